"""Causal self-attention with grouped key/value heads, heads sharded over the tensor axis."""

# Shape suffix legend: B = batch, S = this context rank's tokens, H = hidden, N = local query heads,
# K = local key/value heads, D = head_dim.

from functools import lru_cache

import torch
from torch import Tensor, nn

from megagrow import ops
from megagrow.config import ModelConfig
from megagrow.model.tokens import Tokens
from megagrow.parallel import context
from megagrow.parallel.layers import ColumnParallelLinear, RowParallelLinear, TensorParallel, column_parallel
from megagrow.parallel.mesh import Mesh
from megagrow.parallel.shards import kv_rows, local


class Attention(nn.Module):
    """softmax(q kᵀ / √head_dim) v over earlier positions, for every head."""

    def __init__(self, model: ModelConfig, mesh: Mesh, backend: str = "sdpa") -> None:
        super().__init__()
        self.tp, self.cp = TensorParallel.of(mesh), mesh.cp
        query_size, kv_size = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        rows = kv_rows(model, mesh.tp)
        self.query = ColumnParallelLinear(model.hidden_size, query_size, model.bias, self.tp)
        self.key_value = ColumnParallelLinear(model.hidden_size, 2 * kv_size, model.bias, self.tp, rows)
        self.query_norm = HeadNorm(model) if model.qk_norm else None
        self.key_norm = HeadNorm(model) if model.qk_norm else None
        self.output = RowParallelLinear(query_size, model.hidden_size, model.bias, self.tp)
        self.head_dim, self.backend = model.head_dim, backend

    def forward(self, x_BSH: Tensor, tokens: Tokens) -> Tensor:
        q, kv = column_parallel(x_BSH, self.tp, self.query, self.key_value)
        q_BSND = q.unflatten(-1, (-1, self.head_dim))
        k_BSKD, v_BSKD = kv.unflatten(-1, (-1, 2, self.head_dim)).unbind(-2)
        if self.query_norm is not None and self.key_norm is not None:
            q_BSND, k_BSKD = self.query_norm(q_BSND), self.key_norm(k_BSKD)
        if tokens.rotary is not None:
            q_BSND, k_BSKD = ops.rope(q_BSND, *tokens.rotary), ops.rope(k_BSKD, *tokens.rotary)
        q_BNSD, k_BKSD, v_BKSD = (x.transpose(1, 2) for x in (q_BSND, k_BSKD, v_BSKD))
        y_BNSD = context.attention(q_BNSD, k_BKSD, v_BKSD, self.cp, tokens.document_masks, self.backend)
        return self.output(y_BNSD.transpose(1, 2).flatten(-2))


class HeadNorm(nn.Module):
    """RMSNorm over the elements of each head, one gain for all heads (Henry et al., 2020; Qwen3's form)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(model.head_dim))
        self.eps = model.norm_eps

    def forward(self, x_BSND: Tensor) -> Tensor:
        return ops.rms_norm(x_BSND, local(self.weight).to(x_BSND.dtype), self.eps)


@lru_cache(maxsize=8)
def rotary_table(
    seq_length: int, rank: int, size: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, head_dim] of a context rank's tokens, in the half-rotation layout of Hugging Face's Llama.

    Source: Su et al., 2021 (RoFormer), equation 34. Computed in float32, as Hugging Face does, so that logits agree.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    positions = context.local_positions(seq_length, rank, size, device).float()
    angles = torch.outer(positions, 1.0 / theta**exponents)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)
