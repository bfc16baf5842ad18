"""The kernel that grows by copies, interpreted, against float64: weight and both moments."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from megagrow import torch_growth_ops
from megagrow_kernels.launch import ANY
from megagrow_kernels.sparse_map import ROWS, sparse_map_, sparse_map_ref
from tests.kernels.accuracy import assert_as_good_as_twin

pytestmark = pytest.mark.interpreted

F32, BF16 = torch.float32, torch.bfloat16
BLOCK = ANY["sparse_map"][-1].block
NAMES = ("weight", "exp_avg", "exp_avg_sq")


class Case(NamedTuple):
    """Rows and columns of the source and of the range of the target."""

    A: int
    B: int
    R: int
    C: int
    dtype: torch.dtype
    num_tensors: int = 3
    target: torch.dtype = F32


CASES = [
    Case(1, 1, 1, 1, F32),
    Case(6, 5, 13, 7, F32),
    Case(7, 40, ROWS, 96, F32),
    Case(5, 33, 2 * ROWS + 3, BLOCK + 9, F32),  # two blocks of columns, the last program has few rows
    Case(6, 16, 12, 32, BF16, 1, BF16),
    Case(6, 16, 12, 32, BF16),  # into float32
    Case(4, 4, 0, 8, F32),
]


def indices(num_source: int, num_target: int, seed: int) -> Tensor:
    """Replicas side by side, some out of their order, some elements new."""
    index = torch.arange(num_target) * num_source // max(num_target, 1)
    drawn = torch.rand(num_target, generator=torch.Generator().manual_seed(seed))
    return torch.where(drawn < 0.1, -1, torch.where(drawn > 0.8, index.flip(0), index))


def inputs(case: Case) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(case.R + case.C)
    sources = [torch.randn(case.A, case.B, generator=generator).to(case.dtype) for _ in range(case.num_tensors)]
    scales = (torch.rand(2, n, generator=generator) + 0.3 for n in (case.R, case.C))
    return sources, (indices(case.A, case.R, 1), indices(case.B, case.C, 2), *scales)


def written(write, case: Case, sources: list[Tensor], maps: tuple[Tensor, ...]) -> list[Tensor]:
    targets = [torch.full((case.R, case.C), torch.nan, dtype=case.target) for _ in sources]
    write(targets, sources, *maps)
    return targets


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_good_as_the_twin(case: Case) -> None:
    sources, maps = inputs(case)
    actual, twin = (written(write, case, sources, maps) for write in (sparse_map_, torch_growth_ops.sparse_map_))
    rows_R, columns_C, *scales = maps
    truth = sparse_map_ref([x.double() for x in sources], rows_R, columns_C, *(x.double() for x in scales))
    for name, *found in zip(NAMES[: len(sources)], actual, twin, truth, strict=True):
        assert found[0].shape == (case.R, case.C)
        if case.R:
            assert_as_good_as_twin(*found, name)


def test_copies_are_exact_and_bits_are_the_twins() -> None:
    case = Case(5, 33, 12, 70, F32)
    sources, (rows_R, columns_C, *scales) = inputs(case)
    ones = (torch.ones_like(x) for x in scales)
    rows_R, columns_C = rows_R.clamp(min=0), columns_C.clamp(min=0)
    for found, source in zip(written(sparse_map_, case, sources, (rows_R, columns_C, *ones)), sources, strict=True):
        assert torch.equal(found, source[rows_R][:, columns_C])
    maps = (rows_R, columns_C, *scales)
    ours, twins = (written(write, case, sources, maps) for write in (sparse_map_, torch_growth_ops.sparse_map_))
    assert all(map(torch.equal, ours, twins))


def test_a_shard_whose_rows_lie_apart() -> None:
    case = Case(5, 33, 12, 20, F32)
    sources, maps = inputs(case)
    expected = written(sparse_map_, case, sources, maps)
    wholes = [torch.full((case.R, case.C + 7), torch.nan) for _ in sources]
    sparse_map_([whole[:, 3:-4] for whole in wholes], sources, *maps)
    for whole, part in zip(wholes, expected, strict=True):
        assert torch.equal(whole[:, 3:-4], part)
        assert whole[:, :3].isnan().all() and whole[:, -4:].isnan().all()


def test_new_elements_read_nothing() -> None:
    case = Case(2, 2, 2, 2, F32, 1)
    source = torch.full((2, 2), torch.nan)
    (found,) = written(
        sparse_map_, case, [source], (torch.tensor([-1, -1]), torch.tensor([0, 1]), *[torch.ones(2, 2)] * 2)
    )
    assert torch.equal(found, torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"targets": [torch.ones(2, 3)] * 2, "sources": [torch.ones(4, 4)] * 2},
            "2 targets of 2 sources, must be 1 or 3",
        ),
        ({"targets": [torch.ones(3, 3)]}, r"targets\[0\] has shape \(3, 3\), must be \(2, 3\)"),
        ({"sources": [torch.ones(4, 4, dtype=torch.float64)]}, r"sources\[0\] is torch.float64"),
        ({"targets": [torch.ones(3, 2).T]}, "a target's columns lie apart"),
        ({"rows_R": torch.zeros(2, dtype=torch.int32)}, "indices are torch.int32 and torch.int64"),
        ({"row_scales_2R": torch.ones(2)}, r"scales have shapes \(2,\) and \(2, 3\)"),
    ],
    ids=["number", "shape", "dtype", "strides", "indices", "scales"],
)
def test_refusals(changes: dict, message: str) -> None:
    given = {
        "targets": [torch.ones(2, 3)],
        "sources": [torch.ones(4, 4)],
        "rows_R": torch.zeros(2, dtype=torch.int64),
        "columns_C": torch.zeros(3, dtype=torch.int64),
        "row_scales_2R": torch.ones(2, 2),
        "column_scales_2C": torch.ones(2, 3),
    }
    with pytest.raises(ValueError, match=f"sparse_map_: {message}") as refusal:
        sparse_map_(**(given | changes))
    assert "\n" not in str(refusal.value)


def test_it_is_a_sound_operation() -> None:
    case = Case(3, 4, 6, 8, F32)
    sources, maps = inputs(case)
    targets = [torch.zeros(case.R, case.C) for _ in sources]
    torch.library.opcheck(torch.ops.megagrow_kernels.sparse_map_, (targets, sources, *maps))
