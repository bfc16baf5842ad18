"""Tests megagrow/data/files.py: a file is whole or as it was."""

import os
from pathlib import Path
from typing import Any

import pytest

from megagrow.data.files import os_errors_as_data_errors, write_atomically
from megagrow.errors import DataError


def test_written_whole_into_a_new_folder(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a/b/c.bin", b"content")
    assert (tmp_path / "a/b/c.bin").read_bytes() == b"content"
    assert os.listdir(tmp_path / "a/b") == ["c.bin"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "c.bin"
    write_atomically(path, b"old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(DataError, match="c.bin: No space left on device"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["c.bin"]


def test_errors_name_the_file_that_failed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent: No such file"), os_errors_as_data_errors("corpus"):
        (tmp_path / "absent").read_bytes()
    with pytest.raises(DataError, match="corpus: ConnectionError"):  # noqa: SIM117
        with os_errors_as_data_errors("corpus"):
            raise ConnectionError
