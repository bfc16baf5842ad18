"""Raw records of text corpora: JSON lines and plain text, uncompressed, gzip or zstandard."""

import codecs
import gzip
import importlib
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import IO, Any, cast

import orjson

from megagrow.data.files import os_errors_as_data_errors
from megagrow.errors import DataError

_COMPRESSED = (".gz", ".zst")
_JSON = (".jsonl", ".ndjson", ".json")
_BATCH_BYTES = 256 << 10
_MAX_RECORD_BYTES = 256 << 20  # a larger one is a decompression bomb or not a text corpus
_SKIPPED_BYTES = 1 << 20  # at a time, of the rest of a record above that


class TooLong(bytes):
    """In the place of a record above the limit: says so, see `text_and_fields`."""


class BadRecord(Exception):
    """A record that is not what the format asks for; the message says why."""


@dataclass(frozen=True)
class Batch:
    """Consecutive records of one file: lines of a JSON lines file, or one whole text file."""

    path: str
    first_line: int  # of records[0], from 1
    records: list[bytes]
    is_json: bool
    position: int  # bytes of all input files, as stored, that were read up to here


def total_bytes(paths: Sequence[str | Path]) -> int:
    """Stored size of all input files.

    Raises DataError naming a path that is not a file, or whose name is that of a part of a JSON lines file.
    """
    for path in paths:
        if not Path(path).is_file():
            raise DataError(f"{path}: no such input file")
        _check_name(Path(path))
    return sum(Path(path).stat().st_size for path in paths)


def read_batches(paths: Sequence[str | Path], max_record_bytes: int | None = None) -> Iterator[Batch]:
    """The records of `paths` in order. Names decide, in any case: `.jsonl`, `.ndjson`, `.json` hold
    one JSON object per line, anything else is one document; `.gz` and `.zst` are decompressed.

    In the place of a record above the limit stands a bad one (`TooLong`), and its batch ends there.
    Raises DataError for a file that cannot be read or decompressed.
    """
    before, limit = 0, _MAX_RECORD_BYTES if max_record_bytes is None else max_record_bytes
    for path in map(Path, paths):
        yield from _read_file(path, before, limit)
        before += path.stat().st_size


def parse_record(record: bytes, is_json: bool, json_key: str) -> str:
    """The text of a record. Raises BadRecord when it has none."""
    return text_and_fields(record, is_json, json_key)[0]


def text_and_fields(record: bytes, is_json: bool, json_key: str) -> tuple[str, dict[str, Any]]:
    """The text of a record and, where it is a JSON object, its fields. Raises BadRecord when it has no text."""
    if isinstance(record, TooLong):
        raise BadRecord(record.decode())
    if not is_json:
        return _decoded(record), {}
    fields = _parsed(record)
    if not isinstance(fields, dict):
        raise BadRecord(f"must be a JSON object, is {type(fields).__name__}")
    if json_key not in fields:
        raise BadRecord(f"has no key {json_key!r}, only {', '.join(map(repr, fields))[:80]} (--json-key says which)")
    if not isinstance(fields[json_key], str):
        raise BadRecord(f"{json_key!r} must be a string, is {type(fields[json_key]).__name__}")
    # The file is UTF-8, which has no surrogates: only escapes can make them.
    return _without_surrogates(fields[json_key]) if b"\\u" in record else fields[json_key], fields


def read_texts(paths: Sequence[str | Path], json_key: str = "text") -> Iterator[str]:
    """The texts of `paths` in order, but blank JSON lines. Raises DataError naming file and line of a bad record."""
    total_bytes(paths)
    for batch in read_batches(paths):
        for line, record in enumerate(batch.records, batch.first_line):
            if batch.is_json and not record.strip():
                continue
            try:
                yield parse_record(record, batch.is_json, json_key)
            except BadRecord as error:
                raise DataError(f"{batch.path}:{line}: {error}") from error


def _parsed(record: bytes) -> Any:
    """By orjson, which takes a fifth of the time; what it refuses is taken, or refused with a reason, by json."""
    try:
        return orjson.loads(record)
    except orjson.JSONDecodeError:
        text = _decoded(record)
    try:
        return json.loads(text)
    except RecursionError as error:
        raise BadRecord("JSON nested too deeply") from error
    except ValueError as error:
        raise BadRecord(f"not valid JSON: {error}") from error


