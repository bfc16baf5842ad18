"""`make faults`: rarer ways for a rank to hang or to die than those of tests/train/test_liveness.py (a minute)."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.train.jobs import HOST, Job, assert_ended_with_one_line, start, wait
from tests.train.runs import make_corpus

TIMEOUT = 5.0
PATIENCE = 10.0
LONG = 300.0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def two_nodes(corpus: Path, directory: Path, ranks_per_node: int, timeout: float, fault: str) -> tuple[Job, Job]:
    """Two torchruns on this machine; the fault comes to the last rank."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    rank = 2 * ranks_per_node - 1
    places = [
        (
            "--nnodes=2",
            f"--node-rank={node}",
            f"--nproc-per-node={ranks_per_node}",
            "--master-addr=127.0.0.1",
            f"--master-port={port}",
        )
        for node in (0, 1)
    ]
    first, second = (
        start(corpus, directory, timeout, fault, rank, 3, where=where, name=f"{node}-")
        for node, where in enumerate(places)
    )
    wait(first, second)
    return first, second


def test_a_call_that_holds_the_interpreter(corpus: Path, tmp_path: Path) -> None:
    job = start(corpus, tmp_path / "run", TIMEOUT, "holds the interpreter", 1, 3)
    wait(job)
    assert_ended_with_one_line(job, "does not answer (no progress for ")
    assert job.seconds_after_fault < TIMEOUT + PATIENCE


def test_a_death_on_another_node_is_told_by_its_neighbour(corpus: Path, tmp_path: Path) -> None:
    jobs = two_nodes(corpus, tmp_path / "run", 2, LONG, "killed")
    (line,) = jobs[0].errors + jobs[1].errors
    assert line.startswith(f"megagrow: error: rank 3 (host {HOST}) has died: process ")
    assert "phase data, last step 3" in line and jobs[0].exit["code"] == 6
    assert all(job.code == 1 and job.seconds_after_fault < PATIENCE for job in jobs)


def test_a_death_without_neighbours_is_told_by_those_who_miss_it(corpus: Path, tmp_path: Path) -> None:
    jobs = two_nodes(corpus, tmp_path / "run", 1, LONG, "killed")
    (line,) = jobs[0].errors + jobs[1].errors
    assert line.startswith(f"megagrow: error: rank 1 (host {HOST}) does not answer (connections to it broke): ")
    assert "last step 3" in line and jobs[0].exit["code"] == 6
    assert all(job.code == 1 and job.seconds_after_fault < PATIENCE for job in jobs)


def test_a_hang_on_another_node_ends_both(corpus: Path, tmp_path: Path) -> None:
    jobs = two_nodes(corpus, tmp_path / "run", 2, TIMEOUT, "sleeps")
    (line,) = jobs[0].errors + jobs[1].errors
    assert line.startswith(f"megagrow: error: rank 3 (host {HOST}) has made no progress for ")
    assert all((tmp_path / f"run/stacks/rank-{rank}.txt").exists() for rank in range(4))
    assert all(job.code == 1 and job.seconds_after_fault < TIMEOUT + PATIENCE for job in jobs)


def test_a_hang_while_the_store_is_silent(corpus: Path, tmp_path: Path) -> None:
    """torchrun itself is stopped, and the store with it: every rank can judge only itself."""
    job = start(corpus, tmp_path / "run", TIMEOUT, "launcher stopped", 1, 3)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run/exit.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    seconds = time.time() - (tmp_path / "run.fault").stat().st_mtime
    os.kill(job.process.pid, signal.SIGCONT)
    wait(job)
    assert job.exit["code"] == 6 and "has made no progress" in job.exit["reason"]
    assert "the store beside rank 0 does not answer either" in job.exit["reason"]
    assert seconds < TIMEOUT + PATIENCE
