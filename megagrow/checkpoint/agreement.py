"""Decisions that all ranks take together: a failure on one is the same error on all, not a hang."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from megagrow.errors import CheckpointError, Damaged, MegagrowError, Preempted

T = TypeVar("T")

_NUM_NAMED = 3  # ranks or tensors that an error names before it only counts


@dataclass(frozen=True)
class Cause:
    """Why a rank has failed, as it travels to the others: whether by damage, or as a signal has asked it to stop."""

    text: str
    is_damage: bool
    is_stop: bool

    @staticmethod
    def of(error: BaseException) -> "Cause":
        """See `cause_of`; each rank keeps what follows from the class."""
        return Cause(cause_of(error), isinstance(error, Damaged), isinstance(error, Preempted | KeyboardInterrupt))


class Ranks:
    """The ranks of a group that save or load together; one process without a group is one rank.

    Args:
        group: all its ranks must make the same calls; None is the default group, if there is one.
        alone: this process by itself, whatever groups exist.
    """

    def __init__(self, group: dist.ProcessGroup | None, alone: bool = False) -> None:
        self.group = group
        self.is_distributed = not alone and dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if self.is_distributed else 0
        self.world_size = dist.get_world_size(group) if self.is_distributed else 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on every rank."""
        if not self.is_distributed:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, action: str, function: Callable[[], T]) -> T:
        """Runs `function` on every rank; returns its local result if it succeeded on all of them.

        Raises:
            CheckpointError: on every rank, if it failed on any: `action`, the ranks, the causes; Damaged, if that is
                what any rank has found; or Preempted, if a signal has ended it on any.
        """
        result, error = _attempt(function)
        causes = self.gather(Cause.of(error) if error else None)
        failures = {rank: cause for rank, cause in enumerate(causes) if cause is not None}
        if failures:
            raise failure(action, failures, self.world_size) from error
        return result  # type: ignore[return-value]

    def first(self, action: str, function: Callable[[], T]) -> T:
        """Runs `function` on the first rank and returns its result on every rank.

        Raises:
            CheckpointError: on every rank, if it failed; Damaged or Preempted, if that is what it raised.
        """
        result, error = _attempt(function) if self.is_first else (None, None)
        outcome = [(result, Cause.of(error) if error else None)]
        if self.is_distributed:
            source = dist.get_global_rank(self.group or dist.group.WORLD, 0)  # type: ignore[arg-type]
            dist.broadcast_object_list(outcome, src=source, group=self.group)
        result, cause = outcome[0]
        if cause is not None:
            raise failure(action, {0: cause}, self.world_size) from error
        return result  # type: ignore[return-value]


def failure(action: str, causes: Mapping[int, Cause], world_size: int) -> MegagrowError:
    """One line: what could not be done, where, why; ranks with the same cause stand together."""
    kind: type[MegagrowError] = CheckpointError
    if any(cause.is_stop for cause in causes.values()):
        kind = Preempted
    elif any(cause.is_damage for cause in causes.values()):
        kind = Damaged
    if world_size == 1:
        return kind(f"{action}: {causes[0].text}")
    ranks_of = defaultdict(list)
    for rank, cause in sorted(causes.items()):
        ranks_of[cause.text].append(str(rank))
    lines = [f"rank {some(ranks)}: {text}" for text, ranks in ranks_of.items()]
    return kind(f"{action}: {some(lines, '; ')}")


def some(names: list[str], separator: str = ", ") -> str:
    """The first few of many names, and the number of the others."""
    rest = len(names) - _NUM_NAMED
    return separator.join(names[:_NUM_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def cause_of(error: BaseException) -> str:
    """What went wrong, in one line; in the words of the operating system if an OSError did it.

    torch.save, for example, replaces "No space left on device" by a remark on positions in its
    archive.
    """
    if isinstance(error, CheckpointError | Preempted):
        return str(error)
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.strerror:
            return f"{link.filename}: {link.strerror}" if link.filename else link.strerror
        link = link.__cause__ or link.__context__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _attempt(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return function(), None
    except Exception as error:
        return None, error
