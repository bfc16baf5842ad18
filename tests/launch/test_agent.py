"""Tests launch/agent.py: the run's own exit code comes out, whatever was left from before, and crash loops end."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from megagrow.config import CheckpointConfig, TrainConfig
from megagrow.config_file import dump
from megagrow.metrics import read_exit, write_exit
from tests.launch.scripts import LAUNCH, Programs
from tests.train.runs import make_config, make_corpus, metrics

COMMAND = ("--standalone", "--", "quickstart_small", "--run.dir")


@pytest.fixture(scope="module")
def agent() -> ModuleType:
    spec = importlib.util.spec_from_file_location("agent", LAUNCH / "agent.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def failure(*codes: int) -> ChildFailedError:
    """What torchrun raises when ranks have ended with these codes."""
    ranks = {n: ProcessFailure(local_rank=n, pid=1, exitcode=code, error_file="none") for n, code in enumerate(codes)}
    return ChildFailedError("megagrow", ranks)


def run_that_writes(directory: Path, code: int | None, error: Exception | None) -> Callable[[list[str]], None]:
    """torchrun's part: the run writes its exit.json, then torchrun raises."""

    def torchrun(arguments: list[str]) -> None:
        assert not (directory / "exit.json").exists(), "the old one is still there while the run starts"
        if code is not None:
            write_exit(directory, code, "because", 7, 0, "host")
        if error:
            raise error

    return torchrun


@pytest.mark.parametrize(
    ("written", "error", "expected"),
    [
        (0, None, 0),
        (None, None, 0),  # done, though this node sees the file only later
        *((code, failure(1, code), code) for code in range(2, 8)),
        (1, failure(1), 1),
        (None, failure(1, -9), 1),
        (None, failure(-15, 2), 2),  # no directory to write exit.json to
        (7, SignalException("stop", signal.SIGTERM), 7),
        (None, SignalException("stop", signal.SIGTERM), 143),
        (None, RendezvousConnectionError("nobody there"), 1),
    ],
)
def test_the_code_of_the_run_comes_out(agent, tmp_path, monkeypatch, capsys, written, error, expected) -> None:
    write_exit(tmp_path, 3, "from before", 1, 0, "host")
    monkeypatch.setattr(agent, "torchrun", run_that_writes(tmp_path, written, error))
    monkeypatch.setattr(agent, "EXIT_SECONDS", 0.0)
    assert agent.main([*COMMAND, str(tmp_path)]) == expected
    told = capsys.readouterr().err
    assert told.count("\n") >= (expected != 0) and ("exit code" in told) == (expected != 0)
    assert "from before" not in told


