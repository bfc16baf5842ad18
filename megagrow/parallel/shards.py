"""Which piece of a parameter this rank stores, and the way between pieces and whole tensors.

Every parameter of a model on more than one rank is a DTensor: sharded over `tp` as its role says (or replicated), then
by FSDP2 in rows over `dp`. A rank's piece is therefore always one box of the whole tensor.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from megagrow.parallel.mesh import Axis, Mesh
from megagrow.roles import role_of

Box = tuple[slice, ...]


def local(tensor: Tensor) -> Tensor:
    """This rank's piece of a DTensor (differentiable), or the plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole tensor; a collective over the axes that shard it. Returned detached."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def chunk(size: int, axis: Axis) -> slice:
    """The part of `size` elements that the rank at this position holds: equal chunks, the last ones shorter."""
    step = -(-size // axis.size)
    start = min(axis.rank * step, size)
    return slice(start, min(start + step, size))


def box(tensor: Tensor) -> Box:
    """The global index range of this rank's piece, one slice per dim.

    Tensor sharding is applied first and FSDP cuts the rows of what is left, whatever the order of the mesh dims.
    """
    slices = [slice(0, n) for n in tensor.shape]
    if not isinstance(tensor, DTensor):
        return tuple(slices)
    mesh = tensor.device_mesh
    names = mesh.mesh_dim_names or ()
    for name in ("tp", "dp"):
        if name not in names:
            continue
        index = names.index(name)
        placement = tensor.placements[index]
        if not isinstance(placement, Replicate):
            dim = placement.dim  # type: ignore[attr-defined]
            held = slices[dim]
            part = chunk(held.stop - held.start, Axis(None, mesh.get_local_rank(name), mesh.size(index)))
            slices[dim] = slice(held.start + part.start, held.start + part.stop)
    return tuple(slices)


def wrap_like(piece: Tensor, tensor: Tensor) -> Tensor:
    """A tensor whose local piece is `piece`, laid out like `tensor`; shares the piece's memory."""
    if not isinstance(tensor, DTensor):
        return piece
    return DTensor.from_local(
        piece, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def fill(tensor: Tensor, whole: Tensor) -> None:
    """Writes this rank's piece of `whole` into the tensor."""
    with torch.no_grad():
        local(tensor).copy_(whole[box(tensor)])


def shard_parameters(model: nn.Module, mesh: Mesh) -> None:
    """Replaces the parameters of a model on the meta device by DTensors on the `tp` axis, as their roles say."""
    if mesh.tp.size == 1:
        return
    tp_mesh = mesh.sub_mesh("tp")
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        dim = role_of(name).tensor_dim
        index = [slice(None)] * parameter.ndim
        if dim is not None:
            index[dim] = chunk(parameter.shape[dim], mesh.tp)
        placement = Replicate() if dim is None else Shard(dim)
        piece = parameter.data[tuple(index)].contiguous()
        sharded = DTensor.from_local(
            piece, tp_mesh, [placement], run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
        module_name, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module_name), leaf, nn.Parameter(sharded))


def counted_here(name: str, mesh: Mesh, held_elsewhere: bool = False) -> bool:
    """Whether this rank is the one that counts its piece of a parameter in sums over the whole mesh.

    A piece that every tensor rank holds is counted by the first of them; a tied embedding that two pipeline stages hold
    is counted by the first stage (`held_elsewhere` says that this is the second copy).
    """
    return not held_elsewhere and (role_of(name).tensor_dim is not None or mesh.tp.rank == 0)


def cpu_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU, by name; a collective. For tests and small models."""
    return {name: full(tensor).cpu().clone() for name, tensor in tensors.items()}
