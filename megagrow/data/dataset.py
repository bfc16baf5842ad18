"""Packed samples: the documents of a corpus laid end to end and cut every `seq_length` tokens.

Shape legend: B = samples, S = seq_length
"""

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megagrow.data.indexed import IndexedDataset
from megagrow.errors import ConfigError, DataError


class PackedDataset:
    """Sample i = tokens [i·S, i·S + S + 1) of the documents laid end to end in file order.

    The first S tokens are inputs, the last S labels, so each token but the first is a label once.
    The tail shorter than S + 1 tokens belongs to no sample. With `vocab_size`, every batch is
    checked: a token id outside [0, vocab_size) is a DataError instead of a wild memory access.
    Raises DataError when the corpus has fewer than S + 1 tokens.
    """

    def __init__(self, prefix: str | Path, seq_length: int, vocab_size: int | None = None) -> None:
        if seq_length < 1:
            raise ConfigError(f"data.seq_length={seq_length} must be positive")
        self.indexed = IndexedDataset(prefix)
        self.prefix = self.indexed.prefix
        self.seq_length = seq_length
        self.vocab_size = vocab_size
        if self.indexed.num_tokens == 0:
            raise DataError(f"{self.prefix}: the corpus is empty; preprocess a file that has text")
        self.num_samples = (self.indexed.num_tokens - 1) // seq_length
        if self.num_samples == 0:
            raise DataError(
                f"{self.prefix}: {self.indexed.num_tokens} tokens are too few for one sample of "
                f"seq_length + 1 = {seq_length + 1}; use more text or a shorter data.seq_length"
            )

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
        outside = (ids_B < 0) | (ids_B >= self.num_samples)
        if outside.any():
            raise DataError(
                f"{self.prefix}: sample {ids_B[outside][0]} does not exist, there are "
                f"{self.num_samples} of seq_length {self.seq_length}"
            )
        positions_BS1 = ids_B[:, None] * self.seq_length + np.arange(self.seq_length + 1)
        tokens_BS1 = self.indexed.tokens[positions_BS1].astype(np.int64)
        if self.vocab_size is not None:
            self._check_tokens(tokens_BS1, ids_B, self.vocab_size)
        return tokens_BS1

    def documents(self, ids: ArrayLike) -> NDArray[np.int64]:
        """The document [B, S] of every input of the samples `ids` [B], as its number in the file."""
        first_tokens = np.concatenate([[0], np.cumsum(self.indexed.lengths, dtype=np.int64)])
        ends = first_tokens[self.indexed.document_indices[1:]]
        positions_BS = np.asarray(ids, np.int64)[:, None] * self.seq_length + np.arange(self.seq_length)
        return np.searchsorted(ends, positions_BS, side="right")

    def _check_tokens(self, tokens_BS1: NDArray[np.int64], ids_B: NDArray[np.int64], vocab_size: int) -> None:
        outside = (tokens_BS1 < 0) | (tokens_BS1 >= vocab_size)
        if outside.any():
            row, column = np.argwhere(outside)[0]
            raise DataError(
                f"{self.prefix}: sample {ids_B[row]} holds token {tokens_BS1[row, column]}, the "
                f"model's vocab_size is {vocab_size}; preprocess with the model's tokenizer"
            )
