"""Selection by score."""

from pathlib import Path

import numpy as np
import pytest

from megagrow.data.loader import SampleOrder
from megagrow.errors import ConfigError, DataError
from megagrow.salt.score_files import SCORE_NAMES, Cost, Identity, Scores
from megagrow.salt.select import select


def scores(values: list[float], name: str = "median_zero") -> Scores:
    """The given values under one name, falling ones under the others."""
    size = len(values)
    arrays = {n: -np.arange(size, dtype=np.float32) for n in SCORE_NAMES}
    arrays[name] = np.array(values, np.float32)
    identity = Identity("", "", "", 10, 8, size, "float32")
    num_tokens = np.full(size, 8, np.int32)
    return Scores(Path("folder"), arrays, num_tokens, identity, Cost(0.0, None, 0), "")


@pytest.mark.parametrize(
    ("keep", "ids"),
    [(1.0, [0, 1, 2, 3, 4, 5]), (0.5, [1, 3, 5]), (0.1, [3]), (1e-9, [3]), (0.7, [1, 2, 3, 5])],
)
def test_the_highest_scores_are_kept(keep: float, ids: list[int]) -> None:
    chosen = select(scores([0.1, 0.5, 0.4, 0.9, 0.2, 0.6]), "median_zero", keep)
    assert chosen.dtype == np.int64
    assert chosen.tolist() == ids


def test_the_named_score_decides() -> None:
    by_mean = scores([0.1, 0.2, 0.3, 0.4], "mean_nll")
    assert select(by_mean, "mean_nll", 0.5).tolist() == [2, 3]
    assert select(by_mean, "median_zero", 0.5).tolist() == [0, 1]


def test_of_equal_scores_the_lower_ids_are_kept() -> None:
    values = [0.5] * 1000
    values[700] = 0.6
    assert select(scores(values), "median_zero", 0.004).tolist() == [0, 1, 2, 700]
    # -0 and 0 are the same score.
    assert select(scores([0.0, -0.0, 0.0, -0.0]), "median_zero", 0.5).tolist() == [0, 1]


def test_a_share_of_a_tenth_is_a_tenth() -> None:
    """0.1 · 30 is 3.0000000000000004."""
    assert len(select(scores([0.0] * 30), "median_zero", 0.1)) == 3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_every_sample_needs_a_score(bad: float) -> None:
    with pytest.raises(DataError, match="median_zero of sample 2 is (nan|inf), and 1 of 4") as error:
        select(scores([0.1, 0.2, bad, 0.3]), "median_zero", 0.5)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "keep", "message"),
    [
        ("median", 0.5, "salt.score=median is unknown; use one of median_in_top_k, "),
        ("median_zero", 0.0, "salt.keep_fraction=0.0 must be in"),
        ("median_zero", 1.5, "salt.keep_fraction=1.5 must be in"),
    ],
)
def test_wrong_settings(name: str, keep: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select(scores([0.1, 0.2]), name, keep)


def test_a_selection_makes_an_order() -> None:
    ids = select(scores([0.1, 0.5, 0.4, 0.9]), "median_zero", 0.5)
    assert sorted(SampleOrder(ids, seed=3).ids(0, 2).tolist()) == [1, 3]
