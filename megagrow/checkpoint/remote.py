"""Folders that are reached through fsspec: object stores and other machines' disks, by URL.

    s3://bucket/run   gs://bucket/run   memory://run        RemotePath, with what checkpoints need of pathlib.Path
    /local/run        file:///local/run                     Path

Remote folders are not taken to have an atomic rename, nor to know folders that are empty. Only FileNotFoundError means
that something is not there: a store that is busy, or wants credentials, has given no answer, which is an OSError here.
(fsspec's own `exists`, `isfile` and `isdir` answer "no" then.)
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

import fsspec

from megagrow.errors import CheckpointError, Damaged, Preempted

SEPARATOR = "://"
LOCAL = ("file", "local")
MISSING = (FileNotFoundError, NotADirectoryError)  # the latter for what would lie in a file


class RemotePath:
    """A file or folder by its URL.

    Attributes:
        filesystem: fsspec's.
        key: its name there.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self.filesystem, self.key = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise CheckpointError(f"{url}: {error}; install what fsspec needs for it, or use a local folder") from None

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"RemotePath({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "RemotePath":
        """All but the last part."""
        return RemotePath(self.url.rpartition("/")[0])

    def with_name(self, name: str) -> "RemotePath":
        """Another file or folder of the same parent."""
        return self.parent / name

    def absolute(self) -> "RemotePath":
        """Itself."""
        return self

    def exists(self) -> bool:
        """Whether there is a file or folder."""
        return self._kind() is not None

    def is_file(self) -> bool:
        """Whether it is a file."""
        return self._kind() == "file"

    def is_dir(self) -> bool:
        """Whether it is a folder, with something in it."""
        return self._kind() == "directory"

    def iterdir(self) -> Iterator["RemotePath"]:
        """What is in the folder; nothing where there is none."""
        self.filesystem.invalidate_cache()
        names = []
        with self._os_errors(), suppress(*MISSING):
            names = self.filesystem.ls(self.key, detail=False)
        return iter([self / str(name).rstrip("/").rpartition("/")[2] for name in names])

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Makes the folder where the store knows empty ones."""
        with self._os_errors():
            self.filesystem.makedirs(self.key, exist_ok=True)

    def open(self, mode: str) -> IO[Any]:
        """As a binary file."""
        with self._os_errors():
            return self.filesystem.open(self.key, mode)

    def read_bytes(self) -> bytes:
        """The whole file."""
        with self._os_errors():
            return bytes(self.filesystem.cat_file(self.key))

    def num_bytes(self) -> int:
        """Size of the file."""
        self.filesystem.invalidate_cache()
        with self._os_errors():
            return int(self.filesystem.size(self.key))

    def unlink(self) -> None:
        """Deletes the file."""
        with self._os_errors():
            self.filesystem.rm_file(self.key)

    def rmdir(self) -> None:
        """Deletes the folder where the store knows empty ones."""
        if self.is_dir():
            with self._os_errors():
                self.filesystem.rmdir(self.key)

    def move(self, target: "RemotePath") -> None:
        """Copies the folder and deletes it."""
        with self._os_errors():
            self.filesystem.mv(self.key, target.key, recursive=True)

    def _kind(self) -> str | None:
        """`file`, `directory`, or None where there is nothing."""
        with self._os_errors(), suppress(*MISSING):
            return str(self.filesystem.info(self.key)["type"])
        return None

    @contextmanager
    def _os_errors(self) -> Iterator[None]:
        """Whatever fsspec raises becomes an OSError that names the URL; what is missing stays FileNotFoundError."""
        try:
            yield
        except (*MISSING, Preempted):
            raise
        except Exception as error:
            reason = isinstance(error, OSError) and error.strerror
            text = " ".join(str(error).split())
            raise OSError(errno.EIO, reason or f"{type(error).__name__}: {text}", self.url) from error


def as_path(place: Path | str) -> Path:
    """A local path for a path or a file:// URL; for any other URL a RemotePath, which passes for a Path here.

    Raises:
        CheckpointError: fsspec does not know the protocol, or lacks a package for it.
    """
    if not isinstance(place, str):
        return place
    protocol, separator, rest = place.partition(SEPARATOR)
    if not separator:
        return Path(place)
    return Path(rest) if protocol in LOCAL else cast(Path, RemotePath(place))


def remote(path: Path) -> RemotePath | None:
    """The path, if it is remote."""
    place: object = path
    return place if isinstance(place, RemotePath) else None


def num_bytes(path: Path) -> int:
    """Size of a file."""
    place = remote(path)
    return path.stat().st_size if place is None else place.num_bytes()


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """What an OSError in reading a checkpoint's file is: damage where the file is missing, else nothing is proven."""
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MISSING):
        return Damaged(f"{path}: {reason}")
    return CheckpointError(f"{path}: {reason}; start again, or move this checkpoint away to use an older one")
