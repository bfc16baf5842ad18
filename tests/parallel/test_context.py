"""The cut of sequences over context ranks; that attention is exact is shown by the parity tests."""

import pytest
import torch

from megagrow.parallel.context import cut, local_positions
from megagrow.parallel.mesh import Axis

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_position_is_held_once(size: int) -> None:
    held = torch.cat([local_positions(48, rank, size, CPU) for rank in range(size)])
    assert torch.equal(held.sort().values, torch.arange(48))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_ranks_have_the_same_work_under_a_causal_mask(size: int) -> None:
    pairs = [int((local_positions(48, rank, size, CPU) + 1).sum()) for rank in range(size)]
    assert len(set(pairs)) == 1


def test_the_first_rank_has_both_ends() -> None:
    assert local_positions(8, 0, 2, CPU).tolist() == [0, 1, 6, 7]
    assert local_positions(8, 1, 2, CPU).tolist() == [2, 3, 4, 5]


def test_cut_takes_the_rank_s_tokens() -> None:
    x_BT = torch.arange(16).view(2, 8)
    assert cut(x_BT, Axis(None, 1, 2)).tolist() == [[2, 3, 4, 5], [10, 11, 12, 13]]
    assert cut(x_BT, Axis()) is x_BT
