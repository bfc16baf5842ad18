"""The terms of the loss of a chunk of tokens: their sums over vocabulary shards, and their gradients in place.

    loss = Σ_t weight_t · [(1 − ω)·H_t + ω·scale·D_t]
    H = CE + ε·(s[label] − mean_v s) + λ·lse(s)²        CE = lse(s) − s[label]
    D = Σ_v p·(log p − log q)                            forward_kl     ∂D/∂s = (q − p) / σ
      = −Σ_v p·log q                                     cross_entropy  the same
      = Σ_v q·(log q − log p)                            reverse_kl     ∂D/∂s = q·(log q − log p − D) / σ
    p = softmax(t / ρ), q = softmax(s / σ) over the tokens that student and teacher have in common

s and t are the logits of student and teacher. The logits become their gradient while they are at hand. Each rank reads
them once for statistics that merge, which one all-gather brings together, and once for the gradient, which is written
by hand, where autograd does not see the collective.

Sources: the mixture: SALT (Rawat et al., 2024, arXiv 2410.18779); distillation: Hinton et al., 2015; reverse KL: Gu et
al., 2024 (MiniLLM, arXiv 2306.08543); label smoothing ε: Szegedy et al., 2016 (arXiv 1512.00567), as in
`torch.nn.functional.cross_entropy`; z-loss λ: Chowdhery et al., 2022 (PaLM, arXiv 2204.02311).
"""

# Shape suffix legend: C = tokens of a chunk, P = tokens of a piece of it, G = the teacher's hidden, V = rows of the
# vocabulary on this rank, R = tensor ranks, K = statistics of a token.

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megagrow import ops
from megagrow.parallel.vocab_shard import VocabShard, logsumexp

TEACHER_BYTES = {
    "cuda": 2**26,
    "cpu": 2**24,
}  # of its logits that exist at a time; a CPU's cache holds them beside ours


@dataclass(frozen=True)
class LossOptions:
    """What the loss of a token is.

    Attributes:
        weight: ω, the share of the distillation term.
        temperature: ρ.
        both: apply ρ to the student too (σ = ρ), or to the teacher only (σ = 1).
        scale: factor on the distillation term (ρ² for Hinton's convention).
        chunk_tokens: tokens whose logits exist at a time.
        compiled: fuse the passes over the logits with torch.compile, where no kernel does it.
        divergence: of the distillation term; the cross-entropy to the teacher is the forward KL plus its entropy.
        label_smoothing: ε, the share of the label's probability that is spread over the whole vocabulary.
        z_loss: λ, the weight of lse².
    """

    weight: float = 0.0
    temperature: float = 1.0
    both: bool = False
    scale: float = 1.0
    chunk_tokens: int = 1024
    compiled: bool = False
    divergence: Literal["forward_kl", "reverse_kl", "cross_entropy"] = "forward_kl"
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    @property
    def student_temperature(self) -> float:
        """σ."""
        return self.temperature if self.both else 1.0

    @property
    def is_reverse(self) -> bool:
        """Whether the divergence is that of the student from the teacher."""
        return self.divergence == "reverse_kl"

    @property
    def is_smooth(self) -> bool:
        """Whether more than the cross-entropy with the labels is minimised in its term."""
        return self.label_smoothing > 0 or self.z_loss > 0


class Hard(NamedTuple):
    """The term of the labels, per token: log-sum of exponentials, cross-entropy, and what is minimised (H)."""

    lse_C: Tensor
    ce_C: Tensor
    loss_C: Tensor


class Soft(NamedTuple):
    """The term of the teacher, per token: what its gradient needs (see `ops.distill_grad_`), D, and p's entropy."""

    lse_C: Tensor
    third_C: Tensor
    kd_C: Tensor
    entropy_C: Tensor


