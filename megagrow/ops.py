"""The one door to the kernels: Triton for tensors on a GPU, a PyTorch twin elsewhere.

Everything here sees plain local tensors and no process group. The twins are in torch_ops.py, by the same names and with
the same parameters. Matrix products are in product_ops.py, attention and its back ends in attention_ops.py, what growth
needs in growth_ops.py, which kernels serve in serving.py.

Legend: T = tokens, V = local vocabulary, H = hidden size, B = batch, S = sequence, N = heads, D = head dimension,
F = FFN size, 3 = (max, sum_exp, label_logit).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from megagrow import torch_ops, torch_vocab_ops
from megagrow.attention_ops import DocumentMask, allow_versions, attention, check_attention_backend, document_mask
from megagrow.growth_ops import dense_blocks_, dense_map, dense_map_, layer_mix, sparse_map_
from megagrow.product_ops import add_product_, linear, piece_rows, product
from megagrow.serving import (
    KERNEL_DTYPES,
    KERNELS,
    MEASURED,
    check_kernels,
    chosen,
    kernels_for,
    let_kernels_serve,
)

__all__ = [
    "KERNELS",
    "KERNEL_DTYPES",
    "MEASURED",
    "DocumentMask",
    "adamw_table",
    "add_product_",
    "attention",
    "bias_add",
    "bias_gelu",
    "bias_gelu_erf",
    "check_attention_backend",
    "check_kernels",
    "chosen",
    "compiled",
    "dense_blocks_",
    "dense_map",
    "dense_map_",
    "distill_grad_",
    "distill_stats",
    "document_mask",
    "dropout_add",
    "gate_up_rows",
    "geglu",
    "layer_mix",
    "layer_norm",
    "let_kernels_serve",
    "linear",
    "piece_rows",
    "product",
    "rms_norm",
    "rope_",
    "serves",
    "sparse_map_",
    "swiglu",
    "vocab_grad_",
    "vocab_scores",
    "vocab_stats",
]


def serves(name: str, x: Tensor) -> bool:
    """Whether the kernels of that name serve `x`."""
    return kernels_for(name, x) is not None


def bias_add(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """x + (y + bias); x and y [..., H], bias [H]. The kernel is `dropout_add`'s, which drops nothing."""
    kernels = kernels_for("dropout_add", x)
    if kernels is None:
        return x + (y + bias)
    keys = torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
    return kernels.dropout_add(x, y, bias, 0.0, keys, 0)


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: None = None) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square norm over the last dimension, times `weight`; float32 statistics at least.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4, with eps
    inside the root.

    Args:
        x: [..., H]; the output has its dtype.
        weight: [H], any floating dtype.
        eps: added to the mean square.
        residual: like x in shape and dtype; added to it before the norm.

    Returns:
        y of x's shape; with a residual the pair (y, x + residual).
    """
    kernels = kernels_for("norm", x)
    if kernels is None:
        return torch_ops.rms_norm(x, weight, eps, residual)
    return kernels.rms_norm(x, weight, eps, residual)


@overload
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: None = None) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer norm over the last dimension, times `weight`, plus `bias`; float32 statistics at least.

    Source: Ba, Kiros and Hinton, "Layer Normalization" (2016), equation 4.

    Args:
        x: [..., H]; the output has its dtype.
        weight: [H], any floating dtype.
        bias: [H], likewise, or None.
        eps: added to the variance.
        residual: like x in shape and dtype; added to it before the norm.

    Returns:
        y of x's shape; with a residual the pair (y, x + residual).
    """
    kernels = kernels_for("norm", x)
    if kernels is None:
        return torch_ops.layer_norm(x, weight, bias, eps, residual)
    return kernels.layer_norm(x, weight, bias, eps, residual)


