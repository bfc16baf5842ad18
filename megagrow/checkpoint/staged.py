"""A folder that appears under its name complete or not at all.

    NAME.tmp-*/    is filled  ->  fsync  ->  rename to NAME/
    NAME.trash-*/  what NAME/ was before, being deleted

A process that dies on the way leaves other names behind; the next one to write the folder removes
them.
"""

import os
import re
import secrets
import shutil
from pathlib import Path

from megagrow.data.files import fsync_path
from megagrow.errors import CheckpointError


class StagedFolder:
    """A folder on its way to `path`.

    Attributes:
        path: where it will be.
        temporary: where it is filled, beside `path`; exists from `start` on.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.temporary = _beside(self.path, "tmp")

    def start(self) -> None:
        """Makes the temporary folder, and removes those that killed processes have left."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(self.path, "tmp")
        self.temporary.mkdir()

    def publish(self) -> None:
        """Gives the folder its name; what was there goes."""
        for parent, _, files in os.walk(self.temporary):
            for name in files:
                fsync_path(Path(parent, name))
            fsync_path(Path(parent))
        if self.path.exists():
            os.rename(self.path, _beside(self.path, "trash"))
        os.rename(self.temporary, self.path)
        fsync_path(self.path.parent)
        _remove_leftovers(self.path, "trash")

    def discard(self) -> None:
        """Removes what was not published; never fails."""
        shutil.rmtree(self.temporary, ignore_errors=True)


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


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f"{path.name}.{kind}-{secrets.token_hex(4)}")


def _remove_leftovers(path: Path, kind: str) -> None:
    leftover = re.compile(rf"{re.escape(path.name)}\.{kind}-[0-9a-f]{{8}}")
    for sibling in path.parent.iterdir():
        if leftover.fullmatch(sibling.name):
            shutil.rmtree(sibling, ignore_errors=True)
