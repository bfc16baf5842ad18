"""Folders of scores: a wrong manifest, wrong shards, and tensors that are wrong although their digest is right."""

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from hypothesis import strategies as st

from megagrow.salt.score_files import DTYPES, Cost, ShardFolder, identity_of, read_scores, write_scores
from tests.fuzz.fields import Field, texts_with, unparsable
from tests.fuzz.literals import is_count, is_digest, is_number, is_text, rejecting
from tests.salt.samples import opened, random_corpus

NUM_SAMPLES, SEQ_LENGTH = 6, 4


def fields(folder: Path) -> Iterator[Field]:
    folder.mkdir()
    dataset = opened(random_corpus(folder / "corpus", NUM_SAMPLES, SEQ_LENGTH), SEQ_LENGTH)
    identity = identity_of(dataset, "model", 10, "float32")
    arrays = {name: np.ones(NUM_SAMPLES, dtype) for name, dtype in DTYPES.items()}
    write_scores(folder, arrays, identity, Cost(1.5, 2e9, 24))

    def read() -> Any:
        return read_scores(folder, dataset)

    read()
    yield from _manifest_fields(folder / "manifest.json", read)
    yield from _tensor_fields(folder, read)
    shards = ShardFolder(folder)
    shards.begin(identity, 2)
    file = folder / "shards" / "identity.json"
    record = json.loads(file.read_bytes())
    for path, accepts in _identity_rules(("identity",), record).items():
        texts = texts_with(record, path, rejecting(accepts))
        yield Field("identity.json", ".".join(path), file, texts, lambda: shards.check(identity, 2), path[-1])
    texts = texts_with(record, ("shard_size",), rejecting(lambda value: type(value) is int and value == 2))
    yield Field("identity.json", "shard_size", file, texts, lambda: shards.check(identity, 2), "shard_size")


def _identity_rules(path: tuple[str, ...], record: dict[str, Any]) -> dict[tuple[str, ...], Callable[[Any], bool]]:
    """In a folder of shards everything must be what the scoring that goes on says."""
    return {(*path, name): _equals(value) for name, value in record["identity"].items()}


def _is_cost(value: Any) -> bool:
    return is_number(value) and 0 <= value < 1e60


def _equals(value: Any) -> Callable[[Any], bool]:
    return lambda other: type(other) is type(value) and other == value


def _manifest_fields(file: Path, read: Callable[[], Any]) -> Iterator[Field]:
    record = json.loads(file.read_bytes())
    original = file.read_bytes()
    fixed = ("corpus_sha256", "seq_length", "num_samples")
    rules: dict[tuple[str, ...], Callable[[Any], bool]] = {
        ("format_version",): _equals(1),
        ("identity",): lambda value: False,
        **{("identity", name): _equals(record["identity"][name]) for name in fixed},
        ("identity", "tokenizer_sha256"): lambda value: value == "" or is_digest(value),
        ("identity", "model"): is_text,
        ("identity", "top_k"): lambda value: is_count(value) and value > 0,
        ("identity", "dtype"): is_text,
        ("identity", "mask_documents"): lambda value: isinstance(value, bool),
        ("identity", "reset_positions"): lambda value: isinstance(value, bool),
        ("cost",): lambda value: False,
        ("cost", "seconds"): _is_cost,
        ("cost", "flops"): lambda value: value is None or _is_cost(value),
        ("cost", "tokens"): is_count,
        ("training",): lambda value: value is None or isinstance(value, dict),
        ("scores_sha256",): _equals(record["scores_sha256"]),
    }
    for path, accepts in rules.items():
        texts = texts_with(record, path, rejecting(accepts))
        says = f"{path[-1]}|sha256" if path == ("scores_sha256",) else path[-1]
        says = {("identity",): "identity|corpus_", ("cost",): "cost|seconds"}.get(path, says)  # or its first field
        yield Field(
            "score manifest",
            ".".join(path),
            file.parent if "sha256" in says else file,
            texts,
            read,
            says,
            file.write_bytes,
        )
    yield Field("score manifest", "(whole file)", file, unparsable(original), read, "JSON")
    file.write_bytes(original)


def _tensor_fields(folder: Path, read: Callable[[], Any]) -> Iterator[Field]:
    file, manifest = folder / "scores.safetensors", folder / "manifest.json"
    raw, record = file.read_bytes(), json.loads(manifest.read_bytes())
    size = struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]

    def write_signed(content: bytes) -> None:
        file.write_bytes(content)
        manifest.write_text(json.dumps({**record, "scores_sha256": hashlib.sha256(content).hexdigest()}))

    def write_unsigned(content: bytes) -> None:
        file.write_bytes(content)
        manifest.write_text(json.dumps(record))

    def with_header(text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text + data

    flipped = st.tuples(st.integers(0, len(raw) - 1), st.integers(1, 255)).map(
        lambda change: raw[: change[0]] + bytes([raw[change[0]] ^ change[1]]) + raw[change[0] + 1 :]
    )
    yield Field("scores.safetensors", "(any byte)", file, flipped, read, "sha256", write_unsigned)
    cut = st.integers(0, len(raw) - 1).map(lambda end: raw[:end]) | st.binary(min_size=1, max_size=40).map(
        lambda x: raw + x
    )
    yield Field("scores.safetensors", "(size)", file, cut, read, "safetensors", write_signed)
    lengths = st.integers(0, 2**64 - 1).filter(lambda n: n != size).map(lambda n: struct.pack("<Q", n) + raw[8:])
    yield Field("scores.safetensors", "header length", file, lengths, read, "safetensors|holds", write_signed)
    for name, entry in header.items():
        for key, right in entry.items():
            texts = texts_with(header, (name, key), rejecting(_equals(right))).map(with_header)
            says = "safetensors|mean_nll|num_tokens|median|in_top_k|holds"
            yield Field("scores.safetensors", f"{name}.{key}", file, texts, read, says, write_signed)
    for name, values in (
        ("median_in_top_k", st.sampled_from([np.nan, np.inf, -np.inf])),
        ("median_zero", st.sampled_from([np.nan, np.inf, -np.inf])),
        ("mean_nll", st.sampled_from([np.nan, np.inf, -np.inf])),
        ("in_top_k_fraction", st.floats(width=32).filter(lambda x: not 0 <= x <= 1)),
        ("num_tokens", st.integers(-(2**31), 2**31 - 1).filter(lambda n: not 0 <= n <= SEQ_LENGTH)),
    ):
        contents = _with_values(name, values)
        yield Field("scores.safetensors", f"{name} (values)", file, contents, read, name, write_signed)
    write_unsigned(raw)


def _with_values(name: str, wrong: Any) -> Any:
    """Right but for at least one value of one array."""

    def content(bad: Any, at: int, others: list[float]) -> bytes:
        arrays = {key: np.full(NUM_SAMPLES, 0, dtype) for key, dtype in DTYPES.items()}
        arrays["mean_nll"] = np.array(others, np.float32)
        arrays[name][at] = bad
        return safetensors.numpy.save(arrays)

    floats = st.lists(st.floats(0, 9, width=32), min_size=NUM_SAMPLES, max_size=NUM_SAMPLES)
    return st.builds(content, wrong, st.integers(0, NUM_SAMPLES - 1), floats)