def cross_entropy(
    logits_CV: Tensor, local_C: Tensor, weights_C: Tensor, shard: VocabShard, options: LossOptions, write_gradient: bool
) -> Tensor:
    """Returns the sums [loss, CE, 0, 0]; turns the logits into their gradient when asked to."""
    stats_CK = with_total(ops.vocab_stats(logits_CV, local_C, fused=shard.fused), logits_CV, options)
    found_RCK = shard.of_all_ranks(stats_CK)
    hard = hard_term(found_RCK[..., :3], found_RCK[..., 3:], shard, options)
    ce = (hard.ce_C * weights_C).sum()
    loss = (hard.loss_C * weights_C).sum() if options.is_smooth else ce
    if write_gradient:
        scale_C, smooth_C2 = hard_scales(weights_C, hard, shard, options)
        ops.vocab_grad_(logits_CV, local_C, hard.lse_C, scale_C, smooth_T2=smooth_C2, fused=shard.fused)
    zero = torch.zeros_like(ce)
    return torch.stack([loss, ce, zero, zero])


def distillation(
    logits_CV: Tensor,
    teacher_CG: Tensor,
    teacher_head_VG: Tensor,
    local_C: Tensor,
    weights_C: Tensor,
    shard: VocabShard,
    options: LossOptions,
    write_gradient: bool,
) -> Tensor:
    """Returns the sums [loss, CE, KD, p's entropy]; turns the logits into their gradient when asked to.

    Args:
        teacher_head_VG: the teacher's rows of the common tokens of this rank.
    """
    head = teacher_head_VG.to(teacher_CG.dtype)
    size, pieces = teacher_tokens(shard.most_rows, head.element_size(), head.device.type), []
    for start in range(0, len(logits_CV), size):
        part = slice(start, start + size)
        teacher_PV = ops.product(teacher_CG[part], head)
        given = logits_CV[part], teacher_PV, local_C[part], weights_C[part]
        pieces.append(_piece(*given, shard, options, write_gradient))
        del teacher_PV, given  # before the next piece's exist
    # Summed over the chunk at once, as a plain loss is: so ω = 0 gives its bits.
    ce, hard, kd, entropy = ((torch.cat(values) * weights_C).sum() for values in zip(*pieces, strict=True))
    kd = kd * options.scale
    loss = (1 - options.weight) * (hard if options.is_smooth else ce) + options.weight * kd
    return torch.stack([loss, ce, kd, entropy])


def with_total(stats_CK: Tensor, logits_CV: Tensor, options: LossOptions) -> Tensor:
    """A rank's statistics with one more, the sum of all logits, where label smoothing needs it."""
    if options.label_smoothing == 0:
        return stats_CK
    return torch.cat((stats_CK, logits_CV.sum(-1, keepdim=True, dtype=stats_CK.dtype)), dim=-1)


def hard_term(stats_RC3: Tensor, totals_RCK: Tensor, shard: VocabShard, options: LossOptions) -> Hard:
    """The term of the labels from what all ranks found, see `with_total`."""
    max_RC, sum_RC, label_RC = stats_RC3.unbind(-1)
    lse_C, label_C = logsumexp(max_RC, sum_RC), label_RC.sum(0)
    loss_C = ce_C = lse_C - label_C
    if options.label_smoothing:
        loss_C = loss_C + options.label_smoothing * (label_C - totals_RCK.sum((0, 2)) / shard.vocab_size)
    if options.z_loss:
        loss_C = loss_C + options.z_loss * lse_C.square()
    return Hard(lse_C, ce_C, loss_C)


def hard_scales(scale_C: Tensor, hard: Hard, shard: VocabShard, options: LossOptions) -> tuple[Tensor, Tensor | None]:
    """The factors of the gradient of Σ scale · H: of softmax, and what `ops.vocab_grad_` calls smooth."""
    if not options.is_smooth:
        return scale_C, None
    spread = options.label_smoothing
    smooth_C2 = torch.stack((scale_C * (1 - spread), scale_C * (spread / shard.vocab_size)), dim=-1)
    return scale_C * (1 + 2 * options.z_loss * hard.lse_C), smooth_C2


