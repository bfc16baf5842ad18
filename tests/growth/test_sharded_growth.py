"""Growth in a running job: shards grown in place are the shards of the grown whole, bit for bit."""

import dataclasses

import pytest
import torch
from torch import Tensor

from megagrow.config import ModelConfig, OptimConfig, ParallelConfig, Policy
from megagrow.growth import exchange, operator
from megagrow.growth.exchange import Exchange
from megagrow.growth.grow import grow_into
from megagrow.growth.methods import make_recipe
from megagrow.growth.moments import QUANTITIES, grow_optimizer
from megagrow.growth.operator import grow_box, write_box
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


def grow_shards(recipe: Recipe, parallel: ParallelConfig, policy: Policy = "exact") -> dict[str, Tensor]:
    """Everything that the target stores after growing in place, gathered."""
    mesh = make_mesh(parallel)
    small, large = sharded(recipe.source, mesh), sharded(recipe.target, mesh)
    old, new = optimizer_of(small), optimizer_of(large)
    whole = tensors_of(make(recipe.source))
    for name, parameter in small.named_parameters():
        fill(parameter, whole[name])
        for moment in MOMENTS:
            fill(old.moments()[moment][name], moments_of(recipe.source, moment)[name])

    moves = Exchange(recipe, tensors_of(small), tensors_of(large), mesh)
    grow_into(recipe, moves.fetch(tensors_of(small)), tensors_of(large))
    sources = {m: moves.fetch(old.moments()[m], QUANTITIES[m]) for m in MOMENTS}
    grow_optimizer(recipe, policy, sources, new.moments(), 7)

    stored = {n: full(t) for n, t in tensors_of(large).items()}
    return stored | {f"{m}.{n}": full(t) for m in MOMENTS for n, t in new.moments()[m].items()}


def grow_alone(recipe: Recipe, policy: Policy = "exact") -> dict[str, Tensor]:
    """The same from whole tensors in one process."""
    large = models.grown(recipe, make(recipe.source))
    moments = {m: {n: t * torch.nan for n, t in tensors_of(large).items()} for m in MOMENTS}
    sources = {m: moments_of(recipe.source, m).__getitem__ for m in MOMENTS}
    grow_optimizer(recipe, policy, sources, moments, 7)
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


# What each rank needs of the source is a range in some, the whole in others: random and mean entries, two layers' rows.
OTHERS: dict[str, tuple[Policy, tuple[int, int, int]]] = {
    "net2net+stack": ("asymmetric", (4, 2, 2)),
    "aki+stack": ("asymmetric", (4, 2, 2)),
    "rms_random+interleave": ("zero_pad", (4, 1, 2)),
    "clone+insert_identity": ("asymmetric", (4, 2, 1)),
    "direct_copy+middle": ("reset", (3, 1, 1)),
}


@pytest.mark.parametrize("method", OTHERS)
def test_other_methods_move_what_they_need(method: str) -> None:
    policy, (ranks, tensor, pipeline) = OTHERS[method]
    recipe = make_recipe(method, LLAMA, widened(LLAMA, hidden=2, query=2, kv=2, ffn=2, layers=6))
    expected = grow_alone(recipe, policy)
    for found in run_ranks(grow_shards, ranks, recipe, ParallelConfig(tensor, pipeline), policy):
        for name, tensor_found in found.items():
            assert torch.equal(tensor_found, expected[name]), name


@pytest.mark.parametrize("method", ["clone", "zero_pad", "aki", "rms_random", "clone+insert_identity"])
def test_pieces_are_the_whole_bit_for_bit(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written a few rows at a time, values and moments; with factors for rows and columns of their own."""
    monkeypatch.setattr(operator, "MAX_COPIED", 50)
    target = widened(LLAMA, **(WIDTH | {"hidden": 2 if method == "aki" else 3}))
    eps = LLAMA.norm_eps * (LLAMA.hidden_size / target.hidden_size if method == "zero_pad" else 1)
    recipe = make_recipe(method, LLAMA, dataclasses.replace(target, norm_eps=eps))
    sources = {name: tensor.float() for name, tensor in tensors_of(make(LLAMA)).items()}
    for name, shape in parameter_shapes(recipe.target).items():
        parts = [sources[each] for each in recipe.source_names(name)]
        source, part = torch.cat(parts), tuple(slice(size // 3, size) for size in shape)
        for quantity in ("value", "gradient", "squared_gradient"):
            found = torch.full([each.stop - each.start for each in part], torch.nan)
            write_box(recipe, name, source, part, found, quantity)
            assert torch.equal(found, grow_box(recipe, name, source, part, quantity)), (name, quantity)


def moves_of(recipe: Recipe, parallel: ParallelConfig) -> list[tuple[int, int, int]]:
    mesh = make_mesh(parallel)
    small, large = sharded(recipe.source, mesh), sharded(recipe.target, mesh)
    return list(Exchange(recipe, tensors_of(small), tensors_of(large), mesh).moves())


def test_even_clones_send_nothing_and_stacks_send_the_layers_that_change_their_stage() -> None:
    """The source of four layers has two on each of two stages; the target of eight has the first four on one stage."""
    even = dataclasses.replace(
        LLAMA, vocab_size=64, num_layers=4, hidden_size=16, num_heads=4, num_kv_heads=2, ffn_size=32
    )
    wide = make_recipe("clone", even, widened(even, hidden=2, query=2, kv=2, ffn=2, layers=4))
    deep = make_recipe("stack", even, widened(even, layers=8))
    layer = sum(torch.Size(shape).numel() for name, shape in parameter_shapes(even).items() if "layers.0." in name)
    for parallel in (ParallelConfig(tensor=2, pipeline=2), ParallelConfig(pipeline=2)):
        (found, *_), (stacked, *_) = (run_ranks(moves_of, 4, recipe, parallel) for recipe in (wide, deep))
        assert all(sender == receiver for sender, receiver, _ in found)
        sent = sum(size for sender, receiver, size in stacked if sender != receiver) / 3
        norms = 2 * even.hidden_size * (parallel.tensor - 1)  # every tensor rank has them whole
        assert sent == 4 * (layer + norms)


def test_a_range_that_is_too_small_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not read is not there to be copied."""
    recipe = make_recipe("clone", LLAMA, widened(LLAMA, **WIDTH))
    box_of = exchange.copied_box

    def smaller(*args: object) -> tuple[slice, ...]:
        first, *rest = box_of(*args)
        return slice(first.start, max(first.start + 1, first.stop - 1)), *rest

    monkeypatch.setattr(exchange, "copied_box", smaller)
    with pytest.raises(IndexError):
        grow_shards(recipe, ParallelConfig())
