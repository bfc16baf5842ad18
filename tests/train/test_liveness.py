"""Runs end when a rank hangs or dies, and say which; signals save the same step on all ranks.

Here torchrun is the real one, and what happens to a rank happens in faulty.py. Slower cases: tests/faults/liveness.py.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fsspec.implementations.memory import MemoryFileSystem
from torch.distributed import distributed_c10d

from megagrow.checkpoint import directory, source, store
from megagrow.config import CheckpointConfig, Config, ParallelConfig, TrainConfig
from megagrow.errors import Preempted
from megagrow.parallel import board, heartbeat, watchdog
from megagrow.parallel.board import Board, StoreSilentError
from megagrow.parallel.heartbeat import Beat
from megagrow.parallel.mesh import make_mesh
from megagrow.parallel.pipeline import Engine
from megagrow.parallel.watchdog import Watchdog, limit_collectives
from megagrow.train import run, stop, trainer
from megagrow.train.run import _end_of, _tell
from megagrow.train.stop import StopRequest
from tests.ranks import RankError, run_ranks
from tests.train.faulty import faulty_config, faulty_run
from tests.train.jobs import Job, assert_ended_with_one_line, start, wait
from tests.train.runs import make_config, metrics, run_on_ranks

run_module = import_module("megagrow.train.run")

TIMEOUT = 10.0  # seconds without progress in the runs that hang
PATIENCE = 10.0  # what the job may take to end after that
LONG = 300.0  # run.timeout where nothing should wait for it
ALL_SIGNALS = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


@pytest.fixture(scope="module")
def failed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """Three jobs at once, since they mostly wait: rank 1 is killed, stopped or asleep after three steps."""
    folder = tmp_path_factory.mktemp("failed")
    timeouts = {"killed": LONG, "stopped": TIMEOUT, "sleeps": TIMEOUT}
    jobs = {fault: start(corpus, folder / fault, timeout, fault, 1, 3) for fault, timeout in timeouts.items()}
    wait(*jobs.values())
    return jobs


def test_a_rank_that_dies_ends_the_job_at_once(failed: dict[str, Job]) -> None:
    job = failed["killed"]
    assert_ended_with_one_line(job, "has died: process ")
    assert "phase data, last step 3;" in job.errors[0]
    assert job.seconds_after_fault < PATIENCE


def test_a_rank_that_is_stopped_ends_the_job_after_the_timeout(failed: dict[str, Job]) -> None:
    job = failed["stopped"]
    assert_ended_with_one_line(job, "does not answer (no progress for ")
    assert "phase data, last step 3; stacks in" in job.errors[0]
    assert TIMEOUT < job.seconds_after_fault < TIMEOUT + PATIENCE
    assert "phase forward/backward" in job.stacks(0) and "in train_step" in job.stacks(0)


def test_a_rank_that_hangs_ends_the_job_after_the_timeout(failed: dict[str, Job]) -> None:
    job = failed["sleeps"]
    assert_ended_with_one_line(job, "has made no progress for ")
    assert "phase data, last step 3, at faulty.py:" in job.errors[0]
    assert TIMEOUT < job.seconds_after_fault < TIMEOUT + PATIENCE
    assert "in train_step" in job.stacks(0) and "in faulty" in job.stacks(1)


def test_every_signal_saves_the_same_step_on_all_ranks_and_the_unchanged_command_resumes(
    corpus: Path, tmp_path: Path
) -> None:
    """One run, stopped three times: through one worker and through torchrun. Rank 1 gets or sends the signal."""
    signals = {2: "SIGUSR1 to one worker", 4: "SIGUSR1 to torchrun", 6: "SIGTERM to torchrun"}
    for step, fault in signals.items():
        job = start(corpus, tmp_path / "stopped", LONG, fault, 1, step, ALL_SIGNALS)
        wait(job)
        assert job.code == 1, "torchrun's code for everything"
        assert (job.exit["code"], job.exit["step"]) == (7, step + 1), job.output
        assert (tmp_path / f"stopped/checkpoints/step-{step + 1}").is_dir()
    assert job.output.count("resuming from") == 2
    assert len(job.errors) == 3, "one line for each stop"
    for name in ("stopped", "whole"):
        assert run_ranks(run_on_ranks, 2, faulty_config(corpus, tmp_path / name, LONG), 1, 1) == [0, 0]
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")


def test_a_single_process_that_hangs_ends_itself(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="ended with code 6"):
        run_ranks(faulty_run, 1, faulty_config(corpus, tmp_path / "run", 4.0), "sleeps", 0, 3)
    ended = json.loads((tmp_path / "run/exit.json").read_text())
    assert (ended["code"], ended["step"]) == (6, 3)
    assert "has made no progress for 4 s: phase data, last step 3, at faulty.py:" in ended["reason"]
    assert "faulty.py" in (tmp_path / "run/stacks/rank-0.txt").read_text()


def threads_left(config: Config) -> list[str]:
    """Names of the watchdog's threads that are there after a run."""
    assert run(config) == 0
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("watchdog", "heartbeat"))]


