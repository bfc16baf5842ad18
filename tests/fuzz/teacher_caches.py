"""Teachers' caches: a wrong manifest, wrong ids, and shards that are damaged, or wrong although their digests fit."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from megagrow.salt.cache_files import INDEX_DTYPE, SAMPLES_FILE, samples_sha256
from megagrow.salt.teacher_cache import TeacherCache
from tests.fuzz.fields import Field, texts_with, unparsable
from tests.fuzz.literals import is_count, is_digest, is_number, is_text, rejecting
from tests.salt.samples import opened
from tests.salt.test_cache_files import IDS, SEQ_LENGTH, make_folder


def fields(folder: Path) -> Iterator[Field]:
    cache = make_folder(folder / "cache")
    dataset = opened(folder / "corpus", SEQ_LENGTH)

    def read() -> Any:
        found = TeacherCache(cache)
        found.check_dataset(dataset)
        found.check_files()
        return found.targets(IDS)

    read()
    yield from _manifest_fields(cache / "manifest.json", read)
    yield from _shard_fields(cache, read)
    yield from _samples_fields(cache, read)


def _equals(value: Any) -> Callable[[Any], bool]:
    return lambda other: type(other) is type(value) and other == value


def _is_cost(value: Any) -> bool:
    return is_number(value) and 0 <= value < 1e60


def _manifest_fields(file: Path, read: Callable[[], Any]) -> Iterator[Field]:
    original = file.read_bytes()
    record = json.loads(original)
    fixed = ("corpus_sha256", "seq_length", "num_samples", "samples_sha256", "kind", "num_entries")
    rules: dict[tuple[str, ...], Callable[[Any], bool]] = {
        ("format_version",): _equals(1),
        ("identity",): lambda value: False,
        **{("identity", name): _equals(record["identity"][name]) for name in fixed},
        ("identity", "tokenizer_sha256"): lambda value: value == "" or is_digest(value),
        ("identity", "model"): is_text,
        ("identity", "dtype"): is_text,
        ("identity", "vocab_size"): lambda value: is_count(value) and 12 < value <= 2**31,
        ("identity", "temperature"): lambda value: is_number(value) and 0 < value < 1e6,
        ("identity", "mask_documents"): lambda value: isinstance(value, bool),
        ("identity", "reset_positions"): lambda value: isinstance(value, bool),
        ("cost",): lambda value: False,
        ("cost", "seconds"): _is_cost,
        ("cost", "flops"): lambda value: value is None or _is_cost(value),
        ("cost", "tokens"): is_count,
        ("training",): lambda value: value is None or isinstance(value, dict),
        ("shard_size",): _equals(4),
        ("compression",): _equals("zlib"),
        ("shards",): _equals(record["shards"]),
    }
    of_shards = ("shards", "shard_size", "kind", "num_entries", "vocab_size", "compression")
    for path, accepts in rules.items():
        texts = texts_with(record, path, rejecting(accepts))
        says, where = {("identity",): "identity|corpus_", ("cost",): "cost|seconds"}.get(path, path[-1]), file
        if path[-1] in (*of_shards, "samples_sha256", "num_samples"):
            # What the shards or ids contradict is told where they are.
            says, where = f"{says}|what the manifest says|index|ids|zstandard|shards", file.parent
        yield Field("cache manifest", ".".join(path), where, texts, read, says, file.write_bytes)
    yield Field("cache manifest", "(whole file)", file, unparsable(original), read, "JSON")
    file.write_bytes(original)


def _shard_fields(folder: Path, read: Callable[[], Any]) -> Iterator[Field]:
    file, manifest = folder / "shards" / "00000000.bin", folder / "manifest.json"
    raw, record = file.read_bytes(), json.loads(manifest.read_bytes())
    size = 4 * INDEX_DTYPE.itemsize

    def write_signed(content: bytes) -> None:
        file.write_bytes(content)
        shards = [hashlib.sha256(content[:size]).hexdigest(), *record["shards"][1:]]
        manifest.write_text(json.dumps({**record, "shards": shards}))

    def write_unsigned(content: bytes) -> None:
        file.write_bytes(content)
        manifest.write_text(json.dumps(record))

    flipped = st.tuples(st.integers(0, len(raw) - 1), st.integers(1, 255)).map(
        lambda change: raw[: change[0]] + bytes([raw[change[0]] ^ change[1]]) + raw[change[0] + 1 :]
    )
    yield Field("cache shard", "(any byte)", file, flipped, read, "damaged|index", write_unsigned)
    yield Field("cache shard", "(any byte, signed)", file, flipped, read, "damaged|index", write_signed)
    cut = st.integers(0, len(raw) - 1).map(lambda end: raw[:end]) | st.binary(min_size=1, max_size=40).map(
        lambda x: raw + x
    )
    yield Field("cache shard", "(size)", file, cut, read, "bytes|index", write_signed)

    def with_end(change: tuple[int, int]) -> bytes:
        index = np.frombuffer(raw[:size], INDEX_DTYPE).copy()
        index["end"][change[0]] = change[1]
        return index.tobytes() + raw[size:]

    right = np.frombuffer(raw[:size], INDEX_DTYPE)["end"].tolist()
    ends = st.tuples(st.integers(0, 3), st.integers(0, 2**64 - 1)).filter(lambda x: x[1] != right[x[0]]).map(with_end)
    yield Field("cache shard", "end", file, ends, read, "bytes|damaged", write_signed)
    write_unsigned(raw)


def _samples_fields(folder: Path, read: Callable[[], Any]) -> Iterator[Field]:
    file, manifest = folder / SAMPLES_FILE, folder / "manifest.json"
    raw, record = file.read_bytes(), json.loads(manifest.read_bytes())

    def write_signed(content: bytes) -> None:
        """With the digest of the ids that stand at the end of the file."""
        file.write_bytes(content)
        ids = np.frombuffer(content[-8 * len(IDS) :], "<i8")
        identity = {**record["identity"], "samples_sha256": samples_sha256(ids)}
        manifest.write_text(json.dumps({**record, "identity": identity}))

    def is_wrong(ids: list[int]) -> bool:
        return ids != sorted(set(ids)) or ids[0] < 0 or ids[-1] > 5

    wrong = st.lists(st.integers(-3, 9), min_size=5, max_size=5).filter(is_wrong)
    contents = wrong.map(lambda ids: raw[: -8 * len(IDS)] + np.array(ids, "<i8").tobytes())
    yield Field("samples.safetensors", "ids", file, contents, read, "ids", write_signed)
    cut = st.integers(0, len(raw) - 1).map(lambda end: raw[:end]) | st.binary(min_size=1, max_size=40).map(
        lambda x: raw + x
    )
    yield Field("samples.safetensors", "(size)", file, cut, read, "safetensors|ids")
    file.write_bytes(raw)
    manifest.write_text(json.dumps(record))
