"""Ends a job that stands still, and says which rank is to blame.

A thread of each rank looks about once a second. The job ends

    with exit code 6   when no rank has marked progress (see heartbeat.py) for `timeout` seconds. One rank calls all
                       others: each writes its Python stacks to DIR/stacks/rank-N.txt and answers. Those that do not
                       answer are to blame: they are stopped, their host is gone, or a call holds the interpreter. Else
                       it is a rank whose main thread is not in a collective, the one furthest behind.
    with exit code 6   as soon as a rank dies that has not left in order. Its neighbours under the same torchrun see it
                       at once, whatever the backend (NCCL's peers of a dead rank only hang).
    with its code      when a rank has left with an error, and the others have not ended by themselves.

As long as any rank marks progress, the others may wait for it: a rank that hashes a checkpoint for ten minutes is not
hanging. The same holds for the threads that work beside the main ones (a checkpoint that is written while training goes
on), by themselves: neither kind of thread hides that the other stands still. Time in which the watching thread itself
did not run (a suspended job) does not count.
"""

import itertools
import os
import select
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Lock, Thread
from threading import enumerate as threads
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megagrow.errors import HangError, MegagrowError
from megagrow.parallel import heartbeat
from megagrow.parallel.board import Board, Ending, StoreSilentError
from megagrow.parallel.heartbeat import Beat, Page
from megagrow.parallel.neighbours import Neighbours

ANSWER_SECONDS = 3.0  # in which a rank that is alive answers a call
FILE_SECONDS = 1.0  # which a file system gets for stacks before the end: it may be what hangs
PUBLISH_SECONDS = 1.0  # which the rank that tells the user gets before the others leave and torchrun ends it
LEAVE_SECONDS = 10.0  # which the others get to end by themselves after the orderly end of a rank
COLLECTIVE_FACTOR = 4.0  # a collective may wait this many times as long as the watchdog: others may be at work
STACKS = "stacks"

_runs = itertools.count()  # of this process