def test_torchrun_gets_the_command_unchanged(agent, tmp_path, monkeypatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(agent, "torchrun", seen.append)
    assert (
        agent.main(["--nnodes", "2", "--", "quickstart_small", "--run.dir", str(tmp_path), "--train.steps", "5"]) == 0
    )
    assert seen == [
        ["--nnodes", "2", "-m", "megagrow", "quickstart_small", "--run.dir", str(tmp_path), "--train.steps", "5"]
    ]


def test_a_command_that_cannot_be_read_never_starts_and_is_told_to_the_scheduler(
    agent, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(agent, "torchrun", lambda arguments: pytest.fail("torchrun was started"))
    assert agent.main([*COMMAND, str(tmp_path), "--train.stepz", "5"]) == 2
    told = read_exit(tmp_path)
    assert told is not None and told["code"] == 2 and "--train.stepz" in told["reason"]
    assert "--train.stepz" in capsys.readouterr().err
    (tmp_path / "exit.json").unlink()
    assert agent.main([*COMMAND[:-1], f"--run.dir={tmp_path}", "--train.stepz", "5"]) == 2
    assert read_exit(tmp_path) == told
    assert agent.main([*COMMAND, str(tmp_path / "new"), "--train.stepz", "5"]) == 2
    assert not (tmp_path / "new").exists()


@pytest.fixture
def starts(agent, tmp_path, monkeypatch) -> Callable[[int | None], int]:
    """Starts the run, which ends with the given code; the code that the agent ends with."""
    monkeypatch.setenv("MAX_CRASHES", "2")

    def start(code: int | None) -> int:
        monkeypatch.setattr(agent, "torchrun", run_that_writes(tmp_path, code, failure(1) if code else None))
        return agent.main([*COMMAND, str(tmp_path)])

    return start


@pytest.mark.parametrize("crash", [1, 6])
def test_a_crash_loop_ends(starts, tmp_path, capsys, crash: int) -> None:
    assert [starts(crash) for _ in range(3)] == [crash, crash, 2]
    assert "crashes.jsonl" in capsys.readouterr().err
    assert json.loads((tmp_path / "exit.json").read_text())["code"] == 2
    (tmp_path / "crashes.jsonl").unlink()
    assert starts(crash) == crash


def test_a_new_checkpoint_starts_the_count_again(starts, tmp_path) -> None:
    assert [starts(1), starts(1)] == [1, 1]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text('{"step": "step-40"}')
    assert [starts(1) for _ in range(3)] == [1, 1, 2]
    crashes = [json.loads(line)["checkpoint"] for line in (tmp_path / "crashes.jsonl").read_text().splitlines()]
    assert crashes == ["", "", "step-40", "step-40"]


def test_stops_that_are_no_crash_do_not_count(starts, tmp_path) -> None:
    assert [starts(code) for code in (7, 7, 7, 3, 0)] == [7, 7, 7, 3, 0]
    assert not (tmp_path / "crashes.jsonl").exists()


def test_the_first_node_counts_for_all(starts, agent, tmp_path, monkeypatch) -> None:
    """The other nodes' agents begin while its start is under way, and do not take that for one that crashed."""
    here = "0"

    def torchrun(arguments: list[str]) -> None:
        nonlocal here
        if here == "0":
            here = "1"
            monkeypatch.setenv("NODE_RANK", here)
            assert agent.main([*COMMAND, str(tmp_path)]) == 1
            write_exit(tmp_path, 1, "because", 7, 0, "host")
            raise failure(1)
        raise failure(1)

    def start() -> int:
        nonlocal here
        here = "0"
        monkeypatch.setenv("NODE_RANK", here)
        monkeypatch.setattr(agent, "torchrun", torchrun)
        return agent.main([*COMMAND, str(tmp_path)])

    monkeypatch.setattr(agent, "EXIT_SECONDS", 0.0)
    assert [start() for _ in range(3)] == [1, 1, 2]
    assert len((tmp_path / "crashes.jsonl").read_text().splitlines()) == 2


def test_another_node_neither_removes_nor_believes_what_is_left(agent, tmp_path, monkeypatch) -> None:
    """It may be what the first node has just said of this start, or of the last one."""
    monkeypatch.setenv("NODE_RANK", "1")
    monkeypatch.setattr(agent, "EXIT_SECONDS", 0.0)

    def torchrun(arguments: list[str]) -> None:
        raise failure(1)

    monkeypatch.setattr(agent, "torchrun", torchrun)
    write_exit(tmp_path, 2, "from before", 1, 0, "host")
    assert agent.main([*COMMAND, str(tmp_path)]) == 1
    told = read_exit(tmp_path)
    assert told is not None and told["reason"] == "from before"


def test_an_agent_that_is_killed_counts(starts, agent, tmp_path, monkeypatch) -> None:
    if os.fork() == 0:
        monkeypatch.setattr(agent, "torchrun", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        agent.main([*COMMAND, str(tmp_path)])
    os.wait()
    assert [starts(1), starts(1)] == [1, 2]


def test_damage_to_the_list_of_crashes_stops_no_run(starts, tmp_path) -> None:
    (tmp_path / "crashes.jsonl").write_bytes(b'{"torn\n[]\n\xff\n')
    assert [starts(1), starts(7), starts(1), starts(1)] == [1, 7, 1, 2]


def test_a_late_exit_file_is_waited_for(agent, tmp_path, monkeypatch) -> None:
    late = threading.Timer(0.3, write_exit, (tmp_path, 7, "because", 7, 0, "host"))

    def torchrun(arguments: list[str]) -> None:
        late.start()
        raise failure(1)

    monkeypatch.setattr(agent, "torchrun", torchrun)
    assert agent.main([*COMMAND, str(tmp_path)]) == 7


def test_by_hand_nothing_is_counted(starts, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("MAX_CRASHES")
    assert [starts(1) for _ in range(3)] == [1, 1, 1]
    assert not (tmp_path / "crashes.jsonl").exists()


@pytest.mark.parametrize("waits", [False, True])
def test_a_signal_before_the_ranks_start_is_no_crash(tmp_path: Path, waits: bool) -> None:
    """While it imports, or waits for another node; the first process of a container would not even get it."""
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command = [sys.executable, str(LAUNCH / "agent.py"), *options, "--", "quickstart_small", "--run.dir", str(tmp_path)]
    environment = {**os.environ, "MAX_CRASHES": "3", "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as agent:
        log = tmp_path / "crashes.jsonl"
        began = time.monotonic()
        while agent.poll() is None and (not log.exists() if waits else time.monotonic() < began + 0.5):
            time.sleep(0.02)
        time.sleep(1.0 if waits else 0.0)  # into the rendezvous
        agent.send_signal(signal.SIGTERM)
        errors = agent.communicate(timeout=60)[1]
    assert agent.returncode == 128 + signal.SIGTERM, errors
    assert not log.exists()


def test_a_broken_environment_ends_with_2(tmp_path: Path) -> None:
    """Else a scheduler would start it again for ever: nothing has been counted yet."""
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so: cannot open')")
    command = [sys.executable, str(LAUNCH / "agent.py"), "--standalone", "--", "quickstart_small"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert "lacks what a run needs: libcudart.so: cannot open" in ended.stderr
    script = subprocess.run(
        [LAUNCH / "torchrun.sh", "x"], env={**os.environ, "PYTHON": "no-python"}, capture_output=True
    )
    assert script.returncode == 2 and b"no no-python here; set PYTHON" in script.stderr


def test_a_limit_that_is_no_number_is_refused(starts, monkeypatch, capsys) -> None:
    monkeypatch.setenv("MAX_CRASHES", "abc")
    assert starts(0) == 2
    assert "MAX_CRASHES=abc must be a whole number" in capsys.readouterr().err


def test_a_signal_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    programs = Programs(tmp_path / "files")
    train = TrainConfig(steps=300, global_batch_size=4, eval_interval=0)
    config = make_config(make_corpus(tmp_path), tmp_path, train=train, checkpoint=CheckpointConfig(interval=0))
    (tmp_path / "config.json").write_text(dump(config))
    command = [str(LAUNCH / "torchrun.sh"), str(tmp_path / "config.json"), "--run.dir", str(tmp_path / "run")]
    environment = programs.environment(NPROC_PER_NODE="1")
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as run:
        log = tmp_path / "run" / "metrics.jsonl"
        while run.poll() is None and not (log.exists() and log.read_text()):
            time.sleep(0.02)
        run.send_signal(signal.SIGUSR1)  # torchrun passes it on because env.sh says so
        errors = run.communicate(timeout=120)[1]
    assert run.returncode == 7, errors
    stopped = read_exit(tmp_path / "run")
    assert stopped is not None and stopped["code"] == 7 and 0 < stopped["step"] < 300
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 301))
