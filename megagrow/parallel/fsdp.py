"""From a model on the meta device to this rank's shards, in a fixed order.

    1. tensor parallelism cuts each parameter as its role says (shards.py)
    2. FSDP2 cuts the rows of what is left over the shard axis, block by block; with `replicate` > 1 (HSDP) each
       such group holds a whole copy, and plain data parallelism is the case of groups of one
    3. memory is allocated for the pieces alone; nothing of global size ever exists

Under a pipeline, blocks stay gathered between the forward and backward passes of the microbatches: gathering them again
for each microbatch would multiply the communication by their number.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from megagrow.config import ModelConfig
from megagrow.parallel.mesh import Mesh
from megagrow.parallel.shards import shard_parameters


def materialize(
    module: nn.Module, blocks: list[nn.Module], model: ModelConfig, mesh: Mesh, dtype: torch.dtype | None
) -> None:
    """Shards a module built on the meta device and allocates this rank's pieces, uninitialised.

    Args:
        module: a pipeline stage of this rank.
        blocks: its layers; each is gathered and freed as one.
        model: the whole model's configuration.
        mesh: where the rank stands.
        dtype: of compute, when it differs from the parameters'; gradients are reduced in float32.
    """
    shard_parameters(module, model, mesh)
    if mesh.tokens.size > 1:
        _wrap(module, blocks, mesh, dtype)
    module.to_empty(device=mesh.device)


def _wrap(module: nn.Module, blocks: list[nn.Module], mesh: Mesh, dtype: torch.dtype | None) -> None:
    # torch sums the gradients of a backward pass in two halves in the dtype of the gathered weights: in 16 bits
    # later microbatches would be lost beside the sum. Gathered in float32, they are cast at each use.
    gathered = None if mesh.parallel.splits_backward else dtype
    policy = MixedPrecisionPolicy(
        param_dtype=gathered,
        reduce_dtype=torch.float32 if dtype else None,
        cast_forward_inputs=False,  # the tokens' weights in the loss are an input: rounded, they would scale it
    )
    storage, reshard = storage_mesh(mesh), mesh.pp.size == 1
    for part in [*blocks, module]:
        # Head and embedding are needed again at once: what comes last stays gathered between the two passes.
        again = reshard and part is not module
        wrapped = fully_shard(part, mesh=storage, mp_policy=policy, reshard_after_forward=again)
        # The loss is already divided by the global number of tokens: gradients are summed, not averaged.
        wrapped.set_gradient_divide_factor(1.0)
        wrapped.set_force_sum_reduction_for_comms(True)


def storage_mesh(mesh: Mesh) -> DeviceMesh:
    """The axes that FSDP2 uses: rows are cut over `shard`, copies stand along `replicate`."""
    return mesh.sub_mesh("replicate", "shard") if mesh.parallel.replicate > 1 else mesh.sub_mesh("shard")


def sync_gradients(module: nn.Module, enabled: bool) -> None:
    """Whether the next backward reduces gradients over the data axes; off for all but the last microbatch."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(enabled)
        module.set_is_last_backward(enabled)


def reshard(module: nn.Module) -> None:
    """Frees gathered parameters, so that `parameters()` are this rank's shards again (after a forward-only pass)."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
