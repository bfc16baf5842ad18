"""Recomputing a block's forward pass during its backward pass, to keep fewer activations."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import megagrow.cpu_ops  # noqa: F401 (registers its operations)

_aten, _functional, _own = torch.ops.aten, torch.ops._c10d_functional, torch.ops.megagrow

# What selective recompute keeps: the results that cost the most to have again. (FlexAttention cannot be kept.)
KEPT_OPERATIONS = {
    _aten.mm.default,
    _aten.addmm.default,
    _own.product.default,
    _own.causal_attention.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._flash_attention_forward.default,
    _aten._efficient_attention_forward.default,
    _functional.all_reduce.default,
    _functional.reduce_scatter_tensor.default,
}
FLASH_ATTN_FORWARD = "flash_attn._flash_attn_forward.default"  # registered by that package


def recompute(compute: Callable[..., Any], how: str, *args: Any) -> Any:
    """`compute(*args)`, keeping less of what happens in it for its backward pass.

    Args:
        compute: a differentiable function without randomness of its own.
        how: `none`; `full` keeps the arguments only; `selective` also the results of matrix products, attention and
            sums over ranks, and computes norms, activations and rotations again.
    """
    if how == "none":
        return compute(*args)
    selective: dict[str, Any] = {"context_fn": _keep_expensive} if how == "selective" else {}
    return checkpoint(compute, *args, use_reentrant=False, preserve_rng_state=False, **selective)


def _keep_expensive() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation in KEPT_OPERATIONS or str(operation) == FLASH_ATTN_FORWARD
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
