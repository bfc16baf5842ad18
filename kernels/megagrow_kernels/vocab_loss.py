"""Cross-entropy over the local shard of a vocabulary: statistics, label rank, gradient in place.

The caller merges the statistics of the shards r, over ranks with whatever collective it likes:

    max = max_r max_r                   sum_exp = sum_r sum_exp_r * exp(max_r - max)
    label_logit = sum_r label_logit_r   rank = sum_r rank_r
    logsumexp = max + log(sum_exp)      loss = logsumexp - label_logit

Running maximum and sum: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018),
algorithm 3. Bytes per logit with 2-byte logits: statistics 2, gradient 4 (together 6, the floor for
a loss whose logits are in memory), rank 2.

Legend: T = tokens, V = local vocabulary (columns of the shard; the last ones may be padding),
3 = (max, sum_exp, label_logit).
Prefixes: i_ index, o_ offsets, p_ pointer, b_ values of a block, m_ mask.
"""

import torch
import triton
import triton.language as tl

from megagrow_kernels.launch import pick

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def vocab_stats_ref(logits_TV: torch.Tensor, labels_T: torch.Tensor, num_valid: int | None = None) -> torch.Tensor:
    """The definition of `vocab_stats`, in the precision of its inputs, given a finite logit."""
    valid_TV = logits_TV[:, :num_valid]
    max_T1 = valid_TV.amax(-1, keepdim=True)
    onehot_TV = labels_T[:, None] == torch.arange(valid_TV.shape[1], device=labels_T.device)
    label_logit_T = torch.where(onehot_TV, valid_TV, 0).sum(-1)
    return torch.stack((max_T1[:, 0], (valid_TV - max_T1).exp().sum(-1), label_logit_T), -1)


def vocab_rank_ref(
    logits_TV: torch.Tensor,
    label_logits_T: torch.Tensor,
    labels_T: torch.Tensor,
    num_valid: int | None = None,
) -> torch.Tensor:
    """The definition of `vocab_rank`."""
    valid_TV = logits_TV[:, :num_valid]
    other_TV = labels_T[:, None] != torch.arange(valid_TV.shape[1], device=labels_T.device)
    return ((valid_TV > label_logits_T[:, None]) & other_TV).sum(-1).to(torch.int32)


def vocab_grad_ref(
    logits_TV: torch.Tensor,
    labels_T: torch.Tensor,
    logsumexp_T: torch.Tensor,
    scale_T: torch.Tensor,
    num_valid: int | None = None,
) -> torch.Tensor:
    """The definition of `vocab_grad_`, not in place."""
    columns_V = torch.arange(logits_TV.shape[1], device=labels_T.device)
    onehot_TV = (labels_T[:, None] == columns_V).to(logits_TV.dtype)
    grad_TV = scale_T[:, None] * ((logits_TV - logsumexp_T[:, None]).exp() - onehot_TV)
    return grad_TV if num_valid is None else torch.where(columns_V < num_valid, grad_TV, 0)


@triton.jit
def _update_stats(b_max, b_sum, b_x):
    """One more block: one maximum per row; the sums stay spread over the columns until the end."""
    b_new = tl.maximum(b_max, tl.max(b_x, axis=0))
    # As long as every logit is -inf the reference point is 0, since -inf - -inf would be NaN.
    b_at = tl.where(b_new == float("-inf"), 0.0, b_new)
    return b_new, b_sum * tl.exp(b_max - b_at) + tl.exp(b_x - b_at)


@triton.jit
def _local_column(i_label, num_valid):
    """The label as a 32-bit column of this shard, or -1 where it is not here."""
    return tl.where((i_label >= 0) & (i_label < num_valid), i_label, -1).to(tl.int32)