def vocab_stats(
    logits_TV: Tensor,
    labels_T: Tensor,
    num_valid: int | None = None,
    label_logits_T: Tensor | None = None,
    *,
    fused: bool = False,
) -> Tensor:
    """Maximum, sum of exponentials, label logit and perhaps rank of every token over one vocabulary shard.

    Not differentiable: `vocab_grad_` is the gradient. The statistics of shards r merge as

        max = max_r max_r                   sum_exp = sum_r sum_exp_r * exp(max_r - max)
        label_logit = sum_r label_logit_r   rank = sum_r rank_r

    and then logsumexp = max + log(sum_exp), loss = logsumexp - label_logit.

    Args:
        logits_TV: floating; rows may be strided.
        labels_T: int64, local column of the label; any index outside 0..num_valid - 1 means that
            the label is on another shard, or ignored.
        num_valid: columns from here on are padding and count as -inf; default: all are valid.
        label_logits_T: the label logit of every token over all shards, in the dtype of the statistics; asks for the
            rank, the number of logits strictly greater. The label's own column is skipped: a label logit that went
            through other arithmetic would otherwise count itself.
        fused: let torch.compile make one pass of the twin, where no kernel serves.

    Returns:
        stats_TK, float32 (float64 for float64 logits): (max, sum of exp(logit - max), label logit), rank if asked for.
        Without a label here the label logit is 0; without any valid column the first two are (-inf, 0).
    """
    kernels = kernels_for("vocab_loss", logits_TV)
    if kernels is not None:
        return kernels.vocab_stats(logits_TV, labels_T, num_valid, label_logits_T)
    if fused and logits_TV[:, :num_valid].numel():
        return compiled(torch_vocab_ops.stats_of_rows)(logits_TV[:, :num_valid], labels_T, label_logits_T)
    return torch_vocab_ops.vocab_stats(logits_TV, labels_T, num_valid, label_logits_T)


def vocab_grad_(
    logits_TV: Tensor,
    labels_T: Tensor,
    logsumexp_T: Tensor,
    scale_T: Tensor,
    num_valid: int | None = None,
    smooth_T2: Tensor | None = None,
    *,
    fused: bool = False,
) -> Tensor:
    """Overwrites logits with the gradient of sum(scale * loss): scale * (softmax - onehot(label)).

    With label smoothing or a z-loss it is scale * softmax - label_scale * onehot(label) - uniform.

    Args:
        logits_TV, labels_T, num_valid, fused: as in `vocab_stats`; padding columns become 0.
        logsumexp_T: over the whole vocabulary, in the dtype of the statistics.
        scale_T: weight of every token's loss, in the dtype of the statistics; 0 for ignored ones.
        smooth_T2: (label_scale, uniform) of every token, likewise, or None: (scale, 0).

    Returns:
        logits_TV itself.
    """
    kernels = kernels_for("vocab_loss", logits_TV)
    if kernels is not None:
        return kernels.vocab_grad_(logits_TV, labels_T, logsumexp_T, scale_T, num_valid, smooth_T2)
    if fused and num_valid is None and logits_TV.numel():
        compiled(torch_vocab_ops.write_vocab_grad)(logits_TV, labels_T, logsumexp_T, scale_T, smooth_T2)
        return logits_TV
    return torch_vocab_ops.vocab_grad_(logits_TV, labels_T, logsumexp_T, scale_T, num_valid, smooth_T2)


def vocab_scores(
    logits_TV: Tensor,
    labels_T: Tensor,
    label_logits_T: Tensor,
    max_T: Tensor,
    bits: int,
    num_valid: int | None = None,
    *,
    fused: bool = False,
) -> tuple[Tensor, Tensor]:
    """The sum of exponentials in fixed point, which does not show how the vocabulary is cut, and the label's rank.

    Args:
        logits_TV, labels_T, num_valid, fused: as in `vocab_stats`.
        label_logits_T: the label logit of every token over all shards, in the dtype of the statistics.
        max_T: the maximum of every token over all shards, likewise.
        bits: exp(0) is 2^bits units; 2^bits times the vocabulary's size must stay below 2^63.

    Returns:
        units_T int64: the sum of exp(logit - max), each term cut down to whole units; rank_T int32: the number of
        logits strictly greater than the label's, without the label's own column. Both add up over the shards.
    """
    kernels = kernels_for("vocab_loss", logits_TV)
    if kernels is not None:
        return kernels.vocab_scores(logits_TV, labels_T, label_logits_T, max_T, bits, num_valid)
    if fused and logits_TV[:, :num_valid].numel():
        return compiled(torch_vocab_ops.scores_of_rows)(logits_TV[:, :num_valid], labels_T, label_logits_T, max_T, bits)
    return torch_vocab_ops.vocab_scores(logits_TV, labels_T, label_logits_T, max_T, bits, num_valid)


