"""Traces hold the steps that were asked for, and are written however the run ends."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megagrow.config import RunConfig
from megagrow.errors import ConfigError
from megagrow.profiling import Profiling, check_profiling

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def work() -> None:
    torch.ones(8, 8) @ torch.ones(8, 8)


def steps_in(path: Path) -> list[int]:
    """The steps whose work a trace holds."""
    events = json.loads(path.read_text())["traceEvents"]
    assert not any("Input Dims" in event.get("args", {}) for event in events)  # shapes cost time: off
    steps = {int(e["name"].split()[1]): e for e in events if e["name"].startswith("step ") and e["ph"] == "X"}
    starts = [event["ts"] for event in events if event["name"] == "aten::mm"]
    assert len(starts) == len(steps)
    assert all(any(0 <= ts - e["ts"] <= e["dur"] for ts in starts) for e in steps.values())
    return sorted(steps)


def run(config: RunConfig, steps: range, rank: int = 0) -> None:
    with Profiling(config, rank, CPU) as profiling:
        for step in steps:
            with profiling.step(step):
                work()


@pytest.mark.parametrize(
    ("at", "steps", "traced"),
    [
        (4, range(9), [4, 5, 6]),
        (0, range(9), [0, 1, 2]),  # without warm-up
        (4, range(4, 9), [4, 5, 6]),  # resumed there
        (4, range(6), [4, 5]),  # the run ends first
    ],
)
def test_trace_of_three_steps(at: int, steps: range, traced: list[int], tmp_path: Path) -> None:
    run(RunConfig(dir=str(tmp_path), profile_at=at), steps)
    assert steps_in(tmp_path / "profile" / "rank-0.json") == traced
    title, *table = (tmp_path / "profile" / "summary.txt").read_text().splitlines()
    assert title == f"Rank 0, 3 steps from {at} on, by the time in each operation itself"
    assert any("aten::mm" in row for row in table)
    assert len(table) < 30


@pytest.mark.parametrize(("at", "steps"), [(-1, range(5)), (4, range(5, 9)), (4, range(3)), (4, range(4))])
def test_no_trace_of_other_steps(at: int, steps: range, tmp_path: Path) -> None:
    run(RunConfig(dir=str(tmp_path), profile_at=at), steps)
    assert not (tmp_path / "profile").exists()


def test_other_ranks_write_their_trace_alone(tmp_path: Path) -> None:
    run(RunConfig(dir=str(tmp_path), profile_at=1), range(5), rank=3)
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["rank-3.json"]


def test_steps_that_come_again_are_not_traced_again(tmp_path: Path) -> None:
    path = tmp_path / "profile" / "rank-0.json"
    with Profiling(RunConfig(dir=str(tmp_path), profile_at=1), 0, CPU) as profiling:
        for time in range(2):  # rolled back in between
            for step in range(5):
                with profiling.step(step):
                    work()
            assert path.exists() == (time == 0)
            path.unlink(missing_ok=True)


def test_a_step_that_fails_is_in_the_trace(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Profiling(RunConfig(dir=str(tmp_path), profile_at=0), 0, CPU) as profiling:
        for step in range(3):
            with profiling.step(step):
                work()
                1 // (1 - step)
    assert steps_in(tmp_path / "profile" / "rank-0.json") == [0, 1]


@pytest.fixture
def memory_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What torch's recorder of a GPU's memory is told, in order."""
    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: calls.append(options))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", calls.append)
    return calls


def test_memory_snapshot_of_one_step(memory_calls: list[Any], tmp_path: Path) -> None:
    config = RunConfig(dir=str(tmp_path), memory_snapshot_at=1)
    with Profiling(config, 5, CUDA) as profiling:
        for step in (0, 1, 2, 0, 1):
            with profiling.step(step):
                memory_calls.append(step)
    path = str(tmp_path / "profile" / "memory-rank-5.pickle")
    assert memory_calls == [0, {"max_entries": 100_000}, 1, path, {"enabled": None}, 2, 0, 1]
    assert (tmp_path / "profile").is_dir()


def test_memory_snapshot_of_a_step_that_fails(memory_calls: list[Any], tmp_path: Path) -> None:
    profiling = Profiling(RunConfig(dir=str(tmp_path), memory_snapshot_at=0), 0, CUDA)
    with pytest.raises(torch.OutOfMemoryError), profiling.step(0):
        raise torch.OutOfMemoryError
    assert memory_calls[1:] == [str(tmp_path / "profile" / "memory-rank-0.pickle"), {"enabled": None}]


def test_memory_of_a_cpu_is_refused() -> None:
    check_profiling(RunConfig(profile_at=3), CPU)
    check_profiling(RunConfig(memory_snapshot_at=3), CUDA)
    with pytest.raises(ConfigError, match=r"run.memory_snapshot_at=0 .* computes on the cpu; leave it out"):
        check_profiling(RunConfig(memory_snapshot_at=0), CPU)
