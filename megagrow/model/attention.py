"""Self-attention with grouped key/value heads, heads sharded over the tensor axis."""

# Shape suffix legend: B = batch, S = this context rank's tokens, H = hidden, N = local query heads,
# K = local key/value heads, D = head_dim.

import torch
from torch import Tensor, nn

from megagrow import ops
from megagrow.config import ModelConfig, TrainConfig
from megagrow.model.tokens import Tokens
from megagrow.parallel import context
from megagrow.parallel.layers import ColumnParallelLinear, RowParallelLinear, TensorParallel, column_parallel
from megagrow.parallel.mesh import Mesh
from megagrow.parallel.shards import kv_rows, local


class Attention(nn.Module):
    """softmax(q kᵀ / √head_dim) v over earlier positions, or over all (encoders), for every head.

    The bias of the last projection is left to the residual addition, which follows.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh, train: TrainConfig) -> None:
        super().__init__()
        self.tp, self.cp = TensorParallel.of(mesh), mesh.cp
        query_size, kv_size = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        bias = model.attention_bias
        rows = kv_rows(model, mesh.tp)
        self.query = ColumnParallelLinear(model.hidden_size, query_size, bias != "none", self.tp)
        self.key_value = ColumnParallelLinear(model.hidden_size, 2 * kv_size, bias != "none", self.tp, rows)
        self.query_norm = HeadNorm(model) if model.qk_norm else None
        self.key_norm = HeadNorm(model) if model.qk_norm else None
        self.output = RowParallelLinear(query_size, model.hidden_size, bias == "all", self.tp)
        self.head_dim, self.backend, self.causal = model.head_dim, train.attention, model.is_causal
        self.overwrites = train.recompute != "selective"  # which keeps the projections' results

    def forward(self, x_BSH: Tensor, tokens: Tokens) -> Tensor:
        q, kv = column_parallel(x_BSH, self.tp, self.query, self.key_value)
        q_BSND, kv_BSK2D = q.unflatten(-1, (-1, self.head_dim)), kv.unflatten(-1, (-1, 2, self.head_dim))
        if self.query_norm is not None and self.key_norm is not None:
            k_BSKD, v_BSKD = kv_BSK2D.unbind(-2)
            k_BSK1D = self.key_norm(k_BSKD).unsqueeze(-2)
            q_BSND, k_BSKD = self._placed(self.query_norm(q_BSND), k_BSK1D, tokens)
        else:
            q_BSND, k_BSKD, v_BSKD = self._placed(q_BSND, kv_BSK2D, tokens)
        q_BNSD, k_BKSD, v_BKSD = (x.transpose(1, 2) for x in (q_BSND, k_BSKD, v_BSKD))
        y_BNSD = context.attention(q_BNSD, k_BKSD, v_BKSD, self.cp, tokens.document_masks, self.backend, self.causal)
        return self.output(y_BNSD.transpose(1, 2).flatten(-2))

    def _placed(self, q_BSND: Tensor, kv_BSKPD: Tensor, tokens: Tokens) -> tuple[Tensor, ...]:
        """Queries, keys and the other parts of kv, where positions are rotations turned by theirs."""
        if tokens.rotary is None:
            return q_BSND, *kv_BSKPD.unbind(-2)
        cos, sin = tokens.rotary
        if cos.dim() == 2:
            return ops.rope_(q_BSND, kv_BSKPD, cos, sin, in_place=self.overwrites)
        # Each sample has positions of its own: end to end they are one sequence.
        q, kv, cos, sin = (x.flatten(0, 1) for x in (q_BSND, kv_BSKPD, cos, sin))
        turned = ops.rope_(q[None], kv[None], cos, sin, in_place=self.overwrites)
        return tuple(x[0].unflatten(0, q_BSND.shape[:2]) for x in turned)


class HeadNorm(nn.Module):
    """RMSNorm over the elements of each head, one gain for all heads (Henry et al., 2020; Qwen3's form)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(model.head_dim))
        self.eps = model.norm_eps

    def forward(self, x_BSND: Tensor) -> Tensor:
        return ops.rms_norm(x_BSND, local(self.weight).to(x_BSND.dtype), self.eps)
