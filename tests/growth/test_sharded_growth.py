"""Growth in a running job: shards grown in place are the shards of the grown whole, bit for bit."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megagrow.config import ModelConfig, OptimConfig, ParallelConfig, Policy
from megagrow.errors import ConfigError
from megagrow.growth.grow import grow_into
from megagrow.growth.local import boxes, shard_fetch
from megagrow.growth.methods import make_recipe
from megagrow.growth.moments import grow_optimizer, rule_problem
from megagrow.growth.recipe import Recipe
from megagrow.model import Transformer
from megagrow.optim import MOMENTS, Optimizer
from megagrow.parallel import shards
from megagrow.parallel.fsdp import materialize
from megagrow.parallel.mesh import Mesh, make_mesh
from megagrow.parallel.shards import box, fill
from megagrow.parallel.stages import own_stages
from megagrow.roles import parameter_shapes
from tests.growth import models
from tests.growth.models import make, tensors_of, widened
from tests.growth.recipes import METHODS, recipe_of
from tests.ranks import run_ranks

# The vocabulary, the position table and some heads and neurons do not divide evenly by rows.
LLAMA = models.LLAMA
TIED = dataclasses.replace(models.EVERYTHING, max_seq_length=9)
EVEN = dataclasses.replace(models.MHA, vocab_size=32, hidden_size=16, ffn_size=16)

# (model, ranks, tensor, pipeline); what is left is FSDP2's. All layouts and models: `make growth`.
LAYOUTS = [(TIED, 2, 1, 2), (LLAMA, 3, 1, 1), (EVEN, 4, 2, 1)]


def sharded(model: ModelConfig, mesh: Mesh) -> Transformer:
    """This rank's stage, full of NaN."""
    with torch.device("meta"):
        stage = Transformer(model, mesh, stage=own_stages(model.num_layers, mesh)[0]).double()
    materialize(stage, list(stage.layers.values()), model, mesh, None)
    for parameter in stage.parameters():
        whole = torch.full(tuple(parameter.shape), torch.nan, dtype=torch.double)
        fill(parameter, whole)
    return stage


def moments_of(model: ModelConfig, moment: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(moment))
    return {
        name: torch.rand(shape, generator=generator, dtype=torch.double)
        for name, shape in parameter_shapes(model).items()
    }


def optimizer_of(stage: Transformer) -> Optimizer:
    return Optimizer(dict(stage.named_parameters()), OptimConfig())


def filled(model: ModelConfig, mesh: Mesh) -> tuple[Transformer, Optimizer]:
    """A source in this job, in the middle of its training."""
    stage = sharded(model, mesh)
    optimizer, whole = optimizer_of(stage), tensors_of(make(model))
    for name, parameter in stage.named_parameters():
        fill(parameter, whole[name])
        for moment in MOMENTS:
            fill(optimizer.moments()[moment][name], moments_of(model, moment)[name])
    return stage, optimizer


def grow_shards(recipe: Recipe, mesh: Mesh) -> dict[str, Tensor]:
    """Everything that this rank stores of the target after growing in place."""
    small, old = filled(recipe.source, mesh)
    large = sharded(recipe.target, mesh)
    new = optimizer_of(large)
    grow_into(recipe, shard_fetch(tensors_of(small), recipe, mesh), tensors_of(large))
    sources = {m: shard_fetch(old.moments()[m], recipe, mesh) for m in MOMENTS}
    grow_optimizer(recipe, policy_for(recipe), sources, new.moments(), 7)
    return tensors_of(large) | {f"{m}.{n}": t for m in MOMENTS for n, t in new.moments()[m].items()}


def grow_alone(recipe: Recipe) -> dict[str, Tensor]:
    """The same from whole tensors in one process."""
    large = models.grown(recipe, make(recipe.source))
    moments = {m: {n: t * torch.nan for n, t in tensors_of(large).items()} for m in MOMENTS}
    sources = {m: moments_of(recipe.source, m).__getitem__ for m in MOMENTS}
    grow_optimizer(recipe, policy_for(recipe), sources, moments, 7)
    return tensors_of(large) | {f"{m}.{n}": t for m in MOMENTS for n, t in moments[m].items()}


