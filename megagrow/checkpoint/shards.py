"""The box of a global tensor that this rank holds: what it saves, and what it loads.

torch's own answer (`compute_local_shape_and_global_offset`, torch 2.13) is wrong for FSDP2 over a
tensor-parallel shard when chunks get short: 13 rows on dp 3 x tp 2 overlap, and DCP refuses to save
them. So boxes are computed here, and compared with the local tensor.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from megagrow.errors import CheckpointError

# Other dtypes are refused on saving: what is stored must be readable by name alone.
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


@dataclass(frozen=True)
class LocalShard:
    """A plain tensor that shares its memory with one box of a global tensor; it may be empty."""

    data: Tensor
    offsets: tuple[int, ...]
    shape: tuple[int, ...]  # of the whole tensor


def local_shards(tensors: Mapping[str, Tensor]) -> dict[str, LocalShard]:
    """The local part of every tensor; a DTensor whose mesh does not contain this rank is left out.

    Raises:
        CheckpointError: a dtype that has no name in checkpoints, or a tensor without elements.
    """
    shards = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise CheckpointError(f"tensor {name!r} is {tensor.dtype}; must be one of {[*DTYPES]}")
        if tensor.numel() == 0:
            raise CheckpointError(
                f"tensor {name!r} of shape {list(tensor.shape)} has no elements; leave it out"
            )
        shard = local_shard(tensor.detach())
        if shard is not None:
            shards[name] = shard
    return shards


def local_shard(tensor: Tensor) -> LocalShard | None:
    """This rank's part of a DTensor (None outside its mesh) or plain tensor (the whole)."""
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return LocalShard(tensor, (0,) * len(shape), shape)
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    offsets, sizes = local_box(shape, tuple(mesh.shape), coordinate, tensor.placements)
    with torch.no_grad():
        data = tensor.to_local()
    # An empty shard has no box to compare: torch gives it any shape without elements.
    assert tuple(data.shape) == sizes or data.numel() == math.prod(sizes) == 0, (
        f"{tensor.placements} on {mesh} hold {tuple(data.shape)}, expected {sizes}"
    )
    return LocalShard(data, offsets, shape)


def local_box(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    coordinate: Sequence[int],
    placements: Sequence[Placement],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and sizes of the box that a DTensor with these placements has at `coordinate`.

    A `Shard` cuts what the mesh axes to its left have left over. A `_StridedShard`, which FSDP2
    makes over a tensor that is sharded already, cuts after the axes to its right. Every cut is that
    of `torch.chunk`.
    """
    assert all(isinstance(p, Shard | _StridedShard | Replicate) for p in placements), (
        f"{placements} cannot be saved: reduce partial sums first"
    )
    offsets, sizes = [0] * len(shape), list(shape)
    for axis, dim in _cuts(mesh_shape, placements):
        step = -(-sizes[dim] // mesh_shape[axis])
        start = min(step * coordinate[axis], sizes[dim])
        offsets[dim] += start
        sizes[dim] = min(step, sizes[dim] - start)
    return tuple(offsets), tuple(sizes)


def layout_of(tensors: Mapping[str, Tensor], world_size: int) -> dict[str, Any]:
    """World size and mesh axes, those of the tensor that has most; for people to read."""
    meshes = [t.device_mesh for t in tensors.values() if isinstance(t, DTensor)]
    axes: dict[str, int] = {}
    if meshes:
        mesh = max(meshes, key=lambda m: m.ndim)
        names = mesh.mesh_dim_names or tuple(f"axis{i}" for i in range(mesh.ndim))
        axes = dict(zip(names, mesh.shape, strict=True))
    return {"world_size": world_size, "axes": axes}


def _cuts(mesh_shape: Sequence[int], placements: Sequence[Placement]) -> list[tuple[int, int]]:
    """(mesh axis, tensor dim) of every cut, in the order in which they are made."""
    strided = [(a, p) for a, p in enumerate(placements) if isinstance(p, _StridedShard)]
    later = {axis for axis, _ in strided}
    plain = [
        (a, p.dim) for a, p in enumerate(placements) if isinstance(p, Shard) and a not in later
    ]
    cuts = plain + [(axis, placement.dim) for axis, placement in reversed(strided)]
    for axis, placement in strided:
        num_shards = math.prod(
            mesh_shape[a] for a, dim in cuts if a > axis and dim == placement.dim
        )
        assert placement.split_factor == num_shards, f"{placements} on {mesh_shape} hold no boxes"
    return cuts
