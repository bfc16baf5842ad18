"""The shards of a teacher's cache while it is made, how it becomes complete, and which samples it is for."""

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megagrow.config import require
from megagrow.data.files import write_atomically
from megagrow.data.loader import epoch_permutation
from megagrow.errors import ConfigError, DataError
from megagrow.parallel.mesh import Mesh
from megagrow.salt.cache_files import (
    SAMPLES_FILE,
    SECONDS_SUFFIX,
    join_shard,
    read_index,
    samples_sha256,
    work_folder,
    write_samples,
)
from megagrow.salt.cache_format import COMPRESSIONS, best_compression, can_compress
from megagrow.salt.cache_manifest import WORDS, CacheIdentity, Manifest, write_manifest
from megagrow.salt.records import MANIFEST_FILE, Cost, Training, field, read_object, to_json
from megagrow.salt.sharded import Shards
from megagrow.salt.work_folder import remove_unfinished

__all__ = ["CacheShards", "samples_sha256", "samples_to_cache"]


class CacheShards(Shards):
    """The shards of a cache that is under way.

    The time that each took is a file of its own, so that shards are the same however often the work was interrupted.

    Args:
        output: folder of the cache.
        identity: what the targets depend on.
        samples: ascending ids; None: all of the corpus.
        batch_size, shard_size, mesh: see `Shards`.

    Attributes:
        compression: known once `begin` has been called.
    """

    identity: CacheIdentity

    def __init__(
        self,
        output: Path,
        identity: CacheIdentity,
        samples: NDArray[np.int64] | None,
        batch_size: int,
        shard_size: int,
        mesh: Mesh,
    ) -> None:
        self.output, self.cached = output, samples
        num_samples = identity.num_samples if samples is None else len(samples)
        super().__init__(work_folder(output), identity, num_samples, batch_size, shard_size, mesh)

    def ids(self, places: range) -> NDArray[np.int64]:
        """The samples at these places of the cache."""
        return np.asarray(places, np.int64) if self.cached is None else self.cached[places.start : places.stop]

    def begin(self, **more: Any) -> None:
        """Makes the folder; one that is continued keeps its compression."""
        if self.mesh.is_main and self.cached is not None:
            write_samples(self.output, self.cached)
        super().begin(compression=best_compression(), **more)
        self.compression = self._recorded_compression()

    def write(self, shard: int, blocks: list[bytes], seconds: float) -> None:
        """Stores one finished shard and the wall-clock time that it took of the whole work."""
        write_atomically(self.folder.file(shard, SECONDS_SUFFIX), to_json({"seconds": seconds}))
        write_atomically(self.folder.file(shard), join_shard(blocks))

    def complete(self, flops: float | None, training: Training) -> None:
        """Writes the manifest."""
        digests, seconds = [], 0.0
        for shard in range(self.count):
            index = read_index(self.folder.file(shard), len(self.samples(shard)), None)
            digests.append(hashlib.sha256(index.tobytes()).hexdigest())
            path = self.folder.file(shard, SECONDS_SUFFIX)
            seconds += field(read_object(path, WORDS), "seconds", float | int, path, WORDS)
        cost = Cost(seconds, flops, self.num_samples * self.identity.seq_length)
        compression = self._recorded_compression()
        write_manifest(self.output, Manifest(self.identity, cost, training, self.size, compression, tuple(digests)))

    def clean_up(self) -> None:
        """Removes what only unfinished work needs, and what a kill left half written."""
        self.folder.remove(SECONDS_SUFFIX)
        remove_unfinished(self.output, MANIFEST_FILE, SAMPLES_FILE)

    def _recorded_compression(self) -> str:
        record, path = self.folder.record() or {}, self.folder.identity_file
        compression = field(record, "compression", str, path, WORDS)
        if compression not in COMPRESSIONS or not can_compress(compression):
            raise DataError(f"{path}: compression is {compression}, going on needs it: pip install zstandard")
        return str(compression)


def samples_to_cache(given: str, num_samples: int, seed: int) -> NDArray[np.int64] | None:
    """The ascending ids that a text names; None: all.

    Args:
        given: "" for all, "A:B" for ids A … B - 1, or the share of an epoch that runs with this `data.seed` draw first,
            as in "0.2".
        num_samples: of the corpus.
        seed: see `given`.

    Raises:
        ConfigError: it names no samples, or such as do not exist.
    """
    if not given:
        return None
    try:
        first, stop = (int(part) for part in given.split(":")) if ":" in given else (0, 0)
        share = 1.0 if ":" in given else float(given)
    except ValueError:
        raise ConfigError(f"samples={given} must be ids A:B or a share such as 0.2") from None
    if ":" in given:
        require(0 <= first < stop <= num_samples, f"samples={given} must lie in 0:{num_samples}, the corpus's samples")
        ids = np.arange(first, stop)
    else:
        require(0 < share <= 1, f"samples={given}: a share must be above 0 and at most 1")
        ids = np.sort(epoch_permutation(num_samples, seed, 0)[: math.ceil(share * num_samples)])
    return None if len(ids) == num_samples else ids
