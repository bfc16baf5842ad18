"""How far every layout's training is from that of one process, as a table and in benchmarks/results/parity.json.

    make parity                                              # all layouts, about ten minutes on two cores
    python -m tests.parallel.parity_table context documents  # those with all these words; nothing is written
    python -m tests.parallel.parity_table --markdown         # what is written, for docs/parallelism.md

Each layout is trained twice: 20 updates in float64, and one in float32 against one process in float32. How far float32
itself is from float64, on the layout and on one process, stands beside it in the file.
"""

import json
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import tests.conftest  # noqa: F401  # one thread, no GPU, strict torch: what holds for tests holds here
from benchmarks.results_file import FOLDER, save
from tests import ranks
from tests.parallel.layouts import LAYOUTS, Layout
from tests.parallel.parity import (
    GRADIENT_BOUND,
    NUM_UPDATES,
    WEIGHT_BOUND,
    Error,
    compare,
    gradient_errors,
    one_process,
    train_rank,
)

BOUNDS = {
    "gradient_fp64": GRADIENT_BOUND[torch.float64],
    "gradient_fp32": GRADIENT_BOUND[torch.float32],
    "weight_fp64": WEIGHT_BOUND,
}


def measure(layout: Layout) -> dict[str, Any]:
    """One row of the table; a layout that does not run holds nothing."""
    began = time.perf_counter()
    row: dict[str, Any] = {"layout": layout.name, "ranks": layout.ranks}
    try:
        errors, rounding = _errors(layout)
    except Exception as error:
        return {**row, "holds": False, "failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    for name, error in errors.items():
        row |= {name: error.value, f"{name}_of": error.where}
    holds = all(errors[name].value <= bound for name, bound in BOUNDS.items())
    return {**row, **rounding, "holds": holds, "seconds": round(time.perf_counter() - began, 1)}


def _errors(layout: Layout) -> tuple[dict[str, Error], dict[str, float]]:
    """The measured errors, and how far float32 is from float64 on the layout and on one process."""
    traces, expected = {}, {}
    for dtype, num_updates in ((torch.float64, NUM_UPDATES), (torch.float32, 1)):
        traces[dtype] = ranks.run_ranks(train_rank, layout.ranks, layout.config, dtype, num_updates)
        expected[dtype] = one_process(layout.one_process, dtype, num_updates)
    wide, narrow = (compare(traces[dtype], expected[dtype]) for dtype in traces)
    exact = expected[torch.float64]
    rounding = {
        "rounding_of_layout": max(gradient_errors(traces[torch.float32], exact).values()),
        "rounding_of_one_process": max(gradient_errors([expected[torch.float32]], exact).values()),
    }
    return {"gradient_fp64": wide.gradient, "gradient_fp32": narrow.gradient, "weight_fp64": wide.weight}, rounding


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows with the worst parameter under each figure."""
    heads = [f"{name.replace('_', ' ')} <= {bound:.0e}" for name, bound in BOUNDS.items()]
    table = Table(title="largest relative errors against one process")
    for head in ("layout", "ranks", *heads, "holds"):
        table.add_column(head, overflow="fold")
    for row in rows:
        cells = [f"{row[name]:.1e}\n{row[f'{name}_of']}" if name in row else row["failed"] for name in BOUNDS]
        table.add_row(row["layout"], str(row["ranks"]), *cells, "yes" if row["holds"] else "NO")
    Console(width=160).print(table)


def print_markdown() -> None:
    """The rows of the results file, without the names of parameters."""
    heads = ["layout", "ranks", "gradients, fp64", "gradients, fp32", f"weights, {NUM_UPDATES} steps, fp64", "holds"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for row in json.loads((FOLDER / "parity.json").read_text())["rows"]:
        figures = [f"{row[name]:.0e}" if name in row else "failed" for name in BOUNDS]
        cells = [row["layout"], str(row["ranks"]), *figures, "yes" if row["holds"] else "**no**"]
        print("| " + " | ".join(cells) + " |")


def main(words: list[str]) -> int:
    if words == ["--markdown"]:
        print_markdown()
        return 0
    rows = []
    chosen = [layout for layout in LAYOUTS if all(word in layout.name for word in words)]
    for number, layout in enumerate(chosen, 1):
        rows.append(measure(layout))
        verdict = "holds" if rows[-1]["holds"] else "FAILS"
        print(f"{number}/{len(chosen)} {layout.name}: {verdict}", flush=True)
    ranks.shutdown()
    print_table(rows)
    if not words:
        bounds = {name: f"<= {bound:.0e}" for name, bound in BOUNDS.items()}
        print(f"written to {save('parity', rows, bounds=bounds)}")
    failed = [row["layout"] for row in rows if not row["holds"]]
    print(f"{len(rows) - len(failed)} of {len(rows)} layouts hold")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
