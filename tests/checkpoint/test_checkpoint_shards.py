"""Boxes of sharded tensors, compared with cutting a whole tensor in the order of parallelism."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from megagrow.parallel.shards import local_box

SIZES = [1, 2, 5, 7, 8, 13, 16, 27, 101]


def cut(tensor: Tensor, dim: int, num_chunks: int, index: int) -> Tensor:
    """One of torch.chunk's chunks, of which there are fewer if the last ones would be empty."""
    chunks = tensor.chunk(num_chunks, dim)
    return chunks[index] if index < len(chunks) else tensor.narrow(dim, 0, 0)


def cut_box(tensor: Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(dim, offset, size)
    return tensor


@pytest.mark.parametrize("num_rows", SIZES)
@pytest.mark.parametrize("tp_dim", [0, 1])
def test_fsdp_cuts_what_tensor_parallelism_left(num_rows: int, tp_dim: int) -> None:
    whole = torch.arange(num_rows * 6).view(num_rows, 6)
    for dp, tp in itertools.product((1, 2, 3, 4), repeat=2):
        first: Placement = _StridedShard(0, split_factor=tp) if tp_dim == 0 and tp > 1 else Shard(0)
        for coordinate in itertools.product(range(dp), range(tp)):
            expected = cut(cut(whole, tp_dim, tp, coordinate[1]), 0, dp, coordinate[0])
            box = local_box(whole.shape, (dp, tp), coordinate, (first, Shard(tp_dim)))
            assert torch.equal(cut_box(whole, *box), expected)


def test_plain_shards_of_one_dim_are_cut_from_left_to_right() -> None:
    whole = torch.arange(13)
    for coordinate in itertools.product(range(2), range(3)):
        expected = cut(cut(whole, 0, 2, coordinate[0]), 0, 3, coordinate[1])
        box = local_box((13,), (2, 3), coordinate, (Shard(0), Shard(0)))
        assert torch.equal(cut_box(whole, *box), expected)


def test_strided_shards_are_cut_from_right_to_left() -> None:
    whole = torch.arange(29)
    placements = (_StridedShard(0, split_factor=6), _StridedShard(0, split_factor=3), Shard(0))
    for coordinate in itertools.product(range(2), range(2), range(3)):
        expected = cut(cut(whole, 0, 3, coordinate[2]), 0, 2, coordinate[1])
        expected = cut(expected, 0, 2, coordinate[0])
        box = local_box((29,), (2, 2, 3), coordinate, placements)
        assert torch.equal(cut_box(whole, *box), expected)


def test_replicas_hold_everything_and_scalars_have_no_offsets() -> None:
    assert local_box((4, 3), (2, 2), (1, 1), (Replicate(), Replicate())) == ((0, 0), (4, 3))
    assert local_box((), (2,), (1,), (Replicate(),)) == ((), ())


def test_what_is_no_box_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="hold no boxes"):
        local_box((8,), (2, 2), (0, 0), (_StridedShard(0, split_factor=2), Replicate()))
    with pytest.raises(AssertionError, match="partial sums"):
        local_box((8,), (2,), (0,), (Partial(),))
