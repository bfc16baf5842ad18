"""Cross-entropy and distillation over the local shard of a vocabulary, student and teacher read once each way.

    CE = lse(s) - s[label]        KD = sum_v p[v] (log p[v] - log q[v]), or with p and q exchanged (reverse)
    p = softmax(t / rho)          q = softmax(s / sigma)

The caller merges the statistics of the shards r as in vocab_loss.py; the maxima are of unscaled logits, so those that
belong to a temperature shrink by exp((max_r - max) / temperature):

    KD = cross / t_sum - lse_t + lse_s     lse_t = t_max / rho + log t_sum     lse_s = s_max / sigma + log soft_sum
    reverse: cross / soft_sum - lse_s + lse_t                                  entropy of p = lse_t - t_mean / t_sum

Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015), section 2. Bytes per logit with
2-byte logits: statistics 4, gradient 6 (together 10, the floor for logits in memory).

Legend: T = tokens, V = local vocabulary (columns of the shard; the last ones may be padding), K = the statistics:
(max, sum_exp, label_logit, soft_sum, t_max, t_sum, cross, t_mean) and perhaps rank.
Prefixes: i_ index, o_ offsets, p_ pointer, b_ values of a block, m_ mask.
"""

import torch
import triton
import triton.language as tl

from megagrow_kernels.launch import pick
from megagrow_kernels.vocab_loss import (
    as_float32,
    check_logits,
    check_smooth,
    count_greater,
    finite,
    fold_of,
    hard_gradient,
    local_column,
)


def distill_stats_ref(
    logits_TV: torch.Tensor,
    teacher_TV: torch.Tensor,
    labels_T: torch.Tensor,
    temperature: float,
    student_temperature: float,
    num_valid: int | None = None,
    label_logits_T: torch.Tensor | None = None,
    reverse: bool = False,
) -> torch.Tensor:
    """The definition of `distill_stats`, in the precision of its inputs, given finite logits."""
    s_TV, t_TV = logits_TV[:, :num_valid], teacher_TV[:, :num_valid]
    s_max_T1, t_max_T1 = s_TV.amax(-1, keepdim=True), t_TV.amax(-1, keepdim=True)
    onehot_TV = labels_T[:, None] == torch.arange(s_TV.shape[1], device=labels_T.device)
    weight_TV = ((t_TV - t_max_T1) / temperature).exp()
    soft_TV = ((s_TV - s_max_T1) / student_temperature).exp()
    gap_TV = t_TV / temperature - s_TV / student_temperature
    stats = [
        s_max_T1[:, 0],
        (s_TV - s_max_T1).exp().sum(-1),
        torch.where(onehot_TV, s_TV, 0).sum(-1),
        soft_TV.sum(-1),
        t_max_T1[:, 0],
        weight_TV.sum(-1),
        (-soft_TV * gap_TV if reverse else weight_TV * gap_TV).sum(-1),
        (weight_TV * t_TV / temperature).sum(-1),
    ]
    if label_logits_T is not None:
        stats.append(((s_TV > label_logits_T[:, None]) & ~onehot_TV).sum(-1).to(s_TV.dtype))
    return torch.stack(stats, -1)


