"""Prints the tables of docs/results.md: what each arm of each comparison saved, from docs/results/*/savings.csv.

    python benchmarks/compare_tables.py

The files are those that `tools/compare.py SUITE --data TEXT` wrote.
"""

import csv
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from megagrow.compare import SUITES
from megagrow.compare.controls import CONTROLS
from megagrow.compare.recipes import RECIPES
from megagrow.compare.suite import NEVER_GROWN, SCRATCH

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "results"
ARMS = list(dict.fromkeys([NEVER_GROWN, *(arm for arm in RECIPES if arm != SCRATCH), *CONTROLS]))


@dataclass(frozen=True)
class Table:
    """What a table shows of each run.

    Attributes:
        column: of savings.csv.
        rows: arms and controls, in order; those that no suite has are left out.
        factor: of its figures.
        digits: after the point.
    """

    column: str
    rows: list[str]
    factor: int
    digits: int

    def cell(self, found: list[str] | None, seeds: int) -> str:
        """The mean, and the least and the greatest; a dash where a seed's is unknown, nothing where none ran."""
        if found is None:
            return ""
        if not all(found) or len(found) < seeds:
            return "–"
        values = [self.factor * float(each) for each in found]
        mean, low, high = (f"{each:.{self.digits}f}" for each in (fmean(values), min(values), max(values)))
        return f"{mean} ({low} … {high})".replace("-", "−")


TABLES = {
    "FLOPs saved by the papers' convention, %": Table("saving_flops_papers_convention", ARMS, 100, 1),
    "FLOPs saved all-in, %": Table("saving_flops_all_in", ARMS, 100, 1),
    "Held-out loss, nats per token": Table("loss", [f"{SCRATCH}-1", *ARMS], 1, 4),
}
Cells = dict[tuple[str, str], list[str]]  # (arm, suite) -> one text for each seed


def tables(folder: Path = FOLDER) -> dict[str, str]:
    """Heading -> markdown: a row for each arm or control, a column for each suite whose core size is there."""
    suites = [name for name in SUITES if (folder / name / "savings.csv").is_file()]
    return {heading: _markdown(table, suites, _read(folder, suites, table.column)) for heading, table in TABLES.items()}


def _read(folder: Path, suites: list[str], column: str) -> Cells:
    cells: Cells = defaultdict(list)
    for name in suites:
        with (folder / name / "savings.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                cells[row["arm"], name].append(row[column])
    return cells


def _markdown(table: Table, suites: list[str], cells: Cells) -> str:
    seeds = {suite: max(len(found) for (_, of), found in cells.items() if of == suite) for suite in suites}
    lines = [["arm", *suites], ["---", *("---:" for _ in suites)]]
    for arm in table.rows:
        if any((arm, suite) in cells for suite in suites):
            lines.append([f"`{arm}`", *(table.cell(cells.get((arm, suite)), seeds[suite]) for suite in suites)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    for heading, table in tables().items():
        print(f"{heading}\n\n{table}\n")
