"""Megatron's order of samples: the same tokens at the same place as its GPTDataset gives, for the same seed.

The sequences of a split are shuffled over all epochs at once (the last epoch by itself where little of it is needed),
laid end to end and cut every `seq_length` tokens; then the samples are shuffled. Megatron stores where each sample
begins, which takes compiled code to build; here the running total of the lengths is enough, in which a sample's
beginning is found when it is read.

Source: Megatron-LM, megatron/core/datasets/gpt_dataset.py and blended_megatron_dataset_config.py.

Shape legend: B = samples, S = seq_length, N = places: the sequences of a split, once per epoch, in shuffled order,
P = pieces: what one place gives to one sample
"""

import re
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megagrow.data.dataset import Samples
from megagrow.data.indexed import IndexedDataset
from megagrow.errors import ConfigError, DataError

SPLITS = ("train", "validation", "test")
FINAL_EPOCH_SHARE = 0.80  # of an epoch's samples; a last epoch of which less is needed is shuffled by itself


class MegatronDataset(Samples):
    """Sample i is what Megatron's GPTDataset has at index i.

    Args:
        prefix: of the .bin/.idx files.
        seq_length: inputs of a sample.
        num_samples: that the run asks for, which decides how many epochs are mixed; None: one epoch.
        seed: Megatron's --seed.
        share: the part of the sequences that belongs to the split, see `split_shares`.
        vocab_size: see `Samples`.

    Raises:
        ConfigError: a seed that numpy's old generator does not take.
        DataError: missing or malformed files, or a split that is shorter than one sample.
    """

    def __init__(
        self,
        prefix: str | Path,
        seq_length: int,
        num_samples: int | None,
        seed: int,
        share: tuple[float, float] = (0.0, 1.0),
        vocab_size: int | None = None,
    ) -> None:
        super().__init__(prefix, seq_length, vocab_size)
        random = legacy_generator(seed)
        self.indexed = IndexedDataset(prefix)
        first, end = (round(bound * self.indexed.num_sequences) for bound in share)
        num_tokens = int(self.indexed.lengths[first:end].sum(dtype=np.int64))
        if num_tokens < seq_length + 1:
            raise DataError(
                f"{self.prefix}: sequences {first} to {end} of {self.indexed.num_sequences}, which data.split gives, "
                f"have {num_tokens} tokens, too few for one sample of seq_length + 1 = {seq_length + 1}"
            )
        num_epochs, num_mixed = _epochs(num_tokens, seq_length, num_samples)
        self.num_samples = (num_epochs * num_tokens - 1) // seq_length
        self.sequences_N = _shuffled_sequences(first, end, num_epochs, num_mixed, random)
        self.ends_N = running_total(self.indexed.lengths, self.sequences_N)
        self.windows = _shuffled_windows(self.num_samples, (num_mixed * num_tokens - 1) // seq_length, random)

    def documents(self, ids: ArrayLike) -> NDArray[np.int64]:
        """The place [B, S] in the shuffled sequences of every input of the samples `ids` [B]."""
        ids_B = np.asarray(ids, np.int64)
        self._check_ids(ids_B)
        places_P, _, lengths_P = self._pieces(ids_B)
        return np.repeat(places_P, lengths_P).reshape(len(ids_B), -1)[:, :-1]

    def _tokens(self, ids_B: NDArray[np.int64]) -> NDArray[np.int64]:
        _, starts_P, lengths_P = self._pieces(ids_B)
        before_P = np.cumsum(lengths_P) - lengths_P
        positions = np.repeat(starts_P - before_P, lengths_P) + np.arange(lengths_P.sum())
        return self.indexed.tokens[positions].astype(np.int64).reshape(len(ids_B), -1)

    def _pieces(self, ids_B: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Place, first token in the file and number of tokens of each piece, sample after sample."""
        begins_B = self.windows[ids_B].astype(np.int64) * self.seq_length
        stops_B = begins_B + self.seq_length + 1
        firsts_B = np.searchsorted(self.ends_N, begins_B, side="right")
        counts_B = np.searchsorted(self.ends_N, stops_B, side="left") + 1 - firsts_B
        before_B = np.cumsum(counts_B) - counts_B
        places_P = np.repeat(firsts_B - before_B, counts_B) + np.arange(counts_B.sum())
        ends_P, sequences_P = self.ends_N[places_P], self.sequences_N[places_P]
        own_P = ends_P - self.indexed.lengths[sequences_P]  # where the sequence begins
        begins_P = np.maximum(own_P, np.repeat(begins_B, counts_B))
        lengths_P = np.minimum(ends_P, np.repeat(stops_B, counts_B)) - begins_P
        pointers_P = self.indexed.pointers[sequences_P] // self.indexed.dtype.itemsize
        return places_P, pointers_P + begins_P - own_P, lengths_P


def running_total(lengths: NDArray[np.int32], sequences_N: NDArray[np.int32]) -> NDArray[np.int64]:
    """Where each of these sequences [N] ends when they are laid end to end, in tokens.

    It does what Megatron's compiled helper does, in less time; mode="wrap" spares a pass over the indices.
    """
    return np.cumsum(lengths.take(sequences_N, mode="wrap"), dtype=np.int64)


def legacy_generator(seed: int) -> np.random.RandomState:
    """numpy's old generator, whose shuffles Megatron's order is made of; they are frozen.

    Raises:
        ConfigError: a seed outside [0, 2^32).
    """
    if not 0 <= seed < 2**32:
        raise ConfigError(f"data.seed={seed} must lie between 0 and 2^32 - 1 under data.order=megatron")
    return np.random.RandomState(seed)


def split_shares(split: str) -> dict[str, tuple[float, float]]:
    """Where each of SPLITS that is not empty begins and ends, as shares of the sequences, from weights like "99,1,0".

    Raises:
        ConfigError: not one to three numbers, none of them negative, and not all zero.
    """
    texts = split.split(",")
    wrong = f'data.split="{split}" must be up to three weights, of {", ".join(SPLITS)}, as in "99,1,0"'
    if not (1 <= len(texts) <= len(SPLITS)) or not all(re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*", t) for t in texts):
        raise ConfigError(wrong)
    weights = np.array([float(text) for text in texts] + [0.0] * (len(SPLITS) - len(texts)))
    if weights.sum() == 0:
        raise ConfigError(wrong)
    bounds = [0.0]
    for weight in (weights / weights.sum()).tolist():
        bounds.append(bounds[-1] + weight)
    shares = zip(SPLITS, bounds[:-1], bounds[1:], strict=True)
    return {name: (begin, end) for name, begin, end in shares if begin < end}


def _epochs(num_tokens: int, seq_length: int, num_samples: int | None) -> tuple[int, int]:
    """How many epochs are needed, and how many of these are shuffled together."""
    if num_samples is None:
        return 1, 1
    num_epochs = max(1, -(-(num_samples * seq_length + 1) // num_tokens))
    if num_epochs == 1:
        return 1, 1
    num_from_final = num_samples - ((num_epochs - 1) * num_tokens - 1) // seq_length
    is_separate = num_from_final < int(FINAL_EPOCH_SHARE * ((num_tokens - 1) // seq_length))
    return num_epochs, num_epochs - 1 if is_separate else num_epochs


def _shuffled_sequences(
    first: int, end: int, num_epochs: int, num_mixed: int, random: np.random.RandomState
) -> NDArray[np.int32]:
    """The sequences of all epochs [N], in shuffled order."""
    sequences_N = np.tile(np.arange(first, end, dtype=np.int32), num_epochs)
    num_first = num_mixed * (end - first)
    for part in (sequences_N[:num_first], sequences_N[num_first:]):
        if len(part):
            random.shuffle(part)
    return sequences_N


def _shuffled_windows(num_samples: int, num_mixed: int, random: np.random.RandomState) -> NDArray[np.uint32 | np.int64]:
    """Which window of the sequences each sample is."""
    is_large = num_samples >= np.iinfo(np.uint32).max - 1
    windows: NDArray[np.uint32 | np.int64] = np.arange(num_samples, dtype=np.int64 if is_large else np.uint32)
    for part in (windows[:num_mixed], windows[num_mixed:]):
        if len(part):
            random.shuffle(part)
    return windows
