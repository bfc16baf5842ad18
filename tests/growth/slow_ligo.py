"""LiGO learns in every variant on three seeds, alone and on tensor x pipeline x data shards; more layouts (minutes)."""

import pytest

from tests.growth.ligo_learning import WAYS, assert_learned, learn, trained_source
from tests.growth.test_ligo import SLOW_LAYOUTS, assert_shards_equal_one_process
from tests.growth.test_ligo_learning import EVERY
from tests.ranks import run_ranks

SEEDS = [1, 2, 3]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("variant", WAYS)
def test_learned_maps_beat_the_initial_ones(variant: str, seed: int) -> None:
    assert_learned(learn(seed, WAYS[variant]))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("variant", WAYS)
def test_maps_learn_on_shards(variant: str, seed: int) -> None:
    alone = learn(seed, WAYS[variant])
    for result in run_ranks(learn, 8, seed, WAYS[variant], EVERY, source=trained_source(seed)):
        assert_learned(result)
        assert (result.before, result.after) == pytest.approx((alone.before, alone.after), rel=1e-3)


@pytest.mark.parametrize("layout", SLOW_LAYOUTS, ids=lambda x: "-".join(map(str, x)))
def test_shards_and_their_gradients_equal_one_process(layout: tuple[int, int, int]) -> None:
    assert_shards_equal_one_process(*layout)
