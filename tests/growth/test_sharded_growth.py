"""Growth in a running job: shards grown in place are the shards of the grown whole, bit for bit."""

import dataclasses

import pytest
import torch
from torch import Tensor

from megagrow.config import ModelConfig, OptimConfig, ParallelConfig
from megagrow.growth.grow import grow_into, mesh_fetch
from megagrow.growth.methods import make_recipe
from megagrow.growth.moments import grow_optimizer
from megagrow.growth.recipe import Recipe
from megagrow.model import Transformer
from megagrow.optim import MOMENTS, Optimizer
from megagrow.parallel.fsdp import materialize
from megagrow.parallel.mesh import Mesh, make_mesh
from megagrow.parallel.shards import fill, full
from megagrow.parallel.stages import own_stages
from megagrow.roles import parameter_shapes
from tests.growth import models
from tests.growth.models import make, tensors_of, widened
from tests.ranks import run_ranks

# The vocabulary, the position table and some heads and neurons do not divide evenly by rows.
LLAMA = dataclasses.replace(models.LLAMA, num_layers=3)
TIED = dataclasses.replace(models.EVERYTHING, num_layers=3, max_seq_length=9)
WIDTH = {"hidden": 3, "query": 2, "kv": 2, "ffn": 2, "layers": 5}

LAYOUTS = [(2, 2, 1), (2, 1, 2), (2, 1, 1), (3, 1, 1), (4, 2, 2), (4, 2, 1), (4, 1, 2)]


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


def grow_shards(recipe: Recipe, parallel: ParallelConfig) -> dict[str, Tensor]:
    """Everything that the target stores after growing in place, gathered."""
    mesh = make_mesh(parallel)
    small, large = sharded(recipe.source, mesh), sharded(recipe.target, mesh)
    old, new = optimizer_of(small), optimizer_of(large)
    whole = tensors_of(make(recipe.source))
    for name, parameter in small.named_parameters():
        fill(parameter, whole[name])
        for moment in MOMENTS:
            fill(old.moments()[moment][name], moments_of(recipe.source, moment)[name])

    fetch = mesh_fetch(tensors_of(small), recipe.source, mesh)
    grow_into(recipe, fetch, tensors_of(large))
    sources = {m: mesh_fetch(old.moments()[m], recipe.source, mesh) for m in MOMENTS}
    grow_optimizer(recipe, "exact", sources, new.moments(), 7)

    stored = {n: full(t) for n, t in tensors_of(large).items()}
    return stored | {f"{m}.{n}": full(t) for m in MOMENTS for n, t in new.moments()[m].items()}


def grow_alone(recipe: Recipe) -> dict[str, Tensor]:
    """The same from whole tensors in one process."""
    large = models.grown(recipe, make(recipe.source))
    moments = {m: {n: t * torch.nan for n, t in tensors_of(large).items()} for m in MOMENTS}
    sources = {m: moments_of(recipe.source, m).__getitem__ for m in MOMENTS}
    grow_optimizer(recipe, "exact", sources, moments, 7)
    return tensors_of(large) | {f"{m}.{n}": t for m in MOMENTS for n, t in moments[m].items()}


@pytest.mark.parametrize("source", [LLAMA, TIED], ids=["llama", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: "-".join(map(str, x)))
def test_grown_shards_are_shards_of_the_grown(source: ModelConfig, layout: tuple[int, int, int]) -> None:
    ranks, tensor, pipeline = layout
    recipe = make_recipe("clone", source, widened(source, **WIDTH))
    expected = grow_alone(recipe)
    results = run_ranks(grow_shards, ranks, recipe, ParallelConfig(tensor, pipeline))
    assert set().union(*results) == expected.keys()
    for found in results:
        for name, tensor_found in found.items():
            assert torch.equal(tensor_found, expected[name]), name


def test_stack_moves_layers_between_stages() -> None:
    recipe = make_recipe("stack", LLAMA, widened(LLAMA, layers=7))
    expected = grow_alone(recipe)
    for found in run_ranks(grow_shards, 2, recipe, ParallelConfig(1, 2)):
        for name, tensor_found in found.items():
            assert torch.equal(tensor_found, expected[name]), name
