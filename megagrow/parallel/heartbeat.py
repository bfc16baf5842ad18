"""What a rank is doing, as its main thread marks it.

Progress is a mark. The main thread marks where each phase begins (`enter`), and inside long phases each piece of work
that is finished (`progress`): a batch of an evaluation, a tensor that is loaded, saved or grown. Marks are a few writes
to memory, so that they may stand anywhere.

A thread that works beside the main one (`in_background`) makes marks of its own: a busy one must not hide that the main
thread stands still, nor the main thread that a background one does.
"""

import mmap
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

_TORCH = str(Path(torch.__file__).parent)
_JOIN_SECONDS = 0.05  # between two looks at the background thread that the main thread waits for
_WAITING = (str(Path(dist.__file__).parent), str(Path(__file__).parent / "collectives.py"))
_STORING = str(
    Path(dist.__file__).parent / "checkpoint"
)  # stands in a file as often as in a collective, which is deeper


@dataclass
class Marks:
    """Where the main thread is.

    Attributes:
        phase: its name, for people.
        step: steps that are done.
        phases: phases entered so far; all ranks enter the same ones, so that the smallest count is furthest behind.
        count: marks so far.
        at: when the last one was made, on the host's monotonic clock.
    """

    phase: str = "start"
    step: int = 0
    phases: int = 0
    count: int = 0
    at: float = 0.0


class Page:
    """Marks in shared memory, so that neighbours can read them when this process is dead or stopped (on Linux).

    Attributes:
        descriptor: of the memory; -1 where the system has none to share.
    """

    _layout = struct.Struct("qqqd32s")

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, self._layout.size)

    @classmethod
    def make(cls) -> "Page":
        """A page of this process."""
        if not hasattr(os, "memfd_create"):
            return cls(-1)
        descriptor = os.memfd_create("megagrow-marks")
        os.ftruncate(descriptor, cls._layout.size)
        return cls(descriptor)

    @classmethod
    def of(cls, process: int, descriptor: int) -> "Page":
        """The page of another process of this host; OSError when it cannot be opened."""
        return cls(os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR))

    def write(self, marks: Marks) -> None:
        """Replaces the marks."""
        name = marks.phase.encode()[:32]
        self._layout.pack_into(self._memory, 0, marks.step, marks.phases, marks.count, marks.at, name)

    def read(self) -> Marks:
        """The marks that were written last."""
        step, phases, count, at, name = self._layout.unpack_from(self._memory)
        return Marks(name.rstrip(b"\0").decode(errors="replace"), step, phases, count, at)

    def close(self) -> None:
        """Lets go of the memory."""
        self._memory.close()
        if self.descriptor >= 0:
            os.close(self.descriptor)


@dataclass
class Background:
    """What this process does beside its main thread.

    Attributes:
        phase: its name, for people; empty while there is nothing.
        thread: the thread that does it, by its identifier.
        count: marks so far, those of earlier threads included.
    """

    phase: str = ""
    thread: int = 0
    count: int = 0


here = Marks()
background = Background()
_page: Page | None = None


def enter(phase: str, step: int | None = None) -> None:
    """Marks the beginning of a phase, the same one on all ranks; `step`: how many steps are done."""
    here.phase, here.phases = phase, here.phases + 1
    here.step = here.step if step is None else step
    progress()


def progress() -> None:
    """Marks that a piece of the phase is finished; ranks may do so at different times."""
    if background.phase and threading.get_ident() == background.thread:
        background.count += 1
        return
    here.count, here.at = here.count + 1, time.monotonic()
    if _page is not None:
        _page.write(here)


@contextmanager
def in_background(phase: str) -> Iterator[None]:
    """What the calling thread does from here on is no work of the main thread's; one such thread at a time."""
    background.thread, background.phase = threading.get_ident(), phase
    progress()
    try:
        yield
    finally:
        background.phase = ""


def join(thread: threading.Thread) -> None:
    """Waits for a background thread to end; its progress is that of the main thread meanwhile."""
    seen = background.count
    while thread.is_alive():
        thread.join(_JOIN_SECONDS)
        if background.count != seen:
            seen = background.count
            progress()


def reset() -> None:
    """Forgets an earlier run of this process."""
    vars(here).update(asdict(Marks(at=time.monotonic())))


def share(page: Page | None) -> None:
    """Writes the marks into a page too, from now on; None: no longer."""
    global _page
    _page = page
    if page is not None:
        page.write(here)


@dataclass(frozen=True)
class Beat:
    """The last sign of a rank.

    Attributes:
        rank, host, process: who; the process by its id.
        page: descriptor of its `Page` in that process.
        phase, step, phases: as in `Marks`.
        idle: seconds since its last mark.
        waiting: whether its main thread stands in a collective.
        place: the line of code at which its main thread stands.
        called: whether it has answered a call (`Board.call`).
        left: whether it has ended in order.
        background, background_idle, background_waiting, background_place: phase, idle, waiting and place of the thread
            beside the main one; the phase is empty when there is none.
    """

    rank: int
    host: str
    process: int
    page: int
    phase: str
    step: int
    phases: int
    idle: float = 0.0
    waiting: bool = False
    place: str = ""
    called: bool = False
    left: bool = False
    background: str = ""
    background_idle: float = 0.0
    background_waiting: bool = False
    background_place: str = ""

    def of_background(self) -> "Beat":
        """The same sign, of the thread beside the main one; where there is none, nobody waits for this rank."""
        if not self.background:
            return replace(self, waiting=True)
        return replace(
            self,
            phase=self.background,
            idle=self.background_idle,
            waiting=self.background_waiting,
            place=self.background_place,
        )


def beat(rank: int, idle: float = 0.0, called: bool = False, left: bool = False, background_idle: float = 0.0) -> Beat:
    """This rank's beat as of now."""
    waiting, place = _stand(threading.main_thread().ident or 0)
    who = (rank, socket.gethostname(), os.getpid(), -1 if _page is None else _page.descriptor)
    side = background.phase, background_idle, *(_stand(background.thread) if background.phase else (False, ""))
    return Beat(*who, here.phase, here.step, here.phases, idle, waiting, place, called, left, *side)


def _stand(thread: int) -> tuple[bool, str]:
    """Whether a thread waits in a collective, and its innermost line of code outside of torch."""
    innermost = frame = sys._current_frames().get(thread)
    while frame and _file(frame).startswith(_TORCH) and not _file(frame).startswith(_WAITING):
        frame = frame.f_back
    waiting = frame is not None and _file(frame).startswith(_WAITING) and not _file(frame).startswith(_STORING)
    while frame and _file(frame).startswith(_TORCH):
        frame = frame.f_back
    frame = frame or innermost
    return waiting, f"{Path(_file(frame)).name}:{frame.f_lineno} in {frame.f_code.co_name}" if frame else ""


def _file(frame: FrameType) -> str:
    return frame.f_code.co_filename