def policy_for(recipe: Recipe) -> Policy:
    """The one that carries the most moments over."""
    policies: tuple[Policy, ...] = ("exact", "zero_pad", "asymmetric")
    return next(policy for policy in policies if rule_problem(recipe, policy) is None)


def all_methods(source: ModelConfig) -> dict[str, Recipe]:
    recipes = {}
    for name in METHODS:
        try:
            recipes[name] = recipe_of(name, source)
        except ConfigError:
            continue
    return recipes


def compare_all(parallel: ParallelConfig, source: ModelConfig) -> tuple[int, list[str]]:
    """How many pieces of grown tensors this rank compared, and which differ from those of the grown whole."""
    mesh, count, differing = make_mesh(parallel), 0, []
    for method, recipe in all_methods(source).items():
        expected = grow_alone(recipe)
        for name, tensor in grow_shards(recipe, mesh).items():
            count += 1
            if not torch.equal(shards.local(tensor), expected[name][box(tensor)]):
                differing.append(f"{method}: {name}")
    return count, differing


@pytest.mark.parametrize(("source", "ranks", "tensor", "pipeline"), LAYOUTS, ids=["pipeline", "fsdp", "tensor-fsdp"])
def test_grown_shards_are_shards_of_the_grown(source: ModelConfig, ranks: int, tensor: int, pipeline: int) -> None:
    for count, differing in run_ranks(compare_all, ranks, ParallelConfig(tensor, pipeline), source):
        assert count > 500
        assert not differing, differing


def test_all_methods_are_compared() -> None:
    assert all_methods(LLAMA).keys() == METHODS.keys()
    assert METHODS.keys() - all_methods(TIED).keys() == {"zero_pad"}  # no exact answer under LayerNorm


class Counter(TorchDispatchMode):
    """Counts the collectives that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace in ("c10d", "_c10d_functional") and "wait" not in str(func)
        return func(*args, **(kwargs or {}))


def count_collectives(parallel: ParallelConfig, method: str, width: dict[str, int]) -> tuple[int, bool, bool]:
    """Collectives while this rank's shards grow, whether they grew right, and whether `boxes` says where they lie."""
    mesh = make_mesh(parallel)
    recipe = make_recipe(method, EVEN, widened(EVEN, **width))
    expected, (small, _), large = grow_alone(recipe), filled(EVEN, mesh), sharded(recipe.target, mesh)
    with Counter() as counter:
        grow_into(recipe, shard_fetch(tensors_of(small), recipe, mesh), tensors_of(large))
    is_right = all(torch.equal(shards.local(t), expected[n][box(t)]) for n, t in tensors_of(large).items())
    place = mesh.tokens.rank + mesh.tp.rank * mesh.tokens.size
    is_placed = all(box(t) == list(boxes(n, recipe.target, mesh))[place] for n, t in tensors_of(large).items())
    return counter.count, is_right, is_placed


LOCAL = [("clone", {"hidden": 2, "query": 2, "kv": 2, "ffn": 3}), ("interleave", {"layers": 4})]
MOVED = [("net2net", {"ffn": 2}), ("stack", {"layers": 4}), ("zero_pad", {"ffn": 2})]


@pytest.mark.parametrize(("ranks", "parallel"), [(4, ParallelConfig(tensor=2)), (4, ParallelConfig(2, 2))])
def test_copies_side_by_side_grow_without_communication(ranks: int, parallel: ParallelConfig) -> None:
    for method, width in LOCAL:
        for count, is_right, is_placed in run_ranks(count_collectives, ranks, parallel, method, width):
            assert is_right and is_placed
            assert count == 0, method
    for method, width in MOVED:
        results = run_ranks(count_collectives, ranks, parallel, method, width)
        assert all(is_right and is_placed for _, is_right, is_placed in results), method
        if method != "stack" or parallel.pipeline > 1:  # without stages, layers stay where they are
            assert all(count > 0 for count, *_ in results), method
