"""Adam's state after growing: with it, the large model goes exactly where the small one goes."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megagrow.config import ModelConfig, OptimConfig
from megagrow.errors import ConfigError
from megagrow.growth.grow import grow_whole
from megagrow.growth.ligo import Ligo
from megagrow.growth.methods import make_recipe
from megagrow.growth.moments import (
    gradient_scale,
    grow_multipliers,
    grow_optimizer,
    value_scale,
)
from megagrow.growth.recipe import Recipe
from megagrow.model import Transformer
from megagrow.optim import MOMENTS, Multipliers, Optimizer
from tests.growth import models
from tests.growth.models import grown, loss_of, make, make_ids, tensors_of, widened

CONFIG = OptimConfig(lr=3e-3, weight_decay=0.1, eps=1e-4)
FAMILIES = {
    "llama": models.LLAMA,
    "mha": models.MHA,
    "mqa, tied": dataclasses.replace(models.MQA, tied_embeddings=True),
    "gpt2": models.GPT2,
    "gpt-neox": models.GPT_NEOX,
    "qwen2": models.QWEN2,
    "tied": models.EVERYTHING,
    "untied": models.UNTIED_BIAS,
    "qk-norm": models.QK_NORM,
    "bert": models.BERT,
    "roberta, untied": models.UNTIED_ROBERTA,
}
WIDTH = {"hidden": 2, "query": 6, "kv": 3, "ffn": 3}


def train(model: Transformer, optimizer: Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = loss_of(model, make_ids(model.config, seed=100 + step))
        loss.backward()
        optimizer.step(CONFIG.lr)
        losses.append(loss.item())
    return losses


def small_run(source: ModelConfig) -> tuple[Transformer, Optimizer]:
    """A model in the middle of its training."""
    model = make(source)
    optimizer = Optimizer(dict(model.named_parameters()), CONFIG)
    train(model, optimizer, range(4))
    return model, optimizer


def fetches(optimizer: Optimizer) -> dict[str, Callable[[str], Tensor]]:
    moments = optimizer.moments()
    return {moment: moments[moment].__getitem__ for moment in MOMENTS}


def grow_run(
    recipe: Recipe,
    small: Transformer,
    old: Optimizer,
    multipliers: dict[str, Multipliers],
) -> tuple[Transformer, Optimizer]:
    large = grown(recipe, small)
    optimizer = Optimizer(dict(large.named_parameters()), CONFIG, multipliers, old.step_count)
    targets = optimizer.moments()
    step = grow_optimizer(recipe, "exact", fetches(old), targets, old.step_count)
    assert step == old.step_count == 4
    return large, optimizer


@pytest.mark.parametrize(
    "source",
    FAMILIES.values(),
    ids=FAMILIES,
)
def test_exact_moments_give_the_small_models_trajectory(source: ModelConfig) -> None:
    small, old = small_run(source)
    recipe = make_recipe("clone", source, widened(source, **WIDTH))
    large, new = grow_run(recipe, small, old, grow_multipliers(recipe, "exact"))
    small_losses = train(small, old, range(4, 29))
    large_losses = train(large, new, range(4, 29))
    assert small_losses == pytest.approx(large_losses, rel=1e-10, abs=0)
    assert abs(small_losses[0] - small_losses[-1]) > 0.01
    expected = {n: grow_whole(recipe, tensors_of(small).__getitem__, n) for n in tensors_of(large)}
    assert models.distance(tensors_of(large), expected) <= 1e-10


def test_without_its_step_sizes_the_trajectory_is_another() -> None:
    small, old = small_run(models.LLAMA)
    recipe = make_recipe("clone", models.LLAMA, widened(models.LLAMA, **WIDTH))
    large, new = grow_run(recipe, small, old, grow_multipliers(recipe, "reset"))
    small_losses = train(small, old, range(4, 29))
    assert abs(train(large, new, range(4, 29))[-1] - small_losses[-1]) > 1e-3


def test_a_second_growth_multiplies_the_step_sizes() -> None:
    source, middle = models.TIED, widened(models.TIED, hidden=2)
    last = widened(middle, hidden=3, ffn=2)
    first = grow_multipliers(make_recipe("clone", source, middle), "exact")
    both = grow_multipliers(make_recipe("clone", middle, last), "exact", first)
    once = grow_multipliers(make_recipe("clone", source, last), "exact")
    for name in once:
        for field in ("lr", "eps", "weight_decay"):
            assert getattr(both[name], field) == pytest.approx(getattr(once[name], field))


def test_scales_of_each_kind_of_parameter() -> None:
    source = models.TIED
    tied = make_recipe("clone", source, widened(source, hidden=2, query=6, kv=3, ffn=5))
    scales = {
        "embedding.tokens": (1, 1 / 2),
        "layers.0.attention_norm.weight": (1, 1 / 2),
        "layers.0.attention.query.weight": (1 / 2, 1 / 6),
        "layers.1.attention.key_value.weight": (1 / 2, 1 / 3),
        "layers.0.attention.output.weight": (1 / 6, 1 / 2),
        "layers.0.mlp.gate_up.weight": (1 / 2, 1 / 5),
        "layers.0.mlp.down.weight": (1 / 5, 1 / 2),
        "final_norm.weight": (1 / 2, 1),  # takes the scale of the tied head
    }
    for name, (value, gradient) in scales.items():
        assert value_scale(tied, name) == pytest.approx(value), name
        assert gradient_scale(tied, name) == pytest.approx(gradient), name
    untied = make_recipe("clone", models.LLAMA, widened(models.LLAMA, hidden=2))
    assert value_scale(untied, "head.weight") == 1 / 2
    assert gradient_scale(untied, "head.weight") == 1
    assert value_scale(untied, "final_norm.weight") == 1


def test_the_last_norm_of_an_encoder_takes_the_scale_of_its_tied_head() -> None:
    source = models.BERT
    tied = make_recipe("clone", source, widened(source, hidden=2))
    scales = {
        "embedding.token_types": (1, 1 / 2),
        "embedding_norm.bias": (1, 1 / 2),
        "layers.1.mlp_norm.weight": (1, 1 / 2),
        "mlm_head.dense.weight": (1 / 2, 1 / 2),
        "mlm_head.norm.weight": (1 / 2, 1),
        "mlm_head.norm.bias": (1 / 2, 1),
        "head.bias": (1, 1),
    }
    for name, (value, gradient) in scales.items():
        assert (value_scale(tied, name), gradient_scale(tied, name)) == (value, gradient), name


def test_reset_clears_moments_and_count() -> None:
    small, old = small_run(models.LLAMA)
    recipe = make_recipe("stack", models.LLAMA, widened(models.LLAMA, layers=3))
    moments = {m: {n: torch.ones(3) for n in tensors_of(small)} for m in MOMENTS}
    assert grow_optimizer(recipe, "reset", {}, moments, old.step_count) == 0
    assert not any(t.any() for tensors in moments.values() for t in tensors.values())
    assert set(grow_multipliers(recipe, "reset").values()) == {Multipliers()}


def test_stack_carries_the_moments_of_the_copied_layers() -> None:
    small, old = small_run(models.GPT2)
    recipe = make_recipe("stack", models.GPT2, widened(models.GPT2, layers=4))
    _, new = grow_run(recipe, small, old, grow_multipliers(recipe, "exact"))
    for moment in MOMENTS:
        of_small, of_large = old.moments()[moment], new.moments()[moment]
        for leaf in ("mlp.down.weight", "attention.query.bias"):
            assert torch.equal(of_large[f"layers.3.{leaf}"], of_small[f"layers.1.{leaf}"])
            assert of_large[f"layers.3.{leaf}"].any()


def test_exact_is_refused_where_there_is_no_rule() -> None:
    start = make_recipe("ligo", models.LLAMA, widened(models.LLAMA, hidden=2))
    with pytest.raises(ConfigError, match="no rule for the learned maps of ligo"):
        grow_optimizer(Ligo(start).recipe(), "exact", {}, {}, 1)
    with pytest.raises(ConfigError, match="no rule for the learned maps of ligo"):
        grow_multipliers(Ligo(start).recipe(), "exact")