def distill_grad_ref(
    logits_TV: torch.Tensor,
    teacher_TV: torch.Tensor,
    labels_T: torch.Tensor,
    logsumexps_T3: torch.Tensor,
    ce_scale_T: torch.Tensor,
    kd_scale_T: torch.Tensor,
    temperature: float,
    student_temperature: float,
    num_valid: int | None = None,
    smooth_T2: torch.Tensor | None = None,
    reverse: bool = False,
) -> torch.Tensor:
    """The definition of `distill_grad_`, not in place."""
    lse_T1, soft_lse_T1, third_T1 = logsumexps_T3[..., None].unbind(1)
    columns_V = torch.arange(logits_TV.shape[1], device=labels_T.device)
    onehot_TV = (labels_T[:, None] == columns_V).to(logits_TV.dtype)
    label_T1, uniform_T1 = (ce_scale_T[:, None], 0.0) if smooth_T2 is None else smooth_T2.split(1, dim=1)
    ce_TV = ce_scale_T[:, None] * (logits_TV - lse_T1).exp() - label_T1 * onehot_TV - uniform_T1
    s_TV, t_TV = logits_TV / student_temperature, teacher_TV / temperature
    q_TV = (s_TV - soft_lse_T1).exp()
    kd_TV = q_TV * (s_TV - t_TV - third_T1) if reverse else q_TV - (t_TV - third_T1).exp()
    grad_TV = ce_TV + kd_scale_T[:, None] * kd_TV
    return grad_TV if num_valid is None else torch.where(columns_V < num_valid, grad_TV, 0)


@triton.jit
def _gap(b_q, b_s, b_t, r_rho, r_sigma):
    """s / sigma - t / rho; 0 where the student gives no probability at all, whatever the teacher gives."""
    m_given = b_q > 0.0
    return tl.where(m_given, b_s, 0.0) * r_sigma - tl.where(m_given, b_t, 0.0) * r_rho


