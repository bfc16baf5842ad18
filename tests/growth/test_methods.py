"""Named methods: the function that clone keeps, the layers that stack copies, and what is refused."""

import dataclasses

import pytest
import torch

from megagrow.config import ModelConfig, RopeScaling
from megagrow.errors import ConfigError
from megagrow.growth import operator
from megagrow.growth.maps import SparseMap, to_elements
from megagrow.growth.methods import make_recipe
from megagrow.growth.recipe import Recipe
from megagrow.growth.verify import function_change, gradient_errors, replica_distances
from megagrow.roles import leaves
from tests.growth import models
from tests.growth.models import grown, make, make_ids, tensors_of, widened

KEPT = 1e-12

MODELS = {
    "llama": models.LLAMA,
    "llama-mha": models.MHA,
    "llama-mqa": models.MQA,
    "llama-tied": models.TIED,
    "gpt2": models.GPT2,
    "everything": models.EVERYTHING,
    "qk-norm": models.QK_NORM,
    "untied-bias": models.UNTIED_BIAS,
    "bert": models.BERT,
    "roberta-untied": models.UNTIED_ROBERTA,
    "gpt-neox": models.GPT_NEOX,
    "qwen2": models.QWEN2,
}
WIDTHS = [
    {"hidden": 2},
    {"hidden": 3},
    {"ffn": 2},
    {"ffn": 3},
    {"query": 2, "kv": 2},
    {"query": 3, "kv": 3},
    {"hidden": 2, "query": 2, "kv": 2, "ffn": 3},
    {"hidden": 3, "query": 2, "kv": 2, "ffn": 2},
]
QUERY_ONLY = [{"query": 2}, {"query": 3}, {"query": 6, "kv": 3}, {"query": 2, "hidden": 2}]
DOUBLED = {"hidden": 2, "query": 2, "kv": 2, "ffn": 2}


def cases() -> list[object]:
    return [
        pytest.param(source, width, id=f"{name}-{'-'.join(f'{k}{v}' for k, v in width.items())}")
        for name, source in MODELS.items()
        for width in WIDTHS + QUERY_ONLY
    ]


@pytest.mark.parametrize(("source", "width"), cases())
def test_clone_keeps_function_and_gradient_rule(source: ModelConfig, width: dict[str, int]) -> None:
    small, target = make(source), widened(source, **width)
    recipe = make_recipe("clone", source, target)
    large, ids = grown(recipe, small), make_ids(source)
    assert function_change(small, large, ids[:, :-1]) <= KEPT
    gradients = models.gradients_of(small, ids), models.gradients_of(large, ids)
    errors = gradient_errors(recipe, *gradients)
    assert max(errors.values()) <= 1e-11, max(errors, key=errors.__getitem__)
    assert max(replica_distances(recipe, tensors_of(large)).values()) == 0


def test_replicas_that_differ_are_found() -> None:
    source = models.LLAMA
    recipe = make_recipe("clone", source, widened(source, **DOUBLED))
    tensors = tensors_of(grown(recipe, make(source)))
    tensors["layers.0.mlp.down.weight"][3, 5] *= 1.5
    distances = replica_distances(recipe, tensors)
    moved = [name for name, distance in distances.items() if distance]
    assert moved == ["layers.0.mlp.down.weight"]
    assert distances[moved[0]] > 0.01


def test_tiled_query_heads_lose_the_function() -> None:
    source = models.LLAMA
    recipe = make_recipe("clone", source, widened(source, query=2))
    tiled = to_elements(torch.arange(8) % 4, source.head_dim)
    heads = SparseMap(tiled, source.num_heads * source.head_dim, in_scale=0.5)
    wrong = dataclasses.replace(recipe, axes={"query": heads, "heads": heads})
    small, ids = make(source), make_ids(source)
    assert function_change(small, grown(wrong, small), ids) > 1e-2


def test_tied_head_without_scale_loses_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    source = models.TIED
    recipe = make_recipe("clone", source, widened(source, hidden=2))
    monkeypatch.setattr(operator, "_forms", lambda name, model: ("out", "in"))
    small, ids = make(source), make_ids(source)
    assert function_change(small, grown(recipe, small), ids) > 1e-2


