"""The kernels' PyTorch twins: same names and parameters, on any device, in any dtype. `ops` is the door to both.

Legend: T = tokens, V = local vocabulary, H = hidden size, B = batch, S = sequence, N = heads, D = head dimension,
F = FFN size, K = statistics of the vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megagrow.cpu_ops import wide_dtype

# Logits that a twin works on at a time. On a CPU they stay in its cache from pass to pass (measured
# on 2048 x 8192 float32 logits: statistics in 15 ms instead of 41); on a GPU this bounds the copies.
CHUNK_LOGITS_CPU = 2**18
CHUNK_LOGITS_GPU = 2**24

FIELDS = 1 << 16  # values of the random number that decides whether an element is dropped
GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed number
INVERSE = -0xE217C1E66C88CC3  # of GOLDEN, modulo 2^64
MIX_1 = -0x40A7B892E31B1A47  # the multipliers of SplitMix64, signed
MIX_2 = -0x6B2FB644ECCEEE15


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
def vocab_stats(
    logits_TV: Tensor, labels_T: Tensor, num_valid: int | None = None, label_logits_T: Tensor | None = None
) -> Tensor:
    valid_TV, wholes = logits_TV[:, :num_valid], () if label_logits_T is None else (label_logits_T,)
    stats_TK = torch.zeros(len(logits_TV), 3 + len(wholes), dtype=wide_dtype(logits_TV), device=logits_TV.device)
    stats_TK[:, 0] = -torch.inf
    for rows in row_chunks(valid_TV):
        stats_TK[rows] = stats_of_rows(valid_TV[rows], labels_T[rows], *(each[rows] for each in wholes))
    return stats_TK


def stats_of_rows(logits_TV: Tensor, labels_T: Tensor, label_logits_T: Tensor | None = None) -> Tensor:
    """`vocab_stats` of rows without padding, all at once."""
    wide_TV = logits_TV.to(wide_dtype(logits_TV))
    max_T, sum_exp_T = _sum_exp(wide_TV)
    stats = [max_T, sum_exp_T, _label_logits(wide_TV, labels_T)]
    if label_logits_T is not None:
        stats.append(_num_greater(wide_TV, labels_T, label_logits_T).to(wide_TV.dtype))
    return torch.stack(stats, dim=-1)


def _sum_exp(wide_TV: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The maximum, and the sum of exp((x - maximum) / temperature)."""
    max_T1 = wide_TV.amax(-1, keepdim=True)
    shifted_TV = wide_TV - _finite(max_T1)
    return max_T1[:, 0], (shifted_TV if temperature == 1.0 else shifted_TV.div_(temperature)).exp_().sum(-1)


def _finite(max_T1: Tensor) -> Tensor:
    """The reference point: 0 for nothing but -inf, since -inf - -inf would be NaN."""
    return max_T1.masked_fill(max_T1 == -torch.inf, 0.0)


def _label_logits(wide_TV: Tensor, labels_T: Tensor) -> Tensor:
    """Those of the labels that are here; 0 for the others."""
    here_T, column_T1 = _local_columns(labels_T, wide_TV.shape[1])
    return torch.where(here_T, wide_TV.gather(1, column_T1)[:, 0], 0.0)


def _num_greater(wide_TV: Tensor, labels_T: Tensor, label_logits_T: Tensor) -> Tensor:
    """Logits strictly greater than the label's, without its own column."""
    label_T1 = label_logits_T[:, None].to(wide_TV.dtype)
    here_T, column_T1 = _local_columns(labels_T, wide_TV.shape[1])
    own_T1 = wide_TV.gather(1, column_T1) > label_T1
    return (wide_TV > label_T1).sum(-1, dtype=torch.int32) - (own_T1[:, 0] & here_T).to(torch.int32)


@torch.no_grad()
def vocab_scores(
    logits_TV: Tensor,
    labels_T: Tensor,
    label_logits_T: Tensor,
    max_T: Tensor,
    bits: int,
    num_valid: int | None = None,
) -> tuple[Tensor, Tensor]:
    valid_TV = logits_TV[:, :num_valid]
    units_T = torch.zeros(len(logits_TV), dtype=torch.int64, device=logits_TV.device)
    rank_T = torch.zeros(len(logits_TV), dtype=torch.int32, device=logits_TV.device)
    for rows in row_chunks(valid_TV):
        given = valid_TV[rows], labels_T[rows], label_logits_T[rows], max_T[rows]
        units_T[rows], rank_T[rows] = scores_of_rows(*given, bits)
    return units_T, rank_T


