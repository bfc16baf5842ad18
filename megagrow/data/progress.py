"""How far a pass over a corpus has come: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

_SECONDS_BETWEEN_LINES = 10.0


class Report(Protocol):
    """Called with totals so far: stored input bytes read, documents, tokens."""

    def __call__(self, num_bytes: int, num_documents: int, num_tokens: int) -> None: ...


@contextmanager
def corpus_progress(
    label: str, total_bytes: int, console: Console | None = None, start: tuple[int, int, int] = (0, 0, 0)
) -> Iterator[Report]:
    """Yields the function to call as the pass goes on; everything is written to stderr.

    Args:
        label: what is done.
        total_bytes: stored size of all input files.
        console: where to; by default stderr.
        start: bytes, documents and tokens that an earlier process has done: they took this one no time.
    """
    first_byte, *before = start
    console = console or Console(stderr=True)
    started = time.monotonic()
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            DownloadColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(label, total=total_bytes, completed=first_byte, rate="")

            def move(num_bytes: int, num_documents: int, num_tokens: int) -> None:
                rate = _rate(started, num_documents - before[0], num_tokens - before[1])
                bar.update(task, completed=num_bytes, rate=rate)

            yield move
        return
    last = started

    def line(num_bytes: int, num_documents: int, num_tokens: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            share = 100 * num_bytes / max(1, total_bytes)
            left = (last - started) * (total_bytes - num_bytes) / max(1, num_bytes - first_byte)
            rate = _rate(started, num_documents - before[0], num_tokens - before[1])
            print(f"{label}: {share:.1f} %, {rate}, {left:.0f} s left", file=sys.stderr, flush=True)

    yield line


def _rate(started: float, num_documents: int, num_tokens: int) -> str:
    seconds = max(time.monotonic() - started, 1e-9)
    return f"{num_documents / seconds:,.0f} documents/s, {num_tokens / seconds:,.0f} tokens/s"
