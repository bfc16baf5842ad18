"""The kernels of dense maps, interpreted, against float64: whole, in ranges, by blocks, and every gradient."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from megagrow import torch_growth_ops
from megagrow_kernels.dense_map import BLOCK_K, BLOCK_M, dense_blocks_, dense_map, dense_map_, dense_map_ref
from megagrow_kernels.launch import ANY
from tests.kernels.accuracy import assert_as_good_as_twin

pytestmark = pytest.mark.interpreted

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
BLOCK_N = ANY["dense_map"][-1].block


class Case(NamedTuple):
    """Rows and columns of the source and of the range; 0: that dim does not grow."""

    A: int
    B: int
    R: int
    C: int
    dtype: torch.dtype = F32
    scale: float = 1.0
    maps: torch.dtype = F32


CASES = [
    Case(1, 1, 1, 1),
    Case(5, 3, 9, 7, scale=0.75),
    Case(6, 1, 11, 0),  # a vector
    Case(17, BLOCK_K + 5, 0, 40, scale=1 / 3),
    Case(BLOCK_K + 8, 20, BLOCK_M + 6, 2 * BLOCK_N + 8),  # blocks that do not divide; rows first
    Case(90, 40, 12, 200),  # a part of the rows of many: rows first
    Case(40, 90, 200, 12),  # columns first
    Case(24, 24, 40, 40, BF16),
    Case(24, 24, 40, 40, F16, 0.5, F16),
    Case(4, 6, 0, 0, scale=2.0),
]


def inputs(case: Case) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(case.A + case.R)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "source": normal(case.A, case.B).to(case.dtype),
        "rows": normal(case.R, case.A).to(case.maps) if case.R else None,
        "columns": normal(case.C, case.B).to(case.maps) if case.C else None,
    }


def output_and_gradients(grow, given: dict[str, Tensor | None], scale: float) -> dict[str, Tensor]:
    leaves = {name: None if x is None else x.clone().requires_grad_() for name, x in given.items()}
    target_RC = grow(*leaves.values(), scale)
    seed = torch.randn(target_RC.shape, generator=torch.Generator().manual_seed(3)).to(F16)  # exact in every dtype
    target_RC.backward(seed.to(target_RC.dtype))
    return {"target": target_RC.detach()} | {f"d{n}": x.grad for n, x in leaves.items() if x is not None}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_good_as_the_twin(case: Case) -> None:
    given = inputs(case)
    doubles = {name: None if x is None else x.double() for name, x in given.items()}
    twin = torch_growth_ops.dense_map
    actual, expected = (output_and_gradients(grow, given, case.scale) for grow in (dense_map, twin))
    for name, exact in output_and_gradients(dense_map_ref, doubles, case.scale).items():
        if case.maps == case.dtype or name == "target":  # else the twin rounds to the source's dtype once more
            assert_as_good_as_twin(actual[name], expected[name], exact, name)


def test_the_gradient_is_that_of_numbers() -> None:
    leaves = [torch.randn(*shape, dtype=torch.double, requires_grad=True) for shape in ((3, 5), (4, 3), (6, 5))]
    for grow in (dense_map_ref, torch_growth_ops.dense_map):
        assert gradcheck(lambda *x, grow=grow: grow(*x, 0.5), leaves)


def test_only_what_is_wanted_has_a_gradient() -> None:
    source_AB, rows_RA, columns_CB = inputs(Case(5, 6, 7, 8)).values()
    every = output_and_gradients(dense_map, inputs(Case(5, 6, 7, 8)), 1.0)
    for name, x in (("dsource", source_AB), ("drows", rows_RA), ("dcolumns", columns_CB)):
        x.requires_grad_()
        target_RC = dense_map(source_AB, rows_RA, columns_CB)
        seed = torch.randn(7, 8, generator=torch.Generator().manual_seed(3)).to(F16).float()
        (found,) = torch.autograd.grad(target_RC, [x], seed)
        x.requires_grad_(False)
        assert torch.equal(found, every[name])


@pytest.mark.parametrize("target_dtype", [F32, BF16])
def test_a_range_is_written_straight_into_a_shard(target_dtype: torch.dtype) -> None:
    source_AB, rows_RA, columns_CB = inputs(Case(20, 24, 30, 50)).values()
    storage = torch.full((12, 40), torch.nan, dtype=target_dtype)
    dense_map_(storage[:, 5:25], source_AB, rows_RA[8:20], columns_CB[10:30], 0.5)
    exact = dense_map_ref(source_AB.double(), rows_RA.double(), columns_CB.double(), 0.5)[8:20, 10:30]
    twin = torch.empty(12, 20, dtype=target_dtype)
    torch_growth_ops.dense_map_(twin, source_AB, rows_RA[8:20], columns_CB[10:30], 0.5)
    assert_as_good_as_twin(storage[:, 5:25], twin, exact, "range")
    assert storage[:, :5].isnan().all() and storage[:, 25:].isnan().all()


RANGES = [  # first row and column, rows and columns; the source has 12 x 10, the target 20 x 17
    (0, 0, 20, 17),
    (0, 0, 12, 10),
    (5, 4, 15, 13),
    (13, 0, 7, 17),  # new rows only
    (0, 11, 9, 6),  # new columns of some old rows
    (14, 12, 3, 4),  # the corner: what stands above it is not in the range
]


@pytest.mark.parametrize("place", RANGES, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_blocks_are_the_range_of_the_whole(place: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    source_AB, new_rows_XA, new_columns_YB = inputs(Case(12, 10, 8, 7)).values()
    r, c, R, C = place
    maps = (torch.cat((torch.eye(len(new.T)), new)).double() for new in (new_rows_XA, new_columns_YB))
    exact = dense_map_ref(source_AB.double(), *maps)[r : r + R, c : c + C]
    found, twin = (torch.full((R, C), torch.nan, dtype=dtype) for _ in range(2))
    for write, target_RC in ((dense_blocks_, found), (torch_growth_ops.dense_blocks_, twin)):
        write(target_RC, source_AB, new_rows_XA, new_columns_YB, r, c)
    assert_as_good_as_twin(found, twin, exact, "blocks")
    old = found[: max(12 - r, 0), : max(10 - c, 0)]
    assert torch.equal(old, source_AB[r : r + R, c : c + C].to(dtype))


@pytest.mark.parametrize("grows", ["rows", "columns"])
def test_blocks_of_one_dim(grows: str) -> None:
    source_AB, new_rows_XA, new_columns_YB = inputs(Case(6, 5, 3, 2)).values()
    if grows == "rows":
        found, expected = torch.empty(9, 5), torch.cat((source_AB, new_rows_XA @ source_AB))
        dense_blocks_(found, source_AB, new_rows_XA)
    else:
        found, expected = torch.empty(6, 7), torch.cat((source_AB, source_AB @ new_columns_YB.T), dim=1)
        dense_blocks_(found, source_AB, None, new_columns_YB)
    torch.testing.assert_close(found, expected)


REFUSED = {
    "dtype": (lambda x: dense_map(x.double()), "dense_map: source is torch.float64"),
    "map": (
        lambda x: dense_map(x, torch.ones(3, 5)),
        r"dense_map: rows have shape \(3, 5\), the source needs \(…, 4\)",
    ),
    "strides": (lambda x: dense_map_(torch.ones(6, 4).T, x), "dense_map_: the target's columns lie apart"),
    "shape": (
        lambda x: dense_map_(torch.ones(3, 6), x),
        r"dense_map_: target has shape \(3, 6\), the maps give \(4, 6\)",
    ),
    "range": (
        lambda x: dense_blocks_(torch.ones(2, 6), x, None, None, 3),
        r"dense_blocks_: the range ends at \(5, 6\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as refusal:
        call(torch.ones(4, 6))
    assert "\n" not in str(refusal.value)


def test_they_are_sound_operations() -> None:
    given = [x.requires_grad_() for x in inputs(Case(3, 4, 6, 8, BF16)).values()]
    torch.library.opcheck(torch.ops.megagrow_kernels.dense_map, (*given, 0.5))
    given = [x.detach() for x in given]
    torch.library.opcheck(torch.ops.megagrow_kernels.dense_map_, (torch.zeros(6, 8), *given, 0.5))
    torch.library.opcheck(torch.ops.megagrow_kernels.dense_blocks_, (torch.zeros(9, 12), *given, 0, 0))
