"""The shards of a folder that is being made: one file each, beside `identity.json`, which says of what.

Every file appears by a rename, so that a shard whose file is there is whole.
"""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megagrow.data.files import os_errors_as_data_errors, write_atomically
from megagrow.errors import DataError
from megagrow.salt.records import Wording, check_identity, field, read_object, read_section, to_json


class WorkFolder:
    """The finished shards of something that is under way.

    Args:
        folder: what the work is for; its shards lie in `folder/shards`.
        suffix: of the shards' files.
        words: for messages.
    """

    def __init__(self, folder: Path, suffix: str, words: Wording) -> None:
        self.path, self.suffix, self.words = folder / "shards", suffix, words
        self.identity_file = self.path / "identity.json"

    def check(self, identity: Any, shard_size: int) -> None:
        """Raises DataError when the shards that are there belong to other work; writes nothing."""
        record = self.record()
        if record is None:
            if self.path.exists() and any(self.path.glob(f"[!.]*{self.suffix}")):
                raise DataError(
                    f"{self.identity_file}: no such file beside the shards, which may be of any corpus; "
                    f"remove {self.path} or choose another --output"
                )
            return
        size = field(record, "shard_size", int, self.identity_file, self.words)
        found = read_section(type(identity), record, "identity", self.identity_file, self.words)
        check_identity(found, identity, self.identity_file, self.words)
        if size != shard_size:
            raise DataError(
                f"{self.identity_file}: shard_size is {size}, this {self.words.work} has {shard_size} (whole "
                f"batches); use the earlier batch size, or remove {self.path} to start again"
            )

    def record(self) -> dict[str, Any] | None:
        """What `begin` has written; None before."""
        return read_object(self.identity_file, self.words) if self.identity_file.exists() else None

    def begin(self, identity: Any, shard_size: int, **more: Any) -> None:
        """Records what the shards belong to, unless that has been done; `more` is written beside it."""
        if not self.identity_file.exists():
            content = {"identity": asdict(identity), "shard_size": shard_size, **more}
            write_atomically(self.identity_file, to_json(content))

    def finished(self, count: int) -> list[bool]:
        """Which of the first `count` shards are there; one look at the folder, of which there may be many thousands."""
        names = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
        return [self.file(shard).name in names for shard in range(count)]

    def file(self, shard: int, suffix: str | None = None) -> Path:
        """Where a shard lies, or what is written beside it under another suffix."""
        return self.path / f"{shard:08d}{self.suffix if suffix is None else suffix}"

    def remove(self, *suffixes: str) -> None:
        """Removes identity, files of these suffixes and what a kill left half written, and the folder unless something
        else is in it.
        """
        kinds, unfinished = "|".join(map(re.escape, suffixes)), r"\.tmp-[0-9a-f]{8}"
        number = "[0-9]{8,}"
        own_file = re.compile(
            rf"(identity\.json|{number}({kinds}))({unfinished})?|{number}{re.escape(self.suffix)}{unfinished}"
        )
        with os_errors_as_data_errors(self.path):
            names = [path.name for path in self.path.iterdir()] if self.path.is_dir() else []
            own = [name for name in names if own_file.fullmatch(name)]
            for name in own:
                (self.path / name).unlink()
            if own and own == names:
                self.path.rmdir()


def remove_unfinished(folder: Path, *names: str) -> None:
    """Removes what a kill has left of files of these names that were being written."""
    for name in names:
        for path in folder.glob(f"{name}.tmp-????????"):
            with os_errors_as_data_errors(path):
                path.unlink()
