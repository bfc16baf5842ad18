"""What the check has found: rows of a table, and the exit code that they stand for."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from megagrow.errors import MegagrowError

COLUMNS = ("check", "what", "found", "bound", "holds", "where")
NUM_NAMED = 4  # hosts that are named before the others are only counted


@dataclass(frozen=True)
class Row:
    """One finding.

    Attributes:
        check: environment, links, compute or gradients.
        what: what was looked at.
        found: the outcome, for readers.
        where: the ranks and hosts that it is of.
        bound: what it must keep to; "" for what only informs.
        holds: whether it does; None without a bound.
        remedy: what to do where it does not.
        error: what a broken bound is; None: a warning, which leaves the exit code 0.
        figures: the outcome as numbers, for programs.
    """

    check: str
    what: str
    found: str
    where: str = ""
    bound: str = ""
    holds: bool | None = None
    remedy: str = ""
    error: type[MegagrowError] | None = None
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """`holds` in a word."""
        if self.holds is False:
            return "FAILS" if self.error else "warning"
        return "" if self.holds is None else "yes"

    @property
    def line(self) -> str:
        """What, where, the rule, the remedy."""
        return f"{self.what}: {self.found}, {self.where}; bound: {self.bound}; {self.remedy}"


def table(rows: Iterable[Row]) -> str:
    """The rows in columns, as wide as they need to be."""
    cells = [COLUMNS, *((r.check, r.what, r.found, r.bound, r.verdict, r.where) for r in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def problems(rows: Iterable[Row]) -> list[str]:
    """One line for each bound that does not hold."""
    return [f"{'error' if row.error else 'warning'}: {row.line}" for row in rows if row.holds is False]


def first_error(rows: Iterable[Row]) -> MegagrowError | None:
    """The first finding that forbids a run."""
    return next((row.error(row.line) for row in rows if row.holds is False and row.error), None)


def exit_code(rows: Iterable[Row]) -> int:
    """0, or the code of the first finding that forbids a run."""
    error = first_error(rows)
    return error.exit_code if error else 0


def to_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The rows as plain data."""
    return [vars(replace(row)) | {"error": row.error.__name__ if row.error else None} for row in rows]


def place(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Ranks with their hosts: `ranks 4-7 (node1, node2)`.

    Args:
        ranks: some ranks.
        hosts: the host of every rank.
    """
    named = list(dict.fromkeys(hosts[rank] for rank in ranks))
    rest = f" and {len(named) - NUM_NAMED} more" if len(named) > NUM_NAMED else ""
    return f"rank{'s' * (len(ranks) > 1)} {_runs(ranks)} ({', '.join(named[:NUM_NAMED])}{rest})"


def _runs(ranks: Sequence[int]) -> str:
    """0-3, 8, 10-11; with many gaps the first few."""
    together = groupby(enumerate(sorted(ranks)), key=lambda item: item[1] - item[0])
    runs = [[rank for _, rank in run] for _, run in together]
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join(texts[: 2 * NUM_NAMED]) + (", ..." if len(texts) > 2 * NUM_NAMED else "")
