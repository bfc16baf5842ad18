"""Folders of a teacher's targets that are not what they should be."""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from megagrow.errors import DataError
from megagrow.salt.cache_files import INDEX_DTYPE, SAMPLES_FILE, join_shard, samples_sha256, write_samples
from megagrow.salt.cache_format import Entries, compress, encode
from megagrow.salt.cache_manifest import CacheIdentity, Manifest, write_manifest
from megagrow.salt.records import MANIFEST_FILE, Cost, corpus_fields
from megagrow.salt.teacher_cache import TeacherCache, is_complete
from tests.salt.samples import opened, random_corpus

SEQ_LENGTH, NUM_SAMPLES, VOCAB = 4, 6, 29
IDS = np.array([0, 1, 2, 4, 5])


def make_folder(folder: Path, ids: np.ndarray | None = IDS, compression: str = "zlib") -> Path:
    """A good cache of a part of the samples, beside its corpus: two shards, of four samples and of one."""
    dataset = opened(random_corpus(folder.parent / "corpus", NUM_SAMPLES, SEQ_LENGTH), SEQ_LENGTH)
    given = {"model": "model", "dtype": "float32", "vocab_size": VOCAB, "kind": "top_k", "num_entries": 2}
    flags = {"temperature": 1.5, "mask_documents": False, "reset_positions": True}
    identity = CacheIdentity(**corpus_fields(dataset), **given, **flags, samples_sha256=samples_sha256(ids))
    num_cached = NUM_SAMPLES if ids is None else len(ids)
    if ids is not None:
        write_samples(folder, ids)
    (folder / "shards").mkdir(parents=True)
    digests = []
    for shard, start in enumerate(range(0, num_cached, 4)):
        blocks = [compress(sample_bytes(identity, i), compression) for i in range(start, min(start + 4, num_cached))]
        content = join_shard(blocks)
        (folder / "shards" / f"{shard:08d}.bin").write_bytes(content)
        digests.append(hashlib.sha256(content[: len(blocks) * INDEX_DTYPE.itemsize]).hexdigest())
    write_manifest(folder, Manifest(identity, Cost(1.5, 2e9, 20), None, 4, compression, tuple(digests)))
    return folder


def sample_bytes(identity: CacheIdentity, number: int, token: int = 0) -> bytes:
    ids = np.arange(8, dtype=np.int32).reshape(4, 2) + number + token
    codes = np.tile(np.array([1000, 3000], np.uint16), (4, 1))
    return encode(Entries(ids, codes, np.full(4, 2000 + number, np.uint16)), identity.shape)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "cache")


def read(folder: Path) -> Any:
    cache = TeacherCache(folder)
    cache.check_dataset(opened(folder.parent / "corpus", SEQ_LENGTH))
    return cache.targets([5, 0, 2])


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((folder / MANIFEST_FILE).read_text())
    change(data)
    (folder / MANIFEST_FILE).write_text(json.dumps(data))


def write_shard(folder: Path, blocks: list[bytes]) -> None:
    """Changes the first shard and its digest, as a program with a bug would."""
    content = join_shard(blocks)
    (folder / "shards" / "00000000.bin").write_bytes(content)
    digest = hashlib.sha256(content[: len(blocks) * INDEX_DTYPE.itemsize]).hexdigest()
    change_manifest(folder, lambda data: data["shards"].__setitem__(0, digest))


def refusal(folder: Path) -> str:
    """The message, which is one line and names a file in the folder."""
    with pytest.raises(DataError) as error:
        read(folder)
    message = str(error.value)
    assert "\n" not in message and str(folder) in message
    return message


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_what_was_written_is_read(tmp_path: Path, compression: str) -> None:
    ids, masses = read(make_folder(tmp_path / "cache", compression=compression))
    places = [4, 0, 2]  # of the samples 5, 0 and 2 among those that are cached
    for row, place in enumerate(places):
        assert ids[row].tolist() == (np.arange(8).reshape(4, 2) + place).tolist()
        expected = np.exp(-np.array([1000, 3000, 2000 + place]) / 2048)
        np.testing.assert_allclose(masses[row], np.tile(expected / expected.sum(), (4, 1)), rtol=1e-6)


def test_a_missing_folder(tmp_path: Path) -> None:
    random_corpus(tmp_path / "corpus", NUM_SAMPLES, SEQ_LENGTH)
    assert "no such file; make a teacher's cache with tools/cache_teacher.py" in refusal(tmp_path / "no")


def test_an_unfinished_folder(folder: Path) -> None:
    (folder / MANIFEST_FILE).unlink()
    (folder / "shards" / "identity.json").write_text("{}")
    assert "the work is unfinished: run tools/cache_teacher.py again" in refusal(folder)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"", b"[" * 100_000])
def test_a_manifest_that_is_not_json(folder: Path, content: bytes) -> None:
    (folder / MANIFEST_FILE).write_bytes(content)
    assert "manifest.json: not valid JSON" in refusal(folder)


