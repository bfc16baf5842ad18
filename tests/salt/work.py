"""What the tests of scores and caches share: work that is killed, what it leaves, what it tells, and the tools."""

import json
import os
import runpy
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from megagrow.salt.records import MANIFEST_FILE

TOOLS = Path(__file__).parents[2] / "tools"


@contextmanager
def killed_before_rename(count: int) -> Iterator[None]:
    """This process dies by SIGKILL when, after so many renames, the next file is to be put in its place."""
    replace_file, done = os.replace, 0

    def replace_or_die(source: Path, target: Path) -> None:
        nonlocal done
        if done == count:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        replace_file(source, target)

    with mock.patch("os.replace", replace_or_die):
        yield


def files(output: Path) -> dict[str, bytes]:
    """All files by name; of the manifest without how long it took."""
    found = {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}
    if MANIFEST_FILE in found:
        manifest = json.loads(found[MANIFEST_FILE])
        manifest["cost"].pop("seconds")
        found[MANIFEST_FILE] = json.dumps(manifest).encode()
    return found


def times(output: Path) -> dict[Path, int]:
    """When each file was last written."""
    return {path: path.stat().st_mtime_ns for path in output.rglob("*")}


class Recorder:
    """A progress display that only remembers."""

    def __init__(self, phase: str) -> None:
        self.phase = phase
        self.messages: list[str] = []
        self.steps: list[int] = []
        self.speeds: list[float] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def update(self, step: int, *, phase: str, loss: float | None, tokens_per_second: float | None) -> None:
        assert phase == self.phase and loss is None and tokens_per_second is not None
        self.steps.append(step)
        self.speeds.append(tokens_per_second)


def run_tool(name: str, *arguments: object) -> int:
    """Runs a tool as the command line does; returns the exit code."""
    path = TOOLS / f"{name}.py"
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(SystemExit) as ended:
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        monkeypatch.syspath_prepend(str(TOOLS))
        runpy.run_path(str(path), run_name="__main__")
    return int(ended.value.code or 0)


def options(**given: object) -> list[object]:
    """`--some-name value` of every pair."""
    return [x for name, value in given.items() for x in (f"--{name.replace('_', '-')}", value)]
