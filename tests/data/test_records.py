"""Tests megagrow/data/records.py: reading corpora, and what is said of bad ones."""

import gzip
import io
import json
import sys
import types
import zlib
from pathlib import Path
from typing import Any

import pytest
import zstandard

from megagrow.data.records import BadRecord, parse_record, read_batches, read_texts
from megagrow.errors import DataError

TEXTS = ["one\nline", "zwei — ü", "", "三"]
LINES = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.ndjson", LINES.rstrip(b"\n")),
        ("Y.JSONL", LINES),
        ("Y.JsonL.GZ", gzip.compress(LINES, mtime=0)),
        ("a.JSONL.gz.jsonl", b"\xef\xbb\xbf" + LINES),
        ("a.jsonl.gz", gzip.compress(LINES[:40], mtime=0) + gzip.compress(LINES[40:], mtime=0)),
    ],
)
def test_json_lines(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert list(read_texts([tmp_path / name])) == TEXTS


def test_anything_else_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("ü\r\n{}\n".encode())
    (tmp_path / "b.md.gz").write_bytes(gzip.compress(b"# b\n"))
    assert list(read_texts([tmp_path / "a.txt", tmp_path / "b.md.gz"])) == ["ü\r\n{}\n", "# b\n"]


def test_batches_keep_order_lines_and_position(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megagrow.data.records._BATCH_BYTES", 50)
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in paths:
        path.write_bytes(LINES * 3)
    batches = list(read_batches(paths))
    assert b"".join(record for batch in batches for record in batch.records) == LINES * 6
    for path in paths:
        mine = [batch for batch in batches if batch.path == str(path)]
        assert len(mine) > 2
        ends = [batch.first_line + len(batch.records) for batch in mine]
        assert [batch.first_line for batch in mine] == [1, *ends[:-1]]
    positions = [batch.position for batch in batches]
    assert positions == sorted(positions) and positions[-1] == 6 * len(LINES)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b"{", "not valid JSON"),
        (b"[1]", "must be a JSON object, is list"),
        (b'{"body": "x"}', "has no key 'text', only 'body'"),
        (b'{"text": 5}', "'text' must be a string, is int"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
        (b'{"text": "a\\ud800"}', "lone surrogate at character 1"),
        (b"[" * 100_000, "JSON nested too deeply"),
        (b'{"text": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_bad_record_says_why(tmp_path: Path, record: bytes, reason: str) -> None:
    with pytest.raises(BadRecord, match=reason):
        parse_record(record, True, "text")
    (tmp_path / "a.jsonl").write_bytes(LINES + record + b"\n" + LINES)
    with pytest.raises(DataError, match=rf"a.jsonl:5: {reason}"):
        list(read_texts([tmp_path / "a.jsonl"]))


@pytest.mark.parametrize("damage", ["truncated", "garbage", "flipped"])
def test_damaged_gzip_is_named(tmp_path: Path, damage: str) -> None:
    whole = gzip.compress(LINES * 50)
    flipped = bytearray(whole)
    flipped[-6] ^= 1  # the checksum
    content = {"truncated": whole[:-9], "garbage": b"junk" * 9, "flipped": bytes(flipped)}[damage]
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"a.jsonl.gz: compressed file is damaged or truncated"):
        list(read_texts([tmp_path / "a.jsonl.gz"]))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz", "a.jsonl.zst"])
def test_a_compressed_file_without_a_byte_is_damaged(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=rf"{name}: compressed file is empty"):
        list(read_batches([tmp_path / name]))


def test_record_size_is_bounded(tmp_path: Path) -> None:
    """A small compressed file can hold an endless line; what comes after it is read."""
    path = tmp_path / "a.jsonl.gz"
    for end in (b"", b"\n", b"\n" + LINES):
        path.write_bytes(gzip.compress(LINES + bytes(10**6) + end))
        records = [r for batch in read_batches([path], max_record_bytes=1000) for r in batch.records]
        assert len(records) == 5 + (4 if end.endswith(LINES) else 0)
        assert all(len(record) < 1000 for record in records) and b"".join(records[5:]) == end[1:]
        with pytest.raises(BadRecord, match="larger than 1000 bytes"):
            parse_record(records[4], True, "text")


def test_a_record_of_just_the_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"x" * 999 + b"\n" + b"y" * 1000)
    (tmp_path / "b.txt").write_bytes(b"z" * 1000)
    batches = list(read_batches([tmp_path / "a.jsonl", tmp_path / "b.txt"], max_record_bytes=1000))
    assert [len(record) for batch in batches for record in batch.records] == [1000, 1000, 1000]


def test_a_line_too_long_is_told_before_its_end_is_read(tmp_path: Path) -> None:
    """Whoever stops at bad lines need not wait for gigabytes."""
    (tmp_path / "a.jsonl").write_bytes(LINES + bytes(10**6) + b"\n" + LINES)
    first = next(read_batches([tmp_path / "a.jsonl"], max_record_bytes=1000))
    assert len(first.records) == 5 and first.position < 10**5


def test_a_text_that_is_too_long_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(bytes(5000))
    records = [r for batch in read_batches([tmp_path / "b.txt"], max_record_bytes=1000) for r in batch.records]
    assert len(records) == 1
    with pytest.raises(BadRecord, match=r"larger than 1000 bytes; .*JSON lines"):
        parse_record(records[0], False, "text")


@pytest.mark.parametrize("name", ["a.jsonl.part1", "a.jsonl.bz2", "A.JSONL.bak", "a.ndjson.1", "a.jsonl.txt"])
def test_a_name_that_looks_like_json_lines_is_not_read_as_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(LINES)
    with pytest.raises(DataError, match=rf"{name}: .*would be read as one text; .*\.jsonl\.gz"):
        list(read_texts([tmp_path / name]))


def test_missing_inputs_are_named_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    with pytest.raises(DataError, match="b.jsonl: no such input file"):
        next(read_texts([tmp_path / "a.jsonl", tmp_path / "b.jsonl"]))
    with pytest.raises(DataError, match="no such input file"):
        next(read_texts([tmp_path]))


def test_zstandard_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    with pytest.raises(DataError, match=r"a.jsonl.zst: .*pip install zstandard"):
        list(read_texts([tmp_path / "a.jsonl.zst"]))


class DeflateFrame:
    """The interface of zstandard's decompressobj, with deflate inside."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj()

    def decompress(self, block: bytes) -> bytes:
        return self._inner.decompress(block)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data


@pytest.fixture
def deflate_as_zstandard(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("zstandard")
    module.ZstdError = zlib.error
    module.ZstdDecompressor = lambda: types.SimpleNamespace(decompressobj=DeflateFrame)
    monkeypatch.setitem(sys.modules, "zstandard", module)


@pytest.mark.usefixtures("deflate_as_zstandard")
def test_zstandard_frames_are_joined_and_a_cut_one_is_seen(tmp_path: Path) -> None:
    """Frames of several blocks; the cut is where zstandard's own stream reader sees nothing."""
    long = b"".join(json.dumps({"text": f"{i * 7919 % 10007}"}).encode() + b"\n" for i in range(20_000))
    frames = zlib.compress(long, 1) + zlib.compress(LINES)
    assert len(frames) > 8192 * 3
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(frames)
    assert list(read_texts([path])) == [json.loads(x)["text"] for x in io.BytesIO(long + LINES)]
    path.write_bytes(frames[:-3])
    with pytest.raises(DataError, match="damaged or truncated .ends inside a frame"):
        list(read_texts([path]))
    path.write_bytes(frames + b"junk")
    with pytest.raises(DataError, match="damaged or truncated"):
        list(read_texts([path]))


def test_zstandard_itself(tmp_path: Path) -> None:
    """Two frames, without and with the size of what they hold; then a cut file."""
    compressor = zstandard.ZstdCompressor()
    stream = compressor.compressobj()
    frames = compressor.compress(LINES) + stream.compress(LINES) + stream.flush()
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(frames)
    assert list(read_texts([path])) == 2 * [json.loads(line)["text"] for line in io.BytesIO(LINES)]
    path.write_bytes(frames[:-2])
    with pytest.raises(DataError, match="damaged or truncated"):
        list(read_texts([path]))


def test_blank_lines_are_no_records(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n \n')
    assert list(read_texts([tmp_path / "a.jsonl"])) == ["a", "b"]
