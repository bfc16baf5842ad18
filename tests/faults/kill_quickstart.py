"""`make faults`: the quickstart, killed at three random moments and started again each time, gives the same report.

Runs the quickstart twice, so it takes about twenty minutes and is not part of `make test`.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
NUM_KILLS = 3
TIMED = {"seconds", "date", "seconds_total", "checkpoint_seconds", "tokens_per_second", "machine", "commit"}


def copy_tree(destination: Path) -> Path:
    """The source tree without runs, environments and caches."""
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "build", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(REPOSITORY, destination, ignore=ignored)
    return destination


def start(tree: Path) -> subprocess.Popen[bytes]:
    """The quickstart in a process group of its own."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with (tree / "output.txt").open("ab") as output:
        return subprocess.Popen(
            ["launch/quickstart.sh"],
            cwd=tree,
            env={**os.environ, "PATH": path},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def run_whole(tree: Path) -> float:
    """Runs to the end; returns the seconds that it took."""
    began = time.monotonic()
    process = start(tree)
    assert process.wait() == 0, (tree / "output.txt").read_text()[-3000:]
    return time.monotonic() - began


def kill_after(tree: Path, seconds: float) -> None:
    """SIGKILL to the whole process group after a while."""
    process = start(tree)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(seconds)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def without_times(value: Any, key: str = "") -> Any:
    """A report without what depends on the clock; seconds become whether they are known."""
    if isinstance(value, dict):
        return {k: without_times(v, k) for k, v in value.items() if k not in TIMED}
    if isinstance(value, list):
        return [without_times(v, key) for v in value]
    return value


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_three_kills_change_nothing(tmp_path: Path) -> None:
    whole, broken = copy_tree(tmp_path / "whole"), copy_tree(tmp_path / "broken")
    seconds = run_whole(whole)
    # Each start goes on from the last checkpoint: all the kills together must come before the end.
    moments = [random.SystemRandom().uniform(0.05, 0.9 / NUM_KILLS) * seconds for _ in range(NUM_KILLS)]
    print(f"unbroken in {seconds:.0f} s; killing after {[round(m) for m in moments]} s")
    for moment in moments:
        kill_after(broken, moment)
    run_whole(broken)

    reports = [json.loads((tree / "runs/quickstart/report.json").read_text()) for tree in (whole, broken)]
    assert without_times(reports[1]) == without_times(reports[0])
    for run in sorted((whole / "runs/quickstart").glob("*/metrics.jsonl")):
        other = broken / run.relative_to(whole)
        steps = steps_of(other.parent)
        assert steps == sorted(set(steps)) == steps_of(run.parent)
        losses = [[json.loads(line)["loss"] for line in path.read_text().splitlines()] for path in (run, other)]
        assert losses[0] == losses[1], run
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        paths = [tree / "runs/quickstart/hf" / name for tree in (whole, broken)]
        assert paths[0].read_bytes() == paths[1].read_bytes(), name
