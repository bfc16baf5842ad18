"""What the things that a run builds on have cost: entries of its ledger that are made once and stay."""

from typing import Any

from megagrow.checkpoint.source import Source
from megagrow.errors import CheckpointError
from megagrow.ledger import Ledger


def inherit(ledger: Ledger, label: str, identity: str, cost: Ledger, path: str) -> None:
    """Enters a cost into the run's ledger; a resumed run must find what it began with.

    Raises:
        CheckpointError: `path`, the setting that the label begins with, leads elsewhere than when the run began.
    """
    known = {item.identity for item in ledger.inherited if item.label == label}
    if known - {identity}:
        raise CheckpointError(
            f"{path}: salt.{label.split()[0]} has changed since this run began; restore what it was, or use another "
            "--run.dir"
        )
    ledger.inherit(label, identity, cost)


def ledger_of(source: Source, given_flops: float) -> Ledger:
    """What a source's training cost, as far as anybody knows; `given_flops` is the user's word for it, -1 for none."""
    return recorded(source.ledger, f"{source.path}: ledger", given_flops)


def recorded(ledger: dict[str, Any] | None, where: str, given_flops: float) -> Ledger:
    """A ledger from the plain data that was found at `where`; None: see `ledger_of`.

    Raises:
        CheckpointError: it is no ledger.
    """
    if ledger is not None:
        return Ledger.from_dict(ledger, where)
    return Ledger.outside(given_flops if given_flops >= 0 else None)
