"""Checkpoints in folders that fsspec reaches: the same values and checks, without a rename."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import fsspec
import pytest
import torch
import torch.distributed as dist
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from megagrow import checkpoint
from megagrow.checkpoint import store
from megagrow.checkpoint.remote import RemotePath, as_path
from megagrow.checkpoint.saver import Saver
from megagrow.checkpoint.source import open_source
from megagrow.config import CheckpointConfig, RunConfig
from megagrow.errors import CheckpointError, ConfigError
from megagrow.train import run
from tests.checkpoint.samples import assert_holds_step, empty_tensors, save_step, tensors_at
from tests.ranks import run_ranks
from tests.train.runs import make_config, make_corpus, metrics

ROOT = "memory://bucket/run"


class Died(BaseException):
    """The process ended here."""


@pytest.fixture
def root() -> Iterator[Path]:
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield as_path(ROOT)
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def names_in(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def test_which_paths_are_remote(tmp_path: Path) -> None:
    assert as_path("runs/x") == Path("runs/x") and as_path(tmp_path) is tmp_path
    assert as_path(f"file://{tmp_path}") == tmp_path
    bucket = as_path("memory://bucket/run/")
    assert isinstance(bucket, RemotePath) and str(bucket / "step-1") == "memory://bucket/run/step-1"
    assert ((bucket / "a").parent, (bucket / "a").name, bucket.with_name("b").name) == (bucket, "a", "b")
    with pytest.raises(CheckpointError, match="nosuch://x: .*nosuch.*; install what fsspec needs"):
        as_path("nosuch://x")


def test_what_is_saved_is_found_kept_verified_and_loaded(root: Path) -> None:
    assert checkpoint.candidates(root) == []
    for step in (1, 2, 3, 4):
        assert_holds_step(save_step(root, step, keep_last=2, keep_every=3), step)
    assert names_in(root) == {"step-4", "step-3", "latest"}
    save_step(root, 5, keep_last=1, keep_every=3)
    assert names_in(root) == {"step-5", "step-3", "latest"}
    assert [path.name for path in checkpoint.candidates(root)] == ["step-5", "step-3"]
    assert checkpoint.verify(root / "step-3").step == 3
    assert checkpoint.read_full(root / "step-3", ["norm"])["norm"].eq(3).all()


@pytest.mark.parametrize("is_remote", [False, True])
def test_a_folder_that_is_cleared_takes_the_same_step_again(root: Path, tmp_path: Path, is_remote: bool) -> None:
    folder = root if is_remote else tmp_path / "run"
    store.clear(folder)
    for step in (1, 2):
        save_step(folder, step)
    store.clear(folder)
    assert checkpoint.candidates(folder) == [] and names_in(folder) == set()
    assert_holds_step(save_step(folder, 2), 2)
    assert checkpoint.candidates(folder) == [folder / "step-2"]


def test_a_local_file_url_is_a_local_folder(tmp_path: Path) -> None:
    save_step(cast(Path, f"file://{tmp_path}"), 1)
    assert_holds_step(tmp_path / "step-1", 1)


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "manifest.json", "manifest.sha256"])
def test_damage_is_named(root: Path, file: str) -> None:
    path = save_step(root, 2) / file
    raw = path.read_bytes()
    for wrong in (raw[:-1], bytes([raw[0] ^ 1]) + raw[1:]):
        with path.open("wb") as stream:
            stream.write(wrong)
        with pytest.raises(CheckpointError, match=rf"memory://bucket/run/step-2.*{file}"):
            checkpoint.load(root / "step-2", empty_tensors())
    path.unlink()
    with pytest.raises(CheckpointError, match=file):
        checkpoint.load(root / "step-2", empty_tensors())


def test_an_intact_step_is_not_written_again_and_a_damaged_one_is_set_aside(root: Path) -> None:
    path = save_step(root, 2)
    with pytest.raises(CheckpointError, match="step-2 exists and is intact"):
        save_step(root, 2)
    with (path / "__0_0.distcp").open("wb") as stream:
        stream.write(b"")
    assert_holds_step(save_step(root, 2), 2)
    assert len([name for name in names_in(root) if name.startswith("step-2.damaged-")]) == 1


def count_calls(monkeypatch: pytest.MonkeyPatch, die_at: int) -> list[str]:
    """Lets the k-th file that is written or deleted be the last thing that a process tries; returns them."""
    calls: list[str] = []

    def counted(name: str) -> None:
        original = getattr(MemoryFileSystem, name)

        def call(self: MemoryFileSystem, path: str, *args: Any, **kwargs: Any) -> Any:
            if name == "rm_file" or (kwargs.get("mode") or args[0]) != "rb":
                calls.append(path.rpartition("/")[2])
                if len(calls) == die_at or (die_at and len(calls) > die_at):
                    raise Died
            return original(self, path, *args, **kwargs)

        monkeypatch.setattr(MemoryFileSystem, name, call)

    counted("_open")
    counted("rm_file")
    return calls


def calls_of(save: Callable[[], Any], die_at: int = 0) -> list[str]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        calls = count_calls(monkeypatch, die_at)
        try:
            save()
        except (Died, CheckpointError):
            assert die_at
        return list(calls)


def test_the_manifest_is_written_last_and_deleted_first(root: Path) -> None:
    save_step(root, 1)
    calls = calls_of(lambda: save_step(root, 2, keep_last=1))
    assert calls[0] == "__0_0.distcp"
    commit = calls.index("manifest.json")
    assert calls[commit - 1 : commit + 3] == ["manifest.sha256", "manifest.json", "latest", "manifest.json"]
    assert {".metadata", "manifest.sha256", "__0_0.distcp"} == set(calls[commit + 3 :])


def test_death_at_any_call_leaves_complete_checkpoints_only(root: Path) -> None:
    def prepare() -> None:
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]
        save_step(root, 1)
        save_step(root, 2)

    prepare()
    num_calls = len(calls_of(lambda: save_step(root, 3, keep_last=2)))
    survivors = set()
    for die_at in range(1, num_calls + 1):
        prepare()
        calls_of(lambda: save_step(root, 3, keep_last=2), die_at)
        found = [int(path.name[-1]) for path in checkpoint.candidates(root)]
        assert found in ([2, 1], [3, 2, 1], [3, 2])
        for step in found:
            assert_holds_step(root / f"step-{step}", step)
        save_step(root, 4)
        assert names_in(root) == {*(f"step-{step}" for step in [4, *found]), "latest"}
        survivors.add(tuple(found))
    assert survivors == {(2, 1), (3, 2, 1), (3, 2)}


def test_only_dead_saves_are_no_checkpoint(root: Path) -> None:
    calls_of(lambda: save_step(root, 1), 2)
    assert names_in(root) == {"step-1"} and checkpoint.candidates(root) == []


class Busy(MemoryFileSystem):
    """A store that answers some questions with an error; what fsspec makes of it is that nothing is there."""

    protocol = "busy"
    exists, isfile, isdir = (getattr(fsspec.AbstractFileSystem, name) for name in ("exists", "isfile", "isdir"))
    error: Exception | None = None
    number = asked = 0  # which of the questions has no answer (0: none has one), and how many were asked

    @classmethod
    def fail(cls, error: Exception | None, number: int = 0) -> None:
        cls.error, cls.number, cls.asked = error, number, 0

    def _answer(self) -> None:
        Busy.asked += 1
        if Busy.error is not None and Busy.number in (0, Busy.asked):
            raise Busy.error

    def info(self, path: str, **kwargs: Any) -> Any:
        self._answer()
        return super().info(path, **kwargs)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        self._answer()
        return super().ls(path, detail, **kwargs)


@pytest.fixture
def busy(root: Path) -> Iterator[Path]:
    fsspec.register_implementation("busy", Busy, clobber=True)
    yield as_path("busy://bucket/run")
    Busy.fail(None)


BUSY, NO_CREDENTIALS = OSError("503 SlowDown"), RuntimeError("Unable to locate credentials")


@pytest.mark.parametrize("error", [BUSY, NO_CREDENTIALS], ids=["busy", "no credentials"])
def test_no_answer_is_not_an_empty_folder(busy: Path, error: Exception) -> None:
    for step in (1, 2):
        save_step(busy, step)
    Busy.fail(None)
    assert [path.name for path in checkpoint.candidates(busy)] == ["step-2", "step-1"]
    for number in range(Busy.asked + 1):
        Busy.fail(error, number)
        with pytest.raises(CheckpointError, match=r"busy://bucket/run.*(503 SlowDown|Unable to locate credentials)"):
            checkpoint.candidates(busy)
    Busy.fail(error)
    with pytest.raises(CheckpointError, match=r"busy://bucket/run: cannot be read.*(503|credentials)"):
        open_source("busy://bucket/run")


def test_no_answer_deletes_no_checkpoint(busy: Path) -> None:
    """Whichever question has no answer: the checkpoints from before stay whole, and so does one that is committed."""
    save_step(busy, 1)
    Busy.fail(None)
    save_step(busy, 2, keep_last=3)
    num_asked, failed = Busy.asked, 0
    assert num_asked > 5
    for number in range(1, num_asked + 1):
        before = [path.name for path in checkpoint.candidates(busy)]
        Busy.fail(BUSY, number)
        try:
            save_step(busy, number + 2, keep_last=3)
        except CheckpointError:
            failed += 1
            expected = before
        else:
            expected = [f"step-{number + 2}", *before]
        Busy.fail(None)
        found = [path.name for path in checkpoint.candidates(busy)]
        assert found in (expected, expected[:3]), number
        for name in found:
            checkpoint.verify(busy / name)
    assert failed


def test_no_answer_sets_no_checkpoint_aside(busy: Path) -> None:
    save_step(busy, 2)
    Busy.fail(None)
    with pytest.raises(CheckpointError, match="exists and is intact"):
        save_step(busy, 2)
    for number in range(1, Busy.asked + 1):
        Busy.fail(BUSY, number)
        with pytest.raises(CheckpointError):
            save_step(busy, 2)
        Busy.fail(None)
        assert names_in(busy) == {"step-2", "latest"}


class Objects(LocalFileSystem):
    """Stands for a store that several ranks see and that cannot rename."""

    protocol = ("objects",)

    def mv(self, path1: str, path2: str, **kwargs: Any) -> None:
        old, new = (Path(self._strip_protocol(path)) for path in (path1, path2))
        assert old.is_file(), "folders cannot be renamed"
        shutil.copy(old, new)
        old.unlink()


def save_and_load(root: str) -> bool:
    fsspec.register_implementation("objects", Objects, clobber=True)
    saver, tensors = Saver(dist.new_group(backend="gloo"), keep_last=1), empty_tensors()
    for step in (1, 2):
        saver.save(as_path(root), step, lambda step=step: store.snapshot(tensors_at(step), {"step": step}, {}, {}))
    saver.wait()
    (newest,) = checkpoint.candidates(as_path(root))
    state = checkpoint.load(newest, tensors)
    return state == {"step": 2} and all(torch.equal(tensors[name], tensor) for name, tensor in tensors_at(2).items())


def test_ranks_save_and_load_together(tmp_path: Path) -> None:
    assert run_ranks(save_and_load, 2, f"objects://{tmp_path}/run") == [True, True]


def test_a_run_resumes_from_a_url_and_another_begins_from_it(root: Path, tmp_path: Path) -> None:
    corpus, there = make_corpus(tmp_path), CheckpointConfig(interval=2, dir=ROOT)
    assert run(make_config(corpus, tmp_path / "run", checkpoint=there)) == 0
    assert not (tmp_path / "run/checkpoints").exists() and "step-6" in names_in(root)
    expected = metrics(tmp_path / "run")
    for path in (root / "step-6").iterdir():
        path.unlink()
    assert run(make_config(corpus, tmp_path / "run", checkpoint=there)) == 0
    assert metrics(tmp_path / "run") == expected
    source = open_source(ROOT)
    assert source.fetch("final_norm.weight").numel() == source.model.hidden_size
    with pytest.raises(CheckpointError, match=r"memory://bucket/nothing: no such folder"):
        open_source("memory://bucket/nothing")


def test_a_store_that_is_busy_for_a_moment_costs_a_run_no_checkpoint(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The second read of an item of the newest checkpoint has no answer: the run ends with 4, and loses no step."""
    config = make_config(make_corpus(tmp_path), tmp_path / "run", checkpoint=CheckpointConfig(interval=2, dir=ROOT))
    assert run(config) == 0
    before, open_file, reads = names_in(root), MemoryFileSystem._open, [0]

    def busy_once(self: MemoryFileSystem, path: str, *args: Any, **kwargs: Any) -> Any:
        reads[0] += path.endswith("step-6/__0_0.distcp")
        if reads[0] == 2:
            reads[0] += 1
            raise BUSY
        return open_file(self, path, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "_open", busy_once)
    assert run(config) == 4
    told = capfd.readouterr().err
    assert "step-6/__0_0.distcp" in told and "503 SlowDown" in told and "trying the one before" not in told
    assert names_in(root) == before
    assert run(config) == 0
    assert f"resuming from {ROOT}/step-6" in capfd.readouterr().err


def test_the_run_itself_stays_local() -> None:
    with pytest.raises(ConfigError, match=r"run\.dir=s3://x must be a local folder.*checkpoint\.dir"):
        RunConfig(dir="s3://x")
