"""A staged folder is there whole or not at all, and only its own leftovers are removed."""

import errno
import os

import pytest

from megagrow.checkpoint import staged
from megagrow.checkpoint.staged import StagedFolder, check_free
from megagrow.errors import CheckpointError


def fill(folder: StagedFolder, text: str) -> None:
    folder.start()
    (folder.temporary / "sub").mkdir()
    (folder.temporary / "sub" / "file").write_text(text)


def test_nothing_is_there_before_publishing(tmp_path) -> None:
    folder = StagedFolder(tmp_path / "a" / "b")
    fill(folder, "new")
    assert not folder.path.exists()
    folder.publish()
    assert [path.name for path in folder.path.parent.iterdir()] == ["b"]
    assert (folder.path / "sub" / "file").read_text() == "new"


def test_what_was_there_is_replaced_whole(tmp_path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "old").touch()
    folder = StagedFolder(tmp_path / "b", overwrite=True)
    fill(folder, "new")
    assert os.listdir(tmp_path / "b") == ["old"]
    folder.publish()
    assert os.listdir(tmp_path / "b") == ["sub"]
    assert os.listdir(tmp_path) == ["b"]


def test_a_discarded_folder_leaves_nothing(tmp_path) -> None:
    folder = StagedFolder(tmp_path / "b")
    folder.discard()
    fill(folder, "new")
    folder.discard()
    assert os.listdir(tmp_path) == []


def test_only_leftovers_of_the_same_folder_are_removed(tmp_path) -> None:
    others = [
        "b.tmp-01234567x",
        "b.tmp-mine",
        "c.tmp-01234567",
        "b.trash-0123456",
        "xb.tmp-01234567",
    ]
    for name in ["b.tmp-01234567", "b.trash-89abcdef", *others]:
        (tmp_path / name).mkdir()
    folder = StagedFolder(tmp_path / "b")
    fill(folder, "new")
    folder.publish()
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "b"])


def test_two_that_fill_one_folder_do_not_disturb_each_other(tmp_path) -> None:
    first, second = StagedFolder(tmp_path / "b"), StagedFolder(tmp_path / "b")
    fill(first, "first")
    fill(second, "second")
    second.publish()
    with pytest.raises(CheckpointError, match="b: something was put there meanwhile"):
        first.publish()
    first.discard()
    assert (tmp_path / "b/sub/file").read_text() == "second"
    assert os.listdir(tmp_path) == ["b"]


def test_what_is_put_there_meanwhile_stays(tmp_path) -> None:
    folder = StagedFolder(tmp_path / "b")
    fill(folder, "new")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/thesis.tex").touch()
    with pytest.raises(CheckpointError, match="b: something was put there meanwhile"):
        folder.publish()
    assert os.listdir(tmp_path / "b") == ["thesis.tex"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_death_while_it_is_replaced_costs_nothing(tmp_path, monkeypatch, overwrite: bool) -> None:
    class Died(BaseException):
        pass

    def die_at_the_third(source, target) -> None:
        renames.append(target)
        if len(renames) == 3:
            raise Died
        rename(source, target)

    (tmp_path / "b").mkdir()
    (tmp_path / "b/old").touch()
    renames, rename, folder = [], os.rename, StagedFolder(tmp_path / "b", overwrite=True)
    fill(folder, "new")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", die_at_the_third)  # the first is refused, the second moves the old one away
        with pytest.raises(Died):
            folder.publish()
    assert not (tmp_path / "b").exists()
    folder._unlock()  # as the end of a process does
    after = StagedFolder(tmp_path / "b", overwrite)
    if overwrite:
        fill(after, "newer")
    else:
        with pytest.raises(CheckpointError, match="b: is not empty"):
            after.start()
    assert os.listdir(tmp_path / "b") == ["old"]
    after.discard()
    assert os.listdir(tmp_path) == ["b"]


def test_a_file_system_without_locks_loses_nothing(tmp_path, monkeypatch) -> None:
    def unknown(descriptor: int, operation: int) -> None:
        raise OSError(errno.EBADF, "as NFS says of folders")

    monkeypatch.setattr(staged.fcntl, "flock", unknown)
    first, second = StagedFolder(tmp_path / "b"), StagedFolder(tmp_path / "b")
    fill(first, "first")
    fill(second, "second")
    first.publish()
    assert (tmp_path / "b/sub/file").read_text() == "first"


def test_syncing_comes_before_the_rename(tmp_path, monkeypatch) -> None:
    calls = []
    fsync, rename = os.fsync, os.rename
    folder = StagedFolder(tmp_path / "b")
    fill(folder, "new")

    def noted_fsync(descriptor: int) -> None:
        calls.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        fsync(descriptor)

    def noted_rename(source, target) -> None:
        calls.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    folder.publish()
    name = folder.temporary.name
    assert sorted(calls[:3]) == [name, f"{name}/sub", f"{name}/sub/file"]
    assert calls[3:] == ["rename", "."]


def test_a_name_that_is_taken_is_refused(tmp_path) -> None:
    check_free(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    check_free(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="is not empty"):
        check_free(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "link"):
        with pytest.raises(CheckpointError, match="is not a folder"):
            check_free(tmp_path / name)
