"""Changed bytes, missing files, mixtures, full disks and sudden deaths are found and survived."""

import errno
import hashlib
import io
import os
import pickle
import resource
import shutil
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from megagrow import checkpoint
from megagrow.checkpoint import dcp_io, directory
from megagrow.errors import CheckpointError, Damaged
from tests.checkpoint.samples import (
    assert_holds_step,
    empty_tensors,
    rewrite_manifest,
    save_step,
    tensors_at,
)
from tests.ranks import run_ranks

FILES = [".metadata", "__0_0.distcp", "manifest.json", "manifest.sha256"]
FLIPS_PER_FILE = 60


class Died(BaseException):
    """The process ended here."""


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    save_step(root, 1)
    save_step(root, 2)
    return root


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    """A copy of a directory with steps 1 and 2, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "root"))


def assert_refused(path: Path, file: str) -> None:
    for read in (checkpoint.verify, lambda path: checkpoint.load(path, empty_tensors())):
        with pytest.raises(CheckpointError) as raised:
            read(path)
        assert file in str(raised.value)
        assert str(path) in str(raised.value)
        assert "\n" not in str(raised.value)


def test_the_list_of_files_is_complete(saved: Path) -> None:
    assert sorted(path.name for path in (saved / "step-2").iterdir()) == FILES
    assert_holds_step(saved / "step-2", 2)


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_anywhere_is_refused(root: Path, file: str) -> None:
    path = root / "step-2" / file
    raw = path.read_bytes()
    for index in range(0, len(raw), max(1, len(raw) // FLIPS_PER_FILE)):
        flipped = bytearray(raw)
        flipped[index] ^= 1 << (index % 8)
        path.write_bytes(flipped)
        assert_refused(root / "step-2", file)
    path.write_bytes(raw)
    assert_holds_step(root / "step-2", 2)


def test_a_flipped_bit_in_latest_never_hurts(root: Path) -> None:
    raw = (root / "latest").read_bytes()
    for index in range(len(raw)):
        flipped = bytearray(raw)
        flipped[index] ^= 1 << (index % 8)
        (root / "latest").write_bytes(flipped)
        for path in checkpoint.candidates(root):
            assert_holds_step(path, int(path.name[-1]))


@pytest.mark.parametrize("file", FILES)
def test_a_cut_extended_or_missing_file_is_refused(root: Path, file: str) -> None:
    path = root / "step-2" / file
    raw = path.read_bytes()
    for wrong in (b"", raw[:1], raw[: len(raw) // 2], raw[:-1], raw + b"\0"):
        path.write_bytes(wrong)
        assert_refused(root / "step-2", file)
    path.unlink()
    assert_refused(root / "step-2", file)


def test_files_of_another_checkpoint_are_refused(root: Path) -> None:
    one, two = root / "step-1", root / "step-2"
    assert (one / "__0_0.distcp").stat().st_size == (two / "__0_0.distcp").stat().st_size
    shutil.copy(one / "__0_0.distcp", two)
    assert_refused(two, "__0_0.distcp")


PROBLEMS = {
    "flipped": (Damaged("__0_0.distcp: differs from its digest"), "Damaged"),
    "missing": (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)), "Damaged"),
    "no answer": (OSError(errno.EIO, os.strerror(errno.EIO)), "CheckpointError"),
}


def kind_of_error(path: str, problem: str) -> str:
    """How loading fails on this rank, where only the second of two sees the problem."""
    with ExitStack() as stack:
        if dist.get_rank() == 1:
            seen = mock.Mock(side_effect=PROBLEMS[problem][0])
            stack.enter_context(mock.patch.object(dcp_io.ItemReader, "_slice_file", seen))
        try:
            checkpoint.load(Path(path), empty_tensors())
        except CheckpointError as error:
            return type(error).__name__
    return "loaded"


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_ranks_agree_whether_it_is_damage(saved: Path, problem: str) -> None:
    assert run_ranks(kind_of_error, 2, str(saved / "step-2"), problem) == [PROBLEMS[problem][1]] * 2


def test_a_replaced_manifest_is_refused_by_latest(root: Path) -> None:
    shutil.rmtree(root / "step-2")
    shutil.copytree(root / "step-1", root / "step-2")
    with pytest.raises(CheckpointError, match=r"replaced, .*latest"):
        checkpoint.load(root / "step-2", empty_tensors())
    assert [path.name for path in checkpoint.candidates(root)] == ["step-1"]


def test_a_pickle_in_the_metadata_never_runs(root: Path) -> None:
    path, canary = root / "step-2", root / "canary"
    raw = pickle.dumps(Canary(canary))
    (path / ".metadata").write_bytes(raw)
    assert_refused(path, ".metadata")

    def accept(record: dict[str, Any]) -> None:
        digest = hashlib.sha256(raw).hexdigest()
        record["files"][".metadata"] = {"num_bytes": len(raw), "sha256": digest}

    rewrite_manifest(path, accept)
    assert_holds_step(path, 2)
    assert not canary.exists()
    with pytest.raises(AttributeError):  # because what the canary returns is no metadata
        dcp.FileSystemReader(path).read_metadata()
    assert canary.exists(), "torch's own reader no longer runs it: the test proves nothing"


def replace_item(path: Path, raw: bytes) -> None:
    """Makes these bytes the data file, with one item: the tensor `norm`."""
    (path / "__0_0.distcp").write_bytes(raw)

    def accept(record: dict[str, Any]) -> None:
        item = next(item for item in record["items"] if item["tensor"] == "norm")
        item |= {"start": 0, "num_bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        record["items"] = [item]
        record["tensors"] = {"norm": record["tensors"]["norm"]}
        record["files"]["__0_0.distcp"]["num_bytes"] = len(raw)

    rewrite_manifest(path, accept)


def test_a_pickle_in_an_item_never_runs(root: Path) -> None:
    path, canary = root / "step-2", root / "canary"
    stream = io.BytesIO()
    torch.save({"norm": Canary(canary)}, stream)
    replace_item(path, stream.getvalue())
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: tensor 'norm' cannot be read"):
        checkpoint.load(path, {"norm": torch.zeros(5, dtype=torch.bfloat16)})
    assert not canary.exists()


def test_a_compressed_item_is_refused_before_it_is_unpacked(root: Path) -> None:
    plain, bomb = io.BytesIO(), io.BytesIO()
    torch.save(torch.zeros(1 << 20), plain)
    with (
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    replace_item(root / "step-2", bomb.getvalue())
    with pytest.raises(CheckpointError, match="'norm' is no plain torch archive"):
        checkpoint.load(root / "step-2", {"norm": torch.zeros(5, dtype=torch.bfloat16)})


def count_calls(monkeypatch: pytest.MonkeyPatch, fail_at: int, error: BaseException) -> list[str]:
    """Lets the k-th call that makes a change durable or visible raise; returns the calls."""
    calls: list[str] = []

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) == fail_at:
                raise error
            return original(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "replace"):
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))
    return calls


def calls_of_a_save(root: Path) -> list[str]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        calls = count_calls(monkeypatch, 0, Died())
        save_step(root, 3, keep_last=2)
    return calls


def test_a_save_makes_everything_durable_before_it_is_visible(root: Path) -> None:
    assert calls_of_a_save(root) == [
        "fsync",  # the data file
        "fsync",  # .metadata, under another name
        "rename",
        "fsync",  # manifest.json
        "fsync",  # manifest.sha256
        "fsync",  # the directory
        "rename",  # step-3.tmp-* to step-3
        "fsync",  # its parent
        "fsync",  # latest, under another name
        "replace",
        "fsync",  # its parent
        "rename",  # step-1 to step-1.trash-*
        "fsync",
    ]


def test_death_at_any_point_leaves_complete_checkpoints_only(saved: Path, tmp_path: Path) -> None:
    num_calls = len(calls_of_a_save(Path(shutil.copytree(saved, tmp_path / "count"))))
    survivors = set()
    for fail_at in range(1, num_calls + 1):
        root = Path(shutil.copytree(saved, tmp_path / str(fail_at)))
        with pytest.MonkeyPatch.context() as monkeypatch:
            count_calls(monkeypatch, fail_at, Died())
            monkeypatch.setattr(directory, "discard", lambda path: None)
            with pytest.raises((Died, CheckpointError)):
                save_step(root, 3, keep_last=2)
        found = checkpoint.candidates(root)
        steps = [int(path.name[-1]) for path in found]
        assert steps in ([2, 1], [3, 2, 1], [3, 2])
        for path, step in zip(found, steps, strict=True):
            assert_holds_step(path, step)
        save_step(root, 4)
        assert not [path for path in root.iterdir() if "tmp" in path.name or "trash" in path.name]
        survivors.add(tuple(steps))
    assert survivors == {(2, 1), (3, 2, 1), (3, 2)}


def test_a_failure_at_any_point_is_named_and_cleaned_up(saved: Path, tmp_path: Path) -> None:
    num_calls = len(calls_of_a_save(Path(shutil.copytree(saved, tmp_path / "count"))))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for fail_at in range(1, num_calls - 1):  # the last two belong to pruning, which only warns
        root = Path(shutil.copytree(saved, tmp_path / str(fail_at)))
        with pytest.MonkeyPatch.context() as monkeypatch:
            count_calls(monkeypatch, fail_at, full)
            with pytest.raises(CheckpointError, match="save step 3 .*No space left on device"):
                save_step(root, 3, keep_last=2)
        assert not [path for path in root.iterdir() if path.name.startswith("step-3.tmp")]
        for path in checkpoint.candidates(root):
            assert_holds_step(path, int(path.name[-1]))
        assert {"step-1", "step-2"} <= {path.name for path in root.iterdir()}


def test_a_full_disk_is_named_although_torch_hides_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(dcp_io._HashedStream, "write", full)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: No space left on device"):
        save_step(root, 3)
    assert {path.name for path in root.iterdir()} == {"step-1", "step-2", "latest"}
    assert_holds_step(root / "step-2", 2)


def test_a_file_that_may_not_grow_is_named(root: Path) -> None:
    tensors = {"big": torch.zeros(1 << 18)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"step-3\.tmp-.*__0_0\.distcp: File too large"):
            checkpoint.save(root, 3, tensors, {}, config={}, provenance={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name for path in root.iterdir()} == {"step-1", "step-2", "latest"}
    checkpoint.save(root, 3, tensors, {}, config={}, provenance={})


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file.*(Not a directory|File exists)"):
        checkpoint.save(tmp_path / "file", 1, tensors_at(1), {}, config={}, provenance={})
