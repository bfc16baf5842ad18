"""Named methods: what each keeps on every family, which units and layers it copies, and what is refused."""

import dataclasses
from typing import cast

import pytest
import torch

from megagrow.config import Breaker, ModelConfig, RopeScaling
from megagrow.errors import ConfigError
from megagrow.growth.depth import DEPTHS
from megagrow.growth.grow import grow_whole
from megagrow.growth.maps import SparseMap
from megagrow.growth.methods import make_recipe
from megagrow.growth.verify import (
    VERIFY_STEP,
    function_change,
    gradient_errors,
    grow_model,
    promises_gradients,
    replica_distances,
    report,
    train,
)
from megagrow.optim import Optimizer
from megagrow.roles import leaves, parameter_shapes
from tests.growth import models
from tests.growth.models import gradients_of, grown, make, make_ids, tensors_of, widened
from tests.growth.recipes import METHODS, recipe_of

KEPT = 1e-12

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
        for name, source in models.FAMILIES.items()
        for width in WIDTHS + QUERY_ONLY
    ]


@pytest.mark.parametrize(("source", "width"), cases())
def test_clone_keeps_function_and_gradient_rule(source: ModelConfig, width: dict[str, int]) -> None:
    small, target = make(source), widened(source, **width)
    recipe = make_recipe("clone", source, target)
    large, ids = grown(recipe, small), make_ids(source)
    assert function_change(small, large, ids[:, :-1]) <= KEPT
    gradients = gradients_of(small, ids), gradients_of(large, ids)
    errors = gradient_errors(recipe, *gradients)
    assert max(errors.values()) <= 1e-11, max(errors, key=errors.__getitem__)
    assert max(replica_distances(recipe, tensors_of(large)).values()) == 0


SIX_QUERIES = dataclasses.replace(models.LLAMA, num_heads=6)


@pytest.mark.parametrize("breaker", ["none", "split"])
@pytest.mark.parametrize("method", ["clone", "net2net", "fpi"])
@pytest.mark.parametrize(
    ("source", "kv"), [(models.LLAMA, 2), (models.MQA, 2), (models.MQA, 4), (models.QK_NORM, 2), (SIX_QUERIES, 3)]
)
def test_key_value_heads_grow_alone(source: ModelConfig, kv: int, method: str, breaker: Breaker) -> None:
    """MQA -> GQA -> MHA: exact, and copies part by themselves, since each serves queries of its own."""
    recipe = make_recipe(method, source, widened(source, kv=kv), breaker)
    small, ids = make(source), make_ids(source)
    large = grown(recipe, small)
    assert recipe.keeps_function and recipe.axes.keys() == {"key", "value"}
    assert function_change(small, large, ids[:, :-1]) <= KEPT
    assert not promises_gradients(recipe)
    summed = gradients_of(large, ids)["layers.1.attention.key_value.weight"].unflatten(0, (-1, kv, 8)).sum(1)
    expected = gradients_of(small, ids)["layers.1.attention.key_value.weight"]
    torch.testing.assert_close(summed.flatten(0, 1), expected, rtol=1e-10, atol=1e-13)
    optimizer = Optimizer(dict(large.named_parameters()), VERIFY_STEP)
    assert max(replica_distances(recipe, tensors_of(large)).values()) == 0
    train(large, optimizer, ids, 3)
    assert replica_distances(recipe, tensors_of(large))["layers.0.attention.key_value.weight"] > 1e-4


def test_key_value_heads_that_grow_alone_grow_by_whole_numbers() -> None:
    with pytest.raises(ConfigError, match="the target has 3 key/value heads for the same 6 query heads"):
        make_recipe("clone", SIX_QUERIES, dataclasses.replace(SIX_QUERIES, num_kv_heads=3))
    aki = make_recipe("aki", models.LLAMA, widened(models.LLAMA, kv=2))
    assert not aki.keeps_function
    assert not any(tensor.isnan().any() for tensor in tensors_of(grown(aki, make(models.LLAMA))).values())


