"""From a model on the meta device to this rank's shards, in a fixed order.

    1. tensor parallelism cuts each parameter as its role says (shards.py)
    2. FSDP2 cuts the rows of what is left over the data axis, block by block
    3. memory is allocated for the pieces alone; nothing of global size ever exists

Under a pipeline, blocks stay gathered between the forward and backward passes of the microbatches: gathering them again
for each microbatch would multiply the communication by their number.
"""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from megagrow.parallel.mesh import Mesh
from megagrow.parallel.shards import shard_parameters


def materialize(model: nn.Module, blocks: list[nn.Module], mesh: Mesh, dtype: torch.dtype | None) -> None:
    """Shards a model built on the meta device and allocates this rank's pieces, uninitialised.

    Args:
        model: this rank's pipeline stage.
        blocks: its layers; each is gathered and freed as one.
        mesh: where the rank stands.
        dtype: of compute, when it differs from the parameters'; gradients are reduced in float32.
    """
    shard_parameters(model, mesh)
    if mesh.dp.size > 1:
        _wrap(model, blocks, mesh, dtype)
    model.to_empty(device=mesh.device)


def _wrap(model: nn.Module, blocks: list[nn.Module], mesh: Mesh, dtype: torch.dtype | None) -> None:
    data_mesh = mesh.sub_mesh("dp")
    policy = MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=torch.float32 if dtype else None,
        cast_forward_inputs=False,  # the tokens' weights in the loss are an input: rounded, they would scale it
    )
    reshard = mesh.pp.size == 1
    for part in [*blocks, model]:
        module = fully_shard(part, mesh=data_mesh, mp_policy=policy, reshard_after_forward=reshard)
        # The loss is already divided by the global number of tokens: gradients are summed, not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def sync_gradients(model: nn.Module, enabled: bool) -> None:
    """Whether the next backward reduces gradients over the data axis; off for all but the last microbatch."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
        model.set_is_last_backward(enabled)


def reshard(model: nn.Module) -> None:
    """Frees gathered parameters, so that `parameters()` are this rank's shards again (after a forward-only pass)."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
