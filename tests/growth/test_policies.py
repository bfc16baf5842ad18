"""Which entries of a grown model keep their moments, and how the others are updated."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megagrow.config import GrowthConfig, ModelConfig, OptimConfig
from megagrow.errors import ConfigError
from megagrow.growth import moments
from megagrow.growth.grow import grow_whole
from megagrow.growth.maps import LayerMap, SparseMap
from megagrow.growth.methods import make_recipe
from megagrow.growth.moments import (
    QUANTITIES,
    Policy,
    check_policy,
    grow_multipliers,
    grow_new_part,
    grow_optimizer,
    restored_new_part,
)
from megagrow.growth.recipe import Recipe
from megagrow.growth.verify import replica_distances
from megagrow.model import Transformer
from megagrow.new_part import NewPart
from megagrow.optim import MOMENTS, Multipliers, Optimizer
from megagrow.roles import layer_name, parameter_names, parameter_shapes, split_name
from tests.growth import models
from tests.growth.models import grown, loss_of, make, make_ids, tensors_of, widened

WIDTH = {"hidden": 2, "query": 4, "kv": 2, "ffn": 3}
NOT_ALL: Any = GrowthConfig()  # no re-warm-up


def cloned(source: ModelConfig, **sizes: Any) -> Recipe:
    return make_recipe("clone", source, widened(source, **{**WIDTH, **sizes}))


def sized(method: str, source: ModelConfig, seed: int = 0, **sizes: Any) -> Recipe:
    """By a method from a model to the same one with other sizes, with the eps that its norms then need."""
    share = source.hidden_size / sizes.get("hidden_size", source.hidden_size) if "zero_pad" in method else 1.0
    target = dataclasses.replace(source, **sizes, norm_eps=source.norm_eps * share)
    return make_recipe(method, source, target, seed=seed)


UNEVEN = {"hidden_size": 24, "num_heads": 6, "ffn_size": 14}
RECIPES = {
    "clone, depth too": cloned(models.LLAMA, layers=5),
    "fused, tied": cloned(models.EVERYTHING),
    "vocabulary": sized("clone", models.LLAMA, vocab_size=31, ffn_size=20),
    "net2net": sized("net2net", models.LLAMA, 1, **UNEVEN),
    "key/value heads": sized("clone", models.MQA, num_kv_heads=2),
    "identity layers": sized("fpi+insert_identity", models.LLAMA, num_layers=4, ffn_size=20),
    "padded": sized("zero_pad", models.LLAMA, hidden_size=20, ffn_size=13),
    "padded, fused": sized("direct_copy", models.EVERYTHING, hidden_size=20, num_heads=6, ffn_size=13),
    "padded, scaled": sized("rms_random+middle", models.MHA, num_heads=5, num_kv_heads=5, hidden_size=15, num_layers=3),
}


def source_entries(recipe: Recipe) -> dict[str, Tensor]:
    """For each target entry the number of the source entry of that leaf that it copies, from 1 on; 0: none."""
    axes = {name: SparseMap(m.index, m.num_source) for name, m in recipe.axes.items() if isinstance(m, SparseMap)}
    plain = dataclasses.replace(recipe, axes=axes, norm_scale=1.0)
    shapes, first = parameter_shapes(recipe.source), 1
    numbers = {}
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        numbers[name] = torch.arange(first, first + size, dtype=torch.double).view(shape)
        first += size
    return {name: grow_whole(plain, numbers.__getitem__, name, "gradient") for name in parameter_names(recipe.target)}


def first_occurrences(recipe: Recipe) -> dict[str, Tensor]:
    """Which target entries are the first ones, in the order of layers, rows and columns, that copy their entry."""
    seen: set[float] = {0.0}
    found = {}
    for name, numbers in source_entries(recipe).items():
        is_first = []
        for number in numbers.flatten().tolist():
            is_first.append(number not in seen)
            seen.add(number)
        found[name] = torch.tensor(is_first).view(numbers.shape)
    return found


def random_moments(model: ModelConfig) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shapes = parameter_shapes(model).items()
    return {m: {n: torch.rand(s, generator=generator).double() + 1 for n, s in shapes} for m in MOMENTS}


def grown_moments(recipe: Recipe, policy: Policy) -> dict[str, dict[str, Tensor]]:
    old, shapes = random_moments(recipe.source), parameter_shapes(recipe.target).items()
    new = {m: {n: torch.full(s, torch.nan).double() for n, s in shapes} for m in MOMENTS}
    assert grow_optimizer(recipe, policy, {m: old[m].__getitem__ for m in MOMENTS}, new, 7) == 7
    return new


@pytest.mark.parametrize("name", RECIPES)
def test_asymmetric_keeps_the_first_copies_by_the_gradient_rule(name: str) -> None:
    recipe = RECIPES[name]
    old, found, first = random_moments(recipe.source), grown_moments(recipe, "asymmetric"), first_occurrences(recipe)
    for moment, quantity in QUANTITIES.items():
        for parameter, is_first in first.items():
            whole = grow_whole(recipe, old[moment].__getitem__, parameter, quantity)
            expected = torch.where(is_first, whole, 0.0)
            assert torch.equal(found[moment][parameter], expected), parameter
    num_kept = sum(int(is_first.sum()) for is_first in first.values())
    assert num_kept == sum(tensor.numel() for tensor in old["exp_avg"].values()), "every source entry is kept once"


@pytest.mark.parametrize("name", [name for name in RECIPES if "padded" in name])
def test_zero_pad_keeps_the_old_corner_and_its_values(name: str) -> None:
    recipe = RECIPES[name]
    old, found = random_moments(recipe.source), grown_moments(recipe, "zero_pad")
    for moment in MOMENTS:
        for parameter, tensor in found[moment].items():
            before = old[moment][recipe.source_name(parameter)]
            corner = tuple(slice(0, size) for size in before.shape)
            assert torch.count_nonzero(tensor) == before.numel()
            if "query" not in parameter and "attention.output" not in parameter:  # whose new heads stand in each group
                scale = tensor[corner] / before
                assert scale.min() > 0 and scale.max() / scale.min() < 1 + 1e-6


def test_the_new_part_is_what_has_no_moments() -> None:
    for name, policies in (("clone, depth too", ["asymmetric"]), ("padded, fused", ["asymmetric", "zero_pad"])):
        recipe = RECIPES[name]
        tensors = tensors_of(Transformer(recipe.target))
        for policy in policies:
            part = grow_new_part(recipe, policy, NOT_ALL, 7, tensors)
            for parameter, moment in grown_moments(recipe, policy)["exp_avg_sq"].items():
                is_new = torch.zeros(moment.shape, dtype=torch.bool)
                if parameter in part.kept:
                    is_new = part.kept[parameter].new_entries(slice(None), moment.device).view(moment.shape)
                assert torch.equal(is_new, moment == 0), parameter


def test_moments_that_are_whole_need_no_new_part_unless_it_warms_up() -> None:
    recipe = RECIPES["fused, tied"]
    tensors = tensors_of(Transformer(recipe.target))
    warming = GrowthConfig(rewarmup_steps=3, rewarmup_part="new")
    for policy in ("exact", "reset"):
        assert grow_new_part(recipe, policy, NOT_ALL, 7, tensors) is None
        assert grow_new_part(recipe, policy, GrowthConfig(rewarmup_steps=3), 7, tensors) is None
        part = grow_new_part(recipe, policy, warming, 7, tensors)
        assert part.schedule == dataclasses.replace(part.schedule, since=7, starts_at_zero=False, steps=3, factor=1.3)
    learned = dataclasses.replace(recipe, layers=LayerMap((0, 1)), axes={"hidden": object()})
    with pytest.raises(
        ConfigError, match=r"growth.rewarmup_part=new needs a part that is old.*use .*rewarmup_part=all"
    ):
        grow_new_part(learned, "reset", warming, 7, tensors)


def test_the_new_part_comes_back_from_a_checkpoint() -> None:
    recipe = RECIPES["clone, depth too"]
    tensors = tensors_of(Transformer(recipe.target))
    part = grow_new_part(recipe, "asymmetric", GrowthConfig(rewarmup_steps=3, rewarmup_part="new"), 7, tensors)
    again = restored_new_part(part.state(), recipe.target, tensors)
    assert (again.schedule, again.state(), again.kept.keys()) == (part.schedule, part.state(), part.kept.keys())
    for name, kept in part.kept.items():
        assert torch.equal(again.kept[name].rows, kept.rows) and torch.equal(again.kept[name].columns, kept.columns)


REFUSED = [
    ("exact", RECIPES["padded"], "has no rule for zero_pad, which has entries without a source; use zero_pad"),
    (
        "exact",
        RECIPES["net2net"],
        "has no rule for net2net here: it copies .* unequally often, .*asymmetric or",
    ),
    ("zero_pad", RECIPES["fused, tied"], "has nothing to pad: clone gives every entry a source; use exact"),
    ("exact", RECIPES["vocabulary"], "has no rule for clone, which has entries without a source; use zero_pad"),
    (
        "exact",
        sized("clone", models.LLAMA, num_kv_heads=4),
        "has no rule for clone here: copies of a key/value head .*asymmetric or",
    ),
    ("exact", sized("insert_identity", models.LLAMA, num_layers=3), "has no rule .* as the identity; use asymmetric"),
]


@pytest.mark.parametrize(("policy", "recipe", "message"), REFUSED)
def test_policies_without_a_rule_are_refused(policy: Policy, recipe: Recipe, message: str) -> None:
    for ask in (check_policy, grow_multipliers):
        with pytest.raises(ConfigError, match=f"^growth.optimizer={policy} {message}"):
            ask(recipe, policy)


def test_rows_of_the_next_layer_are_new() -> None:
    """AKI keeps what FPI keeps: the old rows of the layer itself."""
    aki, fpi = (grown_moments(sized(name, models.LLAMA, 1, **UNEVEN), "asymmetric") for name in ("aki", "fpi"))
    for moment in MOMENTS:
        for name, tensor in fpi[moment].items():
            assert torch.equal(aki[moment][name], tensor), name


def test_layers_that_begin_as_the_identity_are_new() -> None:
    stacked = make_recipe("stack", models.LLAMA, widened(models.LLAMA, layers=3))
    for silent, layer in ((frozenset({0}), 0), (frozenset[int](), 2)):
        kept = grown_moments(dataclasses.replace(stacked, silent=silent), "asymmetric")["exp_avg"]
        for name, tensor in kept.items():
            assert bool(tensor.any()) == (split_name(name)[0] not in {layer, 2}), name


def test_step_sizes_go_on_as_they_were_in_the_source() -> None:
    recipe = RECIPES["clone, depth too"]
    slow = Multipliers(lr=0.5, eps=0.25, weight_decay=2.0)
    leaf = "mlp.down.weight"
    found = grow_multipliers(recipe, "asymmetric", {layer_name(1, leaf): slow})
    assert {name for name, m in found.items() if m == slow} == {layer_name(1, leaf), layer_name(3, leaf)}
    assert all(m in (slow, Multipliers()) for m in found.values())


CONFIG = OptimConfig(lr=3e-3, beta2=0.999, eps=1e-12, weight_decay=0.0)
GENTLE = dataclasses.replace(CONFIG, eps=1e-4)  # else rounding errors of gradients of 0 would become updates


def trained(model: Transformer, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        loss_of(model, make_ids(model.config, seed=100 + step)).backward()
        optimizer.step(CONFIG.lr)


def grown_run(recipe: Recipe, policy: Policy, config: OptimConfig = CONFIG) -> tuple[Transformer, Optimizer]:
    """A model that grew in the middle of a long training."""
    small = make(recipe.source)
    old = Optimizer(dict(small.named_parameters()), config)
    trained(small, old, range(4))
    old.step_count = 3_000
    large = grown(recipe, small)
    parameters = dict(large.named_parameters())
    new = Optimizer(parameters, config, grow_multipliers(recipe, policy, old.multipliers))
    sources = {moment: tensors.__getitem__ for moment, tensors in old.moments().items()}
    new.step_count = grow_optimizer(recipe, policy, sources, new.moments(), old.step_count)
    new.new_part = grow_new_part(recipe, policy, NOT_ALL, new.step_count, parameters)
    return large, new


def largest_first_update(recipe: Recipe, policy: Policy, corrected: bool) -> float:
    """Of a new entry, in units of the learning rate."""
    model, optimizer = grown_run(recipe, policy)
    part = optimizer.new_part
    assert isinstance(part, NewPart)
    optimizer.new_part = part if corrected else None
    before = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    trained(model, optimizer, range(4, 5))
    change = {name: (tensor - before[name]).abs() / CONFIG.lr for name, tensor in tensors_of(model).items()}
    news = {name: kept.new_entries(slice(None), torch.device("cpu")) for name, kept in part.kept.items()}
    return max(float(change[name][is_new.view(change[name].shape)].max()) for name, is_new in news.items())


@pytest.mark.parametrize(("name", "policy"), [("clone, depth too", "asymmetric"), ("padded", "zero_pad")])
def test_the_first_update_of_a_new_entry_is_that_of_a_fresh_adam(name: str, policy: Policy) -> None:
    assert largest_first_update(RECIPES[name], policy, corrected=True) == pytest.approx(1, abs=1e-6)
    assert largest_first_update(RECIPES[name], policy, corrected=False) > 3  # the trap that this is about


def test_copies_part_under_asymmetric_moments_only() -> None:
    recipe, distances = RECIPES["fused, tied"], {}
    for policy in ("exact", "reset", "asymmetric"):
        model, optimizer = grown_run(recipe, policy, GENTLE)
        distances[policy] = []
        for steps in (range(4, 4), range(4, 14), range(14, 29)):
            trained(model, optimizer, steps)
            distances[policy].append(max(replica_distances(recipe, tensors_of(model)).values()))
    assert max(distances["exact"] + distances["reset"]) <= 1e-12
    start, middle, end = distances["asymmetric"]
    assert start <= 1e-12 and 1e-3 < middle < end


def test_moments_that_are_all_copied_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "first_copies", lambda index: torch.ones_like(index, dtype=torch.bool))
    with pytest.raises(AssertionError):
        test_copies_part_under_asymmetric_moments_only()
    with pytest.raises(AssertionError):
        test_asymmetric_keeps_the_first_copies_by_the_gradient_rule("fused, tied")