def test_replicas_that_differ_are_found() -> None:
    source = models.LLAMA
    recipe = make_recipe("clone", source, widened(source, **DOUBLED))
    tensors = tensors_of(grown(recipe, make(source)))
    tensors["layers.0.mlp.down.weight"][3, 5] *= 1.5
    distances = replica_distances(recipe, tensors)
    moved = [name for name, distance in distances.items() if distance]
    assert moved == ["layers.0.mlp.down.weight"]
    assert distances[moved[0]] > 0.01


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


REFUSED = [
    ("stack", widened(models.LLAMA, hidden=2), "hidden_size is 12 in the source and 24"),
    (
        "clone",
        dataclasses.replace(models.LLAMA, num_heads=6, num_kv_heads=6),
        "use model.num_heads=12 or num_kv_heads=2",
    ),
    ("zero_pad", widened(models.LLAMA, kv=2), "in copies of their own key/value head, equally many of each"),
    (
        "rms_random",
        widened(models.LLAMA, kv=2),
        "fpi, aki, or ligo from growth.ligo_init=clone, or model.num_heads=8",
    ),
    ("clone", dataclasses.replace(models.LLAMA, hidden_size=20), "needs the target's norm_eps=6e-06"),
    ("zero_pad", dataclasses.replace(models.LLAMA, hidden_size=24), "set norm_eps=5e-06"),
    ("zero_pad+stack", dataclasses.replace(models.LLAMA, norm_eps=1e-6), "set norm_eps=1e-05"),
    ("net2net", dataclasses.replace(models.LLAMA, hidden_size=20), "no multiple of the source's 12"),
    ("dus", widened(models.LLAMA, layers=3), "use an even number of at most 4"),
    ("insert_identity", widened(models.LLAMA, ffn=2), "as in clone+insert_identity"),
    ("clone+aki", models.LLAMA, "joins two methods for the same thing"),
    ("clone", dataclasses.replace(models.LLAMA, ffn_size=5), "smaller"),
    ("clone", models.TIED, "tied_embeddings"),
    (
        "clone",
        dataclasses.replace(models.LLAMA, hidden_size=24, head_dim=8),
        "rotary frequencies are those of one head size",
    ),
    ("clone", dataclasses.replace(models.LLAMA, rope_fraction=0.5), "rope_fraction=1.0, the target rope_fraction=0.5"),
    ("clone", dataclasses.replace(models.LLAMA, rope_scaling=RopeScaling("linear", 2.0)), "the target rope_scaling="),
    ("clone", dataclasses.replace(models.LLAMA, parallel_residual=True), "growth keeps the kind of model"),
    ("sprout", models.LLAMA, "use clone, net2net"),
]


