"""Megatron's order of a blend: each draw goes to the dataset that is furthest behind its share.

The rule is sequential: the error of dataset d at draw t is weight_d · max(t, 1) − (its draws so far), the largest error
wins, and of equal ones the first. Here many stretches of the sequence go forward side by side, a numpy operation for
one draw of each. Where a stretch begins is guessed; since the rule soon forgets where it began, most guesses are right,
and the stretches whose beginning is not what the one before ended with are done again. The arithmetic on doubles is
Megatron's, so the result is the same to the last draw.

Source: Megatron-LM, megatron/core/datasets/helpers.cpp (build_blending_indices), blended_dataset.py and
blended_megatron_dataset_builder.py.

Shape legend: D = datasets, L = draws of a stretch, J = stretches
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megagrow.errors import DataError

MID_LEVEL_SURPLUS = 0.005  # more samples than its share that each dataset's own order is made for
_STRETCHES = 8192  # at most: numpy's overhead is small, and all arrays of a step stay in the cache
_MIN_LENGTH = 64  # draws of a stretch, so that guessing costs little
_FORGETTING = 48  # draws after which most guesses have become right


class MegatronDraws:
    """See `Draws`; the first `size` draws are made at once, and there are no more.

    Args:
        weights: [D], positive; only their ratios count.
        size: number of draws.
    """

    def __init__(self, weights: Sequence[float], size: int) -> None:
        given_D = np.asarray(weights, np.float64)
        self.size = size
        self._weights_D1 = (given_D / given_D.sum())[:, None]
        self._length = max(_MIN_LENGTH, -(-size // _STRETCHES))
        num_stretches = max(1, -(-size // self._length))
        kind = np.int8 if len(given_D) <= 127 else np.int16
        self._starts_J = np.arange(num_stretches) * self._length
        self._which_LJ = np.empty((self._length, num_stretches), kind)
        self._begins_DJ = self._guess()
        self._settle()

    def at(self, start: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See `Draws`. Raises DataError beyond `size`."""
        if start + count > self.size:
            raise DataError(
                f"data.order=megatron was made for {self.size} samples and sample {start + count} is asked for; "
                "a new run needs a larger data.num_samples, and data.order=megagrow does not end"
            )
        which = self._which(start, start + count)
        drawn_D, nth = self.counts(start), np.empty(count, np.int64)
        for dataset in np.unique(which):
            mine = which == dataset
            nth[mine] = drawn_D[dataset] + np.arange(np.count_nonzero(mine))
        return which.astype(np.int64), nth

    def counts(self, start: int) -> NDArray[np.int64]:
        """See `Draws`."""
        stretch = min(start // self._length, self._which_LJ.shape[1] - 1)
        since = self._which(stretch * self._length, start)
        begins_D = self._begins_DJ[:, stretch].astype(np.int64)
        return begins_D + np.bincount(since, minlength=len(begins_D))

    def _which(self, start: int, stop: int) -> NDArray[np.int8 | np.int16]:
        first, last = start // self._length, -(-stop // self._length)
        return self._which_LJ[:, first:last].T.reshape(-1)[start - first * self._length : stop - first * self._length]

    def _guess(self) -> NDArray[np.float64]:
        """Counts [D, J] at the beginning of each stretch: those of a sequence that was even a little earlier."""
        early_J = self._starts_J[1:] - _FORGETTING
        shares_DJ = self._weights_D1 * early_J
        counts_DJ = np.floor(shares_DJ)
        missing_J = early_J - counts_DJ.sum(axis=0)
        ranks_DJ = np.argsort(np.argsort(counts_DJ - shares_DJ, axis=0), axis=0)
        counts_DJ += ranks_DJ < missing_J
        self._advance(counts_DJ, early_J, np.empty((_FORGETTING, len(early_J)), self._which_LJ.dtype))
        return np.concatenate((np.zeros_like(self._weights_D1), counts_DJ), axis=1)

    def _settle(self) -> None:
        """Makes all draws, and again those of stretches that began with wrong counts, until each begins as it must."""
        ends_DJ = self._begins_DJ.copy()
        self._advance(ends_DJ, self._starts_J, self._which_LJ)
        while len(wrong := 1 + np.flatnonzero((ends_DJ[:, :-1] != self._begins_DJ[:, 1:]).any(axis=0))):
            counts_DJ = ends_DJ.take(wrong - 1, axis=1)  # not by [:, …], whose result lies in memory column by column
            self._begins_DJ[:, wrong] = counts_DJ
            which_LJ = np.empty((self._length, len(wrong)), self._which_LJ.dtype)
            self._advance(counts_DJ, self._starts_J[wrong], which_LJ)
            ends_DJ[:, wrong], self._which_LJ[:, wrong] = counts_DJ, which_LJ

    def _advance(
        self, counts_DJ: NDArray[np.float64], starts_J: NDArray[np.int64], which_LJ: NDArray[np.int8 | np.int16]
    ) -> None:
        """Makes as many draws as `which_LJ` has rows, from each of `starts_J` on; writes these and the new counts."""
        errors_DJ, largest_J, wins_DJ = np.empty_like(counts_DJ), np.empty(len(starts_J)), counts_DJ > 0
        datasets_D1 = np.arange(len(counts_DJ), dtype=which_LJ.dtype)[:, None]
        numbers_DJ = np.empty(counts_DJ.shape, which_LJ.dtype)
        draws_J, place_J = starts_J.astype(np.float64), np.empty(len(starts_J))
        for which_J in which_LJ:
            np.maximum(draws_J, 1.0, out=place_J)
            np.multiply(self._weights_D1, place_J, out=errors_DJ)
            np.subtract(errors_DJ, counts_DJ, out=errors_DJ)
            np.maximum.reduce(errors_DJ, axis=0, out=largest_J)
            np.equal(errors_DJ, largest_J, out=wins_DJ)
            if np.count_nonzero(wins_DJ) != len(starts_J):
                _keep_first(wins_DJ)  # of equal errors
            np.add(counts_DJ, wins_DJ, out=counts_DJ)
            np.multiply(wins_DJ.view(np.int8), datasets_D1, out=numbers_DJ)
            np.add.reduce(numbers_DJ, axis=0, dtype=numbers_DJ.dtype, out=which_J)
            draws_J += 1


def _keep_first(wins_DJ: NDArray[np.bool_]) -> None:
    """Leaves in each column the first that is true."""
    found_J = wins_DJ[0].copy()
    for wins_J in wins_DJ[1:]:
        np.greater(wins_J, found_J, out=wins_J)
        np.logical_or(found_J, wins_J, out=found_J)


def blend_sizes(weights: Sequence[float], num_samples: int) -> list[int]:
    """How many of a run's samples each dataset is to give, rounded up; their sum is the blend's size."""
    given_D = np.asarray(weights, np.float64)
    return [math.ceil(num_samples * weight) for weight in (given_D / given_D.sum()).tolist()]


def with_surplus(size: int) -> int:
    """For how many samples the order of a dataset is made that is to give `size` to a blend."""
    return math.ceil(size * (1 + MID_LEVEL_SURPLUS))
