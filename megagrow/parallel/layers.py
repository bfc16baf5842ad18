"""Megatron-style layers: parameters of global shape, stored as shards, computed on plain local tensors.

Built on the meta device with global shapes; `shards.shard_parameters` cuts them from outside. The collectives stand
where the mathematics needs them: `column_parallel` enters a sharded region once for all layers that read the same
input, `RowParallelLinear` leaves it.

Source: Megatron-LM (Shoeybi et al., 2019), section 3; sequence parallelism: Korthikanti et al., 2022, section 4.2.2.
"""

# Shape suffix legend: B = batch, S = sequence, H = hidden; other sizes are spelled out.

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagrow import ops
from megagrow.parallel.collectives import (
    copy_to,
    gather_from,
    reduce_from,
    scatter_to,
    start_all_gather,
    start_reduce_scatter,
    start_sum_over,
)
from megagrow.parallel.mesh import Axis, Mesh
from megagrow.parallel.shards import chunk, local

SEQUENCE_DIM = 1


@dataclass(frozen=True)
class TensorParallel:
    """How the tensor axis is used.

    Attributes:
        axis: the ranks that share each matrix.
        sequence: whether activations outside of sharded regions are cut along the sequence.
        overlap: start the backward's reduction before the weights' gradients, which then hide it. Schedules that split
            the backward in two would run such a layer's whole backward twice, as that of any operation of our own.
    """

    axis: Axis = Axis()
    sequence: bool = False
    overlap: bool = True

    @staticmethod
    def of(mesh: Mesh) -> "TensorParallel":
        return TensorParallel(mesh.tp, mesh.sequence_parallel, not mesh.parallel.splits_backward)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x·weightᵀ + bias; by torch's own operation where the backward pass is split: each half of it runs once."""
        return ops.linear(x, weight, bias) if self.overlap else F.linear(x, weight, bias)

    def enter(self, x_BSH: Tensor) -> Tensor:
        """Activations as a sharded region needs them: whole, with gradients summed."""
        return gather_from(x_BSH, SEQUENCE_DIM, self.axis) if self.sequence else copy_to(x_BSH, self.axis)

    def leave(self, x_BSH: Tensor) -> Tensor:
        """The sum of the ranks' contributions, cut along the sequence where activations are."""
        return scatter_to(x_BSH, SEQUENCE_DIM, self.axis) if self.sequence else reduce_from(x_BSH, self.axis)

    def cut(self, x: Tensor) -> Tensor:
        """This rank's part of [B, S, ...] along the sequence, where activations are cut."""
        return x.chunk(self.axis.size, SEQUENCE_DIM)[self.axis.rank] if self.sequence else x


class Linear(nn.Module):
    """Holds weight [out, in] and optional bias [out]; subclasses say how the tensor axis shares the work."""

    def __init__(self, in_size: int, out_size: int, bias: bool, tp: TensorParallel) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size))
        self.bias = nn.Parameter(torch.empty(out_size)) if bias else None
        self.tp = tp

    def bias_operand(self, dtype: torch.dtype) -> Tensor | None:
        """The bias in the dtype of compute."""
        return None if self.bias is None else local(self.bias).to(dtype)


class ColumnParallelLinear(Linear):
    """Output features are sharded: [..., in] -> [..., out / tp]. The input must have entered the sharded region.

    Args:
        rows: of a weight that every tensor rank holds whole, the rows that this rank computes; None: all it holds.
        operand: what makes of weight and bias what is multiplied by, in the dtype of compute.
        adds_bias: False where the next operation does.
    """

    def __init__(
        self,
        in_size: int,
        out_size: int,
        bias: bool,
        tp: TensorParallel,
        rows: slice | None = None,
        operand: Callable[[Tensor, torch.dtype], Tensor] = Tensor.to,
        adds_bias: bool = True,
    ) -> None:
        super().__init__(in_size, out_size, bias, tp)
        self.rows, self.operand, self.adds_bias = rows, operand, adds_bias

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """This rank's weight, and the bias that it adds, in the dtype of compute."""
        return self.operand(self._own(self.weight), dtype), self.bias_operand(dtype) if self.adds_bias else None

    def bias_operand(self, dtype: torch.dtype) -> Tensor | None:
        """This rank's bias in the dtype of compute."""
        return None if self.bias is None else self.operand(self._own(self.bias), dtype)

    def _own(self, parameter: Tensor) -> Tensor:
        piece = local(parameter)
        return piece if self.rows is None else piece[self.rows]

    def forward(self, x: Tensor) -> Tensor:
        return self.tp.linear(x, *self.operands(x.dtype))


