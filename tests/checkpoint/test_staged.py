"""A staged folder is there whole or not at all, and only its own leftovers are removed."""

import os

import pytest

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
    folder = StagedFolder(tmp_path / "b")
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
