"""The box of a global tensor that this rank holds: what it saves, and what it loads."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megagrow.errors import CheckpointError
from megagrow.parallel.shards import local_box

# Other dtypes are refused on saving: what is stored must be readable by name alone.
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


@dataclass(frozen=True)
class Deferred:
    """A whole tensor that is fetched when it is written, so that a model need not be in memory to be saved.

    Attributes:
        shape, dtype: what `fetch` will return.
        fetch: called once, while the checkpoint is being written; a CheckpointError of it fails the save.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    fetch: Callable[[], Tensor]


@dataclass(frozen=True)
class LocalShard:
    """A plain tensor that shares its memory with one box of a global tensor; it may be empty.

    One that is fetched later stands on the meta device.
    """

    data: Tensor
    offsets: tuple[int, ...]
    shape: tuple[int, ...]  # of the whole tensor
    fetch: Callable[[], Tensor] | None = None


def local_shards(tensors: Mapping[str, Tensor | Deferred]) -> dict[str, LocalShard]:
    """The local part of every tensor; a DTensor whose mesh does not contain this rank is left out.

    Raises:
        CheckpointError: a dtype that has no name in checkpoints, or a tensor without elements.
    """
    shards = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise CheckpointError(f"tensor {name!r} is {tensor.dtype}; must be one of {[*DTYPES]}")
        if math.prod(tensor.shape) == 0:
            raise CheckpointError(f"tensor {name!r} of shape {list(tensor.shape)} has no elements; leave it out")
        shard = local_shard(tensor)
        if shard is not None:
            shards[name] = shard
    return shards


def local_shard(tensor: Tensor | Deferred) -> LocalShard | None:
    """This rank's part of a DTensor (None outside its mesh) or of another tensor (the whole)."""
    shape = tuple(tensor.shape)
    if isinstance(tensor, Deferred):
        placeholder = torch.empty(shape, dtype=tensor.dtype, device="meta")
        return LocalShard(placeholder, (0,) * len(shape), shape, tensor.fetch)
    tensor = tensor.detach()
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


def layout_of(tensors: Mapping[str, Tensor | Deferred], world_size: int) -> dict[str, Any]:
    """World size and mesh axes, those of the tensor that has most; for people to read."""
    meshes = [t.device_mesh for t in tensors.values() if isinstance(t, DTensor)]
    axes: dict[str, int] = {}
    if meshes:
        mesh = max(meshes, key=lambda m: m.ndim)
        names = mesh.mesh_dim_names or tuple(f"axis{i}" for i in range(mesh.ndim))
        axes = dict(zip(names, mesh.shape, strict=True))
    return {"world_size": world_size, "axes": axes}
