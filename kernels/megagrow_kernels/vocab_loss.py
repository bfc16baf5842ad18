"""Cross-entropy over the local shard of a vocabulary: statistics, gradient in place, scores.

The caller merges the statistics of the shards r, over ranks with whatever collective it likes:

    max = max_r max_r                   sum_exp = sum_r sum_exp_r * exp(max_r - max)
    label_logit = sum_r label_logit_r   rank = sum_r rank_r
    logsumexp = max + log(sum_exp)      loss = logsumexp - label_logit

Running maximum and sum: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018),
algorithm 3. Bytes per logit with 2-byte logits: statistics 2, gradient 4 (together 6, the floor for
a loss whose logits are in memory), scores 2.

Legend: T = tokens, V = local vocabulary (columns of the shard; the last ones may be padding),
K = statistics: (max, sum_exp, label_logit) and perhaps rank.
Prefixes: i_ index, o_ offsets, p_ pointer, b_ values of a block, m_ mask.
"""

import torch
import triton
import triton.language as tl

from megagrow_kernels.launch import pick

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def vocab_stats_ref(
    logits_TV: torch.Tensor,
    labels_T: torch.Tensor,
    num_valid: int | None = None,
    label_logits_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition of `vocab_stats`, in the precision of its inputs, given a finite logit."""
    valid_TV = logits_TV[:, :num_valid]
    max_T1 = valid_TV.amax(-1, keepdim=True)
    onehot_TV = labels_T[:, None] == torch.arange(valid_TV.shape[1], device=labels_T.device)
    label_logit_T = torch.where(onehot_TV, valid_TV, 0).sum(-1)
    stats = [max_T1[:, 0], (valid_TV - max_T1).exp().sum(-1), label_logit_T]
    if label_logits_T is not None:
        greater_TV = valid_TV > label_logits_T[:, None]
        stats.append((greater_TV & ~onehot_TV).sum(-1).to(valid_TV.dtype))
    return torch.stack(stats, -1)


def vocab_scores_ref(
    logits_TV: torch.Tensor,
    labels_T: torch.Tensor,
    label_logits_T: torch.Tensor,
    max_T: torch.Tensor,
    bits: int,
    num_valid: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of `vocab_scores`, in the precision of its inputs."""
    valid_TV = logits_TV[:, :num_valid]
    units_TV = ((valid_TV - max_T[:, None]).exp() * 2.0**bits).to(torch.int64)
    other_TV = labels_T[:, None] != torch.arange(valid_TV.shape[1], device=labels_T.device)
    rank_T = ((valid_TV > label_logits_T[:, None]) & other_TV).sum(-1)
    return units_TV.sum(-1), rank_T.to(torch.int32)


def vocab_grad_ref(
    logits_TV: torch.Tensor,
    labels_T: torch.Tensor,
    logsumexp_T: torch.Tensor,
    scale_T: torch.Tensor,
    num_valid: int | None = None,
    smooth_T2: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition of `vocab_grad_`, not in place."""
    columns_V = torch.arange(logits_TV.shape[1], device=labels_T.device)
    onehot_TV = (labels_T[:, None] == columns_V).to(logits_TV.dtype)
    label_T1, uniform_T1 = (scale_T[:, None], 0.0) if smooth_T2 is None else smooth_T2.split(1, dim=1)
    grad_TV = scale_T[:, None] * (logits_TV - logsumexp_T[:, None]).exp() - label_T1 * onehot_TV - uniform_T1
    return grad_TV if num_valid is None else torch.where(columns_V < num_valid, grad_TV, 0)


@triton.constexpr_function
def fold_of(p_x, BLOCK_V):
    """Neighbours that one load of 128 bits brings to one thread, which adds them up in its registers."""
    return min(128 // p_x.dtype.element_ty.primitive_bitwidth, BLOCK_V)


@triton.jit
def finite(b_max):
    """The reference point of exponentials: 0 as long as every logit is -inf, since -inf - -inf would be NaN."""
    return tl.where(b_max == float("-inf"), 0.0, b_max)


@triton.jit
def _update_stats(b_max, b_sum, b_xf):
    """One more block [columns / FOLD, FOLD]; every thread keeps its own maxima and sums: none waits for another."""
    b_new = tl.maximum(b_max, tl.max(b_xf, axis=1))
    b_at = finite(b_new)
    return b_new, b_sum * tl.exp(b_max - b_at) + tl.sum(tl.exp(b_xf - b_at[:, None]), axis=1)


@triton.jit
def local_column(i_label, num_valid):
    """The label as a 32-bit column of this shard, or -1 where it is not here."""
    return tl.where((i_label >= 0) & (i_label < num_valid), i_label, -1).to(tl.int32)


@triton.jit
def count_greater(b_x, b_label, o_v, i_label):
    """Logits strictly greater than the label's; its own column is skipped."""
    return ((b_x > b_label) & (o_v != i_label)).to(tl.int32)


@triton.jit(do_not_specialize=["num_valid"])
def vocab_stats_kernel(
    p_logits,
    p_labels,
    p_label_logits,
    p_stats,
    stride_t,
    num_valid,
    BLOCK_V: tl.constexpr,
    HAS_RANK: tl.constexpr,
):
    K: tl.constexpr = 4 if HAS_RANK else 3
    i_t = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_t * stride_t
    o_block = tl.arange(0, BLOCK_V)
    i_label = local_column(tl.load(p_labels + i_t), num_valid)
    b_whole = tl.load(p_label_logits + i_t) if HAS_RANK else 0.0
    FOLD: tl.constexpr = fold_of(p_logits, BLOCK_V)
    F: tl.constexpr = BLOCK_V // FOLD
    b_max = tl.full([F], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([F], dtype=tl.float32)
    b_count = tl.zeros([F], dtype=tl.int32)
    # Full blocks load without a mask: a mask at an odd num_valid would cost the 128-bit loads.
    # With `//` and `*` for `%` the gradient kernel takes 100 registers instead of 40 (sm_90a, bf16).
    num_full = num_valid - num_valid % BLOCK_V
    for i_v in range(0, num_full, BLOCK_V):
        o_v = i_v + o_block
        b_x = tl.load(p_row + o_v).to(tl.float32)
        b_max, b_sum = _update_stats(b_max, b_sum, tl.reshape(b_x, [F, FOLD]))
        if HAS_RANK:
            b_count += tl.sum(tl.reshape(count_greater(b_x, b_whole, o_v, i_label), [F, FOLD]), axis=1)
    if num_full < num_valid:
        o_v = num_full + o_block
        b_x = tl.load(p_row + o_v, mask=o_v < num_valid, other=float("-inf")).to(tl.float32)
        b_max, b_sum = _update_stats(b_max, b_sum, tl.reshape(b_x, [F, FOLD]))
        if HAS_RANK:
            b_count += tl.sum(tl.reshape(count_greater(b_x, b_whole, o_v, i_label), [F, FOLD]), axis=1)
    b_top = tl.max(b_max, axis=0)
    b_label = tl.load(p_row + i_label, mask=i_label >= 0, other=0.0).to(tl.float32)
    tl.store(p_stats + i_t * K, b_top)
    tl.store(p_stats + i_t * K + 1, tl.sum(b_sum * tl.exp(b_max - finite(b_top)), axis=0))
    tl.store(p_stats + i_t * K + 2, b_label)
    if HAS_RANK:
        tl.store(p_stats + i_t * K + 3, tl.sum(b_count, axis=0).to(tl.float32))


@triton.jit
def _units(b_xf, b_max, unit):
    """exp(x - max) in whole units, which add up to the same in any order."""
    return tl.sum((tl.exp(b_xf - b_max) * unit).to(tl.int64), axis=1)


@triton.jit(do_not_specialize=["num_valid"])
def vocab_scores_kernel(
    p_logits, p_labels, p_label_logits, p_max, p_units, p_rank, stride_t, num_valid, unit, BLOCK_V: tl.constexpr
):
    i_t = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_t * stride_t
    o_block = tl.arange(0, BLOCK_V)
    i_label = local_column(tl.load(p_labels + i_t), num_valid)
    b_label, b_max = tl.load(p_label_logits + i_t), tl.load(p_max + i_t)
    FOLD: tl.constexpr = fold_of(p_logits, BLOCK_V)
    F: tl.constexpr = BLOCK_V // FOLD
    b_units = tl.zeros([F], dtype=tl.int64)
    b_count = tl.zeros([F], dtype=tl.int32)
    num_full = num_valid - num_valid % BLOCK_V
    for i_v in range(0, num_full, BLOCK_V):
        o_v = i_v + o_block
        b_x = tl.load(p_row + o_v).to(tl.float32)
        b_units += _units(tl.reshape(b_x, [F, FOLD]), b_max, unit)
        b_count += tl.sum(tl.reshape(count_greater(b_x, b_label, o_v, i_label), [F, FOLD]), axis=1)
    if num_full < num_valid:
        o_v = num_full + o_block
        b_x = tl.load(p_row + o_v, mask=o_v < num_valid, other=float("-inf")).to(tl.float32)
        b_units += _units(tl.reshape(b_x, [F, FOLD]), b_max, unit)
        b_count += tl.sum(tl.reshape(count_greater(b_x, b_label, o_v, i_label), [F, FOLD]), axis=1)
    tl.store(p_units + i_t, tl.sum(b_units, axis=0))
    tl.store(p_rank + i_t, tl.sum(b_count, axis=0))


@triton.jit
def hard_gradient(b_softmax, o_v, i_label, b_scale, b_label, b_uniform, SMOOTH: tl.constexpr):
    """That of the cross-entropy with the label; SMOOTH: with label smoothing or a z-loss."""
    if SMOOTH:
        return b_scale * b_softmax - tl.where(o_v == i_label, b_label, 0.0) - b_uniform
    else:
        return b_scale * tl.where(o_v == i_label, b_softmax - 1.0, b_softmax)


@triton.jit(do_not_specialize=["V", "num_valid"])
def vocab_grad_kernel(
    p_logits,
    p_labels,
    p_logsumexp,
    p_scale,
    p_smooth,
    stride_t,
    V,
    num_valid,
    BLOCK_V: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_t * stride_t
    o_block = tl.arange(0, BLOCK_V)
    i_label = local_column(tl.load(p_labels + i_t), num_valid)
    b_logsumexp = tl.load(p_logsumexp + i_t)
    b_scale = tl.load(p_scale + i_t)
    b_label = tl.load(p_smooth + i_t * 2) if SMOOTH else 0.0
    b_uniform = tl.load(p_smooth + i_t * 2 + 1) if SMOOTH else 0.0
    num_full = num_valid - num_valid % BLOCK_V
    for i_v in range(0, num_full, BLOCK_V):
        o_v = i_v + o_block
        b_p = tl.exp(tl.load(p_row + o_v).to(tl.float32) - b_logsumexp)
        b_grad = hard_gradient(b_p, o_v, i_label, b_scale, b_label, b_uniform, SMOOTH)
        tl.store(p_row + o_v, b_grad.to(p_logits.dtype.element_ty))
    for i_v in range(num_full, V, BLOCK_V):
        o_v = i_v + o_block
        b_x = tl.load(p_row + o_v, mask=o_v < num_valid, other=float("-inf")).to(tl.float32)
        b_p = tl.exp(b_x - b_logsumexp)
        b_grad = hard_gradient(b_p, o_v, i_label, b_scale, b_label, b_uniform, SMOOTH)
        if SMOOTH:
            b_grad = tl.where(o_v < num_valid, b_grad, 0.0)
        tl.store(p_row + o_v, b_grad.to(p_logits.dtype.element_ty), mask=o_v < V)


def check_logits(name: str, logits_TV: torch.Tensor, num_valid: int | None, **per_token: torch.Tensor | None) -> int:
    """The number of valid columns, once every argument fits."""
    T, V = logits_TV.shape
    if logits_TV.dtype not in DTYPES:
        raise ValueError(f"{name}: logits are {logits_TV.dtype}, the kernel takes float16, bfloat16 or float32")
    if V > 1 and logits_TV.stride(1) != 1:
        raise ValueError(f"{name}: logits of one token are {logits_TV.stride(1)} elements apart, must touch")
    for argument, tensor in per_token.items():
        if tensor is not None and tensor.shape != (T,):
            raise ValueError(f"{name}: {argument} has shape {tuple(tensor.shape)}, {T} tokens need ({T},)")
    if num_valid is None:
        return V
    if not 0 <= num_valid <= V:
        raise ValueError(f"{name}: num_valid={num_valid} lies outside 0..{V}")
    return num_valid


def check_smooth(name: str, logits_TV: torch.Tensor, smooth_T2: torch.Tensor | None) -> None:
    """Raises ValueError unless there are two numbers for every token, or none at all."""
    expected = (len(logits_TV), 2)
    if smooth_T2 is not None and smooth_T2.shape != expected:
        raise ValueError(f"{name}: smooth has shape {tuple(smooth_T2.shape)}, need {expected}")


def as_float32(x_T: torch.Tensor | None) -> torch.Tensor | None:
    """As the kernels read statistics: float32, one after the other."""
    return None if x_T is None else x_T.float().contiguous()


@torch.library.custom_op("megagrow_kernels::vocab_stats", mutates_args=())
def _stats(
    logits_TV: torch.Tensor, labels_T: torch.Tensor, num_valid: int, label_logits_T: torch.Tensor | None
) -> torch.Tensor:
    T, V = logits_TV.shape
    has_rank = label_logits_T is not None
    stats_TK = torch.empty(T, 4 if has_rank else 3, dtype=torch.float32, device=logits_TV.device)
    launch = pick("vocab", V, logits_TV.device)
    if T > 0:
        vocab_stats_kernel[(T,)](
            logits_TV,
            labels_T,
            label_logits_T,
            stats_TK,
            logits_TV.stride(0),
            num_valid,
            BLOCK_V=launch.block,
            HAS_RANK=has_rank,
            num_warps=launch.num_warps,
        )
    return stats_TK


@_stats.register_fake
def _(
    logits_TV: torch.Tensor, labels_T: torch.Tensor, num_valid: int, label_logits_T: torch.Tensor | None
) -> torch.Tensor:
    return logits_TV.new_empty(logits_TV.shape[0], 3 if label_logits_T is None else 4, dtype=torch.float32)


@torch.library.custom_op("megagrow_kernels::vocab_scores", mutates_args=())
def _scores(
    logits_TV: torch.Tensor,
    labels_T: torch.Tensor,
    label_logits_T: torch.Tensor,
    max_T: torch.Tensor,
    bits: int,
    num_valid: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    T, V = logits_TV.shape
    units_T = torch.empty(T, dtype=torch.int64, device=logits_TV.device)
    rank_T = torch.empty(T, dtype=torch.int32, device=logits_TV.device)
    launch = pick("vocab", V, logits_TV.device)
    if T > 0:
        vocab_scores_kernel[(T,)](
            logits_TV,
            labels_T,
            label_logits_T,
            max_T,
            units_T,
            rank_T,
            logits_TV.stride(0),
            num_valid,
            2.0**bits,
            BLOCK_V=launch.block,
            num_warps=launch.num_warps,
        )
    return units_T, rank_T


@_scores.register_fake
def _(
    logits_TV: torch.Tensor,
    labels_T: torch.Tensor,
    label_logits_T: torch.Tensor,
    max_T: torch.Tensor,
    bits: int,
    num_valid: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(labels_T), torch.empty_like(labels_T, dtype=torch.int32)


@torch.library.custom_op("megagrow_kernels::vocab_grad_", mutates_args=("logits_TV",))
def _grad_(
    logits_TV: torch.Tensor,
    labels_T: torch.Tensor,
    logsumexp_T: torch.Tensor,
    scale_T: torch.Tensor,
    num_valid: int,
    smooth_T2: torch.Tensor | None,
) -> None:
    T, V = logits_TV.shape
    launch = pick("vocab", V, logits_TV.device)
    if T > 0:
        vocab_grad_kernel[(T,)](
            logits_TV,
            labels_T,
            logsumexp_T,
            scale_T,
            smooth_T2,
            logits_TV.stride(0),
            V,
            num_valid,
            BLOCK_V=launch.block,
            SMOOTH=smooth_T2 is not None,
            num_warps=launch.num_warps,
        )


def vocab_stats(
    logits_TV: torch.Tensor,
    labels_T: torch.Tensor,
    num_valid: int | None = None,
    label_logits_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """Maximum, sum of exponentials, label logit and perhaps rank of every token, in one read of the logits.

    Args:
        logits_TV: float16, bfloat16 or float32; rows may be strided.
        labels_T: int64, local column of the label; any index outside 0..num_valid - 1 means that
            the label is on another shard, or ignored.
        num_valid: columns from here on are padding and count as -inf; default: all are valid.
        label_logits_T: float32, the label logit of every token over all shards; asks for the rank, the number of
            logits strictly greater. The label's own column is skipped: a label logit that went through other
            arithmetic would otherwise count itself.

    Returns:
        stats_TK float32: (max, sum of exp(logit - max), label logit) and the rank if asked for. Without a label here
        the label logit is 0; without any valid column the first two are (-inf, 0).

    Raises:
        ValueError: a shape, dtype or stride does not fit, in one line.
    """
    num_valid = check_logits("vocab_stats", logits_TV, num_valid, labels=labels_T, label_logits=label_logits_T)
    return _stats(logits_TV, labels_T.contiguous(), num_valid, as_float32(label_logits_T))


def vocab_scores(
    logits_TV: torch.Tensor,
    labels_T: torch.Tensor,
    label_logits_T: torch.Tensor,
    max_T: torch.Tensor,
    bits: int,
    num_valid: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of exponentials in fixed point, which does not show how the vocabulary is cut, and the label's rank.

    Args:
        logits_TV, labels_T, num_valid: as in `vocab_stats`.
        label_logits_T: float32, the label logit of every token over all shards.
        max_T: float32, the maximum of every token over all shards.
        bits: exp(0) is 2^bits units; 2^bits times the vocabulary's size must stay below 2^63.

    Returns:
        units_T int64: the sum of exp(logit - max), each term cut down to whole units; rank_T int32: the number of
        logits strictly greater than the label's, without the label's own column. Both add up over the shards.

    Raises:
        ValueError: a shape, dtype or stride does not fit, in one line.
    """
    num_valid = check_logits(
        "vocab_scores", logits_TV, num_valid, label_logits=label_logits_T, max=max_T, labels=labels_T
    )
    label_logits_T, max_T = label_logits_T.float().contiguous(), max_T.float().contiguous()
    return _scores(logits_TV, labels_T.contiguous(), label_logits_T, max_T, bits, num_valid)


def vocab_grad_(
    logits_TV: torch.Tensor,
    labels_T: torch.Tensor,
    logsumexp_T: torch.Tensor,
    scale_T: torch.Tensor,
    num_valid: int | None = None,
    smooth_T2: torch.Tensor | None = None,
) -> torch.Tensor:
    """Overwrites the logits with scale * (softmax - onehot(label)), and returns them.

    With label smoothing or a z-loss it is scale * softmax - label_scale * onehot(label) - uniform.

    Args:
        logits_TV: as in `vocab_stats`; overwritten, padding columns with 0.
        labels_T: as in `vocab_stats`.
        logsumexp_T: float32, over the whole vocabulary.
        scale_T: float32, weight of every token's loss; 0 where it is ignored.
        num_valid: as in `vocab_stats`.
        smooth_T2: float32, (label_scale, uniform) of every token, or None: (scale, 0).

    Raises:
        ValueError: a shape, dtype or stride does not fit, in one line.
    """
    num_valid = check_logits("vocab_grad_", logits_TV, num_valid, labels=labels_T, logsumexp=logsumexp_T, scale=scale_T)
    check_smooth("vocab_grad_", logits_TV, smooth_T2)
    logsumexp_T, scale_T = logsumexp_T.float().contiguous(), scale_T.float().contiguous()
    _grad_(logits_TV, labels_T.contiguous(), logsumexp_T, scale_T, num_valid, as_float32(smooth_T2))
    return logits_TV