def test_a_run_leaves_no_thread_and_no_open_file(corpus: Path, tmp_path: Path) -> None:
    gc.collect()  # what earlier tests left open
    before = len(os.listdir("/proc/self/fd"))
    assert threads_left(make_config(corpus, tmp_path / "one")) == []
    assert len(os.listdir("/proc/self/fd")) == before
    assert run_ranks(threads_left, 2, make_config(corpus, tmp_path / "two")) == [[], []]


def end(ending: object) -> None:
    raise AssertionError(f"the watchdog ends the job: {ending}")


def watch(seconds: dict[int, float], timeout: float, directory: Path) -> bool:
    """Each rank marks progress for its number of seconds, and leaves when all are through."""
    dog = Watchdog(timeout, directory, end)
    dog.start()
    until = time.monotonic() + seconds[dog.rank]
    while time.monotonic() < until:
        heartbeat.progress()
        time.sleep(0.01)
    dist.barrier()
    dog.leave(0, "", agreed=True)
    dog.stop()
    return True


def test_ranks_may_wait_for_one_that_makes_progress(tmp_path: Path) -> None:
    assert run_ranks(watch, 2, {0: 0.0, 1: 5.0}, 3.0, tmp_path) == [True, True]


def hang(directory: Path, disk: str) -> None:
    """One process hangs, and with it the file system (a pipe that nobody reads) that is to hold its last words."""
    (directory / "stacks").mkdir()
    os.mkfifo(directory / "stacks/rank-0.txt")
    if disk == "all":
        os.mkfifo(directory / "exit.json")
    dog = Watchdog(1.0, directory, partial(_tell, directory))
    dog.start()
    time.sleep(60)


@pytest.mark.parametrize("disk", ["stacks", "all"])
def test_a_hanging_file_system_holds_up_no_end(tmp_path: Path, disk: str) -> None:
    with pytest.raises(RankError, match="ended with code 6"):
        run_ranks(hang, 1, tmp_path, disk, timeout=30)


def test_an_error_where_the_store_has_gone_too_is_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "ANSWER_SECONDS", 0.1)
    dog = Watchdog(LONG, tmp_path, end)
    dog._board, dog._thread, dog._blind = SilentBoard(), threading.current_thread(), True  # type: ignore[assignment]
    dog._ringer = os.open(os.devnull, os.O_WRONLY)
    heartbeat.reset()
    heartbeat.enter("optimizer", 7)
    ours = _end_of(RuntimeError("gloo: Connection closed by peer"), StopRequest(), dog)
    assert ours.code == 6 and ours.foreign and "phase optimizer, last step 7" in ours.reason
    own = _end_of(torch.OutOfMemoryError("CUDA out of memory"), StopRequest(), dog)
    assert (own.code, own.reason) == (1, "OutOfMemoryError: CUDA out of memory"), "never a consequence of another's end"
    os.close(dog._ringer)


class SilentBoard:
    """Stands for a board whose store has gone."""


def test_an_error_of_its_own_is_not_lost_when_another_is_to_blame(capsys: pytest.CaptureFixture[str]) -> None:
    class Explained:
        def explanation(self, suspicious: bool, last_words: str) -> board.Ending:
            self.last_words = last_words
            return board.Ending(3, "rank 1: a file is gone", 1, "h", 7, orderly=True)

    dog = Explained()
    error = RuntimeError("mat1 and mat2 cannot be multiplied")
    ours = _end_of(error, StopRequest(), dog)  # type: ignore[arg-type]
    assert ours.code == 3 and "mat1 and mat2" in capsys.readouterr().err and "mat1 and mat2" in dog.last_words
    _end_of(RuntimeError("gloo: Connection closed by peer"), StopRequest(), dog)  # type: ignore[arg-type]
    assert capsys.readouterr().err == dog.last_words == ""


