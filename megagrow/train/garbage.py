"""Garbage collection between steps, on all ranks at the same ones."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

INTERVAL = 50  # steps


@contextmanager
def collected_between_steps() -> Iterator[None]:
    """Turns the interpreter's own collection off inside.

    It would begin at any allocation, in any thread: a rank that collects in the middle of a step makes all others wait,
    and the thread that writes a checkpoint would be the one to free process groups and graphs that growth has left.
    """
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def collect_if_due(step: int) -> None:
    """Collects what is young every `INTERVAL` steps; to be called between two steps."""
    if step % INTERVAL == 0:
        gc.collect(1)
