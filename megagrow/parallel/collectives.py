"""Collectives over one mesh axis, in the conjugate pairs that explicit parallelism needs.

    forward              backward             pair
    copy_to              identity             sum              whole activations enter a sharded region
    reduce_from          sum                  identity         and leave it
    gather_from          all-gather           reduce-scatter   activations cut along the sequence enter
    scatter_to           reduce-scatter       all-gather       and leave

Source: Megatron-LM (Shoeybi et al., 2019), section 3: `copy_to` is its operator f, `reduce_from` its g; sequence
parallelism (Korthikanti et al., 2022), section 4.2.2: g and its conjugate are `gather_from` and `scatter_to`.
On an axis of size 1 all of them are the identity.
"""

import json
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagrow.parallel.mesh import Axis

# Functional collectives give new tensors: selective recompute can keep them, torch.compile can trace them.
_functional = torch.ops._c10d_functional


class Pending:
    """A collective under way; `wait` gives its result."""

    def __init__(self, result: Tensor, finish: Callable[[Tensor], Tensor]) -> None:
        self._result, self._finish = result, finish

    def wait(self) -> Tensor:
        return self._finish(_functional.wait_tensor(self._result))


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return start_sum_over(grad, ctx.axis).wait(), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return start_sum_over(x, axis).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis) -> Tensor:
        ctx.dim, ctx.axis = dim, axis
        return start_all_gather(x, dim, axis).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return start_reduce_scatter(grad, ctx.dim, ctx.axis).wait(), None, None


class _ScatterTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis) -> Tensor:
        ctx.dim, ctx.axis = dim, axis
        return start_reduce_scatter(x, dim, axis).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return start_all_gather(grad, ctx.dim, ctx.axis).wait(), None, None


def copy_to(x: Tensor, axis: Axis) -> Tensor:
    """Enters a sharded region: the identity whose backward sums the gradient over the axis."""
    return x if axis.size == 1 else _CopyTo.apply(x, axis)


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """Leaves a sharded region: sums over the axis; the backward is the identity."""
    return x if axis.size == 1 else _ReduceFrom.apply(x, axis)


def gather_from(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Joins the ranks' pieces along a dim; the backward sums the ranks' gradients and cuts them again."""
    return x if axis.size == 1 else _GatherFrom.apply(x, dim, axis)


def scatter_to(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Sums over the axis and keeps this rank's piece along a dim; the backward joins the pieces' gradients."""
    return x if axis.size == 1 else _ScatterTo.apply(x, dim, axis)


def start_sum_over(x: Tensor, axis: Axis) -> Pending:
    """Begins the sum over the axis; x itself stays as it is."""
    return Pending(_functional.all_reduce(x.contiguous(), "sum", _name(axis)), lambda result: result)


def start_all_gather(x: Tensor, dim: int, axis: Axis) -> Pending:
    """Begins to join the ranks' equal pieces along a dim, in the order of their ranks."""
    joined = _functional.all_gather_into_tensor(x.contiguous(), axis.size, _name(axis))
    if _is_leading(x, dim):
        return Pending(joined, lambda result: result.view(*x.shape[:dim], -1, *x.shape[dim + 1 :]))
    return Pending(joined, lambda result: torch.cat(result.chunk(axis.size), dim))


def start_reduce_scatter(x: Tensor, dim: int, axis: Axis) -> Pending:
    """Begins to sum over the axis and to give each rank its piece along a dim, which the axis divides."""
    if _is_leading(x, dim):
        piece = _functional.reduce_scatter_tensor(x.contiguous().flatten(0, dim), "sum", axis.size, _name(axis))
        return Pending(piece, lambda result: result.view(*x.shape[:dim], *result.shape))
    piece = _functional.reduce_scatter_tensor(torch.cat(x.chunk(axis.size, dim)), "sum", axis.size, _name(axis))
    return Pending(piece, lambda result: result)


def _is_leading(x: Tensor, dim: int) -> bool:
    """Whether pieces along a dim lie one after the other in memory, as collectives want them: else they are copied."""
    return math.prod(x.shape[:dim]) == 1


def _name(axis: Axis) -> str:
    assert axis.group is not None, "an axis of size 1 has no collectives"
    return axis.group.group_name


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


def broadcast_json(value: Any, axis: Axis, device: torch.device) -> Any:
    """The first rank's plain data on every rank of the axis: as JSON, which cannot run code.

    Args:
        value: what JSON can hold; read on the first rank only.
        axis: the ranks.
        device: where their collectives work.
    """
    if axis.size == 1:
        return value
    content = json.dumps(value).encode() if axis.is_first else b""
    num_bytes = int(broadcast_from(torch.tensor([len(content)], device=device), 0, axis))
    data = (
        torch.frombuffer(bytearray(content), dtype=torch.uint8)
        if axis.is_first
        else torch.empty(num_bytes, dtype=torch.uint8)
    )
    return json.loads(broadcast_from(data.to(device), 0, axis).cpu().numpy().tobytes())


def told_by_first(flag: bool, axis: Axis, device: torch.device) -> bool:
    """The first rank's flag, on every rank of the axis: for decisions by numbers that ranks may have rounded otherwise.

    Args:
        flag: read on the first rank only.
        axis: the ranks.
        device: where their collectives work.
    """
    return bool(broadcast_from(torch.tensor(float(flag), device=device), 0, axis).item())


def any_over(flag: bool, axis: Axis, device: torch.device | None = None) -> bool:
    """Whether the flag is set on any rank of the axis.

    Args:
        device: that the ranks speak through; None: the CPU, whose sums pass through all ranks one after the other.
    """
    return bool(max_over(torch.tensor(float(flag), device=device), axis).item()) if axis.size > 1 else flag
