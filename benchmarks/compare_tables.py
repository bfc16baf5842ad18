"""Prints the tables of docs/results.md: what each arm of each comparison saved, from docs/results/*/savings.csv.

    python benchmarks/compare_tables.py

The files are those that `tools/compare.py SUITE --data TEXT` wrote.
"""

import csv
from collections import defaultdict
from pathlib import Path
from statistics import mean

from megagrow.compare import SUITES
from megagrow.compare.controls import CONTROLS
from megagrow.compare.recipes import RECIPES
from megagrow.compare.suite import SCRATCH

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "results"
COLUMNS = {
    "FLOPs saved by the papers' convention, %": "saving_flops_papers_convention",
    "FLOPs saved all-in, %": "saving_flops_all_in",
}
Cells = dict[tuple[str, str], list[str]]  # (arm, suite) -> one text for each seed


def tables(folder: Path = FOLDER) -> dict[str, str]:
    """Heading -> markdown: a row for each arm or control, a column for each suite whose core size is there."""
    suites = [name for name in SUITES if (folder / name / "savings.csv").is_file()]
    return {heading: _table(suites, _read(folder, suites, column)) for heading, column in COLUMNS.items()}


def _read(folder: Path, suites: list[str], column: str) -> Cells:
    cells: Cells = defaultdict(list)
    for name in suites:
        with (folder / name / "savings.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                cells[row["arm"], name].append(row[column])
    return cells


def _table(suites: list[str], cells: Cells) -> str:
    seeds = {suite: max(len(found) for (_, of), found in cells.items() if of == suite) for suite in suites}
    known = [arm for arm in RECIPES if arm != SCRATCH]
    arms = [arm for arm in [*known, *CONTROLS] if any((arm, suite) in cells for suite in suites)]
    lines = [["arm", *suites], ["---", *("---:" for _ in suites)]]
    lines += [[f"`{arm}`", *(_cell(cells.get((arm, suite)), seeds[suite]) for suite in suites)] for arm in arms]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(found: list[str] | None, seeds: int) -> str:
    """The mean, and the least and the greatest; a dash where a seed's is unknown, nothing where none ran."""
    if found is None:
        return ""
    if not all(found) or len(found) < seeds:
        return "–"
    percent = [100 * float(each) for each in found]
    return f"{mean(percent):.1f} ({min(percent):.1f} … {max(percent):.1f})".replace("-", "−")


if __name__ == "__main__":
    for heading, table in tables().items():
        print(f"{heading}\n\n{table}\n")