def scores_of_rows(
    logits_TV: Tensor, labels_T: Tensor, label_logits_T: Tensor, max_T: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """`vocab_scores` of rows without padding, all at once."""
    wide_TV = logits_TV.to(wide_dtype(logits_TV))
    rank_T = _num_greater(wide_TV, labels_T, label_logits_T)
    units_TV = (wide_TV - max_T[:, None]).exp_().mul_(2.0**bits)
    return units_TV.to(torch.int64).sum(-1), rank_T


@torch.no_grad()
def vocab_grad_(
    logits_TV: Tensor,
    labels_T: Tensor,
    logsumexp_T: Tensor,
    scale_T: Tensor,
    num_valid: int | None = None,
    smooth_T2: Tensor | None = None,
) -> Tensor:
    valid_TV = logits_TV[:, :num_valid]
    logits_TV[:, valid_TV.shape[1] :] = 0
    for rows in row_chunks(valid_TV):
        # A copy for 16-bit logits, whose differences would lose most digits; else the logits.
        wide_TV = valid_TV[rows].to(wide_dtype(logits_TV))
        wide_TV.sub_(logsumexp_T[rows, None]).exp_()
        _hard_gradient_(wide_TV, labels_T[rows], scale_T[rows], None if smooth_T2 is None else smooth_T2[rows])
        if wide_TV.dtype != logits_TV.dtype:
            valid_TV[rows] = wide_TV
    return logits_TV


def _hard_gradient_(softmax_TV: Tensor, labels_T: Tensor, scale_T: Tensor, smooth_T2: Tensor | None) -> None:
    """That of the cross-entropy with the labels, in place of the softmax."""
    here_T, column_T1 = _local_columns(labels_T, softmax_TV.shape[1])
    onehot_T1 = here_T[:, None].to(softmax_TV.dtype)
    if smooth_T2 is None:
        softmax_TV.scatter_add_(1, column_T1, -onehot_T1)
        softmax_TV.mul_(scale_T[:, None])
    else:
        label_T1, each_T1 = smooth_T2.split(1, dim=1)
        softmax_TV.mul_(scale_T[:, None]).sub_(each_T1)
        softmax_TV.scatter_add_(1, column_T1, -onehot_T1 * label_T1)


def write_vocab_grad(
    logits_TV: Tensor, labels_T: Tensor, logsumexp_T: Tensor, scale_T: Tensor, smooth_T2: Tensor | None = None
) -> None:
    """In the form that a compiler makes one pass of: the twin's scatter would be a pass of its own."""
    softmax_TV = (logits_TV.to(logsumexp_T.dtype) - logsumexp_T[:, None]).exp()
    logits_TV.copy_(_hard_gradient(softmax_TV, labels_T, scale_T, smooth_T2))


def _hard_gradient(softmax_TV: Tensor, labels_T: Tensor, scale_T: Tensor, smooth_T2: Tensor | None) -> Tensor:
    """That of the cross-entropy with the labels, in the form that a compiler makes one pass of."""
    onehot_TV = torch.arange(softmax_TV.shape[1], device=softmax_TV.device) == labels_T[:, None]
    onehot_TV = onehot_TV.to(softmax_TV.dtype)
    if smooth_T2 is None:
        return scale_T[:, None] * (softmax_TV - onehot_TV)
    label_T1, each_T1 = smooth_T2.split(1, dim=1)
    return scale_T[:, None] * softmax_TV - each_T1 - label_T1 * onehot_TV  # in the order of `_hard_gradient_`


@torch.no_grad()
def distill_stats(
    logits_TV: Tensor,
    teacher_TV: Tensor,
    labels_T: Tensor,
    temperature: float,
    student_temperature: float,
    num_valid: int | None = None,
    label_logits_T: Tensor | None = None,
    reverse: bool = False,
) -> Tensor:
    s_TV, t_TV = logits_TV[:, :num_valid], teacher_TV[:, :num_valid]
    dtype = torch.promote_types(wide_dtype(logits_TV), wide_dtype(teacher_TV))
    num_stats = 8 if label_logits_T is None else 9
    stats_TK = torch.zeros(len(logits_TV), num_stats, dtype=dtype, device=logits_TV.device)
    stats_TK[:, 0] = stats_TK[:, 4] = -torch.inf
    for rows in row_chunks(s_TV):
        given = s_TV[rows], t_TV[rows], labels_T[rows], temperature, student_temperature
        whole_T = None if label_logits_T is None else label_logits_T[rows]
        stats_TK[rows] = distill_stats_of_rows(*given, whole_T, reverse)
    return stats_TK


def distill_stats_of_rows(
    logits_TV: Tensor,
    teacher_TV: Tensor,
    labels_T: Tensor,
    temperature: float,
    student_temperature: float,
    label_logits_T: Tensor | None = None,
    reverse: bool = False,
) -> Tensor:
    """`distill_stats` of rows without padding, all at once."""
    dtype = torch.promote_types(wide_dtype(logits_TV), wide_dtype(teacher_TV))
    s_TV, t_TV = logits_TV.to(dtype), teacher_TV.to(dtype)
    max_T, sum_exp_T = _sum_exp(s_TV)
    soft_sum_T = sum_exp_T if student_temperature == 1.0 else _sum_exp(s_TV, student_temperature)[1]
    t_max_T1 = t_TV.amax(-1, keepdim=True)
    weight_TV = _softer(t_TV - _finite(t_max_T1), temperature).exp_()
    stats = [max_T, sum_exp_T, _label_logits(s_TV, labels_T), soft_sum_T, t_max_T1[:, 0], weight_TV.sum(-1)]
    soft_t_TV, soft_s_TV = _softer(t_TV, temperature), _softer(s_TV, student_temperature)
    t_mean_T = _weighted_sum(weight_TV, soft_t_TV)
    if reverse:
        weight_TV = _softer(s_TV - _finite(max_T[:, None]), student_temperature).exp_()
    gap_TV = soft_s_TV - soft_t_TV if reverse else soft_t_TV - soft_s_TV
    stats += [_weighted_sum(weight_TV, gap_TV), t_mean_T]
    if label_logits_T is not None:
        stats.append(_num_greater(s_TV, labels_T, label_logits_T).to(dtype))
    return torch.stack(stats, dim=-1)


def _softer(x_TV: Tensor, temperature: float) -> Tensor:
    """x / temperature."""
    return x_TV if temperature == 1.0 else x_TV / temperature


def _weighted(weight_TV: Tensor, x_TV: Tensor) -> Tensor:
    """weight · x; where there is no weight at all it is 0, whatever x is."""
    return torch.where(weight_TV > 0, weight_TV * x_TV, weight_TV)


def _weighted_sum(weight_TV: Tensor, x_TV: Tensor) -> Tensor:
    """Sums of `_weighted` over each row."""
    if weight_TV.device.type == "cpu" and not torch.compiler.is_compiling():
        sum_T = (weight_TV * x_TV).sum(-1)
        if not sum_T.isnan().any():  # which costs less than two more passes for what is 0 times infinity
            return sum_T
    return _weighted(weight_TV, x_TV).sum(-1)


@torch.no_grad()
def distill_grad_(
    logits_TV: Tensor,
    teacher_TV: Tensor,
    labels_T: Tensor,
    logsumexps_T3: Tensor,
    ce_scale_T: Tensor,
    kd_scale_T: Tensor,
    temperature: float,
    student_temperature: float,
    num_valid: int | None = None,
    smooth_T2: Tensor | None = None,
    reverse: bool = False,
) -> Tensor:
    s_TV, t_TV = logits_TV[:, :num_valid], teacher_TV[:, :num_valid]
    logits_TV[:, s_TV.shape[1] :] = 0
    for rows in row_chunks(s_TV):
        _distill_grad_of_rows_(
            s_TV[rows],
            t_TV[rows],
            labels_T[rows],
            logsumexps_T3[rows],
            ce_scale_T[rows],
            kd_scale_T[rows],
            temperature,
            student_temperature,
            None if smooth_T2 is None else smooth_T2[rows],
            reverse,
        )
    return logits_TV


def _distill_grad_of_rows_(
    logits_TV: Tensor,
    teacher_TV: Tensor,
    labels_T: Tensor,
    logsumexps_T3: Tensor,
    ce_scale_T: Tensor,
    kd_scale_T: Tensor,
    temperature: float,
    student_temperature: float,
    smooth_T2: Tensor | None,
    reverse: bool,
) -> None:
    """`distill_grad_` of rows without padding, in as few passes as can be: in place where the logits are wide."""
    lse_T1, soft_lse_T1, third_T1 = logsumexps_T3[..., None].unbind(1)
    s_TV, t_TV = (x_TV.to(logsumexps_T3.dtype) for x_TV in (logits_TV, teacher_TV))
    soft_t_TV = _softer(t_TV, temperature)
    gap_TV = (_softer(s_TV, student_temperature) - soft_t_TV).sub_(third_T1) if reverse else None
    soft_TV = None if student_temperature == 1.0 else (s_TV / student_temperature).sub_(soft_lse_T1).exp_()
    softmax_TV = s_TV.sub_(lse_T1).exp_()
    q_TV = softmax_TV if soft_TV is None else soft_TV
    if gap_TV is not None:
        kd_TV = _weighted(q_TV, gap_TV)
    else:
        kd_TV = (soft_t_TV - third_T1).exp_()
        torch.sub(q_TV, kd_TV, out=kd_TV)
    _hard_gradient_(softmax_TV, labels_T, ce_scale_T, smooth_T2)
    softmax_TV.addcmul_(kd_TV, kd_scale_T[:, None])
    if softmax_TV.dtype != logits_TV.dtype:
        logits_TV.copy_(softmax_TV)


def write_distill_grad(
    logits_TV: Tensor,
    teacher_TV: Tensor,
    labels_T: Tensor,
    logsumexps_T3: Tensor,
    ce_scale_T: Tensor,
    kd_scale_T: Tensor,
    temperature: float,
    student_temperature: float,
    smooth_T2: Tensor | None = None,
    reverse: bool = False,
) -> None:
    """`distill_grad_` of rows without padding, in the form that a compiler makes one pass of."""
    lse_T1, soft_lse_T1, third_T1 = logsumexps_T3[..., None].unbind(1)
    s_TV, t_TV = logits_TV.to(logsumexps_T3.dtype), teacher_TV.to(logsumexps_T3.dtype)
    softmax_TV, soft_s_TV, soft_t_TV = (s_TV - lse_T1).exp(), s_TV / student_temperature, t_TV / temperature
    q_TV = softmax_TV if student_temperature == 1.0 else (soft_s_TV - soft_lse_T1).exp()
    kd_TV = _weighted(q_TV, soft_s_TV - soft_t_TV - third_T1) if reverse else q_TV - (soft_t_TV - third_T1).exp()
    ce_TV = _hard_gradient(softmax_TV, labels_T, ce_scale_T, smooth_T2)
    logits_TV.copy_(ce_TV + kd_scale_T[:, None] * kd_TV)


def row_chunks(logits_TV: Tensor) -> Iterator[slice]:
    """Rows that a twin works on at a time; none where there are no columns."""
    num_logits = CHUNK_LOGITS_CPU if logits_TV.device.type == "cpu" else CHUNK_LOGITS_GPU
    T, V = logits_TV.shape
    num_rows = max(1, num_logits // max(V, 1))
    return (slice(start, start + num_rows) for start in range(0, T if V else 0, num_rows))


def _local_columns(labels_T: Tensor, num_valid: int) -> tuple[Tensor, Tensor]:
    """Whether each label is on this shard, and a column that can be indexed in any case."""
    here_T = (labels_T >= 0) & (labels_T < num_valid)
    return here_T, torch.where(here_T, labels_T, 0)[:, None]


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, of columns that alternate if `alternates` says so."""
    return glu(gate_up, "silu", alternates(gate_up))


def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up, likewise, with GELU in its tanh approximation."""
    return glu(gate_up, "gelu", alternates(gate_up))


def glu(gate_up: Tensor, activation: Literal["silu", "gelu"], alternating: bool) -> Tensor:
    """activation(gate) * up [..., F], of columns [..., 2 F] that alternate or hold all of gate before all of up."""
    if torch.compiler.is_compiling():  # which chooses by itself what to keep
        gate, up = gate_and_up(gate_up, alternating)
        return _activate(gate, activation) * up
    return _GLU.apply(gate_up, activation, alternating)


def _activate(x: Tensor, activation: str) -> Tensor:
    return F.silu(x) if activation == "silu" else gelu(x)


class _GLU(torch.autograd.Function):
    """Keeps its input only."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: str, alternating: bool) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.activation, ctx.alternating = activation, alternating
        gate, up = gate_and_up(gate_up, alternating)
        return _activate(gate, activation) * up

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_and_up(gate_up, ctx.alternating)
        if ctx.activation == "silu":
            dgate = torch.ops.aten.silu_backward(dy * up, gate)
        else:
            dgate = torch.ops.aten.gelu_backward(dy * up, gate, approximate="tanh")
        dup = dy * _activate(gate, ctx.activation)
        if ctx.alternating:
            return torch.stack((dgate, dup), dim=-1).flatten(-2), None, None
        return torch.cat((dgate, dup), dim=-1), None, None


def gate_and_up(gate_up: Tensor, alternating: bool) -> tuple[Tensor, Tensor]:
    """The two halves [..., F] of the fused columns [..., 2 F]."""
    halves = gate_up.unflatten(-1, (-1, 2)).unbind(-1) if alternating else gate_up.chunk(2, dim=-1)
    return halves[0], halves[1]


def alternates(x: Tensor) -> bool:
    """Whether gate and up alternate column by column, as they are stored; a CPU has all of gate before all of up."""
    return x.device.type != "cpu"


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh approximation, as in GPT-2."""
    return F.gelu(x, approximate="tanh")


def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU of x + bias."""
    return gelu(x if bias is None else x + bias).to(x.dtype)


def bias_gelu_erf(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU of x + bias by the error function, as in BERT and GPT-NeoX."""
    return F.gelu(x if bias is None else x + bias).to(x.dtype)


def dropout_add(x: Tensor, y: Tensor, bias: Tensor | None, rate: float, keys: Tensor, place: int) -> Tensor:
    """x + dropout(y + bias)."""
    return (x + dropout(y if bias is None else y + bias, rate, keys, place)).to(x.dtype)


def dropout(x: Tensor, rate: float, keys: Tensor, place: int) -> Tensor:
    """Zeroes the elements that `kept` leaves out, and scales the others so that the mean stays as it was."""
    if torch.compiler.is_compiling():  # which chooses by itself what to keep
        return _drop(x, rate, keys, place)
    return _Dropout.apply(x, rate, keys, place)


class _Dropout(torch.autograd.Function):
    """Keeps the tokens' keys only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: float, keys: Tensor, place: int) -> Tensor:
        ctx.save_for_backward(keys)
        ctx.rate, ctx.place = rate, place
        return _drop(x, rate, keys, place)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (keys,) = ctx.saved_tensors
        return _drop(dy, ctx.rate, keys, ctx.place), None, None, None


def _drop(x: Tensor, rate: float, keys: Tensor, place: int) -> Tensor:
    num_dropped = round(rate * FIELDS)
    scale = FIELDS / (FIELDS - num_dropped) if num_dropped < FIELDS else 0.0
    return x * kept(keys, place, rate, x.shape[-1]) * scale


def kept(keys: Tensor, place: int, rate: float, num_features: int) -> Tensor:
    """Which elements [..., num_features] dropout keeps, by the tokens' keys [...]: True for a share of 1 - rate.

    Four features share a hash: 4 i ... 4 i + 3 have the 16-bit fields, lowest first, of output i of SplitMix64 (Steele
    et al., 2014) from the state mix(key + place). An element is dropped if its field is below round(rate 2^16).
    """
    quads_Q = torch.arange(-(-num_features // 4), device=keys.device)
    # state + quad GOLDEN, multiplied out of what is read: a compiler would take the product with an index for an index
    # too, whose overflow it does not expect, and draw other bits (torch 2.13 did).
    hashes = mix(((mix(keys + place) * INVERSE)[..., None] + quads_Q) * GOLDEN)
    fields = hashes[..., None] >> torch.arange(0, 64, 16, device=keys.device) & FIELDS - 1
    return fields.flatten(-2)[..., :num_features] >= round(rate * FIELDS)


def mix(x: Tensor) -> Tensor:
    """`mix_` of a copy."""
    return mix_(x.clone())


def mix_(x: Tensor) -> Tensor:
    """SplitMix64's step and output, in place; int64 arithmetic wraps, and shifts are made logical by masking.

    Source: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators" (OOPSLA 2014).
    """
    shifted = torch.empty_like(x)
    x += GOLDEN
    for shift, factor in ((30, MIX_1), (27, MIX_2), (31, 1)):
        torch.bitwise_right_shift(x, shift, out=shifted)
        x ^= shifted.bitwise_and_((1 << 64 - shift) - 1)
        x *= factor
    return x


def rope_(
    q_BSND: Tensor,
    kv_BSKPD: Tensor,
    cos_SR: Tensor,
    sin_SR: Tensor,
    interleaved: bool = False,
    in_place: bool = True,
) -> tuple[Tensor, ...]:
    """(q, k) or (q, k, v). It may overwrite q and kv, hence its name, as the kernel does; the twin never does."""
    k_BSKD, *v_BSKD = kv_BSKPD.unbind(-2)
    turned = (rope(x_BSND, cos_SR, sin_SR, interleaved) for x_BSND in (q_BSND, k_BSKD))
    return *turned, *v_BSKD


def rope(x_BSND: Tensor, cos_SR: Tensor, sin_SR: Tensor, interleaved: bool = False) -> Tensor:
    """Columns from R on stay as they are; in x's dtype, cos and sin give Hugging Face's bits."""
    R = cos_SR.shape[-1]
    num_rest = x_BSND.shape[-1] - R
    if num_rest > 0:
        turned_BSNR, rest_BSNE = x_BSND.split((R, num_rest), dim=-1)
        return torch.cat((rope(turned_BSNR, cos_SR, sin_SR, interleaved), rest_BSNE), dim=-1)
    cos_S1R, sin_S1R = cos_SR[:, None], sin_SR[:, None]
    if interleaved:
        cos_S1R, sin_S1R = (x[..., : R // 2].repeat_interleave(2, dim=-1) for x in (cos_S1R, sin_S1R))
        first, second = x_BSND.unflatten(-1, (-1, 2)).unbind(-1)
        rotated_BSNR = torch.stack((-second, first), dim=-1).flatten(-2)
    else:
        first, second = x_BSND.chunk(2, dim=-1)
        rotated_BSNR = torch.cat((-second, first), dim=-1)
    return (x_BSND * cos_S1R + rotated_BSNR * sin_S1R).to(x_BSND.dtype)


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor] | None,
    lrs: Sequence[float],
    eps: Sequence[float],
    weight_decays: Sequence[float],
    beta1: float,
    beta2: float,
    step: int,
    scale: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """By torch's fused kernels, a call for all tensors of the same rates; arithmetic in the dtype of params."""
    scale, skip = (None if x is None else x.reshape(()) for x in (scale, skip))
    grouped: dict[tuple[float, float, float], list[int]] = {}
    for i, rates in enumerate(zip(lrs, eps, weight_decays, strict=True)):
        if params[i].numel() > 0:
            grouped.setdefault(rates, []).append(i)
    for (lr, epsilon, weight_decay), chosen in grouped.items():
        wide = [grads[i].to(params[i].dtype) for i in chosen]
        torch._fused_adamw_(
            [params[i] for i in chosen],
            # Beforehand: the fused kernels would overwrite the gradients with the scaled ones.
            wide if scale is None else [grad * scale for grad in wide],
            [exp_avgs[i] for i in chosen],
            [exp_avg_sqs[i] for i in chosen],
            [],
            [torch.full((), float(step), device=wide[0].device)] * len(chosen),
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=epsilon,
            amsgrad=False,
            maximize=False,
            found_inf=None if skip is None else (skip != 0).to(torch.float32),
        )
    for copy, param in zip(copies or (), params, strict=copies is not None):
        rounded = param.to(copy.dtype)
        copy.copy_(rounded if skip is None else torch.where(skip != 0, copy, rounded))
