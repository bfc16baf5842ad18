"""Ends the check when a step of it takes too long, and says which ranks are behind: a dead link must not hang it.

Ranks note in torch's store which steps they have begun and finished. A thread reads the notes when time is up, since
the main thread may wait in a collective that never returns.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megagrow.cluster.report import NUM_NAMED, place
from megagrow.errors import SHARED_ERROR_SECONDS, HangError

LIMIT_SECONDS = 170.0  # with the start of the processes under three minutes
STORE_SECONDS = 5.0  # after which the store counts as silent
REMEDY = "look at these hosts and their network, or start without them"


def end_process(line: str) -> None:
    """Ends this process with the code of a hang; rank 0 tells why."""
    if dist.is_initialized() and dist.get_rank() != 0:
        time.sleep(SHARED_ERROR_SECONDS)  # rank 0's end makes torchrun end us, unless it is rank 0 that is gone
    print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(HangError.exit_code)


class Watch:
    """The clock of all ranks; every rank must take the same steps.

    Args:
        hosts: the host of every rank.
        limit: seconds for all steps together; those of single steps are meant for `LIMIT_SECONDS` and scale with it.
        end: is called, in a thread, with the line that says what hangs where.
    """

    def __init__(self, hosts: Sequence[str], limit: float, end: Callable[[str], None] = end_process) -> None:
        self.hosts, self.end = hosts, end
        self.deadline, self.scale = time.monotonic() + limit, limit / LIMIT_SECONDS
        self.notes = 0  # even inside a step, odd between two
        # A connection of its own: one that waits, as NCCL's does for a rank that is gone, blocks all its users.
        self.store = _own_store() if len(hosts) > 1 else None
        self._note()
        self.meet("the start")

    @contextmanager
    def step(self, name: str, seconds: float, groups: Sequence[Sequence[int]] = ()) -> Iterator[None]:
        """Guards what all ranks do together; they leave it together.

        Args:
            name: what it is, for the line.
            seconds: how long it may take.
            groups: ranks that talk to each other only, if it consists of such groups.
        """
        seconds = min(seconds * self.scale, max(self.deadline - time.monotonic(), 1.0))
        timer = threading.Timer(seconds, self._late, (name, seconds, groups))
        timer.daemon = True
        timer.start()
        try:
            self._note()
            yield
            self._note()
            self.meet(name)
        finally:
            timer.cancel()

    def meet(self, name: str) -> None:
        """Waits for all ranks, over gloo.

        Raises:
            HangError: one of them is gone.
        """
        if self.store is None:
            return
        try:
            dist.all_reduce(torch.zeros(1))
        except RuntimeError as error:
            raise HangError(f"after {name}: a rank is gone ({' '.join(str(error).split())}); {REMEDY}") from error

    def _note(self) -> None:
        self.notes += 1
        if self.store is not None:
            self.store.set(f"cluster/{dist.get_rank()}", str(self.notes))

    def _late(self, name: str, seconds: float, groups: Sequence[Sequence[int]]) -> None:
        began = self.notes - self.notes % 2  # what a rank notes that has begun it, but not finished
        self.end(f"{name}: no answer within {seconds:.0f} s; {self._behind(began, groups)}; {REMEDY}")

    def _behind(self, began: int, groups: Sequence[Sequence[int]]) -> str:
        notes = self._all_notes(began)
        if notes is None:
            return "the store on the first host does not answer either"
        absent = [rank for rank, note in enumerate(notes) if note < began]
        inside = {rank for rank, note in enumerate(notes) if note == began}
        if absent:
            return f"{place(absent, self.hosts)} did not get there"
        if not inside:
            return "every rank has finished it, but they do not meet over gloo"
        stuck = [place(group, self.hosts) for group in groups if inside & set(group)] or [
            place(sorted(inside), self.hosts)
        ]
        rest = f" and {len(stuck) - NUM_NAMED} more groups" if len(stuck) > NUM_NAMED else ""
        return f"it does not end on {', '.join(stuck[:NUM_NAMED])}{rest}"

    def _all_notes(self, own: int) -> list[int] | None:
        """The notes of all ranks; None when the store is gone, or silent."""
        store = self.store
        if store is None:
            return [own]
        keys, found = [f"cluster/{rank}" for rank in range(len(self.hosts))], list[bytes]()
        reader = threading.Thread(target=lambda: found.extend(store.multi_get(keys)), daemon=True)
        reader.start()
        reader.join(STORE_SECONDS)
        return [int(note) for note in found] or None


def _own_store() -> dist.Store:
    store: dist.Store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
    return store