@triton.jit(do_not_specialize=["num_valid"])
def vocab_stats_kernel(p_logits, p_labels, p_stats, stride_t, num_valid, BLOCK_V: tl.constexpr):
    i_t = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_t * stride_t
    o_block = tl.arange(0, BLOCK_V)
    b_max = tl.full([], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_V], dtype=tl.float32)
    # Full blocks load without a mask: a mask at an odd num_valid would cost the 128-bit loads.
    # With `//` and `*` for `%` the gradient kernel takes 100 registers instead of 40 (sm_90a, bf16).
    num_full = num_valid - num_valid % BLOCK_V
    for i_v in range(0, num_full, BLOCK_V):
        b_x = tl.load(p_row + (i_v + o_block)).to(tl.float32)
        b_max, b_sum = _update_stats(b_max, b_sum, b_x)
    if num_full < num_valid:
        o_v = num_full + o_block
        b_x = tl.load(p_row + o_v, mask=o_v < num_valid, other=float("-inf")).to(tl.float32)
        b_max, b_sum = _update_stats(b_max, b_sum, b_x)
    i_label = _local_column(tl.load(p_labels + i_t), num_valid)
    b_label = tl.load(p_row + i_label, mask=i_label >= 0, other=0.0).to(tl.float32)
    tl.store(p_stats + i_t * 3, b_max)
    tl.store(p_stats + i_t * 3 + 1, tl.sum(b_sum, axis=0))
    tl.store(p_stats + i_t * 3 + 2, b_label)


@triton.jit(do_not_specialize=["num_valid"])
def vocab_rank_kernel(p_logits, p_label_logits, p_labels, p_rank, stride_t, num_valid, BLOCK_V: tl.constexpr):
    i_t = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_t * stride_t
    o_block = tl.arange(0, BLOCK_V)
    i_label = _local_column(tl.load(p_labels + i_t), num_valid)
    b_label = tl.load(p_label_logits + i_t)
    b_count = tl.zeros([BLOCK_V], dtype=tl.int32)
    num_full = num_valid - num_valid % BLOCK_V
    for i_v in range(0, num_full, BLOCK_V):
        o_v = i_v + o_block
        b_x = tl.load(p_row + o_v).to(tl.float32)
        b_count += ((b_x > b_label) & (o_v != i_label)).to(tl.int32)
    if num_full < num_valid:
        o_v = num_full + o_block
        b_x = tl.load(p_row + o_v, mask=o_v < num_valid, other=float("-inf")).to(tl.float32)
        b_count += ((b_x > b_label) & (o_v != i_label)).to(tl.int32)
    tl.store(p_rank + i_t, tl.sum(b_count, axis=0))


@triton.jit(do_not_specialize=["V", "num_valid"])
def vocab_grad_kernel(p_logits, p_labels, p_logsumexp, p_scale, stride_t, V, num_valid, BLOCK_V: tl.constexpr):
    i_t = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_t * stride_t
    o_block = tl.arange(0, BLOCK_V)
    i_label = _local_column(tl.load(p_labels + i_t), num_valid)
    b_logsumexp = tl.load(p_logsumexp + i_t)
    b_scale = tl.load(p_scale + i_t)
    num_full = num_valid - num_valid % BLOCK_V
    for i_v in range(0, num_full, BLOCK_V):
        o_v = i_v + o_block
        b_p = tl.exp(tl.load(p_row + o_v).to(tl.float32) - b_logsumexp)
        b_grad = b_scale * tl.where(o_v == i_label, b_p - 1.0, b_p)
        tl.store(p_row + o_v, b_grad.to(p_logits.dtype.element_ty))
    for i_v in range(num_full, V, BLOCK_V):
        o_v = i_v + o_block
        b_x = tl.load(p_row + o_v, mask=o_v < num_valid, other=float("-inf")).to(tl.float32)
        b_p = tl.exp(b_x - b_logsumexp)
        b_grad = b_scale * tl.where(o_v == i_label, b_p - 1.0, b_p)
        tl.store(p_row + o_v, b_grad.to(p_logits.dtype.element_ty), mask=o_v < V)


def _check(name: str, logits_TV: torch.Tensor, num_valid: int | None, **per_token: torch.Tensor) -> int:
    """The number of valid columns, once every argument fits."""
    T, V = logits_TV.shape
    if logits_TV.dtype not in DTYPES:
        raise ValueError(f"{name}: logits are {logits_TV.dtype}, the kernel takes float16, bfloat16 or float32")
    if V > 1 and logits_TV.stride(1) != 1:
        raise ValueError(f"{name}: logits of one token are {logits_TV.stride(1)} elements apart, must touch")
    for argument, tensor in per_token.items():
        if tensor.shape != (T,):
            raise ValueError(f"{name}: {argument} has shape {tuple(tensor.shape)}, {T} tokens need ({T},)")
    if num_valid is None:
        return V
    if not 0 <= num_valid <= V:
        raise ValueError(f"{name}: num_valid={num_valid} lies outside 0..{V}")
    return num_valid


