"""The order of samples, and the batches that each data-parallel rank takes from it.

The order depends on (seed, epoch) only. The whole state is one integer, the number of samples
consumed so far, so that a run continues exactly at any data-parallel degree and batch size.

Shape legend: n = samples in one epoch, B = samples in a batch, S = seq_length
"""

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from megagrow.data.dataset import PackedDataset
from megagrow.errors import ConfigError, DataError


def epoch_permutation(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The int64 permutation [n] of range(n) that epoch `epoch` goes through; a pure function.

    Sorts raw PCG64 words: numpy keeps bit generators and SeedSequence stable between versions,
    its shuffles not. `spawn_key` keeps (seed, epoch) pairs apart for seeds of any size.
    """
    words = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch,))).random_raw(num_samples)
    return np.argsort(words, kind="stable")


class SampleOrder:
    """The infinite global order of sample ids: epoch e is `epoch_permutation(n, seed, e)`.

    `samples` is a number (ids 0 … n - 1) or an explicit array of distinct ids [n], for example a
    selected subset. Raises DataError when there are no samples or an id comes twice.
    """

    def __init__(self, samples: int | ArrayLike, seed: int) -> None:
        if seed < 0:
            raise ConfigError(f"data.seed={seed} must not be negative")
        self.seed = seed
        explicit = np.asarray(samples, np.int64)
        self.sample_ids = explicit if explicit.ndim else None
        self.num_samples = explicit.size if explicit.ndim else int(explicit)
        if self.num_samples < 1:
            raise DataError("no samples to train on: the corpus or the selection is empty")
        if self.sample_ids is not None and len(np.unique(self.sample_ids)) != self.num_samples:
            raise DataError("the selection names a sample twice; each id must come once")
        self._cached: tuple[int, NDArray[np.int64]] | None = None

    def ids(self, start: int, count: int) -> NDArray[np.int64]:
        """The int64 ids [count] at places start, start + 1, … of the order; epochs are crossed."""
        assert start >= 0 and count >= 0
        pieces = [np.empty(0, np.int64)]
        while count > 0:
            epoch, offset = divmod(start, self.num_samples)
            piece = self._epoch(epoch)[offset : offset + count]
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return np.concatenate(pieces)

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        if self._cached is None or self._cached[0] != epoch:
            order = epoch_permutation(self.num_samples, self.seed, epoch)
            self._cached = (epoch, order if self.sample_ids is None else self.sample_ids[order])
        return self._cached[1]


class Stream:
    """Batches of `dataset` in `order`. Keeps no position: the caller counts samples (`cursor`)."""

    def __init__(self, dataset: PackedDataset, order: SampleOrder) -> None:
        ends = [0, order.num_samples - 1]
        used = np.asarray(ends) if order.sample_ids is None else order.sample_ids
        outside = used[(used < 0) | (used >= dataset.num_samples)]
        if len(outside):
            raise DataError(
                f"{dataset.prefix}: the order names sample {outside[0]}, there are "
                f"{dataset.num_samples} of seq_length {dataset.seq_length}"
            )
        self.dataset = dataset
        self.order = order

    def global_ids(self, cursor: int, batch_size: int) -> NDArray[np.int64]:
        """The int64 sample ids [B] of the global batch that begins after `cursor` samples."""
        return self.order.ids(cursor, batch_size)

    def batch(
        self, cursor: int, batch_size: int, rank: int = 0, world: int = 1
    ) -> tuple[NDArray[np.int64], torch.Tensor]:
        """What data-parallel rank `rank` of `world` takes: the rank-th contiguous slice.

        Returns int64 sample ids [B / world] and int64 tokens [B / world, S + 1] (inputs are
        [:, :-1], labels [:, 1:]). Raises ConfigError when `world` does not divide `batch_size`.
        """
        if batch_size % world:
            raise ConfigError(f"global batch size {batch_size} is not divisible by the data-parallel size {world}")
        share = batch_size // world
        ids_B = self.order.ids(cursor + rank * share, share)
        return ids_B, torch.from_numpy(self.dataset.batch(ids_B))
