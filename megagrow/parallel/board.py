"""The board on which the ranks of a job leave messages: what each is doing, and why the job ends."""

import json
import queue
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megagrow.parallel.heartbeat import Beat

STORE_SECONDS = 5.0  # after which a store counts as silent: its host may be gone without a word


@dataclass(frozen=True)
class Ending:
    """Why the whole job ends.

    Attributes:
        code: the exit code of every rank.
        reason: one line.
        rank, host, step: of the rank that is to blame.
        orderly: whether that rank has ended by itself and says why; else it hangs or is dead.
        silent: ranks that do not answer; those that still exist are killed by their neighbours.
    """

    code: int
    reason: str
    rank: int
    host: str
    step: int
    orderly: bool = False
    silent: tuple[int, ...] = ()


class StoreSilentError(RuntimeError):
    """The store is gone, or has not answered in `STORE_SECONDS`."""


class Board:
    """The ranks' messages to each other, in the process group's store; no rank has to take part for another to read.

    All methods raise StoreSilentError when the store is gone.

    Args:
        store: of the default process group. The board has a connection of its own: on a shared one, a thread that waits
            for a key keeps all others waiting.
        rank: of this process.
        world_size: number of ranks.
        run: tells runs in one process group apart.
    """

    def __init__(self, store: Any, rank: int, world_size: int, run: int) -> None:
        self.rank, self.world_size = rank, world_size
        self._worker = _Worker(f"heartbeat-store-{run}")
        self._store = dist.PrefixStore(f"megagrow/heartbeat/{run}", self._worker.run(store.clone))
        self._worker.run(lambda: self._store.set_timeout(timedelta(seconds=STORE_SECONDS)))

    def post(self, beat: Beat) -> None:
        """Replaces this rank's beat."""
        self._worker.run(lambda: self._store.set(f"beat/{beat.rank}", json.dumps(asdict(beat))))

    def beats(self) -> dict[int, Beat]:
        """All beats by rank, without ranks that never had one."""
        return self._worker.run(self._beats)

    def _beats(self) -> dict[int, Beat]:
        ranks = [rank for rank in range(self.world_size) if self._store.check([f"beat/{rank}"])]
        texts = self._store.multi_get([f"beat/{rank}" for rank in ranks]) if ranks else []
        return {rank: Beat(**json.loads(text)) for rank, text in zip(ranks, texts, strict=True)}

    def post_seen(self, beat: Beat) -> None:
        """Posts what a neighbour sees of a rank, which may not be able to post it itself."""
        self._worker.run(lambda: self._store.set(f"seen/{beat.rank}", json.dumps(asdict(beat))))

    def seen(self, rank: int) -> Beat | None:
        """What a neighbour has seen of a rank."""
        return self._beat_at(f"seen/{rank}")

    def beat_of(self, rank: int) -> Beat | None:
        """One rank's beat."""
        return self._beat_at(f"beat/{rank}")

    def _beat_at(self, key: str) -> Beat | None:
        text = self._worker.run(lambda: self._store.get(key) if self._store.check([key]) else None)
        return Beat(**json.loads(text)) if text else None

    def advance(self, count: int, of: str = "progress") -> int:
        """Adds this rank's new marks to those of all ranks; returns the sum, which stands still when all ranks do."""
        return self._worker.run(lambda: int(self._store.add(of, count)))

    def claim(self, what: str) -> bool:
        """Whether this rank is the first, and only one, to claim something."""
        own = str(self.rank)
        return self._worker.run(lambda: self._store.compare_set(f"claim/{what}", "", own)) == own.encode()

    def call(self) -> None:
        """Asks all ranks to write down their stacks and to say so in their next beat."""
        self._worker.run(lambda: self._store.set("news", "called"))

    def decide(self, ending: Ending) -> Ending:
        """Ends the job; returns what holds: the ending that came first."""
        text = json.dumps(asdict(ending))
        first = self._worker.run(lambda: self._store.compare_set("ending", "", text))
        self._worker.run(lambda: self._store.compare_set("news", "", "ending"))
        return _ending(first)

    def news(self) -> tuple[bool, Ending | None]:
        """Whether a rank has called, and the ending if one was decided."""
        return self._worker.run(self._news)

    def _news(self) -> tuple[bool, Ending | None]:
        if not self._store.check(["news"]):
            return False, None
        ending = _ending(self._store.get("ending")) if self._store.check(["ending"]) else None
        return self._store.get("news") == b"called", ending

    def close(self) -> None:
        """Ends the board's thread."""
        self._worker.close()


def _ending(text: bytes) -> Ending:
    fields = json.loads(text)
    return Ending(**{**fields, "silent": tuple(fields["silent"])})


class _Worker:
    """Calls functions in a thread, so that the caller can go on when a call never returns."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._pending: queue.SimpleQueue[Any] | None = None
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def run(self, call: Callable[[], Any]) -> Any:
        with self._lock:
            self._drop_late_answer()
            self._pending = queue.SimpleQueue()
            self._calls.put((call, self._pending))
            try:
                result, error = self._pending.get(timeout=STORE_SECONDS)
            except queue.Empty:
                raise StoreSilentError("the store does not answer") from None
            self._pending = None
        if error is not None:
            raise StoreSilentError(str(error)) from error
        return result

    def _drop_late_answer(self) -> None:
        if self._pending is not None and self._pending.empty():
            raise StoreSilentError("the store does not answer")

    def _serve(self) -> None:
        while (item := self._calls.get()) is not None:
            call, answers = item
            try:
                answers.put((call(), None))
            except Exception as error:
                answers.put((None, error))

    def close(self) -> None:
        self._calls.put(None)
        self._thread.join(STORE_SECONDS)