IDENTITY_CHANGES = [
    ({"num_entries": 0}, "num_entries is 0"),
    ({"num_entries": 30}, "num_entries is 30"),
    ({"num_entries": "2"}, "field num_entries is .* wrong type"),
    ({"kind": "dense"}, "kind is 'dense'"),
    ({"vocab_size": 0}, "vocab_size is 0"),
    ({"vocab_size": 2**40}, "vocab_size is"),
    ({"temperature": 0}, "temperature is 0"),
    ({"temperature": True}, "field temperature is .* wrong type"),
    ({"mask_documents": 1}, "field mask_documents is .* wrong type"),
    ({"seq_length": 2**40}, "seq_length is"),
    ({"seq_length": 5}, "seq_length is 5, that of .*corpus is 4"),
    ({"num_samples": 7}, "num_samples is 7, that of .*corpus is 6"),
    ({"corpus_sha256": "0"}, "corpus_sha256 is 0, that of .*corpus"),
    ({"tokenizer_sha256": "0"}, "tokenizer_sha256 is '0'"),
    ({"samples_sha256": "0" * 64}, "its ids are not those of the manifest's samples_sha256"),
    ({"variant": 1}, "unknown field variant"),
]
CHANGES: list[tuple[Callable[[Any], Any], str]] = [
    *((lambda d, c=change: d["identity"].update(c), message) for change, message in IDENTITY_CHANGES),
    (lambda d: d.update(format_version=2), "format_version is 2, must be 1"),
    (lambda d: d.pop("identity"), "field identity is missing"),
    (lambda d: d.update(compression="lzma"), "compression is 'lzma', must be one of zstd, zlib"),
    (lambda d: d.update(shard_size=0), "shard_size is 0"),
    (lambda d: d.update(shard_size=5), "names 2 shards, 5 samples in shards of 5 make 1"),
    (lambda d: d["shards"].pop(), "names 1 shards, 5 samples in shards of 4 make 2"),
    (lambda d: d["shards"].__setitem__(0, "0"), "shards must be sha256 in hexadecimal"),
    (lambda d: d["shards"].reverse(), "sha256 of its index is not the manifest's"),
    (lambda d: d["cost"].update(flops=-1), "flops is -1, must not be negative"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=[message[:40] for _, message in CHANGES])
def test_wrong_fields(folder: Path, change: Callable[[Any], Any], message: str) -> None:
    change_manifest(folder, change)
    with pytest.raises(DataError, match=message):
        read(folder)
    refusal(folder)


def test_any_changed_byte_of_a_shard_is_seen(folder: Path) -> None:
    path = folder / "shards" / "00000000.bin"
    good = path.read_bytes()
    cache = TeacherCache(folder)
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        cache.forget()
        with pytest.raises(DataError, match=r"00000000\.bin: .*run tools/cache_teacher.py again"):
            cache.targets([0, 1, 2, 4])
    path.write_bytes(good)
    cache.targets([0, 1, 2, 4])


@pytest.mark.parametrize(
    "change", [lambda raw: raw[:-1], lambda raw: raw + b"x", lambda raw: raw[:10], lambda raw: b""]
)
def test_a_shard_of_another_size(folder: Path, change: Callable[[bytes], bytes]) -> None:
    path = folder / "shards" / "00000000.bin"
    path.write_bytes(change(path.read_bytes()))
    assert "00000000.bin: " in refusal(folder)
    with pytest.raises(DataError, match=r"00000000\.bin: "):
        TeacherCache(folder).check_files()


def test_a_missing_shard(folder: Path) -> None:
    (folder / "shards" / "00000001.bin").unlink()
    assert "00000001.bin: No such file" in refusal(folder)
    with pytest.raises(DataError, match=r"00000001\.bin: No such file"):
        is_complete(folder, TeacherCache(folder).identity)


def test_shards_whose_content_is_something_else(folder: Path) -> None:
    identity = TeacherCache(folder).identity
    good = [compress(sample_bytes(identity, i), "zlib") for i in range(4)]
    for wrong in (b"no zlib", compress(b"short", "zlib"), compress(sample_bytes(identity, 0, token=25), "zlib")):
        write_shard(folder, [wrong, *good[1:]])
        assert "its sample 0 is not what the manifest says" in refusal(folder)
    nothing = Entries(np.zeros((4, 2), np.int32), np.full((4, 2), 65535, np.uint16), np.full(4, 65535, np.uint16))
    write_shard(folder, [compress(encode(nothing, identity.shape), "zlib"), *good[1:]])
    assert "a position without any mass" in refusal(folder)


def test_zstd_that_is_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_manifest(folder, lambda data: data.update(compression="zstd"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert "reading it needs one more package: pip install zstandard" in refusal(folder)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"ids": np.array([0, 2, 1])}, "its ids are not those of the manifest"),
        ({"ids": IDS.astype(np.int32)}, "must hold ids, int64"),
        ({"ids": np.empty(0, np.int64)}, "must hold ids, int64"),
        ({"other": IDS}, "must hold ids, int64"),
    ],
)
def test_wrong_samples(folder: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    (folder / SAMPLES_FILE).write_bytes(safetensors.numpy.save(arrays))
    assert message in refusal(folder)


@pytest.mark.parametrize("ids", [[0, 1, 1, 4, 5], [4, 3, 2, 1, 0], [-1, 0, 1, 2, 3], [0, 1, 2, 4, 6]])
def test_ids_that_no_corpus_has(folder: Path, ids: list[int]) -> None:
    """The digest is right, the ids are not."""
    write_samples(folder, np.array(ids))
    change_manifest(folder, lambda data: data["identity"].update(samples_sha256=samples_sha256(np.array(ids))))
    assert "its ids must ascend and be below num_samples=6" in refusal(folder)


def test_missing_samples(folder: Path) -> None:
    (folder / SAMPLES_FILE).unlink()
    assert "samples.safetensors: No such file" in refusal(folder)


def test_the_manifest_of_something_else_is_not_taken_over(folder: Path) -> None:
    """A folder of scores has a manifest.json too."""
    identity = TeacherCache(folder).identity
    (folder / MANIFEST_FILE).write_text('{"format_version": 1, "scores_sha256": "", "identity": {}}')
    with pytest.raises(DataError, match="not a file of a teacher's cache, choose another folder"):
        is_complete(folder, identity)
    assert not is_complete(folder.parent / "none", replace(identity, model="other"))
