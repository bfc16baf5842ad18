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
from megagrow.compare.suite import NEVER_GROWN, SCRATCH

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "results"
COLUMNS = {  # heading -> column, and how a figure is shown
    "FLOPs saved by the papers' convention, %": ("saving_flops_papers_convention", 100, "{:.1f}"),
    "FLOPs saved all-in, %": ("saving_flops_all_in", 100, "{:.1f}"),
    "Held-out loss, nats per token": ("loss", 1, "{:.4f}"),
}
ROWS = list(dict.fromkeys([f"{SCRATCH}-1", NEVER_GROWN, *(arm for arm in RECIPES if arm != SCRATCH), *CONTROLS]))
Cells = dict[tuple[str, str], list[str]]  # (arm, suite) -> one text for each seed


def tables(folder: Path = FOLDER) -> dict[str, str]:
    """Heading -> markdown: a row for each arm or control, a column for each suite whose core size is there."""
    suites = [name for name in SUITES if (folder / name / "savings.csv").is_file()]
    return {
        heading: _table(suites, _read(folder, suites, column), factor, form)
        for heading, (column, factor, form) in COLUMNS.items()
    }


def _read(folder: Path, suites: list[str], column: str) -> Cells:
    cells: Cells = defaultdict(list)
    for name in suites:
        with (folder / name / "savings.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                cells[row["arm"], name].append(row[column])
    return cells


def _table(suites: list[str], cells: Cells, factor: int, form: str) -> str:
    seeds = {suite: max(len(found) for (_, of), found in cells.items() if of == suite) for suite in suites}
    arms = [arm for arm in ROWS if any(any(cells.get((arm, suite), ())) for suite in suites)]
    lines = [["arm", *suites], ["---", *("---:" for _ in suites)]]
    for arm in arms:
        found = (cells.get((arm, suite)) for suite in suites)
        lines.append(
            [f"`{arm}`", *(_cell(each, seeds[of], factor, form) for each, of in zip(found, suites, strict=True))]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(found: list[str] | None, seeds: int, factor: int, form: str) -> str:
    """The mean, and the least and the greatest; a dash where a seed's is unknown, nothing where none ran."""
    if found is None:
        return ""
    if not all(found) or len(found) < seeds:
        return "–"
    values = [factor * float(each) for each in found]
    value, low, high = (form.format(each) for each in (mean(values), min(values), max(values)))
    return f"{value} ({low} … {high})".replace("-", "−")


if __name__ == "__main__":
    for heading, table in tables().items():
        print(f"{heading}\n\n{table}\n")
