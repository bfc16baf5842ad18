"""The other ranks of the same torchrun, watched without their help: a dead or stopped process can say nothing."""

import os
import select
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, replace

from megagrow.parallel.board import Board
from megagrow.parallel.heartbeat import Beat, Page


@dataclass(frozen=True)
class Neighbour:
    """Another process of this host.

    Attributes:
        beat: the first that it posted.
        process: a descriptor that becomes readable when the process ends; -1 when it had ended before.
        page: its marks; None where they cannot be read.
    """

    beat: Beat
    process: int
    page: Page | None

    def seen(self) -> Beat:
        """What can be seen of it now."""
        if self.page is None:
            return self.beat
        marks = self.page.read()
        idle = time.monotonic() - marks.at
        return replace(self.beat, phase=marks.phase, step=marks.step, phases=marks.phases, idle=idle, place="")

    def close(self) -> None:
        """Lets go of its descriptors."""
        if self.process >= 0:
            os.close(self.process)
        if self.page is not None:
            self.page.close()


class Neighbours:
    """All neighbours of this rank; none without torchrun, and none where the system has no process descriptors."""

    def __init__(self) -> None:
        rank, local, size = (int(os.environ.get(n, "0")) for n in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        has_launcher = "TORCHELASTIC_RUN_ID" in os.environ and hasattr(os, "pidfd_open")
        ranks = range(rank - local, rank - local + size) if has_launcher else range(0)
        self._unknown = {r for r in ranks if r != rank}
        self._known: dict[int, Neighbour] = {}

    def find(self, board: Board) -> None:
        """Looks for neighbours that have posted their first beat by now."""
        for rank in sorted(self._unknown):
            if (beat := board.beat_of(rank)) is not None:
                self._unknown.remove(rank)
                self._open(beat)

    def _open(self, beat: Beat) -> None:
        page = None
        with suppress(OSError):
            page = Page.of(beat.process, beat.page)
        try:
            process = os.pidfd_open(beat.process)
        except ProcessLookupError:
            process = -1
        except OSError:
            return  # the system forbids it; then only silence shows a death
        self._known[beat.rank] = Neighbour(beat, process, page)

    @property
    def descriptors(self) -> list[int]:
        """Become readable when a neighbour ends."""
        return [each.process for each in self._known.values() if each.process >= 0]

    def ended(self) -> list[Beat]:
        """What was last seen of the neighbours that have ended since the last call."""
        poll = select.poll()
        for descriptor in self.descriptors:
            poll.register(descriptor, select.POLLIN)
        readable = {descriptor for descriptor, _ in poll.poll(0)}
        ended = [each for each in self._known.values() if each.process < 0 or each.process in readable]
        beats = [each.seen() for each in ended]
        for each in ended:
            self._known.pop(each.beat.rank).close()
        return beats

    def seen(self) -> list[Beat]:
        """What can be seen of all neighbours."""
        return [each.seen() for each in self._known.values()]

    def kill(self, ranks: tuple[int, ...]) -> None:
        """Kills neighbours that are stopped: torchrun would wait half a minute for them."""
        for rank in set(ranks) & self._known.keys():
            if self._known[rank].process >= 0:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._known[rank].process, signal.SIGKILL)

    def close(self) -> None:
        """Lets go of all descriptors."""
        for each in self._known.values():
            each.close()
        self._known = {}
