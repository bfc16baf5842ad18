"""Runs whose checkpoints are written beside training: the same run, and no save is lost or hidden."""

import errno
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from megagrow import checkpoint
from megagrow.checkpoint import dcp_io, store
from megagrow.config import CheckpointConfig, Config, RunConfig, TrainConfig
from megagrow.errors import DataError
from megagrow.parallel import heartbeat
from megagrow.parallel.watchdog import Watchdog
from megagrow.train import run, trainer
from megagrow.train.run import _tell
from tests.ranks import RankError, run_ranks
from tests.train.runs import make_config, metrics, run_on_ranks

TIMEOUT = 2.0
EVERY_SECOND = CheckpointConfig(interval=2, keep_last=0)
write_items = store.write_items


def steps_in(directory: Path) -> list[int]:
    """Steps whose checkpoints are whole."""
    found = checkpoint.candidates(directory / "checkpoints")
    return [checkpoint.verify(path).step for path in found]


@contextmanager
def writers(before: Callable[[], Any]) -> Iterator[None]:
    """Lets something happen in each writer before it writes."""

    def write(*args: Any) -> dcp_io.ItemWriter:
        before()
        return write_items(*args)

    with mock.patch.object(store, "write_items", write):
        yield


def test_both_ways_of_saving_are_the_same_run(corpus: Path, tmp_path: Path) -> None:
    ways = {True: tmp_path / "beside", False: tmp_path / "within"}
    for asynchronous, directory in ways.items():
        options = replace(EVERY_SECOND, asynchronous=asynchronous)
        assert run(make_config(corpus, directory, checkpoint=options)) == 0
    assert metrics(ways[True]) == metrics(ways[False])
    for step in (2, 4, 6):
        one, two = (checkpoint.read_manifest(path / f"checkpoints/step-{step}") for path in ways.values())
        assert one.items == two.items and one.tensors.keys() >= {"optim.exp_avg.final_norm.weight"}
    assert steps_in(ways[True]) == steps_in(ways[False]) == [6, 4, 2]


def waited(corpus: Path, directory: Path, asynchronous: bool) -> float:
    options = CheckpointConfig(interval=2, asynchronous=asynchronous)
    with writers(lambda: time.sleep(1.0)):
        assert run(make_config(corpus, directory, steps=3, checkpoint=options)) == 0
    return sum(
        line["checkpoint_seconds"] for line in map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    )


def test_metrics_say_how_long_steps_have_waited(corpus: Path, tmp_path: Path) -> None:
    assert waited(corpus, tmp_path / "within", False) >= 1.0
    assert 0 < waited(corpus, tmp_path / "beside", True) < 0.5


def run_with_a_full_disk(config: Config, rank: int) -> int:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "__1_0.distcp")

    write = full if dist.get_rank() == rank else dcp_io._HashedStream.write
    with mock.patch.object(dcp_io._HashedStream, "write", write):
        return run_on_ranks(config, tensor=2)


def test_a_failed_save_ends_the_run_on_all_ranks_at_the_same_step(corpus: Path, tmp_path: Path) -> None:
    train = TrainConfig(steps=4000, global_batch_size=4, eval_interval=0)
    config = make_config(corpus, tmp_path, train=train, checkpoint=CheckpointConfig(interval=40))
    assert run_ranks(run_with_a_full_disk, 2, config, 1) == [4, 4]
    end = json.loads((tmp_path / "exit.json").read_text())
    assert end["code"] == 4 and "cannot save step 40" in end["reason"] and "No space left on device" in end["reason"]
    assert 40 <= metrics(tmp_path)[-1]["step"] < 80, "the next save would have told it"
    assert not [*(tmp_path / "checkpoints").glob("step-*")]


def test_an_error_does_not_lose_the_save_under_way(corpus: Path, tmp_path: Path) -> None:
    def gone(*args: Any, **kwargs: Any) -> None:
        raise DataError("the data is gone")

    def slow() -> None:
        trainer.make_batch = gone  # type: ignore[assignment]
        time.sleep(0.5)

    with mock.patch.object(trainer, "make_batch", trainer.make_batch), writers(slow):
        assert run(make_config(corpus, tmp_path, checkpoint=EVERY_SECOND)) == 3
    assert steps_in(tmp_path) == [2]


def test_a_stop_waits_for_the_save_under_way_and_saves(corpus: Path, tmp_path: Path) -> None:
    asked = []

    def ask() -> None:
        if not asked:
            asked.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)

    with writers(ask):
        assert run(make_config(corpus, tmp_path, steps=2000, checkpoint=replace(EVERY_SECOND, interval=5))) == 7
    step = metrics(tmp_path)[-1]["step"]
    assert steps_in(tmp_path) == sorted({step, 5}, reverse=True)
    assert not [*(tmp_path / "checkpoints").glob("*.tmp-*")]


def test_a_stop_whose_save_fails_is_not_told_as_saved(corpus: Path, tmp_path: Path) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    make_batch = trainer.make_batch

    def ask(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return make_batch(*args, **kwargs)

    with mock.patch.object(trainer, "make_batch", ask), mock.patch.object(dcp_io._HashedStream, "write", full):
        assert run(make_config(corpus, tmp_path, checkpoint=CheckpointConfig(interval=0))) == 4
    assert "No space left on device" in json.loads((tmp_path / "exit.json").read_text())["reason"]


def work_beside(directory: Path, stuck: str) -> None:
    """Two ranks with a thread beside each main one; on rank 1 one of the two hangs, and its peer waits for it."""
    group, rank = dist.new_group(backend="gloo"), dist.get_rank()
    dog = Watchdog(TIMEOUT, directory, partial(_tell, directory))
    heartbeat.reset()
    heartbeat.enter("optimizer", 7)
    dog.start()

    def write() -> None:
        with heartbeat.in_background("checkpoint in the background"):
            live(rank, stuck == "writer", group)

    threading.Thread(target=write, daemon=True).start()
    live(rank, stuck == "main", None)


def live(rank: int, is_stuck: bool, group: dist.ProcessGroup | None) -> None:
    if is_stuck and rank == 0:
        dist.barrier(group=group)
    while not is_stuck:
        heartbeat.progress()
        time.sleep(0.01)
    time.sleep(60)


@pytest.mark.parametrize(("stuck", "phase"), [("writer", "checkpoint in the background"), ("main", "optimizer")])
def test_neither_thread_hides_that_the_other_hangs(tmp_path: Path, stuck: str, phase: str) -> None:
    with pytest.raises(RankError, match="ended with code 6"):
        run_ranks(work_beside, 2, tmp_path, stuck, timeout=30)
    end = json.loads((tmp_path / "exit.json").read_text())
    assert (end["code"], end["rank"], end["step"]) == (6, 1, 7)
    assert (
        f"has made no progress for {TIMEOUT:g} s: phase {phase}, last step 7, at test_background_saves.py"
        in end["reason"]
    )


def hang_in_a_file(config: Config) -> int:
    with writers(lambda: time.sleep(60)):
        return run(config)


def test_a_single_process_sees_its_writer_hang(corpus: Path, tmp_path: Path) -> None:
    where = RunConfig(dir=str(tmp_path), timeout=TIMEOUT)
    options = CheckpointConfig(interval=50)
    with pytest.raises(RankError, match="ended with code 6"):
        config = make_config(corpus, tmp_path, steps=100_000, checkpoint=options, run=where)
        run_ranks(hang_in_a_file, 1, config, timeout=60)
    reason = json.loads((tmp_path / "exit.json").read_text())["reason"]
    assert "phase checkpoint in the background" in reason and "test_background_saves.py" in reason
