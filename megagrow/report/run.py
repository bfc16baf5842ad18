"""One run directory as the report reads it, and whether runs may be compared."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagrow.config import Config, DataConfig
from megagrow.config_file import load_file
from megagrow.errors import DataError
from megagrow.ledger import Ledger
from megagrow.metrics import METRICS_FILE, read_exit, read_metrics
from megagrow.roles import num_parameters

Json = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run directory, read."""

    name: str
    path: Path
    config: Config
    lines: list[Json]
    ledger: Ledger
    exit: Json | None

    @property
    def is_scratch(self) -> bool:
        return self.name == "scratch" or self.name.startswith("scratch-")

    @property
    def growth(self) -> Json | None:
        """The event of the run's (last) growth."""
        return next((e for e in reversed(self.ledger.events) if e["event"] == "growth"), None)

    @property
    def is_grown(self) -> bool:
        return not self.is_scratch and (self.growth is not None or bool(self.ledger.inherited))

    @property
    def unfinished(self) -> str:
        """Why the run may not be compared; empty when it may."""
        if self.exit is None:
            return "it has not ended or crashed"
        if self.exit["code"] != 0:
            return f"it ended with exit code {self.exit['code']}: {self.exit.get('reason', '')}"
        last = self.lines[-1] if self.lines else {}
        if last.get("step") != self.exit.get("step") or last.get("validation_loss") is None:
            return f"it has no validation loss at its last step {self.exit.get('step')}"
        return ""

    @property
    def final_loss(self) -> float | None:
        """Validation loss at the end of a finished run, nats per token."""
        return None if self.unfinished else self.lines[-1]["validation_loss"]

    def cost(self, convention: str, measure: str) -> float | None:
        """One of the ledger's totals."""
        return self.ledger.totals()[convention][measure]


def load_run(path: Path) -> Run:
    """Reads a run directory; a run that broke off before its first ledger has an empty one.

    Raises:
        DataError: `path` holds no run.
    """
    if not (path / "config.json").is_file():
        raise DataError(f"{path}: holds no config.json, so it is not a run directory; give what --run.dir named")
    ended = read_exit(path)
    needs_ledger = ended is not None and ended["code"] == 0
    ledger_path = path / "ledger.json"
    ledger = Ledger.load(ledger_path) if needs_ledger or ledger_path.exists() else Ledger()
    return Run(
        path.resolve().name,
        path,
        load_file(path / "config.json"),
        read_metrics(path / METRICS_FILE),
        ledger,
        ended,
    )


def check_comparable(runs: list[Run]) -> None:
    """Raises DataError unless finished scratch and grown runs are one model on one held-out set."""
    compared = [run for run in runs if (run.is_scratch or run.is_grown) and not run.unfinished]
    for run in compared[1:]:
        first = compared[0]
        for what, read in _COMPARABLE.items():
            mine, other = read(run), read(first)
            if mine != other:
                raise DataError(
                    f"{run.name} has {what}={mine}, {first.name} has {other}: their losses cannot "
                    "be compared; leave one of them out"
                )


def _held_out_share(data: DataConfig) -> tuple[Any, ...] | None:
    """What a split's held-out samples follow from; None where they have files of their own."""
    return (data.split, data.train, data.seed) if data.split and not data.validation else None


_COMPARABLE: dict[str, Callable[[Run], Any]] = {
    "parameters": lambda run: num_parameters(run.config.model),
    "vocab_size": lambda run: run.config.model.vocab_size,
    "data.validation": lambda run: os.path.abspath(run.config.data.validation),
    "data.split, of train and seed": lambda run: _held_out_share(run.config.data),
    "data.mask_documents and .reset_positions": lambda run: (
        run.config.data.mask_documents,
        run.config.data.reset_positions,
    ),
    "data.seq_length": lambda run: run.config.data.seq_length,
    "validation samples": lambda run: run.config.train.eval_batches * run.config.train.global_batch_size,
    "ledger convention": lambda run: run.ledger.convention,
}