@pytest.mark.parametrize(("source", "num_outside"), [(models.EVERYTHING, 4), (models.BERT, 10)])
def test_stack_repeats_layers_exactly(source: ModelConfig, num_outside: int) -> None:
    target = widened(source, layers=5)
    small = tensors_of(make(source))
    large = tensors_of(grown(make_recipe("stack", source, target), make(source)))
    for layer in range(5):
        for leaf in leaves(source):
            copied = small[f"layers.{layer % 2}.{leaf}"]
            assert torch.equal(large[f"layers.{layer}.{leaf}"], copied)
    outside = [name for name in small if not name.startswith("layers.")]
    assert len(outside) == num_outside
    assert all(torch.equal(large[name], small[name]) for name in outside)


def test_clone_stacks_the_widened_layers() -> None:
    source = models.LLAMA
    deep = widened(source, **DOUBLED, layers=3)
    recipe = make_recipe("clone", source, deep)
    wide = tensors_of(grown(make_recipe("clone", source, widened(source, **DOUBLED)), make(source)))
    both = tensors_of(grown(recipe, make(source)))
    assert not recipe.keeps_function
    for leaf in leaves(source):
        assert torch.equal(both[f"layers.2.{leaf}"], wide[f"layers.0.{leaf}"])


def uneven(source: ModelConfig) -> Recipe:
    """Net2Net-like: units are copied unequally often, each reader divides by its own count."""
    target = dataclasses.replace(source, ffn_size=source.ffn_size + 3, num_heads=6, num_kv_heads=6)

    def copies(units: torch.Tensor, num_units: int, unit_size: int) -> SparseMap:
        count = torch.bincount(units)[units].repeat_interleave(unit_size)
        return SparseMap(to_elements(units, unit_size), num_units * unit_size, in_scale=1 / count.double())

    heads = copies(torch.tensor([2, 0, 0, 1, 3, 0]), 4, source.head_dim)
    neurons = torch.cat([torch.arange(source.ffn_size), torch.tensor([7, 1, 7])])
    axes = {"ffn": copies(neurons, source.ffn_size, 1)}
    axes |= dict.fromkeys(("query", "key", "value", "heads"), heads)
    return dataclasses.replace(make_recipe("ligo", source, target), axes=axes)


@pytest.mark.parametrize("source", [models.MHA, models.GPT2], ids=["llama-mha", "gpt2"])
def test_uneven_copies_keep_function_and_gradient_rule(source: ModelConfig) -> None:
    small, recipe = make(source), uneven(source)
    large, ids = grown(recipe, small), make_ids(source)
    assert function_change(small, large, ids[:, :-1]) <= KEPT
    gradients = models.gradients_of(small, ids), models.gradients_of(large, ids)
    assert max(gradient_errors(recipe, *gradients).values()) <= 1e-11


REFUSED = [
    ("stack", widened(models.LLAMA, hidden=2), "hidden_size is 12 in the source and 24"),
    ("clone", widened(models.LLAMA, kv=2), "use num_heads=8 or num_kv_heads=2"),
    ("clone", dataclasses.replace(models.LLAMA, ffn_size=5), "smaller"),
    ("clone", models.TIED, "tied_embeddings"),
    ("clone", dataclasses.replace(models.LLAMA, hidden_size=24, head_dim=8), "head_dim=4, the target head_dim=8"),
    ("clone", dataclasses.replace(models.LLAMA, rope_fraction=0.5), "rope_fraction=1.0, the target rope_fraction=0.5"),
    ("clone", dataclasses.replace(models.LLAMA, rope_scaling=RopeScaling("linear", 2.0)), "the target rope_scaling="),
    ("clone", dataclasses.replace(models.LLAMA, parallel_residual=True), "growth keeps the kind of model"),
    ("sprout", models.LLAMA, "use clone, net2net"),
]


@pytest.mark.parametrize("method", ["clone", "ligo"])
def test_a_tied_head_without_a_norm_before_it_has_no_place_for_its_scale(method: str) -> None:
    source = dataclasses.replace(models.TIED, norm_place="after")
    with pytest.raises(ConfigError, match="norm_place=after"):
        make_recipe(method, source, widened(source, hidden=2))
    recipe = make_recipe("clone", source, widened(source, ffn=2))
    small, ids = make(source), make_ids(source)
    assert function_change(small, grown(recipe, small), ids) <= KEPT


@pytest.mark.parametrize(("method", "target", "words"), REFUSED)
def test_refusals_are_one_line(method: str, target: ModelConfig, words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        make_recipe(method, models.LLAMA, target)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)
