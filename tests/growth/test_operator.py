"""Boxes of grown parameters: any box of the whole is what the operator computes for it."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megagrow.config import ModelConfig, ParallelConfig
from megagrow.errors import ConfigError
from megagrow.growth import maps, noise
from megagrow.growth.dims import Quantity
from megagrow.growth.ligo import Ligo
from megagrow.growth.maps import SparseMap
from megagrow.growth.methods import make_recipe
from megagrow.growth.noise import joined_root_mean_square, largest, root_mean_square, sum_of_squares
from megagrow.growth.operator import copied_box, grow_box, write_box
from megagrow.growth.recipe import Recipe
from megagrow.parallel.mesh import make_mesh
from megagrow.plan.measure import peak_memory
from megagrow.roles import parameter_names, parameter_shapes
from tests.growth import models
from tests.growth.models import make, tensors_of, widened
from tests.growth.recipes import METHODS, recipe_of
from tests.ranks import run_ranks

SOURCE = dataclasses.replace(models.EVERYTHING, num_layers=1)
TARGET = widened(SOURCE, hidden=2, query=4, kv=2, ffn=3)


def random_box(shape: tuple[int, ...], generator: torch.Generator) -> tuple[slice, ...]:
    """A box that is not empty; its ends fall inside heads and fused rows."""
    ends = [torch.randperm(size + 1, generator=generator)[:2].sort().values for size in shape]
    return tuple(slice(int(start), int(stop)) for start, stop in ends)


def boxes_and_wholes(recipe: Recipe, quantity: Quantity) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    source = tensors_of(make(recipe.source))
    pairs = []
    for name, shape in parameter_shapes(recipe.target).items():
        whole = grow_box(recipe, name, source[name], tuple(slice(0, n) for n in shape), quantity)
        assert tuple(whole.shape) == shape
        for _ in range(5):
            box = random_box(shape, generator)
            pairs.append((grow_box(recipe, name, source[name], box, quantity), whole[box]))
    return pairs


@pytest.mark.parametrize("quantity", ["value", "gradient", "squared_gradient"])
def test_box_of_copies_is_the_box_of_the_whole(quantity: Quantity) -> None:
    recipe = make_recipe("clone", SOURCE, TARGET)
    for found, expected in boxes_and_wholes(recipe, quantity):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("quantity", ["value", "gradient", "squared_gradient"])
def test_box_of_unequal_scales_is_the_box_of_the_whole(quantity: Quantity) -> None:
    recipe = make_recipe("clone", SOURCE, TARGET)
    generator = torch.Generator().manual_seed(2)
    axes = {
        name: SparseMap(
            axis.index,
            axis.num_source,
            torch.rand(len(axis.index), generator=generator),
            torch.rand(len(axis.index), generator=generator),
        )
        for name, axis in recipe.axes.items()
        if name != "key"  # a fused parameter, one part of which has one scale
    }
    recipe = dataclasses.replace(recipe, axes={**axes, "key": recipe.axes["key"]})
    for found, expected in boxes_and_wholes(recipe, quantity):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("quantity", ["value", "squared_gradient"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("source", [models.EVERYTHING, models.GPT2], ids=lambda source: source.family)
def test_box_by_any_method_is_the_box_of_the_whole_bit_for_bit(
    method: str, source: ModelConfig, quantity: Quantity
) -> None:
    """From the part of the source that it is said to need, in float32."""
    try:
        recipe = recipe_of(method, source)
    except ConfigError:
        return  # refused for this family, see test_methods.py
    generator, small = torch.Generator().manual_seed(3), {n: t.float() for n, t in tensors_of(make(source)).items()}
    for name, shape in parameter_shapes(recipe.target).items():
        rows = [small[each] for each in recipe.source_names(name)]
        needed = torch.cat([rows[0], rows[-1]]) if recipe.reads_next(name) else rows[0]
        whole = grow_box(recipe, name, needed, tuple(slice(0, size) for size in shape), quantity)
        for _ in range(3):
            box = random_box(shape, generator)
            assert torch.equal(grow_box(recipe, name, needed, box, quantity), whole[box]), name
            part = (slice(None),) * needed.ndim if recipe.reads_next(name) else copied_box(recipe, name, box, quantity)
            found = torch.full_like(whole[box], torch.nan)
            origin, rms = [each.start or 0 for each in part], root_mean_square(needed)
            write_box(recipe, name, needed[part], box, found, quantity, origin, rms)
            assert torch.equal(found, whole[box]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_root_mean_squares_are_the_same_bits_in_any_pieces(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(91, 33, generator=generator, dtype=torch.double).exp() * 1e-3).to(dtype)
    before, found = x.clone(), root_mean_square(x)
    assert found == pytest.approx(x.double().square().mean().sqrt().item(), rel=1e-9)
    for rows in (1, 13, 90):
        pieces = [*x[:rows].split(7, 1), *x[rows:].split(20, 1)]
        bound = max(map(largest, pieces))
        total = sum(sum_of_squares(piece, bound, x.numel()) for piece in pieces)
        assert joined_root_mean_square(total, bound, x.numel()) == found
    assert torch.equal(x, before)
    assert root_mean_square(torch.zeros(3, 2)) == 0
    assert math.isnan(root_mean_square(torch.tensor([1.0, torch.nan])))


def spread_sizes(parallel: ParallelConfig) -> dict[str, float]:
    """Of a matrix cut over two ranks, of one that only the second has, and of two with an entry that is no number."""
    mesh, x = make_mesh(parallel), torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    rank, bad = mesh.world.rank, torch.tensor([[1.0, torch.nan], [2.0, 3.0]])
    pieces = {"cut": x[:3] if rank == 0 else x[3:], "bad first": bad[rank], "bad second": bad[1 - rank]}
    pieces |= {"second's": x} if rank else {}
    sizes = {"second's": x.numel(), "cut": x.numel(), "bad first": bad.numel(), "bad second": bad.numel()}
    return noise.root_mean_squares_over(pieces, sizes, mesh.world, mesh.device)


def test_root_mean_squares_of_what_ranks_hold() -> None:
    whole = root_mean_square(torch.randn(7, 5, generator=torch.Generator().manual_seed(0)))
    for found in run_ranks(spread_sizes, 2, ParallelConfig()):
        assert math.isnan(found.pop("bad first")) and math.isnan(found.pop("bad second"))
        assert found == {"cut": whole, "second's": whole}


def test_means_take_little_memory_and_are_the_same_bits_in_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1 << 13, 600, generator=torch.Generator().manual_seed(0))
    whole = noise.mean(x, 0), noise.mean(x.T, 1), noise.mean(x[:, 0], 0)
    assert [tuple(mean.shape) for mean in whole] == [(1, 600), (600, 1), (1,)]
    torch.testing.assert_close(whole[0], x.mean(0, keepdim=True), rtol=1e-4, atol=1e-6)
    assert torch.equal(whole[1], whole[0].T) and torch.equal(whole[2], whole[0][:, 0])
    assert peak_memory(lambda: noise.mean(x, 0)) < 3 * 8 * noise.CHUNK < 8 * x.numel()
    monkeypatch.setattr(noise, "CHUNK", 1)
    assert torch.equal(noise.mean(x, 0), whole[0])


def test_means_of_means_do_not_depend_on_the_box() -> None:
    """Both dims of an embedding have new elements: which is averaged first decides the last bit of the corner."""
    source = dataclasses.replace(models.GPT2, vocab_size=256, hidden_size=192, num_heads=3, num_kv_heads=3)
    target = dataclasses.replace(source, vocab_size=320, hidden_size=200, head_dim=64, norm_eps=1e-5 * 192 / 200)
    recipe = make_recipe("clone", dataclasses.replace(source, head_dim=64), target)
    for seed in range(5):
        weight = torch.randn(256, 192, generator=torch.Generator().manual_seed(seed))
        whole = grow_box(recipe, "embedding.tokens", weight, (slice(0, 320), slice(0, 200)))
        half = grow_box(recipe, "embedding.tokens", weight, (slice(160, 320), slice(0, 200)))
        assert torch.equal(half, whole[160:])


def test_box_of_dense_maps_is_the_box_of_the_whole() -> None:
    ligo = Ligo(make_recipe("ligo", SOURCE, TARGET), noise=0.5, dtype=torch.double)
    for found, expected in boxes_and_wholes(ligo.recipe(), "value"):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_scales_are_applied_once_in_float32_for_narrow_weights() -> None:
    source, target = models.LLAMA, widened(models.LLAMA, hidden=3)
    recipe = make_recipe("clone", source, target)
    weight = torch.randn(source.ffn_size * 2, source.hidden_size).bfloat16()
    box = (slice(0, target.ffn_size * 2), slice(0, target.hidden_size))
    found = grow_box(recipe, "layers.0.mlp.gate_up.weight", weight, box).bfloat16()
    assert torch.equal(found, (weight.float() / 3).bfloat16().repeat_interleave(3, dim=1))


def test_narrow_weights_meet_learned_maps_in_their_dtype() -> None:
    source, target = models.LLAMA, widened(models.LLAMA, hidden=3)
    recipe = Ligo(make_recipe("ligo", source, target), noise=0.3).recipe()
    name, whole = "head.weight", (slice(0, target.vocab_size), slice(0, target.hidden_size))
    weight = torch.randn(source.vocab_size, source.hidden_size).bfloat16()
    found, expected = (grow_box(recipe, name, w, whole) for w in (weight, weight.float()))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("rows", "columns"), [(40, 24), (40, 2), (3, 24), (1, 1), (20, 12)])
def test_dense_boxes_take_the_cheaper_of_the_two_orders(rows: int, columns: int) -> None:
    source = dataclasses.replace(models.GPT2, num_layers=1)  # mlp.up is [10, 12]
    recipe = Ligo(make_recipe("ligo", source, widened(source, hidden=2, ffn=4))).recipe()
    weight = torch.randn(source.ffn_size, source.hidden_size)
    with FlopCounterMode(display=False) as counter:
        grow_box(recipe, "layers.0.mlp.up.weight", weight, (slice(0, rows), slice(0, columns)))
    rows_first = 2 * (rows * 10 * 12 + rows * 12 * columns)
    columns_first = 2 * (10 * 12 * columns + rows * 10 * columns)
    assert counter.get_total_flops() == min(rows_first, columns_first)


def test_fused_rows_stay_with_their_part() -> None:
    """Key rows are copied to key rows, head by head, whatever the value rows do."""
    source, target = models.LLAMA, widened(models.LLAMA, query=2, kv=2)
    recipe = make_recipe("clone", source, target)
    rows = torch.arange(2 * 2 * 4.0)  # (kv head, key | value, head_dim)
    grown = grow_box(recipe, "layers.0.attention.key_value.bias", rows, (slice(0, 32),))
    expected = rows.view(2, 8).repeat_interleave(2, dim=0).flatten()
    assert torch.equal(grown, expected)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((4, 2, 8, 4), [0, 1, 0, 1, 2, 3, 2, 3]),
        ((4, 2, 8, 2), [0, 0, 1, 1, 2, 2, 3, 3]),
        ((2, 1, 8, 2), [0, 0, 1, 1, 0, 0, 1, 1]),
        ((2, 2, 4, 4), [0, 0, 1, 1]),
        ((4, 2, 4, 4), [0, 1, 2, 3]),
        ((2, 2, 3, 3), [0, 0, 1]),
    ],
)
def test_query_heads_stay_in_their_group(sizes: tuple[int, ...], expected: list[int]) -> None:
    assert maps.interleave_queries(*sizes).tolist() == expected


def test_every_parameter_of_every_model_has_a_rule() -> None:
    kinds: list[ModelConfig] = [models.LLAMA, models.GPT2, models.UNTIED_BIAS]
    for source in kinds:
        recipe = make_recipe("ligo", source, widened(source, hidden=2, query=2, kv=2, ffn=2))
        for name in parameter_names(source):
            shape = parameter_shapes(recipe.target)[name]
            whole = tuple(slice(0, size) for size in shape)
            zeros = torch.zeros(parameter_shapes(source)[name])
            assert tuple(grow_box(recipe, name, zeros, whole).shape) == shape