NO_EXACT_ANSWER = {
    "clone, rest": {"qk-norm", "bert", "roberta-untied"},
    "zero_pad": {"qk-norm", "gpt2", "everything", "bert", "roberta-untied", "gpt-neox"},
    "insert_identity": {"bert", "roberta-untied"},
    "clone+insert_identity": {"bert", "roberta-untied"},
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_keep_what_they_promise_on_every_family(method: str) -> None:
    refused = set()
    for family, source in models.FAMILIES.items():
        try:
            recipe = recipe_of(method, source)
        except ConfigError:
            refused.add(family)
            continue
        small, ids = make(source), make_ids(source)
        large = grown(recipe, small)
        assert not any(parameter.isnan().any() for parameter in large.parameters())
        keeps = METHODS[method][-1]
        assert recipe.keeps_function == keeps
        change = function_change(small, large, ids[:, :-1])
        assert change <= KEPT if keeps else change > 1e-3, (family, change)
        if promises_gradients(recipe) and source.vocab_size == recipe.target.vocab_size:
            errors = gradient_errors(recipe, gradients_of(small, ids), gradients_of(large, ids))
            assert max(errors.values()) <= 1e-11, (family, max(errors, key=errors.__getitem__))
    assert refused == NO_EXACT_ANSWER.get(method, set())


def test_shares_that_differ_within_a_group_promise_no_gradients() -> None:
    """Of a key/value head's two query heads one has twice as many copies in the group: split, its share is another."""
    source = dataclasses.replace(models.LLAMA, num_heads=4, num_kv_heads=2)
    target = dataclasses.replace(source, num_heads=12, num_kv_heads=4)
    small, ids = make(source), make_ids(source)
    for breaker, keeps in (("none", True), ("split", False)):
        recipe = make_recipe("clone", source, target, cast(Breaker, breaker))
        large = grown(recipe, small)
        assert function_change(small, large, ids[:, :-1]) <= KEPT
        assert promises_gradients(recipe) is keeps, breaker
        errors = gradient_errors(recipe, gradients_of(small, ids), gradients_of(large, ids))
        assert (max(errors.values()) <= 1e-9) is keeps, breaker


def test_which_methods_promise_gradients() -> None:
    """Those whose gradients the test above judges, and no others: clone's rest is zeros here, means in GPT-2."""
    promised = {method for method in METHODS if promises_gradients(recipe_of(method, models.LLAMA))}
    exact = {"clone", "clone, rest", "net2net", "fpi", "zero_pad", "zero_pad, inside", "insert_identity", "vocabulary"}
    assert promised == exact | {"clone+insert_identity"}
    assert not promises_gradients(recipe_of("clone, rest", models.GPT2))


@pytest.mark.parametrize("method", ["clone", "clone, rest", "net2net, noise", "zero_pad", "insert_identity"])
def test_float32_keeps_the_function_to_its_own_rounding(method: str) -> None:
    judged = 0
    for source in models.FAMILIES.values():
        try:
            recipe = recipe_of(method, source)
        except ConfigError:
            continue
        small, judged = make(source).float(), judged + 1
        assert function_change(small, grow_model(recipe, small), make_ids(source)) <= 1e-5
    assert judged >= 4
    for width in WIDTHS + QUERY_ONLY if method == "clone" else []:
        small = make(models.EVERYTHING).float()
        recipe = make_recipe("clone", models.EVERYTHING, widened(models.EVERYTHING, **width))
        assert function_change(small, grow_model(recipe, small), make_ids(models.EVERYTHING)) <= 1e-5


@pytest.mark.parametrize(
    ("method", "sizes", "index"),
    [
        ("stack", (3, 7), [0, 1, 2, 0, 1, 2, 0]),
        ("interleave", (2, 5), [0, 0, 0, 1, 1]),
        ("insert_identity", (4, 6), [0, 1, 1, 2, 3, 3]),
        ("insert_identity", (2, 5), [0, 0, 1, 1, 1]),
        ("middle", (3, 4), [0, 1, 1, 2]),
        ("middle", (6, 8), [0, 1, 2, 3, 2, 3, 4, 5]),
        ("middle", (4, 5), [0, 1, 1, 2, 3]),
        ("middle", (1, 3), [0, 0, 0]),
        ("dus", (4, 6), [0, 1, 2, 1, 2, 3]),
        ("dus", (32, 48), [*range(24), *range(8, 32)]),
        ("dus", (3, 3), [0, 1, 2]),
    ],
)
def test_depth_methods_copy_these_layers(method: str, sizes: tuple[int, int], index: list[int]) -> None:
    assert list(DEPTHS[method](*sizes).layers.index) == index


def test_identity_layers_learn_from_the_first_step_on() -> None:
    source = models.GPT2
    recipe = recipe_of("insert_identity", source)
    gradients = gradients_of(grown(recipe, make(source)), make_ids(source))
    assert len(recipe.silent) == 1
    for layer in recipe.silent:
        for leaf in ("attention.output.weight", "attention.output.bias", "mlp.down.weight", "mlp.down.bias"):
            assert gradients[f"layers.{layer}.{leaf}"].abs().max() > 1e-4


def test_aki_takes_new_rows_from_the_next_layer() -> None:
    source = models.GPT2
    recipe = make_recipe("aki", source, widened(source, hidden=2, ffn=2))
    small, large = tensors_of(make(source)), tensors_of(grown(recipe, make(source)))
    hidden, ffn = recipe.axes["hidden"], recipe.axes["ffn"]
    assert isinstance(hidden, SparseMap) and isinstance(ffn, SparseMap)
    for layer, following in ((0, 1), (1, 1)):
        found = large[f"layers.{layer}.mlp.up.weight"]
        own, after = (small[f"layers.{i}.mlp.up.weight"] for i in (layer, following))
        wide = [rows[:, hidden.index] / 2 for rows in (own, after)]
        assert torch.equal(found[:10], wide[0])
        assert torch.equal(found[10:], wide[1][ffn.index[10:]])
        assert torch.equal(
            large[f"layers.{layer}.mlp_norm.weight"], small[f"layers.{layer}.mlp_norm.weight"][hidden.index]
        )


def test_new_tokens_begin_as_the_mean_and_leave_old_logits() -> None:
    source = models.BERT
    recipe = recipe_of("vocabulary", source)
    small, large = tensors_of(make(source)), tensors_of(grown(recipe, make(source)))
    for name in ("embedding.tokens", "head.bias"):
        assert torch.equal(large[name][:29], small[name])
        torch.testing.assert_close(large[name][29:], small[name].mean(0, keepdim=True).expand_as(large[name][29:]))


def test_rms_random_keeps_the_size_of_outputs() -> None:
    source = dataclasses.replace(models.LLAMA, hidden_size=128, num_heads=8, num_kv_heads=8, ffn_size=128)
    recipe = make_recipe("rms_random", source, widened(source, hidden=3, query=3, kv=3, ffn=2))
    generator = torch.Generator().manual_seed(0)
    for name in ("layers.0.attention.query.weight", "layers.0.attention.output.weight", "layers.0.mlp.down.weight"):
        weight = torch.randn(parameter_shapes(source)[name], generator=generator, dtype=torch.double)
        wide = grow_whole(recipe, {name: weight}.__getitem__, name)
        x, y = (torch.randn(matrix.shape[1], 256, generator=generator, dtype=torch.double) for matrix in (weight, wide))
        old, new = ((matrix @ v).square().mean().sqrt() for matrix, v in ((weight, x), (wide, y)))
        assert abs(new / old - 1) < 0.03


@pytest.mark.parametrize("breaker", ["none", "noise", "split"])
def test_replicas_part_with_a_breaker_only(breaker: Breaker) -> None:
    source = models.LLAMA
    recipe = make_recipe("clone", source, widened(source, **DOUBLED), breaker)
    large = grown(recipe, make(source))
    optimizer, distances = Optimizer(dict(large.named_parameters()), VERIFY_STEP), []
    for _ in range(3):
        distances.append(replica_distances(recipe, tensors_of(large))["layers.0.attention.query.weight"])
        train(large, optimizer, make_ids(source), 5)
    if breaker == "none":
        assert distances[0] == 0
        assert max(distances) <= 1e-12  # a matrix product may add up neighbouring columns in different orders
    else:
        assert distances[0] <= 1e-15
        assert 1e-4 < distances[1] < distances[2]


def test_shares_of_a_split_keep_the_gradient_rule_where_no_norm_is_in_between() -> None:
    source = models.LLAMA
    recipe = make_recipe("clone", source, widened(source, query=4, kv=2, ffn=3), "split", 0.5)
    small, ids = make(source), make_ids(source)
    errors = gradient_errors(recipe, gradients_of(small, ids), gradients_of(grown(recipe, small), ids))
    assert max(errors.values()) <= 1e-11, errors


def test_a_report_has_the_figures_of_an_exact_method() -> None:
    small, ids = make(models.LLAMA), make_ids(models.LLAMA)
    exact = report(recipe_of("clone", models.LLAMA), small, ids)
    assert max(exact["function_change"] or 0, exact["gradient_error"] or 0, exact["step_error"] or 0) <= 1e-11
    assert exact["replica_distance"] == 0
    assert (exact["replica_distance_later"] or 0) <= 1e-12
    assert exact["step_error"] is not None and exact["effective_rank"] == pytest.approx(exact["effective_rank_source"])
    noisy = report(recipe_of("net2net, noise", models.LLAMA), small, ids)
    assert noisy["step_error"] is None and (noisy["function_change"] or 0) <= KEPT
    assert (noisy["replica_distance"] or 0) <= 1e-15 < 1e-4 < (noisy["replica_distance_later"] or 0)
    assert (noisy["effective_rank"] or 0) > (noisy["effective_rank_source"] or 0)


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
