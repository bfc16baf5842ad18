"""A folder that appears under its name complete or not at all.

    NAME.tmp-TOKEN/    is filled, locked by its process  ->  fsync  ->  rename to NAME/
    NAME.trash-TOKEN/  what NAME/ was before, where it is to be replaced; deleted once the new one is there

A process that dies on the way leaves other names behind; the next one to write the folder removes them, but not those
of processes that live. Where both names of one token are left, death came between the two renames of a replacement:
NAME/ gets back what it was.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from megagrow.data.files import fsync_path
from megagrow.errors import CheckpointError

_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


class StagedFolder:
    """A folder on its way to `path`.

    Args:
        path: where it will be.
        overwrite: replace what is there; else only an empty folder.

    Attributes:
        temporary: where it is filled, beside `path`; exists from `start` on.
    """

    def __init__(self, path: Path | str, overwrite: bool = False) -> None:
        self.path, self.overwrite = Path(path), overwrite
        self._token = secrets.token_hex(4)
        self.temporary = _beside(self.path, "tmp", self._token)
        self._lock: int | None = None

    def start(self) -> None:
        """Makes the temporary folder, and clears away what killed processes have left.

        Raises:
            CheckpointError: something is there that is not to be replaced.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _clear_up(self.path)
        if not self.overwrite:
            check_free(self.path)
        while not self.temporary.exists():  # who clears up may have seen it before it was locked
            self.temporary.mkdir()
            self._lock = _lock(self.temporary, wait=True)

    def publish(self) -> None:
        """Gives the folder its name; what was there goes, if it is to be replaced.

        Raises:
            CheckpointError: something has been put there since `start`; it stays.
        """
        for parent, _, files in os.walk(self.temporary):
            for name in files:
                fsync_path(Path(parent, name))
            fsync_path(Path(parent))
        try:
            os.rename(self.temporary, self.path)  # an empty folder gives way
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            if not self.overwrite:
                raise CheckpointError(
                    f"{self.path}: something was put there meanwhile; move it away or choose another name"
                ) from error
            self._replace()
        fsync_path(self.path.parent)
        shutil.rmtree(_beside(self.path, "trash", self._token), ignore_errors=True)
        self._unlock()

    def discard(self) -> None:
        """Removes what was not published; never fails."""
        shutil.rmtree(self.temporary, ignore_errors=True)
        self._unlock()

    def _replace(self) -> None:
        trash = _beside(self.path, "trash", self._token)
        os.rename(self.path, trash)
        try:
            os.rename(self.temporary, self.path)
        except OSError:
            os.rename(trash, self.path)
            raise

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def check_free(path: Path) -> None:
    """Raises CheckpointError unless nothing, or an empty folder, is at `path`."""
    if path.is_dir():
        if any(path.iterdir()):
            raise CheckpointError(f"{path}: is not empty; remove it or choose another name")
    elif os.path.lexists(path):
        raise CheckpointError(f"{path}: is not a folder; choose another name")


def cannot_be_written(path: Path | str, error: OSError) -> CheckpointError:
    """What an OSError in filling a folder is to the user."""
    reason = error.strerror or type(error).__name__
    return CheckpointError(f"{path}: cannot be written ({reason}); free space or choose another")


def _clear_up(path: Path) -> None:
    """Removes what killed processes have left; what one of them has moved away is put back first."""
    for token, temporary in _left(path, "tmp"):
        lock = _lock(temporary, wait=False)
        if lock is None:
            continue
        trash = _beside(path, "trash", token)
        if trash.exists() and not os.path.lexists(path):
            os.rename(trash, path)
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)
    for token, trash in _left(path, "trash"):
        if not _beside(path, "tmp", token).exists():  # else its process may be about to put it back
            shutil.rmtree(trash, ignore_errors=True)


def _lock(folder: Path, wait: bool) -> int | None:
    """A descriptor that locks the folder until it is closed, or its process ends.

    None: another process has the lock, or the folder is gone, or the file system has no locks. Then nobody can tell a
    folder that is being filled from one that was left, and both stay.
    """
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            os.close(descriptor)
            raise
        return descriptor
    return None


def _beside(path: Path, kind: str, token: str) -> Path:
    return path.with_name(f"{path.name}.{kind}-{token}")


def _left(path: Path, kind: str) -> Iterator[tuple[str, Path]]:
    """Token and place of the folders of that kind."""
    name = re.compile(rf"{re.escape(path.name)}\.{kind}-([0-9a-f]{{8}})")
    for sibling in list(path.parent.iterdir()):
        if found := name.fullmatch(sibling.name):
            yield found[1], sibling