def vocab_stats(logits_TV: torch.Tensor, labels_T: torch.Tensor, num_valid: int | None = None) -> torch.Tensor:
    """Maximum, sum of exponentials and label logit of every token, in one read of the logits.

    Args:
        logits_TV: float16, bfloat16 or float32; rows may be strided.
        labels_T: int64, local column of the label; any index outside 0..num_valid - 1 means that
            the label is on another shard, or ignored.
        num_valid: columns from here on are padding and count as -inf; default: all are valid.

    Returns:
        stats_T3 float32: (max, sum of exp(logit - max), label logit). Without a label here the
        last is 0; without any valid column the first two are (-inf, 0).

    Raises:
        ValueError: a shape, dtype or stride does not fit, in one line.
    """
    num_valid = _check("vocab_stats", logits_TV, num_valid, labels=labels_T)
    T, V = logits_TV.shape
    stats_T3 = torch.empty(T, 3, dtype=torch.float32, device=logits_TV.device)
    launch = pick("vocab", V, logits_TV.device)
    if T > 0:
        vocab_stats_kernel[(T,)](
            logits_TV,
            labels_T.contiguous(),
            stats_T3,
            logits_TV.stride(0),
            num_valid,
            BLOCK_V=launch.block,
            num_warps=launch.num_warps,
        )
    return stats_T3


def vocab_rank(
    logits_TV: torch.Tensor,
    label_logits_T: torch.Tensor,
    labels_T: torch.Tensor,
    num_valid: int | None = None,
) -> torch.Tensor:
    """Number of local logits strictly greater than the label's; the sum over shards is its rank.

    The label's own column is skipped: a label logit that went through other arithmetic would
    otherwise count itself.

    Args:
        logits_TV: as in `vocab_stats`.
        label_logits_T: float32, the label logit of every token, summed over the shards.
        labels_T: int64, local column of the label, as in `vocab_stats`.
        num_valid: as in `vocab_stats`.

    Returns:
        rank_T int32.

    Raises:
        ValueError: a shape, dtype or stride does not fit, in one line.
    """
    num_valid = _check("vocab_rank", logits_TV, num_valid, label_logits=label_logits_T, labels=labels_T)
    T, V = logits_TV.shape
    rank_T = torch.empty(T, dtype=torch.int32, device=logits_TV.device)
    launch = pick("vocab", V, logits_TV.device)
    if T > 0:
        vocab_rank_kernel[(T,)](
            logits_TV,
            label_logits_T.float().contiguous(),
            labels_T.contiguous(),
            rank_T,
            logits_TV.stride(0),
            num_valid,
            BLOCK_V=launch.block,
            num_warps=launch.num_warps,
        )
    return rank_T


def vocab_grad_(
    logits_TV: torch.Tensor,
    labels_T: torch.Tensor,
    logsumexp_T: torch.Tensor,
    scale_T: torch.Tensor,
    num_valid: int | None = None,
) -> torch.Tensor:
    """Overwrites the logits with scale * (softmax - onehot(label)), and returns them.

    Args:
        logits_TV: as in `vocab_stats`; overwritten, padding columns with 0.
        labels_T: as in `vocab_stats`.
        logsumexp_T: float32, over the whole vocabulary.
        scale_T: float32, weight of every token's loss; 0 where it is ignored.
        num_valid: as in `vocab_stats`.

    Raises:
        ValueError: a shape, dtype or stride does not fit, in one line.
    """
    num_valid = _check("vocab_grad_", logits_TV, num_valid, labels=labels_T, logsumexp=logsumexp_T, scale=scale_T)
    T, V = logits_TV.shape
    launch = pick("vocab", V, logits_TV.device)
    if T > 0:
        vocab_grad_kernel[(T,)](
            logits_TV,
            labels_T.contiguous(),
            logsumexp_T.float().contiguous(),
            scale_T.float().contiguous(),
            logits_TV.stride(0),
            V,
            num_valid,
            BLOCK_V=launch.block,
            num_warps=launch.num_warps,
        )
    return logits_TV
