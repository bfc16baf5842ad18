"""Saves that run beside training: a step waits only until its tensors are copied.

    main thread      copies the shards to host memory        goes on training
    writer thread                                      writes, hashes, fsyncs, commits (store.write)

The writer threads of all ranks talk to each other on the checkpoints' own process group; while they do, nothing else
may use it. A process that ends before its writer leaves a `step-N.tmp-*` behind, which the next save removes.
"""

import json
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch.distributed import ProcessGroup

from megagrow.checkpoint import store
from megagrow.checkpoint.host_copy import HostCopy
from megagrow.checkpoint.store import Snapshot
from megagrow.parallel import heartbeat

PHASE = "checkpoint in the background"


class Saver:
    """Saves checkpoints one after the other.

    Args:
        group: for the writers' communication; gloo, and used by nothing else between `save` and `wait`.
        asynchronous: whether `save` returns as soon as the tensors are copied.
        keep_last, keep_every: as in `store.save`.
    """

    def __init__(
        self,
        group: ProcessGroup | None = None,
        asynchronous: bool = True,
        keep_last: int = 0,
        keep_every: int = 0,
    ) -> None:
        self.group, self.asynchronous = group, asynchronous
        self.keep_last, self.keep_every = keep_last, keep_every
        self.facts: dict[str, Any] = {}  # for the provenance of every save, where the first rank of `group` has them
        self.passed_over: set[str] = set()  # checkpoints that were found damaged: they do not count among keep_last
        self._copy = HostCopy()
        self._thread: Thread | None = None
        self._written: Future[Path] = Future()

    def save(self, root: Path, step: int, take: Callable[[], Snapshot], prunes: bool = True) -> None:
        """Saves what `take` gives on each rank; a collective, and so is the writing that may go on after it.

        Args:
            root: a directory that all ranks share.
            step: the checkpoint will be `root/step-N`.
            take: gives this rank's part (`store.snapshot`); its tensors may change once `save` has returned.
            prunes: whether older checkpoints go, as `keep_last` says.

        Raises:
            CheckpointError: on every rank: the save before this one has failed; without `asynchronous` also this one.
        """
        self.wait()
        if not self.asynchronous:
            self._write(root, step, take, prunes)
            return
        taken = _outcome(lambda: self._copied(take()))
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._written = Future()
        self._thread = Thread(
            target=self._run, args=(root, step, taken, prunes, device), name=f"checkpoint-{step}", daemon=True
        )
        self._thread.start()

    @property
    def has_failed(self) -> bool:
        """Whether this rank's writer has ended with an error, which `wait` raises; ranks see it at different times."""
        return self._thread is not None and self._written.done() and self._written.exception() is not None

    def wait(self) -> None:
        """Waits until the last save is complete; a collective.

        Raises:
            CheckpointError: on every rank: it has failed.
        """
        if self._thread is not None:
            heartbeat.join(self._thread)
            self._thread = None
            self._written.result()

    def release(self) -> None:
        """Waits, and gives the memory of the copies back: what is saved next is of another shape."""
        self.wait()
        self._copy = HostCopy()

    def _copied(self, taken: Snapshot) -> Snapshot:
        state = json.loads(json.dumps(taken.state))  # a copy; what JSON cannot hold has been refused
        return replace(taken, shards=self._copy.of(taken.shards), state=state)

    def _run(self, root: Path, step: int, taken: "Future[Snapshot]", prunes: bool, taken_on: int | None) -> None:
        with heartbeat.in_background(PHASE):
            try:
                if taken_on is not None:
                    torch.cuda.set_device(taken_on)  # else torch's writer would take memory of the host's first GPU
                self._written.set_result(self._write(root, step, taken.result, prunes))
            except BaseException as error:  # the main thread raises it
                self._written.set_exception(error)

    def _write(self, root: Path, step: int, take: Callable[[], Snapshot], prunes: bool) -> Path:
        keep_last = self.keep_last if prunes else 0
        path = store.write(root, step, take, self.group, keep_last, self.keep_every, self.passed_over)
        self.passed_over.discard(path.name)  # the damaged one of this step has another name now
        return path


def _outcome(function: Callable[[], Snapshot]) -> "Future[Snapshot]":
    """What the function returns or raises: an error of one rank is told to all of them by the writers."""
    outcome: Future[Snapshot] = Future()
    try:
        outcome.set_result(function())
    except Exception as error:
        outcome.set_exception(error)
    return outcome
