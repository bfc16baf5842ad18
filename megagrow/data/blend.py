"""Blends: which datasets a run draws from, how often, and in which order.

Shape legend: B = draws, D = datasets
"""

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from megagrow.errors import ConfigError

T = TypeVar("T")

MAX_DATASETS = 32767  # as in Megatron, which numbers them in 16 bits


@dataclass(frozen=True)
class Blend:
    """Datasets by prefix, and the weight of each; None: each weighs as many samples as it has."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class DatasetIdentity:
    """What tells a dataset from one that has been put in its place.

    Attributes:
        num_samples: of the run's length, in the run's order.
        sketch: see `IndexedDataset.sketch`.
    """

    num_samples: int
    sketch: str


@dataclass(frozen=True)
class BlendStart:
    """Where a run began to draw from a blend. With the number of samples consumed it gives every dataset's cursor.

    Attributes:
        weights: by prefix, in the blend's order.
        start: samples that the run had consumed.
        firsts: how many of each dataset, also of those that the blend has no more.
        datasets: what each of all these was: their cursors mean nothing in others.
    """

    weights: dict[str, float]
    start: int = 0
    firsts: dict[str, int] = field(default_factory=dict)
    datasets: dict[str, DatasetIdentity] = field(default_factory=dict)

    def consumed(self, cursor: int) -> dict[str, int]:
        """Every dataset's cursor, its samples consumed, when the run has consumed `cursor` samples."""
        counts_D = EvenDraws(list(self.weights.values())).counts(cursor - self.start)
        since = dict(zip(self.weights, counts_D.tolist(), strict=True))
        return self.firsts | {prefix: self.firsts.get(prefix, 0) + count for prefix, count in since.items()}

    def renamed(self, prefixes: Iterable[str]) -> "BlendStart":
        """The same with each dataset under the one of `prefixes` that leads to the same file."""
        new = {os.path.realpath(prefix): prefix for prefix in prefixes}

        def renamed(by_prefix: Mapping[str, T]) -> dict[str, T]:
            return {new.get(os.path.realpath(prefix), prefix): value for prefix, value in by_prefix.items()}

        return BlendStart(renamed(self.weights), self.start, renamed(self.firsts), renamed(self.datasets))

    def changed(self, weights: dict[str, float], cursor: int, datasets: Mapping[str, DatasetIdentity]) -> "BlendStart":
        """Another blend from here on: nothing is lost or repeated, each dataset goes on at its cursor."""
        return BlendStart(weights, cursor, self.consumed(cursor), self.datasets | dict(datasets))


class Draws(Protocol):
    """An endless or long sequence of draws from datasets."""

    def at(self, start: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The dataset [B] of draws start, start + 1, …, and how often it has been drawn before [B]."""

    def counts(self, start: int) -> NDArray[np.int64]:
        """How often each dataset [D] is drawn before draw `start`."""


def parse_blend(value: str | Sequence[str | float], field: str = "data.train") -> Blend:
    """A prefix, several prefixes, or weights and prefixes in turn, as Megatron's --data-path takes them.

    Args:
        value: a list, or a text that is split at white space outside of quotes.
        field: named in errors.

    Raises:
        ConfigError: no prefix, a prefix without a weight, a weight that is not positive, or a prefix that comes twice.
    """
    words = [str(word).strip() for word in (_words(value, field) if isinstance(value, str) else value)]
    if not any(words):
        raise ConfigError(f"{field} is empty; set --{field} to the prefix of a .bin/.idx pair")
    numbers = [_number(word) for word in words[::2]] if len(words) % 2 == 0 else []
    if all(number is None for number in numbers):
        blend = Blend(tuple(words))
    elif any(number is None for number in numbers):
        raise ConfigError(f'{field} must be weights and prefixes in turn, as in "0.7 A 0.3 B", got {" ".join(words)}')
    else:
        blend = Blend(tuple(words[1::2]), tuple(number for number in numbers if number is not None))
    _check(blend, field)
    return blend


def _words(text: str, field: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{field}={text!r} cannot be split into words: {error}") from None


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _check(blend: Blend, field: str) -> None:
    if len(blend.prefixes) > MAX_DATASETS:
        raise ConfigError(f"{field} names {len(blend.prefixes)} datasets, more than {MAX_DATASETS}; merge some of them")
    places: dict[str, str] = {}
    for prefix, weight in zip(blend.prefixes, blend.weights or [1.0] * len(blend.prefixes), strict=True):
        if not prefix or blend.prefixes.count(prefix) > 1:
            raise ConfigError(f"{field} names {prefix or 'an empty prefix'!r} more than once; add its weights up")
        if (first := places.setdefault(os.path.realpath(prefix), prefix)) != prefix:
            raise ConfigError(f"{field} names one dataset as {first} and as {prefix}; name it once, add its weights up")
        if not 0 < weight < float("inf"):
            raise ConfigError(f"{field}: the weight of {prefix} is {weight}, must be positive; leave the dataset out")
    if not sum(blend.weights or []) < float("inf"):
        raise ConfigError(f"{field}: the weights add up to infinity; only their ratios count, give smaller ones")


class EvenDraws:
    """Draws as even as their weights allow: dataset d is drawn for the n-th time at (n + 1/2) / weight_d, in time.

    After any number of draws every dataset is within one draw of its share for two datasets, and about that for more
    (Webster's method of apportionment). Any stretch is computed from its place alone, so nothing is built or stored.

    Args:
        weights: [D], positive; only their ratios count.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        given_D = np.asarray(weights, np.float64)
        self.weights_D = given_D / given_D.sum()

    def at(self, start: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See `Draws`."""
        first_D, stop_D = self._before(start), self._before(start + count + 2 * len(self.weights_D))
        which = np.repeat(np.arange(len(first_D)), stop_D - first_D)
        nth = np.arange(len(which)) - np.repeat(np.cumsum(stop_D - first_D) - stop_D, stop_D - first_D)
        order = np.lexsort((which, self._times(which, nth)))  # of equal times the first dataset's comes first
        skipped = start - int(first_D.sum())
        chosen = order[skipped : skipped + count]
        return which[chosen], nth[chosen]

    def counts(self, start: int) -> NDArray[np.int64]:
        """See `Draws`."""
        first_D = self._before(start)
        which, _ = self.at(int(first_D.sum()), start - int(first_D.sum()))
        return first_D + np.bincount(which, minlength=len(first_D))

    def _times(self, which: NDArray[np.int64], nth: NDArray[np.int64]) -> NDArray[np.float64]:
        return (nth + 0.5) / self.weights_D[which]

    def _before(self, start: int) -> NDArray[np.int64]:
        """Draws [D] of each dataset up to some time, which are `start` or a few less (at most D) in all."""
        datasets = np.arange(len(self.weights_D))
        time = max(0.0, start - len(datasets) / 2)
        count_D = np.floor(self.weights_D * time + 0.5).astype(np.int64)
        # What rounding got wrong by one is put right, so that exactly the draws up to that time are counted.
        count_D -= (count_D > 0) & (self._times(datasets, count_D - 1) > time)
        return count_D + (self._times(datasets, count_D) <= time)
