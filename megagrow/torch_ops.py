"""The kernels' PyTorch twins: same names and parameters, on any device, in any dtype. `ops` is the door to both.

Legend: T = tokens, V = local vocabulary, H = hidden size, B = batch, S = sequence, N = heads, D = head dimension,
F = FFN size, 3 = (max, sum_exp, label_logit).
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megagrow.cpu_ops import wide_dtype

# Logits that a twin works on at a time. On a CPU they stay in its cache from pass to pass (measured
# on 2048 x 8192 float32 logits: statistics in 15 ms instead of 41); on a GPU this bounds the copy.
CHUNK_LOGITS_CPU = 2**18
CHUNK_LOGITS_GPU = 2**26


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """x / √(mean x² + eps) · weight, of x + residual where there is one."""
    total = x if residual is None else x + residual
    dtype = torch.promote_types(x.dtype, weight.dtype)
    y = F.rms_norm(total.to(dtype), weight.shape, weight.to(dtype), eps).to(x.dtype)
    return y if residual is None else (y, total)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """(x - mean x) / √(var x + eps) · weight + bias, of x + residual where there is one."""
    total = x if residual is None else x + residual
    dtype = torch.promote_types(x.dtype, weight.dtype)
    y = F.layer_norm(total.to(dtype), weight.shape, weight.to(dtype), None if bias is None else bias.to(dtype), eps)
    return y.to(x.dtype) if residual is None else (y.to(x.dtype), total)


@torch.no_grad()
def vocab_stats(logits_TV: Tensor, labels_T: Tensor, num_valid: int | None = None) -> Tensor:
    valid_TV = logits_TV[:, :num_valid]
    dtype = wide_dtype(logits_TV)
    stats_T3 = torch.zeros(len(logits_TV), 3, dtype=dtype, device=logits_TV.device)
    stats_T3[:, 0] = -torch.inf
    for rows in row_chunks(valid_TV) if valid_TV.shape[1] else ():
        stats_T3[rows] = stats_of_rows(valid_TV[rows], labels_T[rows])
    return stats_T3


def stats_of_rows(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    wide_TV = logits_TV.to(wide_dtype(logits_TV))
    max_T1 = wide_TV.amax(-1, keepdim=True)
    # With nothing but -inf the reference point is 0, since -inf - -inf would be NaN.
    sum_exp_T = (wide_TV - max_T1.masked_fill(max_T1 == -torch.inf, 0.0)).exp().sum(-1)
    here_T, column_T1 = _local_columns(labels_T, wide_TV.shape[1])
    label_logit_T = torch.where(here_T, wide_TV.gather(1, column_T1)[:, 0], 0.0)
    return torch.stack((max_T1[:, 0], sum_exp_T, label_logit_T), dim=-1)


@torch.no_grad()
def vocab_rank(logits_TV: Tensor, label_logits_T: Tensor, labels_T: Tensor, num_valid: int | None = None) -> Tensor:
    valid_TV = logits_TV[:, :num_valid]
    dtype = wide_dtype(logits_TV)
    label_T1 = label_logits_T[:, None].to(dtype)
    rank_T = torch.zeros(len(logits_TV), dtype=torch.int32, device=logits_TV.device)
    if valid_TV.shape[1] == 0:
        return rank_T
    for rows in row_chunks(valid_TV):
        rank_T[rows] = (valid_TV[rows].to(dtype) > label_T1[rows]).sum(-1, dtype=torch.int32)
    here_T, column_T1 = _local_columns(labels_T, valid_TV.shape[1])
    own_T1 = valid_TV.gather(1, column_T1).to(dtype) > label_T1
    return rank_T - (own_T1[:, 0] & here_T).to(torch.int32)


@torch.no_grad()
def vocab_grad_(
    logits_TV: Tensor,
    labels_T: Tensor,
    logsumexp_T: Tensor,
    scale_T: Tensor,
    num_valid: int | None = None,
) -> Tensor:
    valid_TV = logits_TV[:, :num_valid]
    logits_TV[:, valid_TV.shape[1] :] = 0
    if valid_TV.shape[1] == 0:
        return logits_TV
    dtype = wide_dtype(logits_TV)
    here_T, column_T1 = _local_columns(labels_T, valid_TV.shape[1])
    onehot_T1 = here_T[:, None].to(dtype)
    for rows in row_chunks(valid_TV):
        # A copy for 16-bit logits, whose differences would lose most digits; else the logits.
        wide_TV = valid_TV[rows].to(dtype)
        wide_TV.sub_(logsumexp_T[rows, None]).exp_()
        wide_TV.scatter_add_(1, column_T1[rows], -onehot_T1[rows])
        wide_TV.mul_(scale_T[rows, None])
        if wide_TV.dtype != logits_TV.dtype:
            valid_TV[rows] = wide_TV
    return logits_TV


def write_vocab_grad(logits_TV: Tensor, labels_T: Tensor, logsumexp_T: Tensor, scale_T: Tensor) -> None:
    """In the form that a compiler makes one pass of: the twin's scatter would be a pass of its own."""
    softmax_TV = (logits_TV.to(logsumexp_T.dtype) - logsumexp_T[:, None]).exp()
    onehot_TV = torch.arange(logits_TV.shape[1], device=logits_TV.device) == labels_T[:, None]
    logits_TV.copy_((softmax_TV - onehot_TV.to(softmax_TV.dtype)) * scale_T[:, None])


def row_chunks(logits_TV: Tensor) -> Iterator[slice]:
    """Rows that a twin works on at a time."""
    num_logits = CHUNK_LOGITS_CPU if logits_TV.device.type == "cpu" else CHUNK_LOGITS_GPU
    T, V = logits_TV.shape
    num_rows = max(1, num_logits // V)
    return (slice(start, start + num_rows) for start in range(0, T, num_rows))


def _local_columns(labels_T: Tensor, num_valid: int) -> tuple[Tensor, Tensor]:
    """Whether each label is on this shard, and a column that can be indexed in any case."""
    here_T = (labels_T >= 0) & (labels_T < num_valid)
    return here_T, torch.where(here_T, labels_T, 0)[:, None]


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, of columns as `gate_and_up` finds them."""
    if torch.compiler.is_compiling():  # which chooses by itself what to keep
        gate, up = gate_and_up(gate_up)
        return F.silu(gate) * up
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    """Keeps its input only."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_and_up(gate_up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_and_up(gate_up)
        dgate, dup = torch.ops.aten.silu_backward(dy * up, gate), dy * F.silu(gate)
        if alternates(gate_up):
            return torch.stack((dgate, dup), dim=-1).flatten(-2)
        return torch.cat((dgate, dup), dim=-1)


def gate_and_up(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves [..., F] of the fused columns [..., 2 F]."""
    halves = gate_up.unflatten(-1, (-1, 2)).unbind(-1) if alternates(gate_up) else gate_up.chunk(2, dim=-1)
    return halves[0], halves[1]


def alternates(x: Tensor) -> bool:
    """Whether gate and up alternate column by column, as they are stored; a CPU has all of gate before all of up."""
    return x.device.type != "cpu"


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh approximation, as in GPT-2."""
    return F.gelu(x, approximate="tanh")


def rope(x_BSND: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    cos_S1D, sin_S1D = cos_SD[:, None], sin_SD[:, None]
    first, second = x_BSND.chunk(2, dim=-1)
    rotated_BSND = torch.cat((-second, first), dim=-1)
    return (x_BSND * cos_S1D + rotated_BSND * sin_S1D).to(x_BSND.dtype)
