"""Saves in the background: what a step waits for, what it may change meanwhile, and how a failure comes back."""

import errno
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from megagrow import checkpoint
from megagrow.checkpoint import dcp_io, store
from megagrow.checkpoint.host_copy import HostCopy
from megagrow.checkpoint.saver import Saver
from megagrow.checkpoint.shards import local_shards
from megagrow.checkpoint.store import Snapshot
from megagrow.errors import CheckpointError
from megagrow.parallel import heartbeat
from tests.checkpoint.samples import assert_holds_step, tensors_at
from tests.ranks import run_ranks

SECONDS = 20.0  # after which a thread that does not answer fails the test


def take_step(step: int, tensors: dict[str, Tensor] | None = None) -> Callable[[], Snapshot]:
    state = {"step": step, "cursor": {"epoch": 0, "sample": 8 * step}}
    return lambda: store.snapshot(tensors or tensors_at(step), state, {"model": {"hidden_size": 3}}, {})


class Gate:
    """Holds writers up until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        write_items = store.write_items

        def held(*args: Any) -> dcp_io.ItemWriter:
            self.reached.set()
            assert self.opened.wait(SECONDS)
            return write_items(*args)

        monkeypatch.setattr(store, "write_items", held)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def test_what_changes_after_the_copy_is_not_saved(tmp_path: Path, gate: Gate) -> None:
    saver, tensors, state = Saver(), tensors_at(3), {"step": 3, "cursor": {"sample": 24}}
    saver.save(tmp_path, 3, lambda: store.snapshot(tensors, state, {}, {}))
    assert gate.reached.wait(SECONDS) and not (tmp_path / "step-3").exists()
    for tensor in tensors.values():
        tensor.fill_(4)
    state["cursor"]["sample"] = 32  # type: ignore[index]
    gate.opened.set()
    saver.wait()
    assert_holds_step(tmp_path / "step-3", 3)
    assert checkpoint.read_manifest(tmp_path / "step-3").state["cursor"] == {"sample": 24}


def test_a_second_save_waits_for_the_first(tmp_path: Path, gate: Gate) -> None:
    saver, ended = Saver(), threading.Event()
    saver.save(tmp_path, 1, take_step(1))

    def open_later() -> None:
        time.sleep(0.2)
        assert not ended.is_set() and not (tmp_path / "step-1").exists()
        gate.opened.set()

    opener = threading.Thread(target=open_later)
    opener.start()
    saver.save(tmp_path, 2, take_step(2))
    ended.set()
    assert (tmp_path / "step-1").exists()
    opener.join()
    saver.wait()
    for step in (1, 2):
        assert_holds_step(tmp_path / f"step-{step}", step)


def test_without_asynchronous_a_save_is_complete_when_it_returns(tmp_path: Path) -> None:
    Saver(asynchronous=False).save(tmp_path, 1, take_step(1))
    assert_holds_step(tmp_path / "step-1", 1)


def test_a_failure_comes_back_once_and_the_next_save_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver()
    with monkeypatch.context() as patched:
        patched.setattr(dcp_io._HashedStream, "write", full_disk)
        saver.save(tmp_path, 1, take_step(1))
        with pytest.raises(CheckpointError, match=r"cannot save step 1 .*__0_0\.distcp: No space left on device"):
            saver.wait()
    assert not saver.has_failed and not [*tmp_path.glob("step-*")]
    saver.save(tmp_path, 2, take_step(2))
    saver.wait()
    assert_holds_step(tmp_path / "step-2", 2)


def full_disk(self: object, data: bytes) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def save_where_one_rank_fails(root: Path, failing: int, refuse: bool) -> tuple[str, bool]:
    saver, here = Saver(dist.new_group(backend="gloo")), dist.get_rank() == failing
    state = {"rng": torch.zeros(1)} if refuse and here else {}
    write = full_disk if here and not refuse else dcp_io._HashedStream.write
    with mock.patch.object(dcp_io._HashedStream, "write", write):
        saver.save(root, 1, lambda: store.snapshot(sharded(1), state, {}, {}))
        deadline = time.monotonic() + SECONDS
        while not saver.has_failed and time.monotonic() < deadline:
            time.sleep(0.01)
    failed = saver.has_failed
    try:
        saver.wait()
    except CheckpointError as error:
        return str(error), failed
    return "", failed


def sharded(step: int) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    return {"w": distribute_tensor(torch.full((8, 3), float(step)), mesh, [Shard(0)]), **tensors_at(step)}


@pytest.mark.parametrize(("refuse", "reason"), [(False, "No space left on device"), (True, "state.rng is a Tensor")])
def test_a_failure_of_one_rank_is_the_same_error_on_all(tmp_path: Path, refuse: bool, reason: str) -> None:
    (first, one), (second, two) = run_ranks(save_where_one_rank_fails, 2, tmp_path, 1, refuse)
    assert one and two and first == second
    assert "rank 1: " in first and reason in first and "\n" not in first
    assert not [*tmp_path.glob("step-*")]


def save_both_ways(root: Path) -> None:
    group = dist.new_group(backend="gloo")
    for asynchronous in (False, True):
        saver = Saver(group, asynchronous)
        rows = torch.arange(40.0).view(4, 10)
        tensors = {**sharded(5), "transposed": rows.T, "rows": rows[::2], "columns": rows[:, 1:3], "part": rows[1]}
        saver.save(root / str(asynchronous), 5, lambda: store.snapshot(tensors, {}, {}, {}))  # noqa: B023
        saver.wait()


def test_both_ways_give_the_same_bytes_and_hashes(tmp_path: Path) -> None:
    run_ranks(save_both_ways, 2, tmp_path)
    here, beside = (tmp_path / name / "step-5" for name in ("False", "True"))
    first, second = checkpoint.verify(here), checkpoint.verify(beside)
    assert first.items == second.items and len(first.items) == 9
    for file in here.glob("*.distcp"):
        assert file.read_bytes() == (beside / file.name).read_bytes()


def test_buffers_are_used_again() -> None:
    copy, tensors = HostCopy(), {**tensors_at(1), "rows": torch.ones(4, 6)[::2]}
    addresses = [
        {name: shard.data.data_ptr() for name, shard in copy.of(local_shards(tensors)).items()} for _ in range(2)
    ]
    assert addresses[0] == addresses[1]
    assert not set(addresses[0].values()) & {tensor.data_ptr() for tensor in tensors.values()}
    tensors["norm"] = torch.ones(6, dtype=torch.bfloat16)
    del tensors["rows"]
    copies = copy.of(local_shards(tensors))
    assert set(copies) == set(tensors) and copies["norm"].data.eq(1).all() and copies["norm"].shape == (6,)


def test_a_writer_makes_marks_of_its_own_and_whoever_waits_for_it_shares_them(tmp_path: Path, gate: Gate) -> None:
    saver = Saver()
    saver.save(tmp_path, 1, take_step(1))
    assert gate.reached.wait(SECONDS)
    main, writer = heartbeat.here.count, heartbeat.background.count
    beat = heartbeat.beat(0).of_background()
    assert (beat.phase, beat.waiting) == ("checkpoint in the background", False) and "threading.py" in beat.place
    gate.opened.set()
    deadline = time.monotonic() + SECONDS
    while heartbeat.background.phase and time.monotonic() < deadline:
        time.sleep(0.01)
    assert heartbeat.background.count > writer + 3 and heartbeat.here.count == main
    saver.wait()
    gate.opened.clear()
    saver.save(tmp_path, 2, take_step(2))
    opener = threading.Timer(0.1, gate.opened.set)
    opener.start()
    before = heartbeat.here.count
    saver.wait()
    opener.join()
    assert heartbeat.here.count > before


def test_a_writer_that_stands_in_a_file_does_not_wait_for_others(tmp_path: Path) -> None:
    """The innermost line is one of torch.distributed, as in a collective."""
    saver, lock = Saver(), threading.Lock()
    lock.acquire()
    with mock.patch.object(os, "fsync", lock.acquire):
        saver.save(tmp_path, 1, take_step(1))
        deadline = time.monotonic() + SECONDS
        while "write" not in heartbeat.beat(0).background_place and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        beat = heartbeat.beat(0)
    lock.release()
    saver.wait()
    assert "dcp_io.py" in beat.background_place and not beat.background_waiting


def test_an_error_that_is_no_failure_to_write_comes_back_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Path:
        raise RuntimeError("connection closed by peer")

    saver = Saver()
    monkeypatch.setattr(store, "write", broken)
    saver.save(tmp_path, 1, take_step(1))
    with pytest.raises(RuntimeError, match="closed by peer"):
        saver.wait()


def test_nothing_to_wait_for() -> None:
    saver = Saver()
    saver.wait()
    saver.release()
    assert not saver.has_failed and isinstance(saver._written, Future)