@triton.jit
def _update(
    b_s,
    b_t,
    b_s_max,
    b_sum,
    b_soft,
    b_t_max,
    b_t_sum,
    b_cross,
    b_t_mean,
    r_rho,
    r_sigma,
    SOFT: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """One more block [columns / FOLD, FOLD]; every thread keeps its own maxima and sums: none waits for another."""
    b_s_new, b_t_new = tl.maximum(b_s_max, tl.max(b_s, axis=1)), tl.maximum(b_t_max, tl.max(b_t, axis=1))
    b_s_at, b_t_at = finite(b_s_new), finite(b_t_new)
    b_sum = b_sum * tl.exp(b_s_max - b_s_at) + tl.sum(tl.exp(b_s - b_s_at[:, None]), axis=1)
    b_soft_shrink = tl.exp((b_s_max - b_s_at) * r_sigma)
    b_q = tl.exp((b_s - b_s_at[:, None]) * r_sigma)
    if SOFT:
        b_soft = b_soft * b_soft_shrink + tl.sum(b_q, axis=1)
    b_shrink = tl.exp((b_t_max - b_t_at) * r_rho)
    b_weight = tl.exp((b_t - b_t_at[:, None]) * r_rho)
    # Where the teacher gives no probability at all the term is 0, whatever the student gives.
    m_given = b_weight > 0.0
    b_t_soft = tl.where(m_given, b_t, 0.0) * r_rho
    if REVERSE:
        b_cross = b_cross * b_soft_shrink + tl.sum(b_q * _gap(b_q, b_s, b_t, r_rho, r_sigma), axis=1)
    else:
        b_term = b_weight * (b_t_soft - tl.where(m_given, b_s, 0.0) * r_sigma)
        b_cross = b_cross * b_shrink + tl.sum(b_term, axis=1)
    b_t_mean = b_t_mean * b_shrink + tl.sum(b_weight * b_t_soft, axis=1)
    b_t_sum = b_t_sum * b_shrink + tl.sum(b_weight, axis=1)
    return b_s_new, b_sum, b_soft, b_t_new, b_t_sum, b_cross, b_t_mean


@triton.jit(do_not_specialize=["num_valid"])
def distill_stats_kernel(
    p_logits,
    p_teacher,
    p_labels,
    p_label_logits,
    p_stats,
    stride_t,
    stride_teacher_t,
    num_valid,
    r_rho,
    r_sigma,
    BLOCK_V: tl.constexpr,
    SOFT: tl.constexpr,
    HAS_RANK: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """r_rho and r_sigma are 1 / temperature of the teacher and of the student; SOFT: the latter is not 1."""
    K: tl.constexpr = 9 if HAS_RANK else 8
    i_t = tl.program_id(0).to(tl.int64)
    p_row, p_teacher_row = p_logits + i_t * stride_t, p_teacher + i_t * stride_teacher_t
    o_block = tl.arange(0, BLOCK_V)
    i_label = local_column(tl.load(p_labels + i_t), num_valid)
    b_whole = tl.load(p_label_logits + i_t) if HAS_RANK else 0.0
    FOLD: tl.constexpr = fold_of(p_logits, BLOCK_V)
    F: tl.constexpr = BLOCK_V // FOLD
    b_s_max = tl.full([F], float("-inf"), dtype=tl.float32)
    b_t_max = tl.full([F], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([F], dtype=tl.float32)
    b_soft = tl.zeros([F], dtype=tl.float32)
    b_t_sum = tl.zeros([F], dtype=tl.float32)
    b_cross = tl.zeros([F], dtype=tl.float32)
    b_t_mean = tl.zeros([F], dtype=tl.float32)
    b_count = tl.zeros([F], dtype=tl.int32)
    num_full = num_valid - num_valid % BLOCK_V
    for i_v in range(0, num_full, BLOCK_V):
        o_v = i_v + o_block
        b_s = tl.load(p_row + o_v).to(tl.float32)
        b_t = tl.load(p_teacher_row + o_v).to(tl.float32)
        b_sf, b_tf = tl.reshape(b_s, [F, FOLD]), tl.reshape(b_t, [F, FOLD])
        b_s_max, b_sum, b_soft, b_t_max, b_t_sum, b_cross, b_t_mean = _update(
            b_sf, b_tf, b_s_max, b_sum, b_soft, b_t_max, b_t_sum, b_cross, b_t_mean, r_rho, r_sigma, SOFT, REVERSE
        )
        if HAS_RANK:
            b_count += tl.sum(tl.reshape(count_greater(b_s, b_whole, o_v, i_label), [F, FOLD]), axis=1)
    if num_full < num_valid:
        o_v = num_full + o_block
        b_s = tl.load(p_row + o_v, mask=o_v < num_valid, other=float("-inf")).to(tl.float32)
        b_t = tl.load(p_teacher_row + o_v, mask=o_v < num_valid, other=float("-inf")).to(tl.float32)
        b_sf, b_tf = tl.reshape(b_s, [F, FOLD]), tl.reshape(b_t, [F, FOLD])
        b_s_max, b_sum, b_soft, b_t_max, b_t_sum, b_cross, b_t_mean = _update(
            b_sf, b_tf, b_s_max, b_sum, b_soft, b_t_max, b_t_sum, b_cross, b_t_mean, r_rho, r_sigma, SOFT, REVERSE
        )
        if HAS_RANK:
            b_count += tl.sum(tl.reshape(count_greater(b_s, b_whole, o_v, i_label), [F, FOLD]), axis=1)
    b_label = tl.load(p_row + i_label, mask=i_label >= 0, other=0.0).to(tl.float32)
    b_s_top, b_t_top = tl.max(b_s_max, axis=0), tl.max(b_t_max, axis=0)
    b_s_gap, b_t_gap = b_s_max - finite(b_s_top), b_t_max - finite(b_t_top)
    b_soft_sum = tl.sum(b_soft * tl.exp(b_s_gap * r_sigma) if SOFT else b_sum * tl.exp(b_s_gap), axis=0)
    b_t_scale = tl.exp(b_t_gap * r_rho)
    b_cross_scale = tl.exp(b_s_gap * r_sigma) if REVERSE else b_t_scale
    p_out = p_stats + i_t * K
    tl.store(p_out, b_s_top)
    tl.store(p_out + 1, tl.sum(b_sum * tl.exp(b_s_gap), axis=0))
    tl.store(p_out + 2, b_label)
    tl.store(p_out + 3, b_soft_sum)
    tl.store(p_out + 4, b_t_top)
    tl.store(p_out + 5, tl.sum(b_t_sum * b_t_scale, axis=0))
    tl.store(p_out + 6, tl.sum(b_cross * b_cross_scale, axis=0))
    tl.store(p_out + 7, tl.sum(b_t_mean * b_t_scale, axis=0))
    if HAS_RANK:
        tl.store(p_out + 8, tl.sum(b_count, axis=0).to(tl.float32))


@triton.jit
def _gradient(
    b_s,
    b_t,
    o_v,
    i_label,
    b_lse,
    b_soft_lse,
    b_third,
    b_ce,
    b_label,
    b_uniform,
    b_kd,
    r_rho,
    r_sigma,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    REVERSE: tl.constexpr,
):
    b_softmax = tl.exp(b_s - b_lse)
    b_q = tl.exp(b_s * r_sigma - b_soft_lse) if SOFT else b_softmax
    b_hard = hard_gradient(b_softmax, o_v, i_label, b_ce, b_label, b_uniform, SMOOTH)
    if REVERSE:
        return b_hard + b_kd * (b_q * (_gap(b_q, b_s, b_t, r_rho, r_sigma) - b_third))
    else:
        return b_hard + b_kd * (b_q - tl.exp(b_t * r_rho - b_third))


@triton.jit(do_not_specialize=["V", "num_valid"])
def distill_grad_kernel(
    p_logits,
    p_teacher,
    p_labels,
    p_logsumexps,
    p_ce_scale,
    p_kd_scale,
    p_smooth,
    stride_t,
    stride_teacher_t,
    V,
    num_valid,
    r_rho,
    r_sigma,
    BLOCK_V: tl.constexpr,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """The third of the log-sums is the teacher's; REVERSE: the student's mean of s / sigma - t / rho."""
    i_t = tl.program_id(0).to(tl.int64)
    p_row, p_teacher_row = p_logits + i_t * stride_t, p_teacher + i_t * stride_teacher_t
    o_block = tl.arange(0, BLOCK_V)
    i_label = local_column(tl.load(p_labels + i_t), num_valid)
    b_lse, b_soft_lse = tl.load(p_logsumexps + i_t * 3), tl.load(p_logsumexps + i_t * 3 + 1)
    b_third = tl.load(p_logsumexps + i_t * 3 + 2)
    b_ce, b_kd = tl.load(p_ce_scale + i_t), tl.load(p_kd_scale + i_t)
    b_label = tl.load(p_smooth + i_t * 2) if SMOOTH else 0.0
    b_uniform = tl.load(p_smooth + i_t * 2 + 1) if SMOOTH else 0.0
    num_full = num_valid - num_valid % BLOCK_V
    for i_v in range(0, num_full, BLOCK_V):
        o_v = i_v + o_block
        b_s = tl.load(p_row + o_v).to(tl.float32)
        b_t = tl.load(p_teacher_row + o_v).to(tl.float32)
        b_grad = _gradient(
            b_s,
            b_t,
            o_v,
            i_label,
            b_lse,
            b_soft_lse,
            b_third,
            b_ce,
            b_label,
            b_uniform,
            b_kd,
            r_rho,
            r_sigma,
            SOFT,
            SMOOTH,
            REVERSE,
        )
        tl.store(p_row + o_v, b_grad.to(p_logits.dtype.element_ty))
    for i_v in range(num_full, V, BLOCK_V):
        o_v = i_v + o_block
        b_s = tl.load(p_row + o_v, mask=o_v < num_valid, other=float("-inf")).to(tl.float32)
        b_t = tl.load(p_teacher_row + o_v, mask=o_v < num_valid, other=float("-inf")).to(tl.float32)
        b_grad = _gradient(
            b_s,
            b_t,
            o_v,
            i_label,
            b_lse,
            b_soft_lse,
            b_third,
            b_ce,
            b_label,
            b_uniform,
            b_kd,
            r_rho,
            r_sigma,
            SOFT,
            SMOOTH,
            REVERSE,
        )
        if SMOOTH:
            b_grad = tl.where(o_v < num_valid, b_grad, 0.0)
        tl.store(p_row + o_v, b_grad.to(p_logits.dtype.element_ty), mask=o_v < V)


def _check_pair(
    name: str, logits_TV: torch.Tensor, teacher_TV: torch.Tensor, temperatures: tuple[float, float]
) -> None:
    if teacher_TV.shape != logits_TV.shape:
        raise ValueError(
            f"{name}: the teacher's logits have shape {tuple(teacher_TV.shape)}, the student's {tuple(logits_TV.shape)}"
        )
    check_logits(name, teacher_TV, None)
    if min(temperatures) <= 0:
        raise ValueError(f"{name}: temperatures {temperatures[0]} and {temperatures[1]} must be positive")


@torch.library.custom_op("megagrow_kernels::distill_stats", mutates_args=())
def _stats(
    logits_TV: torch.Tensor,
    teacher_TV: torch.Tensor,
    labels_T: torch.Tensor,
    temperature: float,
    student_temperature: float,
    num_valid: int,
    label_logits_T: torch.Tensor | None,
    reverse: bool,
) -> torch.Tensor:
    T, V = logits_TV.shape
    has_rank = label_logits_T is not None
    stats_TK = torch.empty(T, 9 if has_rank else 8, dtype=torch.float32, device=logits_TV.device)
    launch = pick("distill", V, logits_TV.device)
    if T > 0:
        distill_stats_kernel[(T,)](
            logits_TV,
            teacher_TV,
            labels_T,
            label_logits_T,
            stats_TK,
            logits_TV.stride(0),
            teacher_TV.stride(0),
            num_valid,
            1 / temperature,
            1 / student_temperature,
            BLOCK_V=launch.block,
            SOFT=student_temperature != 1.0,
            HAS_RANK=has_rank,
            REVERSE=reverse,
            num_warps=launch.num_warps,
        )
    return stats_TK


@_stats.register_fake
def _(
    logits_TV: torch.Tensor,
    teacher_TV: torch.Tensor,
    labels_T: torch.Tensor,
    temperature: float,
    student_temperature: float,
    num_valid: int,
    label_logits_T: torch.Tensor | None,
    reverse: bool,
) -> torch.Tensor:
    return logits_TV.new_empty(logits_TV.shape[0], 8 if label_logits_T is None else 9, dtype=torch.float32)


@torch.library.custom_op("megagrow_kernels::distill_grad_", mutates_args=("logits_TV",))
def _grad_(
    logits_TV: torch.Tensor,
    teacher_TV: torch.Tensor,
    labels_T: torch.Tensor,
    logsumexps_T3: torch.Tensor,
    ce_scale_T: torch.Tensor,
    kd_scale_T: torch.Tensor,
    temperature: float,
    student_temperature: float,
    num_valid: int,
    smooth_T2: torch.Tensor | None,
    reverse: bool,
) -> None:
    T, V = logits_TV.shape
    launch = pick("distill", V, logits_TV.device)
    if T > 0:
        distill_grad_kernel[(T,)](
            logits_TV,
            teacher_TV,
            labels_T,
            logsumexps_T3,
            ce_scale_T,
            kd_scale_T,
            smooth_T2,
            logits_TV.stride(0),
            teacher_TV.stride(0),
            V,
            num_valid,
            1 / temperature,
            1 / student_temperature,
            BLOCK_V=launch.block,
            SOFT=student_temperature != 1.0,
            SMOOTH=smooth_T2 is not None,
            REVERSE=reverse,
            num_warps=launch.num_warps,
        )


def distill_stats(
    logits_TV: torch.Tensor,
    teacher_TV: torch.Tensor,
    labels_T: torch.Tensor,
    temperature: float,
    student_temperature: float,
    num_valid: int | None = None,
    label_logits_T: torch.Tensor | None = None,
    reverse: bool = False,
) -> torch.Tensor:
    """What cross-entropy, KL divergence from a teacher, and the label's rank are made of, in one read of the logits.

    Args:
        logits_TV: the student's, float16, bfloat16 or float32; rows may be strided.
        teacher_TV: the teacher's, likewise; its dtype may differ.
        labels_T: int64, local column of the label, as in `vocab_stats`.
        temperature: rho, of the teacher.
        student_temperature: sigma, of the student in the KL divergence.
        num_valid: columns from here on are padding and count as -inf; default: all are valid.
        label_logits_T: float32, the label logit of every token over all shards; asks for the rank.
        reverse: for the KL divergence of the student from the teacher.

    Returns:
        stats_TK float32: (max, sum of exp(s - max), label logit, sum of exp((s - max) / sigma), teacher's max,
        sum of exp((t - t_max) / rho), the latter weighted with t / rho - s / sigma (reverse: the former with
        s / sigma - t / rho), the latter weighted with t / rho) and the rank if asked for.

    Raises:
        ValueError: a shape, dtype, stride or temperature does not fit, in one line.
    """
    _check_pair("distill_stats", logits_TV, teacher_TV, (temperature, student_temperature))
    num_valid = check_logits("distill_stats", logits_TV, num_valid, labels=labels_T, label_logits=label_logits_T)
    whole_T = as_float32(label_logits_T)
    temperatures = temperature, student_temperature
    return _stats(logits_TV, teacher_TV, labels_T.contiguous(), *temperatures, num_valid, whole_T, reverse)


def distill_grad_(
    logits_TV: torch.Tensor,
    teacher_TV: torch.Tensor,
    labels_T: torch.Tensor,
    logsumexps_T3: torch.Tensor,
    ce_scale_T: torch.Tensor,
    kd_scale_T: torch.Tensor,
    temperature: float,
    student_temperature: float,
    num_valid: int | None = None,
    smooth_T2: torch.Tensor | None = None,
    reverse: bool = False,
) -> torch.Tensor:
    """Overwrites the student's logits with ce_scale * (softmax - onehot(label)) + kd_scale * (q - p), and returns them.

    The reverse divergence has q * (s / sigma - t / rho - mean) in the place of q - p.

    Args:
        logits_TV, teacher_TV, labels_T, temperature, student_temperature, num_valid: as in `distill_stats`; the
            student's are overwritten, padding columns with 0.
        logsumexps_T3: float32, over the whole vocabulary: of s, of s / sigma, of t / rho; the last one is, for the
            reverse divergence, the mean of s / sigma - t / rho under q instead.
        ce_scale_T: float32, weight of every token's cross-entropy.
        kd_scale_T: float32, weight of every token's divergence, divided by sigma.
        smooth_T2: float32, of the cross-entropy, as in `vocab_grad_`.
        reverse: the divergence is that of the student from the teacher.

    Raises:
        ValueError: a shape, dtype, stride or temperature does not fit, in one line.
    """
    _check_pair("distill_grad_", logits_TV, teacher_TV, (temperature, student_temperature))
    if logsumexps_T3.shape != (len(logits_TV), 3):
        expected = (len(logits_TV), 3)
        raise ValueError(f"distill_grad_: logsumexps have shape {tuple(logsumexps_T3.shape)}, need {expected}")
    check_smooth("distill_grad_", logits_TV, smooth_T2)
    num_valid = check_logits(
        "distill_grad_", logits_TV, num_valid, labels=labels_T, ce_scale=ce_scale_T, kd_scale=kd_scale_T
    )
    _grad_(
        logits_TV,
        teacher_TV,
        labels_T.contiguous(),
        logsumexps_T3.float().contiguous(),
        ce_scale_T.float().contiguous(),
        kd_scale_T.float().contiguous(),
        temperature,
        student_temperature,
        num_valid,
        as_float32(smooth_T2),
        reverse,
    )
    return logits_TV
