"""Packed samples: the documents of a corpus laid end to end and cut every `seq_length` tokens.

Shape legend: B = samples, S = seq_length
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megagrow.data.indexed import IndexedDataset
from megagrow.errors import ConfigError, DataError, UnknownToken


class Samples(ABC):
    """Samples of S + 1 tokens, by number: the first S tokens are inputs, the last S labels.

    With `vocab_size`, every batch is checked: a token id outside [0, vocab_size) is a DataError
    instead of a wild memory access.
    """

    num_samples: int

    def __init__(self, prefix: str | Path, seq_length: int, vocab_size: int | None = None) -> None:
        if seq_length < 1:
            raise ConfigError(f"data.seq_length={seq_length} must be positive")
        self.prefix = str(prefix)
        self.seq_length = seq_length
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return self.num_samples

    def sample(self, index: int) -> NDArray[np.int64]:
        """The int64 tokens [S + 1] of sample `index`."""
        return self.batch([index])[0]

    def batch(self, ids: ArrayLike) -> NDArray[np.int64]:
        """The int64 tokens [B, S + 1] of the samples `ids` [B], in that order, repeats allowed.

        Raises DataError for an id outside [0, num_samples) or a token outside the vocabulary.
        """
        ids_B = np.asarray(ids, np.int64)
        self._check_ids(ids_B)
        tokens_BS1 = self._tokens(ids_B)
        if self.vocab_size is not None:
            self._check_tokens(tokens_BS1, ids_B, self.vocab_size)
        return tokens_BS1

    @abstractmethod
    def documents(self, ids: ArrayLike) -> NDArray[np.int64]:
        """A number [B, S] for every input of the samples `ids` [B], the same inside of a document only."""

    @abstractmethod
    def _tokens(self, ids_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """The tokens [B, S + 1] of samples that exist."""

    def _check_ids(self, ids_B: NDArray[np.int64]) -> None:
        outside = (ids_B < 0) | (ids_B >= self.num_samples)
        if outside.any():
            raise DataError(
                f"{self.prefix}: sample {ids_B[outside][0]} does not exist, there are "
                f"{self.num_samples} of seq_length {self.seq_length}"
            )

    def _check_tokens(self, tokens_BS1: NDArray[np.int64], ids_B: NDArray[np.int64], vocab_size: int) -> None:
        outside = (tokens_BS1 < 0) | (tokens_BS1 >= vocab_size)
        if outside.any():
            row, column = np.argwhere(outside)[0]
            token = int(tokens_BS1[row, column])
            raise UnknownToken(
                f"{self.prefix}: sample {ids_B[row]} holds token {token}, the "
                f"model's vocab_size is {vocab_size}; preprocess with the model's tokenizer",
                token,
            )


class PackedDataset(Samples):
    """Sample i = tokens [i·S, i·S + S + 1) of the documents laid end to end in file order.

    Each token but the first is a label once; the tail shorter than S + 1 tokens belongs to no
    sample. Raises DataError when the corpus has fewer than S + 1 tokens.
    """

    def __init__(self, prefix: str | Path, seq_length: int, vocab_size: int | None = None) -> None:
        super().__init__(prefix, seq_length, vocab_size)
        self.indexed = IndexedDataset(prefix)
        if self.indexed.num_tokens == 0:
            raise DataError(f"{self.prefix}: the corpus is empty; preprocess a file that has text")
        self.num_samples = (self.indexed.num_tokens - 1) // seq_length
        if self.num_samples == 0:
            raise DataError(
                f"{self.prefix}: {self.indexed.num_tokens} tokens are too few for one sample of "
                f"seq_length + 1 = {seq_length + 1}; use more text or a shorter data.seq_length"
            )

    def documents(self, ids: ArrayLike) -> NDArray[np.int64]:
        """The document [B, S] of every input of the samples `ids` [B], as its number in the file."""
        positions_BS = np.asarray(ids, np.int64)[:, None] * self.seq_length + np.arange(self.seq_length)
        return np.searchsorted(self.indexed.document_ends, positions_BS, side="right")

    def _tokens(self, ids_B: NDArray[np.int64]) -> NDArray[np.int64]:
        positions_BS1 = ids_B[:, None] * self.seq_length + np.arange(self.seq_length + 1)
        return self.indexed.tokens[positions_BS1].astype(np.int64)


class JoinedDatasets(Samples):
    """The samples of several datasets, one dataset after the other."""

    def __init__(self, datasets: Sequence[Samples]) -> None:
        super().__init__(" ".join(d.prefix for d in datasets), datasets[0].seq_length)
        self.datasets = list(datasets)
        self._firsts = np.cumsum([0] + [d.num_samples for d in datasets])  # the number of each one's first sample
        self.num_samples = int(self._firsts[-1])

    def documents(self, ids: ArrayLike) -> NDArray[np.int64]:
        """Documents [B, S], numbered within each dataset: no sample is of two."""
        ids_B = np.asarray(ids, np.int64)
        documents_BS = np.empty((len(ids_B), self.seq_length), np.int64)
        for number, mine in self._owners(ids_B):
            documents_BS[mine] = self.datasets[number].documents(ids_B[mine] - self._firsts[number])
        return documents_BS

    def _tokens(self, ids_B: NDArray[np.int64]) -> NDArray[np.int64]:
        tokens_BS1 = np.empty((len(ids_B), self.seq_length + 1), np.int64)
        for number, mine in self._owners(ids_B):
            tokens_BS1[mine] = self.datasets[number].batch(ids_B[mine] - self._firsts[number])
        return tokens_BS1

    def _owners(self, ids_B: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.bool_]]]:
        owners_B = np.searchsorted(self._firsts, ids_B, side="right") - 1
        for number in np.unique(owners_B):
            yield int(number), owners_B == number
