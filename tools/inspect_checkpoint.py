"""Show what a checkpoint holds: step, layout, configuration, provenance and tensors; or what LiGO's maps have become.

    python tools/inspect_checkpoint.py runs/quickstart/small --verify
    python tools/inspect_checkpoint.py runs/quickstart/grown/maps.safetensors

CKPT is a checkpoint, a run directory (its newest one), or a file of learned maps. Exit codes: 0 done, 2 usage, 4
checkpoint missing or damaged.
"""

import math
import sys
from pathlib import Path
from typing import Any

from _command import Arguments, run
from rich.console import Console
from rich.table import Table

from megagrow import checkpoint
from megagrow.checkpoint import Manifest
from megagrow.errors import CheckpointError
from megagrow.growth.ligo_file import describe_maps
from megagrow.roles import num_parameters


def main() -> None:
    parser = Arguments(description="Show what a checkpoint holds.")
    parser.add_argument("checkpoint", metavar="CKPT", type=Path)
    parser.add_argument("--verify", action="store_true", help="compare every byte with its digest")
    options = parser.parse_args()
    if options.checkpoint.suffix == ".safetensors":
        show_maps(options.checkpoint)
        return

    path = find(options.checkpoint)
    read = checkpoint.verify if options.verify else checkpoint.read_manifest
    show(path, read(path))
    if options.verify:
        print("every byte agrees with its digest")


def show_maps(path: Path) -> None:
    """The maps of a growth: what they are, and how far learning has taken them."""
    ligo, maps = describe_maps(path)
    pair = [f"{num_parameters(model) / 1e6:.2f}M" for model in (ligo.start.source, ligo.start.target)]
    total = sum(math.prod(each.shape) for each in maps)
    begun = f"began as {ligo.start.method}, noise {ligo.noise:g}, seed {ligo.start.seed}"
    table = Table("map", "shape", title=f"{path}: LiGO, {ligo.variant}, {' -> '.join(pair)}, {begun}")
    for column in ("elements", "row sums", "farthest from its start", "effective rank"):
        table.add_column(column, justify="right")
    for each in maps:
        low, high = each.row_sums
        moved, rank = f"{each.departure:.3g}", f"{each.effective_rank:.1f}"
        sums = f"{low:.3g} … {high:.3g}"
        table.add_row(each.name, str(list(each.shape)), f"{math.prod(each.shape):,}", sums, moved, rank)
    table.add_section()
    table.add_row(f"{len(maps):,} maps", "", f"{total:,}", "", "", "")
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table)


def find(path: Path) -> Path:
    """The checkpoint at `path`, or the newest one in a checkpoint or run directory."""
    found = checkpoint.candidates(path) or checkpoint.candidates(path / "checkpoints")
    if not found:
        raise CheckpointError(f"{path}: no checkpoint; give a step-N or a directory that has some")
    return found[0]


def show(path: Path, manifest: Manifest) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(facts(path, manifest))
    console.print(tensors(manifest))


def facts(path: Path, manifest: Manifest) -> Table:
    """One row per fact and per section of the configuration."""
    table = Table(title=str(path), show_header=False)
    on_disk = sum(entry.num_bytes for entry in manifest.files.values())
    table.add_row("step", f"{manifest.step:,}")
    table.add_row("on disk", f"{on_disk:,} bytes in {len(manifest.files)} files")
    rows = {"saved by": manifest.layout, "provenance": manifest.provenance}
    rows |= {f"config.{name}": section for name, section in manifest.config.items()}
    for name, value in rows.items():
        table.add_row(name, summary(value))
    return table


def summary(value: Any) -> str:
    """A section in one line: `hidden_size=64, num_layers=2`."""
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{name}={entry}" for name, entry in value.items()) or "none"


def tensors(manifest: Manifest) -> Table:
    table = Table("tensor", "dtype", "shape")
    table.add_column("bytes", justify="right")
    for name, entry in sorted(manifest.tensors.items()):
        table.add_row(name, entry.dtype, str(list(entry.shape)), f"{entry.num_bytes:,}")
    total = sum(entry.num_bytes for entry in manifest.tensors.values())
    table.add_section()
    table.add_row(f"{len(manifest.tensors):,} tensors", "", "", f"{total:,}")
    return table


if __name__ == "__main__":
    run(main)
