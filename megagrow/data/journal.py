"""A writer of documents that goes on where a killed process was.

Beside PREFIX.bin.tmp, which grows, it keeps PREFIX.lengths.tmp (int32, one per document) and PREFIX.journal.tmp: how
much of both is good, with hashes, and which input that came from. Nothing is trusted before its hash has been compared,
and the finished dataset has the same bytes as one that was written without a stop.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megagrow.data.description import Description
from megagrow.data.files import os_errors_as_data_errors, sweep_leftovers, write_atomically
from megagrow.data.indexed import IndexedWriter
from megagrow.data.output import temporary, tokens_path
from megagrow.data.records import Batch
from megagrow.errors import DataError, named
from megagrow.json_file import parse_object

SECONDS_BETWEEN_ENTRIES = 10.0
MAX_EXAMPLES = 5  # of lines that were left out
_BLOCK = 1 << 24
_HASHED_AHEAD = 16  # batches that wait to be hashed


@dataclass(frozen=True)
class Counts:
    """What a pass over a corpus left out."""

    num_empty: int = 0
    num_bad: int = 0
    bad_examples: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Entry:
    """What PREFIX.journal.tmp says: how far the dataset has come."""

    settings: str  # hash of what decides the output beside the input's content
    num_batches: int = 0  # of the input, see `records.read_batches`
    num_documents: int = 0
    num_token_bytes: int = 0
    input_sha256: str = ""
    lengths_sha256: str = ""
    tokens_sha256: str = ""
    num_empty: int = 0
    num_bad: int = 0
    bad_examples: list[str] = field(default_factory=list)


class JournaledWriter:
    """Writes documents batch by batch; every few seconds what is there is made durable and entered in the journal.

    Left by an error or killed, the next one with the same settings and input goes on after the last entry.

    Args:
        prefix: of the dataset.
        dtype: of the tokens.
        settings: hash of what decides the output beside the input's content.
        read: begins to read the input.

    Attributes:
        done: what an earlier process has done.
        batches: of the input, that are still to be added.
        position: bytes of the input, as stored, that were read for what an earlier process has done.
        problem: why an earlier process' work is not used; empty if it is, or there is none.

    Raises:
        DataError: the folder cannot be written, or another process is writing this dataset.
    """

    def __init__(
        self, prefix: str | Path, dtype: DTypeLike, settings: str, read: Callable[[], Iterator[Batch]]
    ) -> None:
        self._lengths_path, self._journal_path = Path(f"{prefix}.lengths.tmp"), Path(f"{prefix}.journal.tmp")
        self.problem, self.batches, self.position, lengths = "", read(), 0, b""
        self.writer = IndexedWriter(prefix, dtype, keep=True)  # first of all: nobody else writes what is read now
        try:
            sweep_leftovers(self._journal_path)
            lengths = self._take_up(settings, temporary(tokens_path(prefix)))
        except _Unusable as problem:
            self.problem, self.batches, self.position = str(problem), read(), 0
            self._begin(settings)
        except BaseException:
            self.writer.suspend()
            raise
        self.writer.resume(self.done.num_token_bytes, lengths)
        self.counts = Counts(self.done.num_empty, self.done.num_bad, self.done.bad_examples)
        self._num_batches, self._has_entry = self.done.num_batches, self.done.num_batches > 0
        self._pending, self._last = list[bytes](), time.monotonic()
        self._hashing, self._hashed = ThreadPoolExecutor(1), list[Future[None]]()  # beside the next batch's encoding
        with os_errors_as_data_errors(self._lengths_path):
            self._lengths_file = open(self._lengths_path, "ab")  # noqa: SIM115 (closed on leaving)
            self._lengths_file.truncate(len(lengths))

    def add(self, digest: Callable[[], bytes], tokens: NDArray[Any], lengths: list[int], counts: Counts) -> None:
        """Appends the documents of the next batch.

        Args:
            digest: gives that of the batch's records, see `digest_of`; called in a thread.
            tokens: [T] end to end.
            lengths: of the documents, summing to T.
            counts: what has been left out so far, this batch included.
        """
        self.writer.add_documents(tokens, lengths)
        of_lengths = np.asarray(lengths, "<i4").tobytes()
        if len(self._hashed) > _HASHED_AHEAD:
            self._hashed.pop(0).result()
        self._hashed.append(self._hashing.submit(self._hash, digest, of_lengths, tokens))
        self._pending.append(of_lengths)
        self.counts, self._num_batches = counts, self._num_batches + 1
        if time.monotonic() - self._last >= SECONDS_BETWEEN_ENTRIES:
            self._enter()
            self._last = time.monotonic()

    def close(self, description: Description, domains: bytes | None = None) -> None:
        """Commits the dataset, and forgets how it was made; after an error all of it is still there to go on with."""
        self._enter()
        self.writer.close(description, keep=True, domains=domains)
        self._forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self._has_entry:
            self.writer.suspend()
        elif kind is not None:
            self.writer.discard()
            self._forget()
        self._hashing.shutdown(cancel_futures=True)
        with suppress(OSError) if kind is not None else nullcontext():  # the first error is the one to tell
            self._lengths_file.close()

    def _hash(self, digest: Callable[[], bytes], of_lengths: bytes, tokens: NDArray[Any]) -> None:
        self._input.update(digest())
        self._lengths.update(of_lengths)
        self._tokens.update(tokens.astype(self.writer.dtype, copy=False).data)

    def _begin(self, settings: str) -> None:
        self.done = Entry(settings)
        self._input, self._lengths, self._tokens = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()

    def _take_up(self, settings: str, tokens: Path) -> bytes:
        """Reads what has been done, into the hashes; the lengths of its documents.

        Raises:
            _Unusable: it is not what the journal says, or not what is to be done now.
        """
        self._begin(settings)
        if not self._journal_path.exists():
            return b""
        done = _read_entry(self._journal_path)
        if done.settings != settings:
            raise _Unusable("tokenizer, options or names of inputs are others")
        for _ in range(done.num_batches):
            batch = next(self.batches, None)
            if batch is None:
                raise _Unusable("the input has changed since")
            self._input.update(digest_of(batch))
            self.position = batch.position
        lengths = _read(self._lengths_path, 4 * done.num_documents, self._lengths, keep=True)
        _read(tokens, done.num_token_bytes, self._tokens)
        for what, expected, found in (
            ("the input", done.input_sha256, self._input),
            (str(self._lengths_path), done.lengths_sha256, self._lengths),
            (str(tokens), done.tokens_sha256, self._tokens),
        ):
            if expected != found.hexdigest():
                raise _Unusable(f"{what} has changed since")
        if done.num_token_bytes != np.frombuffer(lengths, "<i4").sum(dtype=np.int64) * self.writer.dtype.itemsize:
            raise _Unusable(f"{self._journal_path}: num_token_bytes is not what the lengths sum to")
        self.done = done
        return lengths

    def _enter(self) -> None:
        with os_errors_as_data_errors(self._lengths_path):
            self._lengths_file.write(b"".join(self._pending))
            self._lengths_file.flush()
            os.fsync(self._lengths_file.fileno())
        for hashed in self._hashed:
            hashed.result()
        self._pending.clear()
        self._hashed.clear()
        entry = Entry(
            self.done.settings,
            self._num_batches,
            self.writer.num_documents,
            self.writer.sync(),
            self._input.hexdigest(),
            self._lengths.hexdigest(),
            self._tokens.hexdigest(),
            **asdict(self.counts),
        )
        write_atomically(self._journal_path, json.dumps(asdict(entry)).encode())
        self._has_entry = True

    def _forget(self) -> None:
        for path in (self._journal_path, self._lengths_path):
            path.unlink(missing_ok=True)


class _Unusable(Exception):
    """Why an earlier process' work cannot be gone on with."""


