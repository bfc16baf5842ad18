"""A complete folder of a teacher's targets, read sample by sample in any order."""

# Shape suffix legend: B = samples, S = positions, K = entries of a position.

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megagrow.data.dataset import PackedDataset
from megagrow.data.files import os_errors_as_data_errors
from megagrow.errors import DataError, shown
from megagrow.salt.cache_files import digest_of, read_index, read_samples, work_folder
from megagrow.salt.cache_format import decode, decompress, masses
from megagrow.salt.cache_manifest import WORDS, CacheIdentity, Manifest, read_manifest
from megagrow.salt.records import MANIFEST_FILE, check_identity, check_samples, missing, read_file

KEPT_INDEXES = 4096  # of shards, in memory


class TeacherCache:
    """A complete cache, read sample by sample in any order.

    Args:
        folder: where it lies.

    Attributes:
        folder: where it lies.
        identity: what the targets depend on.
        cost: what they took.
        training: what the teacher had cost before.
        sha256: of the manifest, which vouches for all files; names this cache.
        num_cached: samples that it holds.

    Raises:
        DataError: the folder is missing, unfinished or damaged.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._files = work_folder(self.folder)
        path = self.folder / MANIFEST_FILE
        if not path.exists():
            raise missing(path, self._files.identity_file.exists(), WORDS)
        self._manifest = read_manifest(path)
        self.identity, self.cost = self._manifest.identity, self._manifest.cost
        self.training = self._manifest.training
        self.sha256 = hashlib.sha256(read_file(path)).hexdigest()
        self._ids = read_samples(self.folder, self.identity)
        self.num_cached = self.identity.num_samples if self._ids is None else len(self._ids)
        _check_count(self._manifest, self.num_cached, path)
        self._index = lru_cache(maxsize=KEPT_INDEXES)(self._read_index)

    def check_dataset(self, dataset: PackedDataset) -> None:
        """Raises DataError unless the cache is that of these samples."""
        check_samples(self.identity, dataset, self.folder / MANIFEST_FILE, WORDS)

    def check_files(self) -> None:
        """Raises DataError unless every shard is there, with the index of the manifest and the size of the index."""
        for shard in range(len(self._manifest.shards)):
            self._read_index(shard)

    def missing(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of the sample ids that the cache does not hold."""
        return ids[self._places(ids) < 0]

    def targets(self, ids: Sequence[int] | NDArray[np.int64]) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
        """The token ids [B, S, K] and masses [B, S, K + 1] of samples, see `cache_format.masses`.

        Raises:
            DataError: a sample is not in the cache, or its file is damaged.
        """
        wanted = np.asarray(ids, np.int64)
        places, shape = self._places(wanted), self.identity.shape
        ids_BSK = np.empty((len(wanted), shape.seq_length, shape.num_entries), np.uint32)
        masses_BSK1 = np.empty((len(wanted), shape.seq_length, shape.num_entries + 1), np.float32)
        for row, (sample, place) in enumerate(zip(wanted.tolist(), places.tolist(), strict=True)):
            if place < 0:
                raise DataError(f"{self.folder}: sample {sample} is not in the cache; cache more of the corpus")
            ids_BSK[row], masses_BSK1[row] = self._read(place)
        return ids_BSK, masses_BSK1

    @property
    def num_bytes(self) -> int:
        """Of all shards."""
        return sum(self._files.file(shard).stat().st_size for shard in range(len(self._manifest.shards)))

    def forget(self) -> None:
        """Drops what it keeps of the files; reading goes on all the same."""
        self._index.cache_clear()

    def _places(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where each sample stands in the cache; -1 where it does not."""
        if self._ids is None:
            return np.where((ids >= 0) & (ids < self.num_cached), ids, -1)
        places = np.minimum(np.searchsorted(self._ids, ids), self.num_cached - 1)
        return np.where(self._ids[places] == ids, places, -1)

    def _read(self, place: int) -> tuple[NDArray[np.integer], NDArray[np.float32]]:
        shard, row = divmod(place, self._manifest.shard_size)
        index, path, shape = self._index(shard), self._files.file(shard), self.identity.shape
        begin = int(index["end"][row - 1]) if row else index.nbytes
        with os_errors_as_data_errors(path), path.open("rb") as file:
            file.seek(begin)
            content = file.read(int(index["end"][row]) - begin)
        if digest_of(content) != index["digest"][row].tobytes():
            raise DataError(f"{path}: the targets of its sample {row} are damaged; {WORDS.remedy}")
        try:
            entries = decode(decompress(content, self._manifest.compression, shape.num_bytes), shape)
            if entries.ids_SK.max() >= shape.vocab_size:
                raise ValueError(f"token {entries.ids_SK.max()}")
            return entries.ids_SK, masses(entries, shape)
        except ValueError as error:
            problem = shown(str(error))
            raise DataError(
                f"{path}: its sample {row} is not what the manifest says ({problem}); {WORDS.remedy}"
            ) from None

    def _read_index(self, shard: int) -> NDArray[np.void]:
        size = self._manifest.shard_size
        count = min(size, self.num_cached - shard * size)
        return read_index(self._files.file(shard), count, self._manifest.shards[shard])


def is_complete(folder: Path, identity: CacheIdentity) -> bool:
    """Whether the folder already holds the whole cache of this identity.

    Raises:
        DataError: it holds something else, or a shard is missing or damaged; nothing is ever overwritten.
    """
    path = folder / MANIFEST_FILE
    if not path.exists():
        return False
    check_identity(read_manifest(path).identity, identity, path, WORDS)
    TeacherCache(folder).check_files()
    return True


def _check_count(manifest: Manifest, num_cached: int, path: Path) -> None:
    wanted = -(-num_cached // manifest.shard_size)
    if len(manifest.shards) != wanted:
        raise DataError(
            f"{path}: names {len(manifest.shards)} shards, {num_cached} samples in shards of {manifest.shard_size} "
            f"make {wanted}; {WORDS.remedy}"
        )
