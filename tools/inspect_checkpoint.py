"""Show what a checkpoint holds: step, layout, costs, configuration, provenance and tensors.

    python tools/inspect_checkpoint.py runs/quickstart/small --verify

CKPT is a checkpoint, a run directory (its newest one), or a Hugging Face folder, of which the `model` section of a
configuration is printed. Exit codes: 0 done, 2 usage, 4 checkpoint missing or damaged.
"""

import sys
from pathlib import Path
from typing import Any

import yaml
from _command import Arguments, run
from rich.console import Console
from rich.table import Table

from megagrow import checkpoint
from megagrow.checkpoint import Manifest
from megagrow.checkpoint.hf import is_hf_folder
from megagrow.checkpoint.remote import as_path
from megagrow.checkpoint.source import Source, open_source
from megagrow.config import require
from megagrow.config_file import to_dict
from megagrow.errors import CheckpointError
from megagrow.ledger import costs_of
from megagrow.roles import num_parameters


def main() -> None:
    parser = Arguments(description="Show what a checkpoint holds.")
    parser.add_argument("checkpoint", metavar="CKPT")
    parser.add_argument("--verify", action="store_true", help="compare every byte with its digest")
    options = parser.parse_args()
    if is_hf_folder(as_path(options.checkpoint)):
        require(not options.verify, "--verify: a Hugging Face folder holds no digests to compare with")
        show_folder(open_source(options.checkpoint))
        return
    path = find(as_path(options.checkpoint))
    read = checkpoint.verify if options.verify else checkpoint.read_manifest
    show(path, read(path))
    if options.verify:
        print("every byte agrees with its digest")


def find(path: Path) -> Path:
    """The checkpoint at `path`, or the newest one in a checkpoint or run directory."""
    found = checkpoint.newest(path) or checkpoint.newest(path / "checkpoints")
    if found is None:
        raise CheckpointError(f"{path}: no checkpoint; give a step-N or a directory that has some")
    return found


def show_folder(source: Source) -> None:
    """The model as YAML, which a configuration can begin with."""
    print(f"# {source.path}: {num_parameters(source.model):,} parameters")
    print(yaml.safe_dump({"model": to_dict(source.model)}, sort_keys=False), end="")


def show(path: Path, manifest: Manifest) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(facts(path, manifest))
    console.print(tensors(manifest))


def facts(path: Path, manifest: Manifest) -> Table:
    """One row per fact and per section of the configuration."""
    table = Table(title=str(path), show_header=False)
    table.add_row("step", f"{manifest.step:,}")
    sizes = [entry.num_bytes for entry in manifest.files.values()]
    table.add_row("on disk", f"{sum(sizes):,} bytes in {len(sizes)} files")
    rows = {"saved by": manifest.layout, "provenance": manifest.provenance}
    rows |= {f"cost.{name}": spent for name, spent in costs_of(manifest.state, str(path)).items()}
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
    table.add_section()
    sizes = [entry.num_bytes for entry in manifest.tensors.values()]
    table.add_row(f"{len(sizes):,} tensors", "", "", f"{sum(sizes):,}")
    return table


if __name__ == "__main__":
    run(main)