def hang_at_the_end(config: Config) -> int:
    run_module.END_SECONDS = 1.0
    Watchdog.stop = lambda self: time.sleep(60)  # type: ignore[method-assign]
    return run(config)


def test_a_hang_after_the_end_does_not_hold_the_machines(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="ended with code 0"):
        run_ranks(hang_at_the_end, 1, make_config(corpus, tmp_path), timeout=30)


def test_what_an_earlier_run_said_is_gone_before_ranks_meet(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stacks").mkdir()
    (tmp_path / "stacks/rank-0.txt").touch()
    (tmp_path / "exit.json").write_text("{")

    def meet(seconds: float) -> None:
        assert not (tmp_path / "exit.json").exists() and not (tmp_path / "stacks").exists()
        raise Preempted("here")

    monkeypatch.setattr(run_module, "init_distributed", meet)
    assert run(make_config(corpus, tmp_path)) == 7


def test_long_healthy_work_makes_marks(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[int] = []

    def marks_of(work: Callable[..., Any], *args: Any) -> int:
        before = heartbeat.here.count
        work(*args)
        return heartbeat.here.count - before

    loop = Engine._loop
    monkeypatch.setattr(Engine, "_loop", lambda self, batch: marks.append(marks_of(loop, self, batch)))
    monkeypatch.setattr(source, "HASH_BYTES", 1000)
    train = TrainConfig(steps=1, global_batch_size=4, microbatch_size=1, eval_interval=0)
    assert run(make_config(corpus, tmp_path / "run", train=train)) == 0
    assert marks == [8], "after forward and backward of four microbatches"
    files = [tmp_path / "model.safetensors", tmp_path / "config.json"]
    for file, size in zip(files, (5000, 10), strict=True):
        file.write_bytes(bytes(size))
    assert marks_of(source._identity_of, files) == 6
    assert marks_of(directory.prune, tmp_path / "run/checkpoints/step-2", 1) > 3
    assert not (tmp_path / "run/checkpoints/step-1").exists()


def leave_alone(directory: Path) -> None:
    """Rank 1 has an error of its own; rank 0 hangs, as NCCL's peers do."""
    watchdog.LEAVE_SECONDS = 0.5
    dog = Watchdog(LONG, directory, end)
    dog.start()
    if dog.rank == 1:
        assert dog.leave(3, "a file is gone", agreed=False)
        dog.stop()
    time.sleep(60)


def test_a_rank_with_an_error_takes_the_others_along(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="ended with code 3"):
        run_ranks(leave_alone, 2, tmp_path, timeout=20)


def test_the_rank_to_blame_is_the_one_that_others_wait_for() -> None:
    waiting = Beat(0, "a", 1, -1, "optimizer", 7, phases=30, idle=60, waiting=True)
    stuck = replace(waiting, rank=1, phases=31, idle=50, waiting=False)
    behind = replace(stuck, rank=2, phases=29, idle=55)
    assert min([waiting, stuck], key=watchdog._blame) is stuck
    assert min([waiting, stuck, behind], key=watchdog._blame) is behind
    assert min([behind, replace(behind, rank=3, idle=58)], key=watchdog._blame).rank == 3


def test_time_in_which_nobody_watched_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 2.0, 3602.0, 3603.0])
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: next(clock))
    idle = watchdog._Idle(interval=1.0)
    assert idle.count(5) == 5 and idle.seconds == 0
    assert [(idle.count(5), idle.seconds) for _ in range(2)] == [(0, 1.0), (0, 5.0)]
    assert idle.count(6) == 1 and idle.seconds == 0


def time_limits() -> set[float]:
    make_mesh(ParallelConfig(tensor=2))
    limit_collectives(600.0)
    groups = distributed_c10d._world.pg_map
    assert len(groups) > 3
    return {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}


def test_no_collective_of_any_group_gives_up_before_the_watchdog() -> None:
    assert run_ranks(time_limits, 4) == [{2400.0}] * 4


