"""What a gradient still lacks when the backward pass is over: sums that no layer and no data axis makes.

over tp   parameters that every tensor rank holds whole, but uses for its own part of the work only
over pp   the embedding, where it is the output matrix of another stage too
"""

from collections.abc import Mapping
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagrow.config import ModelConfig
from megagrow.parallel.collectives import sum_over
from megagrow.parallel.mesh import Axis, Mesh
from megagrow.parallel.shards import local, tensor_dim
from megagrow.roles import TIED_EMBEDDING, role_of


def has_partial_gradient(name: str, model: ModelConfig, mesh: Mesh) -> bool:
    """Whether each tensor rank's gradient of a parameter that all of them hold is a part of the whole.

    Under sequence parallelism all of these are: each rank has seen a part of the sequence. Otherwise those of single
    heads are: norms of queries and keys, and key/value heads that several ranks share.
    """
    if mesh.tp.size == 1 or tensor_dim(name, model, mesh.tp) is not None:
        return False
    return mesh.sequence_parallel or role_of(name).out in ("kv_heads", "head_dim")


def sum_partial_gradients(parameters: Mapping[str, nn.Parameter], model: ModelConfig, mesh: Mesh) -> None:
    """Sums over the tensor axis the gradients that need it, in one collective; those of frozen layers are not there."""
    learning = {name: p for name, p in parameters.items() if p.grad is not None}
    partial = [local(_gradient(p)) for name, p in learning.items() if has_partial_gradient(name, model, mesh)]
    if not partial:
        return
    joined = sum_over(torch.cat([grad.flatten() for grad in partial]), mesh.tp)
    for grad, total in zip(partial, joined.split([grad.numel() for grad in partial]), strict=True):
        grad.copy_(total.view_as(grad))


def sum_tied_gradients(parameters: Mapping[str, nn.Parameter], pp: Axis) -> None:
    """Sums the embedding's gradients of the first and the last stage, on both ranks; for these two ranks to call."""
    if parameters[TIED_EMBEDDING].grad is None:  # frozen, on both
        return
    grad = local(_gradient(parameters[TIED_EMBEDDING]))
    received = torch.empty_like(grad)
    peer = pp.size - 1 if pp.is_first else 0
    transfers = [
        dist.P2POp(dist.isend, grad, group=pp.group, group_peer=peer),
        dist.P2POp(dist.irecv, received, group=pp.group, group_peer=peer),
    ]
    for request in dist.batch_isend_irecv(transfers):
        request.wait()
    grad.add_(received)  # addition commutes: both ends get the same bits


def _gradient(parameter: nn.Parameter) -> Tensor:
    return cast(Tensor, parameter.grad)