def teacher_tokens(num_rows: int, width: int, device_type: str) -> int:
    """Tokens whose teacher logits exist at a time, a multiple of 64.

    Args:
        num_rows: of the output matrix, on the rank that has most: all go through the same pieces together.
        width: bytes of a logit.
        device_type: what is none of the two counts as cuda.
    """
    most = TEACHER_BYTES["cpu" if device_type == "cpu" else "cuda"]
    return max(most // (max(num_rows, 1) * width) // 64 * 64, 64)


def _piece(
    logits_PV: Tensor,
    teacher_PV: Tensor,
    local_P: Tensor,
    weights_P: Tensor,
    shard: VocabShard,
    options: LossOptions,
    write_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """CE, H, D and p's entropy of every token; turns the logits into their gradient when asked to."""
    size = teacher_PV.shape[1]
    common_PV, rest_PV, rest_P = logits_PV[:, :size], logits_PV[:, size:], local_P - size
    temperatures, reverse = (options.temperature, options.student_temperature), options.is_reverse
    stats_PK = ops.distill_stats(common_PV, teacher_PV, local_P, *temperatures, reverse=reverse, fused=shard.fused)
    if shard.has_rest:
        stats_PK = torch.cat((stats_PK, ops.vocab_stats(rest_PV, rest_P, fused=shard.fused)), dim=-1)
    found_RPK = shard.of_all_ranks(with_total(stats_PK, logits_PV, options))
    soft = _soft(found_RPK[..., 0], found_RPK[..., 3:8], options)
    labelled_RP3 = found_RPK[..., :3]
    if shard.has_rest:
        labelled_RP3 = torch.cat((labelled_RP3, found_RPK[..., 8:11]))  # as if it were that of more ranks
    hard = hard_term(labelled_RP3, found_RPK[..., 11 if shard.has_rest else 8 :], shard, options)
    if write_gradient:
        scale_P, smooth_P2 = hard_scales(weights_P * (1 - options.weight), hard, shard, options)
        kd_scale_P = weights_P * (options.weight * options.scale / options.student_temperature)
        third_P = soft.third_C
        if shard.has_rest and options.student_temperature == 1:
            # Where σ is 1, the passes take softmax(s) over all tokens for q: over the common ones that is too little.
            lacking_P = hard.lse_C - soft.lse_C
            kd_scale_P = kd_scale_P * lacking_P.exp()
            third_P = third_P if reverse else third_P + lacking_P
        lses_P3 = torch.stack((hard.lse_C, soft.lse_C, third_P), dim=-1)
        rest = lses_P3, scale_P, kd_scale_P, *temperatures, None, smooth_P2, reverse
        ops.distill_grad_(common_PV, teacher_PV, local_P, *rest, fused=shard.fused)
        if shard.has_rest:
            ops.vocab_grad_(rest_PV, rest_P, hard.lse_C, scale_P, smooth_T2=smooth_P2, fused=shard.fused)
    return hard.ce_C, hard.loss_C, soft.kd_C, soft.entropy_C


def _soft(max_RC: Tensor, stats_RC5: Tensor, options: LossOptions) -> Soft:
    rho, sigma = options.temperature, options.student_temperature
    soft_sum_RC, teacher_max_RC, teacher_sum_RC, cross_RC, mean_RC = stats_RC5.unbind(-1)
    lse_C = logsumexp(max_RC, soft_sum_RC, sigma)
    teacher_lse_C = logsumexp(teacher_max_RC, teacher_sum_RC, rho)
    of_teacher_RC = (teacher_max_RC / rho - teacher_lse_C).exp()  # what a rank's sums are divided by, and merged with
    entropy_C = teacher_lse_C - (mean_RC * of_teacher_RC).sum(0)
    if options.is_reverse:
        cross_C = (cross_RC * (max_RC / sigma - lse_C).exp()).sum(0)
        return Soft(lse_C, cross_C, cross_C - lse_C + teacher_lse_C, entropy_C)
    kd_C = (cross_RC * of_teacher_RC).sum(0) - teacher_lse_C + lse_C
    return Soft(lse_C, teacher_lse_C, kd_C + entropy_C if options.divergence == "cross_entropy" else kd_C, entropy_C)