def distill_stats(
    logits_TV: Tensor,
    teacher_TV: Tensor,
    labels_T: Tensor,
    temperature: float,
    student_temperature: float,
    num_valid: int | None = None,
    label_logits_T: Tensor | None = None,
    reverse: bool = False,
    *,
    fused: bool = False,
) -> Tensor:
    """What cross-entropy, KL divergence from a teacher, and the label's rank are made of, over one vocabulary shard.

    With p = softmax(t / rho), q = softmax(s / sigma), lse_t = t_max / rho + log t_sum, lse_s = max / sigma + log
    soft_sum:

        KL(p | q) = sum p (log p - log q) = cross / t_sum - lse_t + lse_s
        KL(q | p) = sum q (log q - log p) = cross / soft_sum - lse_s + lse_t      (reverse)
        entropy of p = lse_t - t_mean / t_sum

    Sums of shards shrink by exp((max_r - max) / temperature) when they merge.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015), section 2; the reverse
    direction: Gu et al., "MiniLLM" (2024), section 2.1.

    Args:
        logits_TV: the student's.
        teacher_TV: the teacher's, of the same shape.
        temperature: rho, of the teacher.
        student_temperature: sigma, of the student in the KL divergence.
        labels_T, num_valid, label_logits_T, fused: as in `vocab_stats`.
        reverse: for the divergence of the student from the teacher.

    Returns:
        stats_TK: (max, sum of exp(s - max), label logit, soft_sum = sum of exp((s - max) / sigma), t_max,
        t_sum = sum of exp((t - t_max) / rho), cross = the latter weighted with t / rho - s / sigma (reverse: soft_sum
        with s / sigma - t / rho), t_mean = t_sum weighted with t / rho), rank if asked for.
    """
    kernels = kernels_for("distill_loss", logits_TV)
    rest = labels_T, temperature, student_temperature
    if kernels is not None:
        return kernels.distill_stats(logits_TV, teacher_TV, *rest, num_valid, label_logits_T, reverse)
    if fused and logits_TV[:, :num_valid].numel():
        rows = logits_TV[:, :num_valid], teacher_TV[:, :num_valid]
        return compiled(torch_vocab_ops.distill_stats_of_rows)(*rows, *rest, label_logits_T, reverse)
    return torch_vocab_ops.distill_stats(logits_TV, teacher_TV, *rest, num_valid, label_logits_T, reverse)


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
    *,
    fused: bool = False,
) -> Tensor:
    """Overwrites the student's logits with ce_scale * (softmax - onehot(label)) + kd_scale * (q - p).

    The reverse divergence has q * (s / sigma - t / rho - mean) in the place of q - p.

    Args:
        logits_TV, teacher_TV, labels_T, temperature, student_temperature, num_valid, fused: as in `distill_stats`;
            padding columns become 0.
        logsumexps_T3: over the whole vocabulary: of s, of s / sigma, of t / rho; the last one is, for the reverse
            divergence, the mean of s / sigma - t / rho under q instead.
        ce_scale_T: weight of every token's cross-entropy.
        kd_scale_T: weight of every token's divergence, divided by sigma.
        smooth_T2: of the cross-entropy, as in `vocab_grad_`.
        reverse: the divergence is that of the student from the teacher.

    Returns:
        logits_TV itself.
    """
    kernels = kernels_for("distill_loss", logits_TV)
    per_token = labels_T, logsumexps_T3, ce_scale_T, kd_scale_T
    rest = *per_token, temperature, student_temperature
    if kernels is not None:
        return kernels.distill_grad_(logits_TV, teacher_TV, *rest, num_valid, smooth_T2, reverse)
    if fused and num_valid is None and logits_TV.numel():
        compiled(torch_vocab_ops.write_distill_grad)(logits_TV, teacher_TV, *rest, smooth_T2, reverse)
        return logits_TV
    return torch_vocab_ops.distill_grad_(logits_TV, teacher_TV, *rest, num_valid, smooth_T2, reverse)


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of a function, one for all who ask: what calls it with equal shapes shares its code.

    Every model of a run that grows takes versions of its own: beyond torch's eight the newest would run uncompiled.
    """
    allow_versions()
    return torch.compile(function)


def adamw_table(params: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor]) -> Any:
    """The kernels' `AdamWTable` of these tensors, whose `update` is a step; for tensors that its kernel `serves`.

    Args:
        params: plain float32 tensors of one device.
        exp_avgs, exp_avg_sqs: averages of the gradients and of their squares, like params.
    """
    kernels = kernels_for("adamw", params[0])
    assert kernels is not None, "torch's fused AdamW has to do"
    return kernels.AdamWTable(params, exp_avgs, exp_avg_sqs)


def gate_up_rows(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The fused weight or bias of gate and up in the dtype of compute, its rows ordered as `swiglu` wants the columns.

    Args:
        weight: [2 F, ...], gate in even rows, up in odd ones.

    Returns:
        On a CPU, which reads every second column at a tenth of its speed, all of gate before all of up; elsewhere as
        they are.
    """
    if torch_ops.alternates(weight):
        return weight.to(dtype)
    separate = weight.unflatten(0, (-1, 2)).transpose(0, 1)
    return separate.to(dtype, memory_format=torch.contiguous_format).flatten(0, 1)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020), equation 5.

    Args:
        gate_up: [..., 2 F], columns as `gate_up_rows` orders them.

    Returns:
        [..., F]
    """
    kernels = kernels_for("glu", gate_up)
    return torch_ops.swiglu(gate_up) if kernels is None else kernels.swiglu(gate_up)


def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up with GELU's tanh approximation; as `swiglu` otherwise."""
    kernels = kernels_for("glu", gate_up)
    return torch_ops.geglu(gate_up) if kernels is None else kernels.geglu(gate_up)


