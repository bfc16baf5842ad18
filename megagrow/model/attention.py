"""Causal self-attention with grouped key/value heads, heads sharded over the tensor axis."""

# Shape suffix legend: B = batch, S = sequence, H = hidden, N = local query heads, K = local key/value heads,
# D = head_dim.

from functools import lru_cache

import torch
from torch import Tensor, nn

from megagrow import ops
from megagrow.config import ModelConfig
from megagrow.parallel.collectives import copy_to
from megagrow.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megagrow.parallel.mesh import Axis


class Attention(nn.Module):
    """softmax(q kᵀ / √head_dim) v over earlier positions, for every head."""

    def __init__(self, model: ModelConfig, tp: Axis) -> None:
        super().__init__()
        query_size, kv_size = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        self.query = ColumnParallelLinear(model.hidden_size, query_size, model.bias, tp)
        self.key_value = ColumnParallelLinear(model.hidden_size, 2 * kv_size, model.bias, tp)
        self.output = RowParallelLinear(query_size, model.hidden_size, model.bias, tp)
        self.head_dim = model.head_dim
        self.rope_theta = model.rope_theta if model.positions == "rope" else None
        self.tp = tp

    def forward(self, x_BSH: Tensor) -> Tensor:
        x_BSH = copy_to(x_BSH, self.tp)
        q_BSND = self.query(x_BSH).unflatten(-1, (-1, self.head_dim))
        k_BSKD, v_BSKD = self.key_value(x_BSH).unflatten(-1, (-1, 2, self.head_dim)).unbind(-2)
        if self.rope_theta is not None:
            cos_SD, sin_SD = rotary_table(x_BSH.shape[1], self.head_dim, self.rope_theta, x_BSH.device)
            cos_SD, sin_SD = cos_SD.to(x_BSH.dtype), sin_SD.to(x_BSH.dtype)
            q_BSND, k_BSKD = ops.rope(q_BSND, cos_SD, sin_SD), ops.rope(k_BSKD, cos_SD, sin_SD)
        y_BNSD = ops.attention(q_BSND.transpose(1, 2), k_BSKD.transpose(1, 2), v_BSKD.transpose(1, 2))
        return self.output(y_BNSD.transpose(1, 2).flatten(-2))


@lru_cache(maxsize=8)
def rotary_table(seq_length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [seq_length, head_dim], float32, in the half-rotation layout of Hugging Face's Llama.

    Source: Su et al., 2021 (RoFormer), equation 34. Computed in float32, as Hugging Face does, so that logits agree.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    positions = torch.arange(seq_length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, 1.0 / theta**exponents)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()