def _decoded(record: bytes) -> str:
    try:
        return record.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8 at byte {error.start}") from error


def _without_surrogates(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord(f"lone surrogate at character {error.start}: not valid text") from error
    return text


def _read_file(path: Path, before: int, max_record_bytes: int) -> Iterator[Batch]:
    is_json = _kind(path) in _JSON
    records: list[bytes] = []
    size, line = 0, 1
    with os_errors_as_data_errors(path), open(path, "rb") as stored:
        for record in _records(path, stored, is_json, max_record_bytes):
            records.append(record)
            size += len(record)
            if size >= _BATCH_BYTES or isinstance(record, TooLong):
                yield Batch(str(path), line, records, is_json, before + stored.tell())
                records, size, line = [], 0, line + len(records)
        yield Batch(str(path), line, records, is_json, before + stored.tell())


def _records(path: Path, stored: IO[bytes], is_json: bool, limit: int) -> Iterator[bytes]:
    """Lines with their ends, or the whole file, without a byte order mark; of one above the limit that it is."""
    damage: list[type[Exception]] = [EOFError, zlib.error, gzip.BadGzipFile]
    if path.suffix.lower() == ".zst":
        damage.append(_zstandard(path).ZstdError)
    if path.suffix.lower() in _COMPRESSED and os.fstat(stored.fileno()).st_size == 0:
        raise DataError(f"{path}: compressed file is empty, which none is that was written to its end")
    try:
        stream = _decompressed(path, stored)
        read = stream.readline if is_json else stream.read
        for line in count(1):
            record = read(limit + 1)
            if len(record) > limit:
                yield _too_long(limit, is_json)
                if not is_json:
                    return
                while not record.endswith(b"\n") and (record := stream.readline(_SKIPPED_BYTES)):
                    pass
                continue
            if not record:
                return
            yield record.removeprefix(codecs.BOM_UTF8) if line == 1 else record
    except tuple(damage) as error:
        raise DataError(f"{path}: compressed file is damaged or truncated ({error})") from error


def _too_long(limit: int, is_json: bool) -> TooLong:
    remedy = "" if is_json else "; a text file is one document: split it, or make JSON lines of it, one document each"
    return TooLong(f"larger than {limit} bytes{remedy}".encode())


def _kind(path: Path) -> str:
    suffixes = [suffix for suffix in map(str.lower, path.suffixes) if suffix not in _COMPRESSED]
    return suffixes[-1] if suffixes else ""


def _check_name(path: Path) -> None:
    """A part of a JSON lines file is JSON lines too, but its name does not end as theirs do."""
    if _kind(path) not in _JSON and {".jsonl", ".ndjson"} & {*map(str.lower, path.suffixes)}:
        raise DataError(
            f"{path}: JSON lines by its name, which does not end as theirs do, so that it would be read as one text; "
            "rename it to end in .jsonl, .jsonl.gz or .jsonl.zst"
        )


def _decompressed(path: Path, stored: IO[bytes]) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return cast(IO[bytes], gzip.open(stored))
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_ZstandardReader(stored, _zstandard(path)), _BATCH_BYTES)
    return stored


def _zstandard(path: Path) -> ModuleType:
    try:
        return importlib.import_module("zstandard")
    except ImportError as error:
        raise DataError(f"{path}: reading .zst needs one more package: pip install zstandard") from error


class _ZstandardReader(io.RawIOBase):
    """Frames end to end; zstandard's own stream reader takes a truncated file for a whole one."""

    def __init__(self, stored: IO[bytes], zstandard: ModuleType) -> None:
        self._stored = stored
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame: Any = None  # the frame that is open
        self._unread = b""  # stored bytes after the end of the last frame
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._ready:
            block = self._unread or self._stored.read(8192)
            if not block:
                if self._frame is not None:
                    raise EOFError("ends inside a frame")
                return 0
            frame = self._frame or self._decompressor.decompressobj()
            self._ready = memoryview(frame.decompress(block))
            self._frame, self._unread = (None, frame.unused_data) if frame.eof else (frame, b"")
        size = min(len(target), len(self._ready))
        target[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size