def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU of x + bias in its tanh approximation, as in GPT-2.

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016), section 2.

    Args:
        x: [..., F]; the result has its dtype.
        bias: [F], any floating dtype, or None.
    """
    kernels = kernels_for("gelu", x)
    return torch_ops.bias_gelu(x, bias) if kernels is None else kernels.bias_gelu(x, bias)


def bias_gelu_erf(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU of x + bias by its definition, x / 2 (1 + erf(x / √2)), as in BERT; as `bias_gelu` otherwise.

    It has no kernel of its own: torch's, and a compiler's, serve everywhere.
    """
    return torch_ops.bias_gelu_erf(x, bias)


def dropout_add(x: Tensor, y: Tensor, bias: Tensor | None, rate: float, keys: Tensor, place: int) -> Tensor:
    """x + dropout(y + bias), with a mask that depends on (token key, place, feature) only: see `torch_ops.kept`.

    Args:
        x: [..., H]; the result has its dtype.
        y: like x in shape and dtype.
        bias: [H], any floating dtype, or None.
        rate: the share that is dropped; in effect its nearest multiple of 2^-16.
        keys: [...] int64, one for each token.
        place: a number of its own for each place in the model that drops.
    """
    kernels = kernels_for("dropout_add", x)
    if kernels is None:
        return torch_ops.dropout_add(x, y, bias, rate, keys, place)
    return kernels.dropout_add(x, y, bias, rate, keys, place)


def rope_(
    q_BSND: Tensor,
    kv_BSKPD: Tensor,
    cos_SR: Tensor,
    sin_SR: Tensor,
    interleaved: bool = False,
    *,
    in_place: bool = True,
) -> tuple[Tensor, ...]:
    """Turns queries and keys by the angles of their positions (rotary position embedding).

    Source: Su et al., "RoFormer" (2021), equation 34, which pairs columns 2i and 2i + 1.

    Args:
        q_BSND: queries; overwritten where a kernel serves, not to be used afterwards.
        kv_BSKPD: keys (P = 1), or keys and values (P = 2), of which the values stay as they are; likewise.
        cos_SR, sin_SR: of R/2 angles of every position, twice over; the columns from R on stay as they are. Float32
            ones round the result to x's dtype once; with ones of x's dtype the twin gives Hugging Face's bits.
        interleaved: pairs columns 2i and 2i + 1; else i and i + R/2, as Hugging Face's Llama.
        in_place: whether the arguments may be overwritten; not what something else has kept.

    Returns:
        (q, k) or (q, k, v).
    """
    kernels = kernels_for("rope", q_BSND)
    rotate = torch_ops.rope_ if kernels is None else kernels.rope_
    return rotate(q_BSND, kv_BSKPD, cos_SR, sin_SR, interleaved, in_place=in_place)
