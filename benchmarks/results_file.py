"""Where benchmarks put what they have measured: benchmarks/results/NAME.json, and the same rows as a table."""

import datetime
import json
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        name: what was measured.
        value: the figure.
        unit: its unit.
        bound: what it must keep to, in words; None for a figure that only informs.
        holds: whether it does; None without a bound.
    """

    name: str
    value: float
    unit: str
    bound: str | None = None
    holds: bool | None = None


def write(name: str, rows: list[Row]) -> Path:
    """Writes the rows with machine, commit and date, and prints them."""
    path = save(name, [asdict(row) for row in rows])
    table = Table("what", "value", "unit", "bound", "holds", title=name)
    for row in rows:
        holds = "" if row.holds is None else str(row.holds)
        table.add_row(row.name, f"{row.value:.4g}", row.unit, row.bound or "", holds)
    Console().print(table)
    return path


def save(name: str, rows: list[dict[str, Any]], **facts: Any) -> Path:
    """Writes rows of any form, and what holds for all of them, with machine, commit and date."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    content = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **facts,
        "rows": rows,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    except OSError:  # no git on this machine
        return "unknown"
    return found.stdout.strip() or "unknown"
