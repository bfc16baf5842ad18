"""Megatron-style layers: parameters of global shape, stored as shards, computed on plain local tensors.

Built on the meta device with global shapes; `shards.shard_parameters` cuts them from outside. The collectives stand
where the mathematics needs them: the caller enters a sharded region once with `copy_to` (several column-parallel
layers share it), `RowParallelLinear` leaves it.

Source: Megatron-LM (Shoeybi et al., 2019), section 3.
"""

# Shape suffix legend: B = batch, S = sequence, H = hidden; other sizes are spelled out.

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagrow.parallel.collectives import reduce_from
from megagrow.parallel.mesh import Axis
from megagrow.parallel.shards import chunk, local


class Linear(nn.Module):
    """Holds weight [out, in] and optional bias [out]; subclasses say how the tensor axis shares the work."""

    def __init__(self, in_size: int, out_size: int, bias: bool, tp: Axis) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size))
        self.bias = nn.Parameter(torch.empty(out_size)) if bias else None
        self.tp = tp


class ColumnParallelLinear(Linear):
    """Output features are sharded: [..., in] -> [..., out / tp]. The input must have passed `copy_to`."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else local(self.bias).to(x.dtype)
        return F.linear(x, local(self.weight).to(x.dtype), bias)


class RowParallelLinear(Linear):
    """Input features are sharded: [..., in / tp] -> [..., out], summed over the tensor axis; bias added once."""

    def forward(self, x: Tensor) -> Tensor:
        y = reduce_from(F.linear(x, local(self.weight).to(x.dtype)), self.tp)
        return y if self.bias is None else y + local(self.bias).to(x.dtype)


class Embedding(nn.Module):
    """Token and (learned) position embeddings; the vocabulary is sharded over the tensor axis."""

    def __init__(self, vocab_size: int, num_positions: int, hidden_size: int, tp: Axis) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.positions = nn.Parameter(torch.empty(num_positions, hidden_size)) if num_positions else None
        self.vocab = chunk(vocab_size, tp)
        self.tp = tp

    def forward(self, ids_BS: Tensor) -> Tensor:
        x_BSH = reduce_from(self._look_up(ids_BS), self.tp)
        if self.positions is None:
            return x_BSH
        return x_BSH + local(self.positions)[: ids_BS.shape[1]]

    def _look_up(self, ids_BS: Tensor) -> Tensor:
        table = local(self.tokens)
        if self.tp.size == 1:
            return F.embedding(ids_BS, table)
        if table.shape[0] == 0:  # fewer rows than ranks have chunks; the sum keeps the gradient, which is empty too
            return table.new_zeros(*ids_BS.shape, table.shape[1]) + table.sum()
        elsewhere_BS = (ids_BS < self.vocab.start) | (ids_BS >= self.vocab.stop)
        rows_BSH = F.embedding((ids_BS - self.vocab.start).masked_fill(elsewhere_BS, 0), table)
        return rows_BSH.masked_fill(elsewhere_BS.unsqueeze(-1), 0)


class Head(nn.Module):
    """The output matrix [vocab, hidden], sharded over the vocabulary; the loss reads its local rows."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
