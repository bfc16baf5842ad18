"""The files of a teacher's cache beside its manifest: shards, and the ids of the samples if it holds a part of them.

    shards/00000012.bin     an index, then the compressed targets of each sample
    index                   of each sample where it ends, uint64, and the first 16 bytes of its sha256

The manifest holds the sha256 of every index, and so vouches for every byte, while one sample can be read without the
rest of its shard.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from megagrow.data.files import os_errors_as_data_errors, write_atomically
from megagrow.errors import DataError
from megagrow.salt.cache_manifest import WORDS, CacheIdentity
from megagrow.salt.records import parse_tensors, read_file
from megagrow.salt.work_folder import WorkFolder

SAMPLES_FILE = "samples.safetensors"
SHARD_SUFFIX, SECONDS_SUFFIX = ".bin", ".json"
INDEX_DTYPE = np.dtype([("end", "<u8"), ("digest", "V16")])


def work_folder(folder: Path) -> WorkFolder:
    """Where the shards of a cache lie."""
    return WorkFolder(folder, SHARD_SUFFIX, WORDS)


def digest_of(content: bytes) -> bytes:
    """What an index holds of each sample's bytes."""
    return hashlib.sha256(content).digest()[:16]


def join_shard(blocks: Sequence[bytes]) -> bytes:
    """A shard of samples, each compressed by itself."""
    index = np.zeros(len(blocks), INDEX_DTYPE)
    index["end"] = index.nbytes + np.cumsum([len(block) for block in blocks])
    index["digest"] = np.frombuffer(b"".join(map(digest_of, blocks)), "V16")
    return b"".join([index.tobytes(), *blocks])


def read_index(path: Path, count: int, sha256: str | None) -> NDArray[np.void]:
    """The index [count] of a shard, compared with the manifest's sha256 if there is one, and with the file's size.

    Raises:
        DataError: the file is missing, of another size, or not the manifest's.
    """
    with os_errors_as_data_errors(path), path.open("rb") as file:
        content, size = file.read(count * INDEX_DTYPE.itemsize), path.stat().st_size
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{path}: the sha256 of its index is not the manifest's, one was changed; {WORDS.remedy}")
    is_whole = len(content) == count * INDEX_DTYPE.itemsize
    index = np.frombuffer(content if is_whole else b"", INDEX_DTYPE)
    ends = index["end"]
    if not is_whole or int(ends[-1]) != size or int(ends[0]) < len(content) or (ends[1:] < ends[:-1]).any():
        raise DataError(f"{path}: has {size} bytes, which are not those of its index; {WORDS.remedy}")
    return index


def read_samples(folder: Path, identity: CacheIdentity) -> NDArray[np.int64] | None:
    """The ascending ids of the samples that a cache holds; None: all of them.

    Raises:
        DataError: the file is missing or damaged.
    """
    if not identity.samples_sha256:
        return None
    path = folder / SAMPLES_FILE
    arrays = parse_tensors(read_file(path), path, WORDS)
    ids = arrays.get("ids", np.empty(0, np.int64))
    if set(arrays) != {"ids"} or ids.dtype != np.int64 or ids.ndim != 1 or len(ids) == 0:
        raise DataError(f"{path}: must hold ids, int64 [at least 1]; {WORDS.remedy}")
    if samples_sha256(ids) != identity.samples_sha256:
        raise DataError(f"{path}: its ids are not those of the manifest's samples_sha256; {WORDS.remedy}")
    if ids[0] < 0 or ids[-1] >= identity.num_samples or (ids[1:] <= ids[:-1]).any():
        raise DataError(f"{path}: its ids must ascend and be below num_samples={identity.num_samples}; {WORDS.remedy}")
    return ids


def write_samples(folder: Path, ids: NDArray[np.int64]) -> None:
    """Stores the ids of a cache that holds a part of the samples."""
    write_atomically(folder / SAMPLES_FILE, safetensors.numpy.save({"ids": ids}))


def samples_sha256(ids: NDArray[np.int64] | None) -> str:
    """Names a part of the samples; "" for all of them."""
    return "" if ids is None else hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