def column_parallel(x_BSH: Tensor, tp: TensorParallel, *layers: ColumnParallelLinear) -> tuple[Tensor, ...]:
    """Enters a sharded region and applies layers that read the same input.

    Args:
        x_BSH: activations as they are outside of sharded regions.
        tp: how the tensor axis is used.
        layers: column-parallel layers.

    Returns:
        For each layer its output [B, S, out / tp].
    """
    if tp.axis.size == 1 or not tp.overlap or torch.compiler.is_compiling():  # the compiler orders for itself
        x_BSH = tp.enter(x_BSH)
        return tuple(layer(x_BSH) for layer in layers)
    weights, biases = zip(*(layer.operands(x_BSH.dtype) for layer in layers), strict=True)
    return _ColumnParallel.apply(x_BSH, tp, *weights, *biases)


class _ColumnParallel(torch.autograd.Function):
    """Linear layers on one input, whose backward hides its reduction behind the weights' gradients."""

    @staticmethod
    def forward(ctx: Any, x_BSH: Tensor, tp: TensorParallel, *operands: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases = cast(tuple[Tensor, ...], operands[: len(operands) // 2]), operands[len(operands) // 2 :]
        ctx.tp, ctx.has_bias = tp, [bias is not None for bias in biases]
        ctx.save_for_backward(x_BSH, *weights)  # of a cut sequence the piece alone: it is gathered again
        whole_BSH = start_all_gather(x_BSH, SEQUENCE_DIM, tp.axis).wait() if tp.sequence else x_BSH
        return tuple(ops.linear(whole_BSH, w, b) for w, b in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BSH, *weights = ctx.saved_tensors
        tp: TensorParallel = ctx.tp
        gathering = start_all_gather(x_BSH, SEQUENCE_DIM, tp.axis) if tp.sequence else None
        dx_BSH = ops.linear(grads[0], weights[0].T)
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            dx_BSH += ops.linear(grad, weight.T)
        whole_BSH = gathering.wait() if gathering else x_BSH
        summing = (
            start_reduce_scatter(dx_BSH, SEQUENCE_DIM, tp.axis) if tp.sequence else start_sum_over(dx_BSH, tp.axis)
        )
        x_TH = whole_BSH.flatten(0, -2)
        dweights = [ops.product(grad.flatten(0, -2).T, x_TH.T) for grad in grads]
        dbiases = [grad.flatten(0, -2).sum(0) if has else None for grad, has in zip(grads, ctx.has_bias, strict=True)]
        return summing.wait(), None, *dweights, *dbiases


class RowParallelLinear(Linear):
    """Input features are sharded: [..., in / tp] -> [..., out], summed over the tensor axis, without the bias.

    The bias, which has to be added once, is left to the residual addition.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.tp.leave(self.tp.linear(x, local(self.weight).to(x.dtype)))


class Embedding(nn.Module):
    """Embeddings of tokens, of (learned) positions and of token types; the vocabulary is sharded over the tensor axis.

    Args:
        num_positions, num_types: rows of the other two tables; 0: there is none.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, tp: TensorParallel, num_positions: int = 0, num_types: int = 0
    ) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.positions = nn.Parameter(torch.empty(num_positions, hidden_size)) if num_positions else None
        self.token_types = nn.Parameter(torch.empty(num_types, hidden_size)) if num_types else None
        self.vocab = chunk(vocab_size, tp.axis)
        self.tp = tp

    def forward(self, ids_BS: Tensor, positions_BS: Tensor, types_BS: Tensor | None = None) -> Tensor:
        """Embeds tokens of these types (None: all of type 0) that stand at these rows of the table of positions.

        Rows [1, S] are those of all samples. The result is cut along the sequence where activations are.
        """
        x_BSH = self.tp.leave(self._look_up(ids_BS))
        if self.positions is not None:
            x_BSH = x_BSH + F.embedding(self.tp.cut(positions_BS), local(self.positions))
        if self.token_types is not None:
            table = local(self.token_types)
            x_BSH = x_BSH + (table[0] if types_BS is None else F.embedding(self.tp.cut(types_BS), table))
        return x_BSH

    def _look_up(self, ids_BS: Tensor) -> Tensor:
        table = local(self.tokens)
        if self.tp.axis.size == 1:
            return F.embedding(ids_BS, table)
        if table.shape[0] == 0:  # fewer rows than ranks have chunks; the sum keeps the gradient, which is empty too
            return table.new_zeros(*ids_BS.shape, table.shape[1]) + table.sum()
        elsewhere_BS = (ids_BS < self.vocab.start) | (ids_BS >= self.vocab.stop)
        rows_BSH = F.embedding((ids_BS - self.vocab.start).masked_fill(elsewhere_BS, 0), table)
        return rows_BSH.masked_fill(elsewhere_BS.unsqueeze(-1), 0)


class Head(nn.Module):
    """The output matrix [vocab, hidden] and a bias per token, sharded over the vocabulary; the loss reads local rows.

    Args:
        weight: False where the embedding is the output matrix.
        bias: whether there is one.
    """

    def __init__(self, vocab_size: int, hidden_size: int, weight: bool, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size)) if weight else None
        self.bias = nn.Parameter(torch.empty(vocab_size)) if bias else None
