"""Watches one read: how it ended, how long it took, and the most memory that it held."""

import resource
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from megagrow.errors import MegagrowError

SECONDS = 10.0  # of the processor, for one input of a few kB, which takes milliseconds
WAIT_SECONDS = 240.0  # of the clock, in case it waits for something; long, because machines may be busy
OWN_BYTES = 3 << 19  # beside the file: one block of 1 MiB that files are hashed in, and the interpreter's own objects
ADDRESS_BYTES = 1 << 30  # that a read may map: torch's allocations are not seen by tracemalloc


class Misbehaved(AssertionError):
    """The reader crashed, hung, took too much memory, or did not say what was wrong."""


def refusal(read: Callable[[], Any], num_bytes: int) -> MegagrowError | None:
    """The error by which a reader refuses a file of `num_bytes`; None when it accepts it.

    Call it inside of `watching()`.

    Raises:
        Misbehaved: another exception than one of the project's that are ValueErrors, more than SECONDS, or more
            memory than twice the file and OWN_BYTES.
    """
    found: MegagrowError | None = None
    tracemalloc.start()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WAIT_SECONDS)
    try:
        read()
    except Exception as error:
        if not (isinstance(error, MegagrowError) and isinstance(error, ValueError)):
            raise Misbehaved(f"ended in {type(error).__name__}: {error}") from error
        found = error
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    if taken > 2 * num_bytes + OWN_BYTES:
        raise Misbehaved(f"took {taken} bytes for a file of {num_bytes}")
    return found


@contextmanager
def watching() -> Iterator[None]:
    """Bounds the address space and turns a hang into an exception, for the calls of `refusal` inside."""

    def late(number: int, frame: FrameType | None) -> None:
        raise Misbehaved(f"no answer within {SECONDS:g} s of the processor, {WAIT_SECONDS:g} s of the clock")

    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    earlier = {number: signal.signal(number, late) for number in (signal.SIGALRM, signal.SIGPROF)}
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESS_BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        for number, handler in earlier.items():
            signal.signal(number, handler)
