"""PyTorch twins of the kernels for the loss: passes over the logits of the whole vocabulary. `ops` is the door to both.

Legend: T = tokens, V = local vocabulary, K = statistics of the vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megagrow.cpu_ops import wide_dtype

# Logits that a twin works on at a time. On a CPU they stay in its cache from pass to pass (measured
# on 2048 x 8192 float32 logits: statistics in 15 ms instead of 41); on a GPU this bounds the copies.
CHUNK_LOGITS_CPU = 2**18
CHUNK_LOGITS_GPU = 2**24


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


def chunk_logits(device: str) -> int:
    """Logits that a twin works on at a time on this type of device."""
    return CHUNK_LOGITS_CPU if device == "cpu" else CHUNK_LOGITS_GPU


def row_chunks(logits_TV: Tensor) -> Iterator[slice]:
    """Rows that a twin works on at a time; none where there are no columns."""
    T, V = logits_TV.shape
    num_rows = max(1, chunk_logits(logits_TV.device.type) // max(V, 1))
    return (slice(start, start + num_rows) for start in range(0, T if V else 0, num_rows))


def _local_columns(labels_T: Tensor, num_valid: int) -> tuple[Tensor, Tensor]:
    """Whether each label is on this shard, and a column that can be indexed in any case."""
    here_T = (labels_T >= 0) & (labels_T < num_valid)
    return here_T, torch.where(here_T, labels_T, 0)[:, None]
