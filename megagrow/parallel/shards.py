"""Which piece of a parameter this rank stores, and the way between pieces and whole tensors.

Every parameter of a model on more than one rank is a DTensor: sharded over `tp` as its role says (or replicated), then
by FSDP2 in rows over `dp`. A rank's piece is therefore always one box of the whole tensor.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from megagrow.config import ModelConfig
from megagrow.parallel.mesh import Axis, Mesh
from megagrow.roles import role_of

Box = tuple[slice, ...]

# Gathering FSDP2's shards of a tensor-parallel shard takes two steps. torch calls that suboptimal, on every rank.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def local(tensor: Tensor) -> Tensor:
    """This rank's piece of a DTensor (differentiable), or the plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole tensor; a collective over the axes that shard it. Returned detached."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    piece, device_type = local(tensor), tensor.device_mesh.device_type
    if piece.device.type != device_type:  # in host memory: the mesh's collectives take what is on its devices
        return DTensor(piece.to(device_type), tensor._spec, requires_grad=False).full_tensor()
    return tensor.full_tensor()


def chunk(size: int, axis: Axis) -> slice:
    """The part of `size` elements that the rank at this position holds: equal chunks, the last ones shorter."""
    step = -(-size // axis.size)
    start = min(axis.rank * step, size)
    return slice(start, min(start + step, size))


def box(tensor: Tensor) -> Box:
    """The global index range of this rank's piece, one slice per dim."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "this rank is not on the tensor's mesh"
    offsets, sizes = local_box(tensor.shape, mesh.shape, coordinate, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))


def local_box(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    coordinate: Sequence[int],
    placements: Sequence[Placement],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and sizes of the box that a DTensor with these placements has at `coordinate`.

    A `Shard` cuts what the mesh axes to its left have left over. A `_StridedShard`, which FSDP2 makes over a tensor
    that is sharded already, cuts after the axes to its right. Every cut is that of `torch.chunk`.

    torch's own answer (`compute_local_shape_and_global_offset`, torch 2.13) is wrong for FSDP2 over a tensor-parallel
    shard when chunks get short: 13 rows on dp 3 x tp 2 overlap, and DCP refuses to save them.
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


def _cuts(mesh_shape: Sequence[int], placements: Sequence[Placement]) -> list[tuple[int, int]]:
    """(mesh axis, tensor dim) of every cut, in the order in which they are made."""
    strided = [(a, p) for a, p in enumerate(placements) if isinstance(p, _StridedShard)]
    later = {axis for axis, _ in strided}
    plain = [(a, p.dim) for a, p in enumerate(placements) if isinstance(p, Shard) and a not in later]
    cuts = plain + [(axis, placement.dim) for axis, placement in reversed(strided)]
    for axis, placement in strided:
        num_shards = math.prod(mesh_shape[a] for a, dim in cuts if a > axis and dim == placement.dim)
        assert placement.split_factor == num_shards, f"{placements} on {mesh_shape} hold no boxes"
    return cuts


def wrap_like(piece: Tensor, tensor: Tensor) -> Tensor:
    """A tensor whose local piece is `piece`, laid out like `tensor`; shares the piece's memory."""
    if not isinstance(tensor, DTensor):
        return piece
    if piece.device.type != tensor.device_mesh.device_type:
        # In host memory; `from_local` would copy it to the device, and writes would not reach it.
        return DTensor(piece, tensor._spec, requires_grad=False)
    return DTensor.from_local(
        piece, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def fill(tensor: Tensor, whole: Tensor) -> None:
    """Writes this rank's piece of `whole` into the tensor."""
    with torch.no_grad():
        local(tensor).copy_(whole[box(tensor)])


def release(tensors: Iterable[Tensor]) -> None:
    """Gives the memory of this rank's pieces back at once, whoever still holds the tensors; none may be read again."""
    for tensor in tensors:
        local(tensor.detach()).untyped_storage().resize_(0)


def tensor_dim(name: str, model: ModelConfig, tp: Axis) -> int | None:
    """The dim of a parameter that tensor parallelism cuts; None: every tensor rank holds the whole.

    Key/value heads fewer than tensor ranks are not cut: several ranks use one head, and their gradients are summed.
    """
    role = role_of(name)
    if role.out == "kv_heads" and model.num_kv_heads < tp.size:
        return None
    return role.tensor_dim


def kv_rows(model: ModelConfig, tp: Axis) -> slice | None:
    """The rows of `attention.key_value` that this tensor rank uses where it holds all of them, else None."""
    if model.num_kv_heads >= tp.size:
        return None
    head, size = tp.rank * model.num_kv_heads // tp.size, 2 * model.head_dim
    return slice(head * size, (head + 1) * size)


def shard_parameters(module: nn.Module, model: ModelConfig, mesh: Mesh) -> None:
    """Replaces the parameters of a module on the meta device by DTensors on the `tp` axis, as their roles say."""
    if mesh.tp.size == 1:
        return
    tp_mesh = mesh.sub_mesh("tp")
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        dim = tensor_dim(name, model, mesh.tp)
        index = [slice(None)] * parameter.ndim
        if dim is not None:
            index[dim] = chunk(parameter.shape[dim], mesh.tp)
        placement = Replicate() if dim is None else Shard(dim)
        piece = parameter.data[tuple(index)].contiguous()
        sharded = DTensor.from_local(
            piece, tp_mesh, [placement], run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
        module_name, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(module_name), leaf, nn.Parameter(sharded))


def counted_here(tensor: Tensor) -> bool:
    """Whether this rank is the one that counts its piece of a tensor in sums over the whole mesh.

    A piece that several ranks of the tensor's mesh hold is counted by the first of them.
    """
    if not isinstance(tensor, DTensor):
        return True
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "this rank is not on the tensor's mesh"
    return all(place == 0 for place, kind in zip(coordinate, tensor.placements, strict=True) if kind.is_replicate())


def cpu_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU, by name; a collective. For tests and small models."""
    return {name: full(tensor).cpu().clone() for name, tensor in tensors.items()}