def test_collectives_are_limited_by_the_public_name_where_torch_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    given = list[tuple[timedelta, str]]()
    groups = {"a": ("gloo", None), "b": ("fake", None), "c": ("cpu:gloo,cuda:nccl", None)}
    monkeypatch.setattr(watchdog, "distributed_c10d", SimpleNamespace(_world=SimpleNamespace(pg_map=groups)))
    monkeypatch.setattr(dist, "set_timeout", lambda limit, group: given.append((limit, group)), raising=False)
    limit_collectives(2.0)
    assert given == [(timedelta(seconds=8), "a"), (timedelta(seconds=8), "c")]


class SilentStore:
    """A store whose host vanishes without a word: its second answer never comes."""

    def __init__(self) -> None:
        self.asked, self.released = 0, threading.Event()

    def clone(self) -> dist.Store:
        return dist.HashStore()

    def delay(self) -> None:
        self.released.wait()


def test_a_store_that_does_not_answer_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "STORE_SECONDS", 0.2)
    store = SilentStore()
    ours = Board(store, 0, 1, 0)
    assert ours.advance(3) == 3
    with pytest.raises(StoreSilentError):
        ours._worker.run(store.delay)
    with pytest.raises(StoreSilentError):
        ours.advance(1)
    store.released.set()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            assert ours.advance(1) == 4, "what was asked for in vain was never sent"
            break
        except StoreSilentError:
            time.sleep(0.01)
    ours.close()


@pytest.fixture
def request_to_stop() -> Iterator[StopRequest]:
    request = StopRequest()
    request.listen()
    yield request
    request.restore()


def test_before_the_first_step_a_signal_ends_the_run(request_to_stop: StopRequest) -> None:
    with pytest.raises(Preempted, match="stopped by SIGUSR1 before the first step"):
        signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGTERM)  # the end is near already
    assert request_to_stop.name == "SIGUSR1", "where the exception is swallowed, the first step boundary stops"


def test_schedulers_may_repeat_themselves_but_a_second_ctrl_c_ends(
    request_to_stop: StopRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    request_to_stop.wait_for_step()
    signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGINT)  # at once: an echo
    monkeypatch.setattr(stop, "ECHO_SECONDS", -1.0)
    signal.raise_signal(signal.SIGTERM)
    assert request_to_stop.name == "SIGUSR1"
    with pytest.raises(SystemExit):
        signal.raise_signal(signal.SIGINT)


def test_a_run_that_is_stopped_while_it_loads_is_to_be_started_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "describe_model", lambda model: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(trainer, "open_training_data", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert run(make_config(corpus, tmp_path)) == 7
    ended = json.loads((tmp_path / "exit.json").read_text())
    assert (ended["code"], ended["step"]) == (7, 0)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("place", ["one rank's decision", "all ranks' decision", "torch's reader", "a store"])
def test_a_run_that_is_stopped_while_a_checkpoint_loads_is_to_be_started_again(
    place: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever gathers errors there passes it on for what it is."""
    root = f"memory://{tmp_path.name}" if place == "a store" else str(tmp_path / "checkpoints")
    config = make_config(corpus, tmp_path, checkpoint=CheckpointConfig(dir=root))
    assert run(config) == 0
    where, name = {
        "one rank's decision": (store, "newest"),
        "all ranks' decision": (store, "_check_files"),
        "torch's reader": (dcp.FileSystemReader, "read_data"),
        "a store": (MemoryFileSystem, "info"),
    }[place]
    monkeypatch.setattr(where, name, lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    assert run(config) == 7
    ended = json.loads((tmp_path / "exit.json").read_text())
    assert ended["code"] == 7 and "stopped by SIGTERM before the first step" in ended["reason"]
    monkeypatch.undo()
    assert run(replace(config, train=replace(config.train, steps=7))) == 0
    assert [line["step"] for line in metrics(tmp_path)] == [*range(1, 8)]


ENDLESS = """
import atexit, runpy, sys, time
from importlib import import_module
import_module("megagrow.train.run").END_SECONDS = 0.5
{hang}
sys.argv = ["megagrow", "no such preset"]
runpy.run_module("megagrow", run_name="__main__")
"""
HANGS = {
    "at exit": "atexit.register(time.sleep, 300)",
    "in the last destructor": """
class Last:
    def __del__(self, sleep=time.sleep):
        sleep(300)
sys.last = Last()
""",
}


@pytest.mark.parametrize("hang", HANGS)
def test_a_process_that_cannot_end_is_ended(hang: str) -> None:
    script = ENDLESS.format(hang=HANGS[hang])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in ((2,) if hang == "at exit" else (2, -signal.SIGALRM))
