"""The order of samples, and the batches that each data-parallel rank takes from it.

The order depends on (seed, epoch) only. The whole state is one integer, the number of samples
consumed so far, so that a run continues exactly at any data-parallel degree and batch size.

Shape legend: n = samples in one epoch, B = samples in a batch, S = seq_length
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from megagrow.data.blend import Draws, EvenDraws
from megagrow.data.dataset import Samples
from megagrow.errors import ConfigError, DataError


class Order(Protocol):
    """The order in which the samples of one dataset are drawn."""

    def ids(self, start: int, count: int) -> NDArray[np.int64]:
        """The int64 ids [count] at places start, start + 1, … of the order."""


def epoch_permutation(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The int64 permutation [n] of range(n) that epoch `epoch` goes through; a pure function.

    Sorts raw PCG64 words: numpy keeps bit generators and SeedSequence stable between versions,
    its shuffles not. `spawn_key` keeps (seed, epoch) pairs apart for seeds of any size.
    """
    words = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch,))).random_raw(num_samples)
    order = np.argsort(words)  # several times as fast as a stable sort, which differs only where a word comes twice
    ascending = words[order]
    if (ascending[1:] == ascending[:-1]).any():
        return np.argsort(words, kind="stable")
    return order


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


class FileOrder:
    """Sample ids as the dataset numbers them, once: for datasets that are in order already."""

    def __init__(self, prefix: str, num_samples: int) -> None:
        self.prefix, self.num_samples = prefix, num_samples

    def ids(self, start: int, count: int) -> NDArray[np.int64]:
        """See `Order`. Raises DataError beyond the last sample."""
        if start + count > self.num_samples:
            raise DataError(
                f"{self.prefix}: data.order=megatron made {self.num_samples} samples and sample {start + count} is "
                "asked for; a new run needs a larger data.num_samples, and data.order=megagrow does not end"
            )
        return np.arange(start, start + count)


@dataclass(frozen=True)
class Ordered:
    """A dataset and the order in which its samples are drawn."""

    dataset: Samples
    order: Order


@dataclass(frozen=True)
class Drawn:
    """The samples that one rank takes.

    Attributes:
        which: int64 [B] the dataset of each, as its place in the blend.
        ids: int64 [B] the sample of that dataset.
        tokens: int64 [B, S + 1]; inputs are [:, :-1], labels [:, 1:].
        documents: int64 [B, S] for every input, the same inside of a document only; None where nobody asked for it.
    """

    which: NDArray[np.int64]
    ids: NDArray[np.int64]
    tokens: Tensor
    documents: Tensor | None


class Stream:
    """Batches of one dataset or a blend. Keeps no position: the caller counts samples (`cursor`).

    Args:
        parts: the datasets, all of one seq_length.
        draws: which of them comes next; None: one after another, evenly.
        start: samples that were consumed before the first of `draws`.
        firsts: for each dataset, its samples that were consumed before `start`; None: none were.
        with_documents: every batch tells documents apart.
    """

    def __init__(
        self,
        parts: Sequence[Ordered],
        draws: Draws | None = None,
        *,
        start: int = 0,
        firsts: Sequence[int] | None = None,
        with_documents: bool = False,
    ) -> None:
        self.parts, self.start, self.with_documents = list(parts), start, with_documents
        self.draws = draws or EvenDraws([1.0] * len(self.parts))
        self.firsts = np.zeros(len(self.parts), np.int64) if firsts is None else np.asarray(firsts, np.int64)

    def samples(self, cursor: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Dataset and id [B] of the `count` samples that come after `cursor` samples."""
        which_B, nth_B = self.draws.at(cursor - self.start, count)
        ids_B = np.empty(count, np.int64)
        for dataset in np.unique(which_B):
            mine = which_B == dataset
            first = int(self.firsts[dataset] + nth_B[mine][0])
            ids_B[mine] = self.parts[dataset].order.ids(first, np.count_nonzero(mine))
        return which_B, ids_B

    def consumed(self, cursor: int) -> list[int]:
        """How many samples of each dataset were consumed when `cursor` samples were."""
        return (self.firsts + self.draws.counts(cursor - self.start)).tolist()

    def batch(self, cursor: int, batch_size: int, rank: int = 0, world: int = 1) -> Drawn:
        """What data-parallel rank `rank` of `world` takes: the rank-th contiguous slice of the global batch.

        Raises ConfigError when `world` does not divide `batch_size`.
        """
        if batch_size % world:
            raise ConfigError(f"global batch size {batch_size} is not divisible by the data-parallel size {world}")
        share = batch_size // world
        return self.take(*self.samples(cursor + rank * share, share))

    def take(self, which_B: NDArray[np.int64], ids_B: NDArray[np.int64]) -> Drawn:
        """Reads samples by dataset and id."""
        length = self.parts[0].dataset.seq_length
        tokens_BS1 = np.empty((len(ids_B), length + 1), np.int64)
        documents_BS = np.empty((len(ids_B), length), np.int64) if self.with_documents else None
        for number in np.unique(which_B):
            mine, dataset = which_B == number, self.parts[number].dataset
            tokens_BS1[mine] = dataset.batch(ids_B[mine])
            if documents_BS is not None:
                documents_BS[mine] = dataset.documents(ids_B[mine])
        documents = None if documents_BS is None else torch.from_numpy(documents_BS)
        return Drawn(which_B, ids_B, torch.from_numpy(tokens_BS1), documents)


def shuffled(dataset: Samples, seed: int, samples: ArrayLike | None = None) -> Ordered:
    """A dataset, or the samples of it with these distinct ids, shuffled anew in each epoch.

    Raises DataError for an id that the dataset does not have.
    """
    order = SampleOrder(dataset.num_samples if samples is None else samples, seed)
    ids = np.empty(0, np.int64) if order.sample_ids is None else order.sample_ids
    outside = ids[(ids < 0) | (ids >= dataset.num_samples)]
    if len(outside):
        raise DataError(
            f"{dataset.prefix}: the order names sample {outside[0]}, there are "
            f"{dataset.num_samples} of seq_length {dataset.seq_length}"
        )
    return Ordered(dataset, order)
