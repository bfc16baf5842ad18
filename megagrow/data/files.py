"""Files that are either whole or absent: temporary names, fsync, rename."""

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megagrow.errors import DataError


@contextmanager
def os_errors_as_data_errors(path: str | Path) -> Iterator[None]:
    """Turn an OSError (no such file, no space …) into a DataError that names `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise DataError(f"{error.filename or path}: {reason}") from error


@contextmanager
def os_errors_name(path: str | Path) -> Iterator[None]:
    """Write `path` into an OSError that names no file: those of open files (write, fsync) do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def fsync_path(path: Path) -> None:
    """Make a file, or the names in a folder, durable (a rename survives a power cut only after this)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with os_errors_name(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_folder(path: str | Path) -> None:
    """Make the folder of a file that is written later. Raises DataError when nothing can be written there."""
    path = Path(path)
    with os_errors_as_data_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def sweep_leftovers(path: str | Path) -> None:
    """Removes what killed processes left of `write_atomically`; only for whom nobody else writes `path` meanwhile.

    Raises DataError when the folder cannot be read or written.
    """
    path = Path(path)
    pattern = re.compile(re.escape(path.name) + r"\.tmp-[0-9a-f]{8}")
    with os_errors_as_data_errors(path), os.scandir(path.parent) as entries:
        for entry in entries:
            if pattern.fullmatch(entry.name):
                Path(entry.path).unlink(missing_ok=True)


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the new one, never a part.

    Raises DataError when the folder cannot be made or written.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")  # several ranks may write one file at once
    with os_errors_as_data_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_path(path.parent)
