"""Growth in a running job: shards grown in place are the shards of the grown whole, bit for bit."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megagrow.config import ModelConfig, OptimConfig, ParallelConfig, Policy
from megagrow.growth import exchange, operator
from megagrow.growth.exchange import Exchange
from megagrow.growth.grow import grow_into
from megagrow.growth.methods import make_recipe
from megagrow.growth.moments import QUANTITIES, grow_optimizer, rule_problem
from megagrow.growth.operator import grow_box, write_box
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

# (model, ranks, tensor, pipeline, methods); what is left is FSDP2's. All of all: `make growth`.
LAYOUTS = [(TIED, 2, 1, 2, slice(13, None)), (LLAMA, 3, 1, 1, slice(0, 13, 2)), (EVEN, 4, 2, 1, slice(1, 13, 2))]


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
    moves = Exchange(recipe, tensors_of(small), tensors_of(large), mesh)
    grow_into(recipe, moves.fetch(tensors_of(small)), tensors_of(large))
    sources = {m: moves.fetch(old.moments()[m], QUANTITIES[m]) for m in MOMENTS}
    grow_optimizer(recipe, policy_for(recipe), sources, new.moments(), 7)
    return tensors_of(large) | {f"{m}.{n}": t for m in MOMENTS for n, t in new.moments()[m].items()}


def grow_alone(recipe: Recipe, policy: Policy = "exact") -> dict[str, Tensor]:
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


WIDTH = {"hidden": 3, "query": 2, "kv": 2, "ffn": 2, "layers": 5}


def compare_all(parallel: ParallelConfig, source: ModelConfig, methods: list[str]) -> tuple[int, list[str]]:
    """How many pieces of grown tensors this rank compared, and which differ from those of the grown whole."""
    mesh, count, differing = make_mesh(parallel), 0, []
    for method in methods:
        recipe = recipe_of(method, source)
        expected = grow_alone(recipe)
        for name, tensor in grow_shards(recipe, mesh).items():
            count += 1
            if not torch.equal(shards.local(tensor), expected[name][box(tensor)]):
                differing.append(f"{method}: {name}")
    return count, differing


@pytest.mark.parametrize(
    ("source", "ranks", "tensor", "pipeline", "methods"), LAYOUTS, ids=["pipeline", "fsdp", "tensor-fsdp"]
)
def test_grown_shards_are_shards_of_the_grown(
    source: ModelConfig, ranks: int, tensor: int, pipeline: int, methods: slice
) -> None:
    chosen = list(METHODS)[methods]
    for count, differing in run_ranks(compare_all, ranks, ParallelConfig(tensor, pipeline), source, chosen):
        assert count > 40 * len(chosen)  # weights and two moments of two layers and more
        assert not differing, differing


def test_all_methods_are_compared() -> None:
    assert {name for *_, methods in LAYOUTS for name in list(METHODS)[methods]} == METHODS.keys()


class Counter(TorchDispatchMode):
    """Counts the collectives that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace in ("c10d", "_c10d_functional") and "wait" not in str(func)
        return func(*args, **(kwargs or {}))


def count_collectives(parallel: ParallelConfig, method: str, width: dict[str, int]) -> tuple[int, bool]:
    """Collectives, and messages between ranks, while this rank's shards grow; and whether they grew right."""
    mesh = make_mesh(parallel)
    recipe = make_recipe(method, EVEN, widened(EVEN, **width))
    expected, (small, _), large = grow_alone(recipe), filled(EVEN, mesh), sharded(recipe.target, mesh)
    moves = Exchange(recipe, tensors_of(small), tensors_of(large), mesh)  # who has what is told once
    with Counter() as counter:
        grow_into(recipe, moves.fetch(tensors_of(small)), tensors_of(large))
    is_right = all(torch.equal(shards.local(t), expected[n][box(t)]) for n, t in tensors_of(large).items())
    return counter.count, is_right


LOCAL = [("clone", {"hidden": 2, "query": 2, "kv": 2, "ffn": 3}), ("interleave", {"layers": 4})]
MOVED = [("net2net", {"ffn": 2}), ("stack", {"layers": 4}), ("zero_pad", {"ffn": 2})]


@pytest.mark.parametrize(("ranks", "parallel"), [(4, ParallelConfig(tensor=2)), (4, ParallelConfig(2, 2))])
def test_copies_side_by_side_grow_without_communication(ranks: int, parallel: ParallelConfig) -> None:
    for method, width in LOCAL:
        for count, is_right in run_ranks(count_collectives, ranks, parallel, method, width):
            assert is_right
            assert count == 0, method
    for method, width in MOVED:
        results = run_ranks(count_collectives, ranks, parallel, method, width)
        assert all(is_right for _, is_right in results), method
        if method != "stack" or parallel.pipeline > 1:  # without stages, layers stay where they are
            assert any(count > 0 for count, _ in results), method


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
    larger = widened(even, hidden=2, query=2, kv=2, ffn=2, layers=4)
    wide, noisy = make_recipe("clone", even, larger), make_recipe("clone", even, larger, "noise")
    deep = make_recipe("stack", even, widened(even, layers=8))
    layer = sum(torch.Size(shape).numel() for name, shape in parameter_shapes(even).items() if "layers.0." in name)
    for parallel in (ParallelConfig(tensor=2, pipeline=2), ParallelConfig(pipeline=2)):
        (found, *_), (drawn, *_), (stacked, *_) = (
            run_ranks(moves_of, 4, recipe, parallel) for recipe in (wide, noisy, deep)
        )
        assert found and all(sender == receiver for sender, receiver, _ in found)
        assert drawn == found, "of what noise is as large as, sums go to all ranks and nothing else"
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
        grow_shards(recipe, Mesh.single())