def digest_of(batch: Batch) -> bytes:
    """sha256 of a batch's records, which says where one ends and the next begins."""
    digest = hashlib.sha256(repr([len(record) for record in batch.records]).encode())
    digest.update(b"".join(batch.records))
    return digest.digest()


def _read_entry(path: Path) -> Entry:
    try:
        values = parse_object(path.read_bytes(), path, DataError, "it is not gone on with")
    except OSError as error:
        raise _Unusable(f"{path} cannot be read ({error.strerror})") from None
    except DataError as problem:
        raise _Unusable(str(problem)) from None
    for name in sorted(values.keys() ^ {each.name for each in fields(Entry)}):
        raise _Unusable(f"{path}: {named(name)} is {'unknown' if name in values else 'missing'}")
    entry = Entry(**values)
    for each in fields(Entry):
        value = getattr(entry, each.name)
        if type(value) is not (each.type if isinstance(each.type, type) else list):
            raise _Unusable(f"{path}: {each.name} is damaged")
        if isinstance(value, int) and value < 0:
            raise _Unusable(f"{path}: {each.name} is negative")
    if len(entry.bad_examples) != min(entry.num_bad, MAX_EXAMPLES) or set(map(type, entry.bad_examples)) - {str}:
        raise _Unusable(f"{path}: bad_examples are not those of num_bad lines")
    return entry


def _read(path: Path, num_bytes: int, digest: Any, keep: bool = False) -> bytes:
    """Hashes the first `num_bytes` of a file, and returns them if they are to be kept."""
    kept = []
    try:
        if path.stat().st_size < num_bytes:
            raise _Unusable(f"{path} is shorter than it was")
        with open(path, "rb") as file:
            while num_bytes > 0:
                block = file.read(min(_BLOCK, num_bytes))
                digest.update(block)
                num_bytes -= len(block)
                kept.append(block if keep else b"")
    except OSError as error:
        raise _Unusable(f"{path} cannot be read ({error.strerror})") from None
    return b"".join(kept)