class Watchdog:
    """Watches over this process and its peers from `start` to `stop`.

    Args:
        timeout: seconds without progress of any rank after which the job ends.
        directory: the run's; stacks go into it.
        tell: called once in the whole job, in the rank that decides on a hang or a death, before the job ends.
    """

    def __init__(self, timeout: float, directory: Path, tell: Callable[[Ending], None]) -> None:
        self.timeout, self.directory, self.tell = timeout, directory, tell
        self.rank = int(os.environ.get("RANK", "0"))
        self._interval = min(1.0, timeout / 10)
        self._own_idle, self._job_idle = _Idle(self._interval), _Idle(self._interval)
        self._own_background, self._job_background = _Idle(self._interval), _Idle(self._interval)
        self._neighbours = Neighbours()
        self._lock = Lock()  # no beat may follow the last one
        self._called = self._leaving = self._stopping = self._suspicion = self._blind = False
        self._board: Board | None = None
        self._thread: Thread | None = None
        self._ending: Ending | None = None
        self._last_words = ""

    def start(self) -> None:
        """Begins to watch; the process group must have been initialised, if there is to be one."""
        run = next(_runs)
        self._page = Page.make()
        heartbeat.share(self._page)
        if dist.is_initialized() and dist.get_world_size() > 1:
            store = distributed_c10d._get_default_store()
            # Counted in the group's store: a process may have had runs that its peers here had no part in.
            run_of_group = int(store.add(f"megagrow/runs/{self.rank}", 1))
            self._board = Board(store, self.rank, dist.get_world_size(), run_of_group)
        self._bell, self._ringer = os.pipe()  # what is written to it ends the thread's pauses
        self._thread = Thread(target=self._watch, name=f"watchdog-{run}", daemon=True)
        self._thread.start()

    @property
    def has_peers(self) -> bool:
        """Whether other ranks are watched too."""
        return self._board is not None

    def leave(self, code: int, reason: str, agreed: bool) -> bool:
        """Takes this rank off the watch: it ends by itself.

        Args:
            code: its exit code.
            reason: why, in one line.
            agreed: whether all ranks come to this end together; else it ends the job, if it is the first.

        Returns:
            Whether this rank is the one to tell the user: only the first end of the job is told.
        """
        beat = heartbeat.beat(self.rank, left=True)
        mine = Ending(code, reason, self.rank, beat.host, beat.step, orderly=True)
        try:
            self._post(beat)
            if agreed:
                return self.rank == 0
            is_first = self._board is None or self._board.decide(mine) == mine
        except StoreSilentError:
            return self.rank == 0 or not agreed
        if not is_first:
            time.sleep(PUBLISH_SECONDS)
        return is_first

    def explanation(self, suspicious: bool, last_words: str = "") -> Ending | None:
        """Another rank's end that explains an error in this one: a peer's death shows here as a broken connection.

        Does not return after a hang or a death: the watching thread ends the process. Where the store is silent too,
        its host is taken for lost.

        Args:
            suspicious: whether to look for ranks that have gone silent; else only what is known soon is told.
            last_words: printed where the watching thread ends the process: what would be lost with it.
        """
        if self._board is None or self._thread is None:
            return None
        self._suspicion, self._last_words = suspicious, last_words
        self._ring()
        deadline = time.monotonic() + (3 * ANSWER_SECONDS if suspicious else 2 * self._interval)
        while self._ending is None and time.monotonic() < deadline and self._suspicion == suspicious:
            time.sleep(0.02)
        self._suspicion = False
        if self._ending is not None and not self._ending.orderly:
            self._thread.join()
        if self._ending is None and suspicious and self._blind:
            return self._loss_of_the_store()
        return self._ending

    def _loss_of_the_store(self) -> Ending:
        own = heartbeat.beat(self.rank)
        seen = f"connections broke and the store beside rank 0 does not answer, its host may be gone: {_where(own)}"
        return Ending(HangError.exit_code, f"{_who(own)}: {seen}", own.rank, own.host, own.step, orderly=True)

    def stop(self) -> None:
        """Ends the watch and its threads."""
        self._stopping = True
        if self._thread is None:
            return
        self._ring()
        self._thread.join()
        self._thread = None
        os.close(self._bell)
        os.close(self._ringer)
        if self._board is not None:
            self._board.close()
        self._neighbours.close()
        heartbeat.share(None)
        self._page.close()

    def _ring(self) -> None:
        os.write(self._ringer, b".")

    def _watch(self) -> None:
        while not self._stopping:
            try:
                self._look()
                self._blind = False
            except StoreSilentError:
                self._blind = True
                self._look_alone()
            self._pause()

    def _pause(self) -> None:
        """Waits; less long when a neighbour ends or this rank has something to say."""
        listens = not (self._blind or self._leaving)
        poll = select.poll()
        for descriptor in (self._bell, *(self._neighbours.descriptors if listens else [])):
            poll.register(descriptor, select.POLLIN)
        if any(descriptor == self._bell for descriptor, _ in poll.poll(self._interval * 1000)):
            os.read(self._bell, 1)

    def _look(self) -> None:
        if self._board is None:
            return self._look_alone()
        self._count_marks(self._board)
        self._post(self._beat(self._called))
        called, ending = self._board.news()
        if self._leaving:
            return None
        if called:
            self._answer()
        if ending is not None:
            return self._end(ending, is_mine=False)
        self._look_for_the_dead()
        if self._job_background.seconds > self.timeout:
            self._find_culprit(self._job_background.seconds, in_background=True)
        elif self._suspicion or self._job_idle.seconds > self.timeout:
            self._find_culprit(self._job_idle.seconds)
        return None

    def _count_marks(self, board: Board) -> None:
        self._job_idle.count(board.advance(self._own_idle.count(heartbeat.here.count)))
        new_marks = self._own_background.count(heartbeat.background.count)
        self._job_background.count(board.advance(new_marks, "background"))
        if not heartbeat.background.phase:
            self._own_background.seconds = self._job_background.seconds = 0.0

    def _beat(self, called: bool = False) -> Beat:
        return heartbeat.beat(self.rank, self._own_idle.seconds, called, background_idle=self._own_background.seconds)

    def _post(self, beat: Beat) -> None:
        with self._lock:
            if self._leaving:
                return
            self._leaving = beat.left
            if self._board is not None:
                self._board.post(beat)

    def _look_alone(self) -> None:
        """Without a board this rank can judge itself only."""
        self._own_idle.count(heartbeat.here.count)
        self._own_background.count(heartbeat.background.count)
        main = self._beat()
        beat = max(main, main.of_background(), key=lambda beat: beat.idle)
        if beat.idle > self.timeout and not self._leaving:
            self._write_stacks()
            lost = "; the store beside rank 0 does not answer either: its host may be gone" if self._board else ""
            reason = f"{_who(beat)} has made no progress for {beat.idle:.0f} s: {self._state(beat)}{lost}"
            self._end(Ending(HangError.exit_code, reason, beat.rank, beat.host, beat.step), is_mine=True)

    def _look_for_the_dead(self) -> None:
        assert self._board is not None
        self._neighbours.find(self._board)
        for seen in self._neighbours.ended():
            posted = self._board.beat_of(seen.rank)
            if posted is None or not posted.left:
                why = "it was killed (out of memory?) or crashed below Python"
                reason = f"{_who(seen)} has died: process {seen.process}, {_where(seen)}; {why}"
                self._decide(Ending(HangError.exit_code, reason, seen.rank, seen.host, seen.step))

    def _find_culprit(self, idle: float, in_background: bool = False) -> None:
        """One rank calls the others and judges by their answers; the others answer, and wait for its judgement.

        Args:
            idle: seconds for which the ranks have stood still; where it is no more than `timeout`, connections broke.
            in_background: whether it is the threads beside the main ones that have.
        """
        assert self._board is not None
        what = "background" if in_background else "judge"
        if not self._board.claim(f"{what}-{int(idle // (2 * ANSWER_SECONDS))}"):
            return
        self._board.call()
        self._answer()
        why = f"no progress for {idle:.0f} s" if idle > self.timeout else "connections to it broke"
        beats = {rank: beat.of_background() if in_background else beat for rank, beat in self._answers().items()}
        silent = [rank for rank in sorted(beats) if not beats[rank].called and not beats[rank].left]
        if not silent and self._suspicion:
            self._suspicion = False  # everyone is there: the error is this rank's own
            return
        culprit = self._seen(beats[silent[0]]) if silent else min(beats.values(), key=_blame)
        reason = f"{_who(culprit)} {_fault(culprit, silent, why)}: {self._state(culprit)}"
        self._decide(
            Ending(HangError.exit_code, reason, culprit.rank, culprit.host, culprit.step, silent=tuple(silent))
        )

    def _answers(self) -> dict[int, Beat]:
        """The ranks' beats, once all have answered or had the time to; that of an unknown rank is made up."""
        assert self._board is not None
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            unknown = {r: Beat(r, "unknown host", 0, -1, "start", 0, 0) for r in range(self._board.world_size)}
            beats = unknown | self._board.beats()
            if time.monotonic() > deadline or all(beat.called or beat.left for beat in beats.values()):
                return beats
            self._look_for_the_dead()  # whose connections broke a moment before
            time.sleep(self._interval / 4)

    def _seen(self, silent: Beat) -> Beat:
        """The state of a rank that does not answer: by its neighbours, or else, from its last words, a little old."""
        assert self._board is not None
        old = replace(silent, step=max(silent.step, heartbeat.here.step), place="")  # all ranks take the same steps
        return self._board.seen(silent.rank) or old

    def _answer(self) -> None:
        """Writes this rank's stacks, and says that it is alive and what it sees of its neighbours; once."""
        assert self._board is not None
        if not self._called:
            self._called = True
            self._write_stacks()
            for neighbour in self._neighbours.seen():
                self._board.post_seen(neighbour)
            self._post(self._beat(called=True))

    def _write_stacks(self) -> None:
        beat = self._beat()
        text = f"{_who(beat)}: {_where(beat)}, idle for {beat.idle:.0f} s\n{_stacks()}"
        path = self.directory / STACKS / f"rank-{self.rank}.txt"
        if problem := problem_with(partial(_write_files, path, text)):
            print(f"megagrow: warning: {path}: {problem}; the stacks follow\n{text}", file=sys.stderr, flush=True)

    def _state(self, beat: Beat) -> str:
        return f"{_where(beat)}; stacks in {self.directory / STACKS}"

    def _decide(self, ending: Ending) -> None:
        assert self._board is not None
        first = self._board.decide(ending)
        self._end(first, is_mine=first == ending)

    def _end(self, ending: Ending, is_mine: bool) -> None:
        """The end of this process, unless it comes to its own end meanwhile."""
        self._ending = ending
        try:
            if is_mine:
                self.tell(ending)
            else:
                self._wait_to_leave(LEAVE_SECONDS if ending.orderly else PUBLISH_SECONDS)
        finally:
            if not self._leaving:
                if self._last_words:
                    print(self._last_words, file=sys.stderr, flush=True)
                self._neighbours.kill(ending.silent)
                os._exit(ending.code)

    def _wait_to_leave(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._leaving:
            time.sleep(0.02)


class _Idle:
    """Seconds for which a number has stood still, as far as they were watched."""

    def __init__(self, interval: float) -> None:
        self.seconds = 0.0
        self._most = 4 * interval
        self._number = 0
        self._at = time.monotonic()

    def count(self, number: int) -> int:
        """Takes the number as it is now; returns by how much it has grown."""
        now = time.monotonic()
        new, self._number = number - self._number, number
        self.seconds = 0.0 if new else self.seconds + min(now - self._at, self._most)
        self._at = now
        return new


def problem_with(write: Callable[[], None], seconds: float = FILE_SECONDS) -> str:
    """What keeps `write` from being done in so many seconds; empty when it is done."""
    problems = ["the file system does not answer"]

    def attempt() -> None:
        try:
            write()
            problems[0] = ""
        except (OSError, RuntimeError, MegagrowError) as error:
            problems[0] = str(error)

    thread = Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    return problems[0]


def _write_files(path: Path, stacks: str) -> None:
    """The stacks, and what NCCL noted of its collectives, as `torchfrtrace` reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(stacks)
    bindings: Any = getattr(torch._C, "_distributed_c10d", None)
    if dist.is_initialized() and "nccl" in dist.get_backend() and hasattr(bindings, "_dump_fr_trace"):
        path.with_name(path.stem.replace("rank-", "nccl_trace_rank_")).write_bytes(bindings._dump_fr_trace())


def _stacks() -> str:
    """The stacks of all threads; faulthandler would keep the interpreter for itself while a file system hangs."""
    frames = sys._current_frames()
    lines = []
    for thread in threads():
        lines.append(f"\nthread {thread.name}, most recent call first:")
        frame = frames.get(thread.ident or 0)
        while frame is not None:
            code = frame.f_code
            lines.append(f'  File "{code.co_filename}", line {frame.f_lineno} in {code.co_name}')
            frame = frame.f_back
    return "\n".join(lines) + "\n"


def limit_collectives(timeout: float) -> None:
    """Lets collectives of all process groups fail, as a last resort, well after the watchdog would have ended the job.

    Groups that torch makes for a mesh have limits of their own, 30 minutes on gloo and 10 on NCCL.
    """
    limit = timedelta(seconds=COLLECTIVE_FACTOR * timeout)
    public = getattr(dist, "set_timeout", None)  # torch 2.14 has it, and warns of the other
    set_timeout = public or distributed_c10d._set_pg_timeout
    for group, (backend, _) in distributed_c10d._world.pg_map.items():
        if "gloo" in backend or "nccl" in backend:
            set_timeout(limit, group)


def _blame(beat: Beat) -> tuple[bool, bool, int, float]:
    """Smallest for the rank to blame."""
    return beat.left, beat.waiting, beat.phases, -beat.idle


def _fault(culprit: Beat, silent: list[int], why: str) -> str:
    others = f", like {len(silent) - 1} more" if len(silent) > 1 else ""
    if silent:
        return f"does not answer{others} ({why})"
    return f"waits for others, as all ranks do ({why})" if culprit.waiting else f"has made {why}"


def _who(beat: Beat) -> str:
    return f"rank {beat.rank} (host {beat.host})"


def _where(beat: Beat) -> str:
    return f"phase {beat.phase}, last step {beat.step}" + (f", at {beat.place}" if beat.place else "")
