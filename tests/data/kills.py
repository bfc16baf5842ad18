"""A process that dies while it writes a dataset."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@contextlib.contextmanager
def killed_after(num_calls: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Lets so many renames, fsyncs and deletions happen, and not one more; gives how many were asked for."""
    calls = 0

    def dying(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > num_calls:
                raise Killed
            return original(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink")):
            patch.setattr(owner, name, dying(getattr(owner, name)))
        with contextlib.suppress(Killed):
            yield lambda: calls
