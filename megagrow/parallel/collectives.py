"""Collectives over one mesh axis, in the conjugate pairs that explicit tensor parallelism needs.

Source: Megatron-LM (Shoeybi et al., 2019), section 3: `copy_to` is its operator f, `reduce_from` its operator g.
On an axis of size 1 all of them are the identity.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagrow.parallel.mesh import Axis


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_over(grad.clone(), ctx.axis), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return sum_over(x.clone(), axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def copy_to(x: Tensor, axis: Axis) -> Tensor:
    """Enters a sharded region: the identity whose backward sums the gradient over the axis."""
    return x if axis.size == 1 else _CopyTo.apply(x, axis)


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """Leaves a sharded region: sums over the axis; the backward is the identity."""
    return x if axis.size == 1 else _ReduceFrom.apply(x, axis)


def sum_over(x: Tensor, axis: Axis) -> Tensor:
    """Sums a tensor over the axis in place, outside autograd; returns it."""
    if axis.size > 1:
        dist.all_reduce(x, group=axis.group)
    return x


def max_over(x: Tensor, axis: Axis) -> Tensor:
    """Takes the maximum over the axis in place, outside autograd; returns it."""
    if axis.size > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=axis.group)
    return x


def broadcast_from(x: Tensor, source: int, axis: Axis) -> Tensor:
    """Copies the tensor of the rank at position `source` of the axis to the others, in place; returns it."""
    if axis.size > 1:
        dist.broadcast(x, group_src=source, group=axis.group)
    return x


def any_over(flag: bool, axis: Axis) -> bool:
    """Whether the flag is set on any rank of the axis."""
    return bool(max_over(torch.tensor(float(flag)), axis).item()) if axis.size > 1 else flag
