"""LiGO learns: on real text, learned maps give a lower held-out loss than those that they start from.

All variants on all seeds, and on shards: tests/growth/slow_ligo.py.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest

from megagrow.config import ParallelConfig
from megagrow.growth.ligo import Ligo
from megagrow.growth.recipe import Recipe
from tests.growth.ligo_learning import WAYS, assert_learned, learn, trained_source
from tests.ranks import run_ranks

EVERY = ParallelConfig(tensor=2, pipeline=2)  # on 8 ranks with FSDP over 2


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_learned_maps_beat_the_initial_ones(seed: int) -> None:
    assert_learned(learn(seed, WAYS["tied"]))


@pytest.mark.parametrize("variant", ["source_layer", "target_layer", "full_rank"])
def test_the_other_variants_learn(variant: str) -> None:
    result = learn(1, WAYS[variant])
    assert_learned(result)
    assert any(name.startswith("fill.") for name in result.moved) == (variant == "full_rank")


def test_maps_learn_on_tensor_pipeline_and_data_shards() -> None:
    way = replace(WAYS["target_layer"], ligo_init="clone", ligo_steps=6)
    results = run_ranks(learn, 8, 1, way, EVERY, source=trained_source(1))
    for result in results:
        assert_learned(result)
        assert (result.before, result.after) == (results[0].before, results[0].after)
    assert len({frozenset(result.moved) for result in results}) == 2, "each stage has its own maps"


def detached(ligo: Ligo) -> None:
    """Generates from maps that no gradient reaches."""
    recipe = ligo.recipe

    def cut() -> Recipe:
        kept = {name: getattr(ligo, name) for name in ("widths", "depth", "fill")}
        vars(ligo).update({name: {n: p.detach() for n, p in maps.items()} for name, maps in kept.items()})
        found = recipe()
        vars(ligo).update(kept)
        return found

    ligo.recipe = cut  # type: ignore[method-assign]


def frozen(name: str) -> Callable[[Ligo], None]:
    """One map stands still."""

    def freeze(ligo: Ligo) -> None:
        ligo.parameters()[name].requires_grad_(False)

    return freeze


FROZEN = {
    "width.hidden": "tied",
    "width.ffn": "tied",
    "width.value": "tied",
    "depth.mlp.down.weight": "tied",
    "width.layers.1.ffn": "target_layer",
}


@pytest.mark.parametrize("name", FROZEN)
def test_a_map_that_stands_still_is_seen(name: str) -> None:
    result = learn(1, replace(WAYS[FROZEN[name]], ligo_steps=2), change=frozen(name))
    with pytest.raises(AssertionError, match=f"not moved: {name}$"):
        assert_learned(result)


@pytest.mark.parametrize("mutant", ["learning rate 0", "detached maps"])
def test_learning_nothing_is_seen(mutant: str) -> None:
    if mutant == "detached maps":
        result = learn(1, WAYS["tied"], change=detached)
    else:
        result = learn(1, replace(WAYS["tied"], ligo_lr=0.0))
    assert result.after == result.before
    with pytest.raises(AssertionError, match="not moved"):
        assert_learned(result)
