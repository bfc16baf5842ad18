"""Distillation from targets that a teacher has left behind, a few tokens of each position, on vocabulary shards.

    top_k      KD_t = Σ_{v in K} p[v]·(log p[v] − log q[v]) + τ·(log τ − log q_tail)
               τ = 1 − Σ_{v in K} p[v],   q_tail = Σ_{v not in K} q[v]
    sampled    KD_t = − Σ_i (log q[v_i]) / N − H,   v_i drawn from p, H its entropy

With all tokens outside of K as one bucket, KD is the divergence of two coarser distributions: never negative, and never
above the full one (data-processing inequality; Cover & Thomas, 2006, section 2.8). Without the bucket, or with p
renormalised over K, it would be neither. The sampled form, and its gradient, are unbiased estimates of the full ones
(sparse logit sampling; Anshumann et al., 2025, arXiv 2503.16870).

q_tail is summed over the tokens outside of K, not taken as 1 − Σ q, which would lose all its digits where it is small.
Beside KD stands the same term of the labels as beside a teacher that is there (loss_terms.py), and q is likewise the
softmax over the tokens that both have. The reverse divergence has no such form: it needs p wherever q has mass.
"""

# Shape suffix legend: C = tokens of a chunk, V = local vocabulary rows, K = entries of a token, R = tensor ranks.

from dataclasses import dataclass

import torch
from torch import Tensor

from megagrow import ops
from megagrow.cpu_ops import wide_dtype
from megagrow.parallel.loss_terms import Hard, LossOptions, hard_scales, hard_term, with_total
from megagrow.parallel.vocab_shard import LocalEntries, VocabShard, logsumexp


@dataclass(frozen=True)
class CachedTargets:
    """What a teacher left behind for each token.

    Attributes:
        ids_TK: int64 tokens in the whole vocabulary; each once, except that repeats may have no mass.
        masses_TK1: their probabilities, then the mass of all others (top_k) or the entropy in nats (sampled).
        is_sample: whether the entries are drawn.
    """

    ids_TK: Tensor
    masses_TK1: Tensor
    is_sample: bool

    def rows(self, part: slice) -> "CachedTargets":
        return CachedTargets(self.ids_TK[part], self.masses_TK1[part], self.is_sample)


@dataclass(frozen=True)
class _Student:
    """What the student gives for each token; soft: with the logits that distillation sees.

    Attributes:
        hard: the term of the labels.
        soft_lse_C: logsumexp of all soft logits.
        base_C: logsumexp of those outside of the entries (top_k; -inf where there are none), or of all (sampled).
        picked_CK: soft logits of the entries that are on this shard.
        cross_C: Σ mass · soft logit of the entries, over all shards.
    """

    hard: Hard
    soft_lse_C: Tensor
    base_C: Tensor
    picked_CK: Tensor
    cross_C: Tensor


def cached_distillation(
    logits_CV: Tensor,
    targets: CachedTargets,
    local_C: Tensor,
    weights_C: Tensor,
    shard: VocabShard,
    options: LossOptions,
    write_gradient: bool,
) -> Tensor:
    """Returns the sums [loss, CE, KD, p's entropy]; turns the logits into their gradient when asked to."""
    omega, sigma = options.weight, options.student_temperature
    one_softmax = sigma == 1 and omega > 0 and not shard.has_rest  # serves both terms, and the logits need no copy
    soft_CV = logits_CV if one_softmax else _soft_logits(logits_CV, sigma, shard)
    entries = shard.entries(targets.ids_TK)
    student = _measure(logits_CV, soft_CV, targets, entries, local_C, shard, options)
    ce = (student.hard.ce_C * weights_C).sum()
    hard = (student.hard.loss_C * weights_C).sum() if options.is_smooth else ce
    entropy_C, kd_C = _entropy(targets, ce.dtype), _divergence(student, targets)
    kd_C = kd_C + entropy_C if options.divergence == "cross_entropy" else kd_C
    kd, entropy = (kd_C * weights_C).sum() * options.scale, (entropy_C * weights_C).sum()
    if write_gradient:
        hard_scale_C, smooth_C2 = hard_scales(weights_C * (1 - omega), student.hard, shard, options)
        kd_scale_C = weights_C * (omega * options.scale / sigma)
        if one_softmax:
            _soft_gradient_(soft_CV, entries, student, targets, kd_scale_C, hard_scale_C, local_C, smooth_C2, shard)
        else:
            ops.vocab_grad_(
                logits_CV, local_C, student.hard.lse_C, hard_scale_C, smooth_T2=smooth_C2, fused=shard.fused
            )
            if omega > 0:
                nothing_C, nowhere_C = torch.zeros_like(hard_scale_C), torch.full_like(local_C, -1)
                _soft_gradient_(soft_CV, entries, student, targets, kd_scale_C, nothing_C, nowhere_C, None, shard)
                logits_CV.add_(soft_CV)
    return torch.stack([(1 - omega) * hard + omega * kd, ce, kd, entropy])


def _soft_logits(logits_CV: Tensor, sigma: float, shard: VocabShard) -> Tensor:
    """A copy over sigma, in which nothing counts the tokens that the teacher lacks."""
    soft_CV = logits_CV.to(wide_dtype(logits_CV)) / sigma
    soft_CV[:, shard.common_rows :] = -torch.inf
    return soft_CV


def _measure(
    logits_CV: Tensor,
    soft_CV: Tensor,
    targets: CachedTargets,
    entries: LocalEntries,
    local_C: Tensor,
    shard: VocabShard,
    options: LossOptions,
) -> _Student:
    """One all-gather brings together what the ranks find; of top_k the entries are blanked afterwards."""
    found = [with_total(ops.vocab_stats(logits_CV, local_C, fused=shard.fused), logits_CV, options)]
    picked_CK = entries.pick(soft_CV)
    masses_CK = targets.masses_TK1[:, :-1].to(picked_CK.dtype)
    if soft_CV is not logits_CV:
        found.append(_max_and_sum(soft_CV, shard))
    if not targets.is_sample:
        entries.blank_(soft_CV)
        found.append(_max_and_sum(soft_CV, shard))
    found.append((masses_CK * picked_CK).sum(-1, keepdim=True))
    of_labels_RCK, *rest_RCK = shard.of_all_ranks(torch.cat(found, -1)).split([x.shape[1] for x in found], dim=-1)
    hard = hard_term(of_labels_RCK[..., :3], of_labels_RCK[..., 3:], shard, options)
    soft_lse_C = hard.lse_C if soft_CV is logits_CV else logsumexp(*rest_RCK[0].unbind(-1))
    base_C = soft_lse_C
    if not targets.is_sample:
        max_RC, sum_RC = rest_RCK[-2].unbind(-1)
        base_C = (max_RC + sum_RC.log()).logsumexp(0)
    return _Student(hard, soft_lse_C, base_C, picked_CK, rest_RCK[-1].sum((0, 2)))


def _max_and_sum(soft_CV: Tensor, shard: VocabShard) -> Tensor:
    nowhere_C = torch.full((len(soft_CV),), -1, device=soft_CV.device)
    return ops.vocab_stats(soft_CV, nowhere_C, fused=shard.fused)[:, :2]


def _divergence(student: _Student, targets: CachedTargets) -> Tensor:
    """KD of each token."""
    masses_CK1 = targets.masses_TK1.to(student.soft_lse_C.dtype)
    rest_C = masses_CK1[:, -1]
    if targets.is_sample:
        return student.soft_lse_C * masses_CK1[:, :-1].sum(-1) - student.cross_C - rest_C
    tail_C = torch.where(rest_C > 0, rest_C * student.base_C, 0.0)
    kd_C = student.soft_lse_C * masses_CK1.sum(-1) - student.cross_C - tail_C - _entropy(targets, masses_CK1.dtype)
    return kd_C.clamp(min=0)  # rounding alone makes it negative


def _entropy(targets: CachedTargets, dtype: torch.dtype) -> Tensor:
    """p's entropy at each token; of top_k with all other tokens as one."""
    masses_CK1 = targets.masses_TK1.to(dtype)
    return masses_CK1[:, -1] if targets.is_sample else -torch.special.xlogy(masses_CK1, masses_CK1).sum(-1)


def _soft_gradient_(
    soft_CV: Tensor,
    entries: LocalEntries,
    student: _Student,
    targets: CachedTargets,
    kd_scale_C: Tensor,
    hard_scale_C: Tensor,
    local_C: Tensor,
    smooth_C2: Tensor | None,
    shard: VocabShard,
) -> None:
    """Overwrites soft logits, of top_k blanked at entries, with kd·(q − p) + hard·(q − label) and what smoothing adds.

    In the tail p is τ·q / q_tail. Terms of one entry, label included, are added up before they are rounded: where a
    confident student agrees with its teacher they cancel.
    """
    both_C = kd_scale_C + hard_scale_C
    label_scale_C = hard_scale_C if smooth_C2 is None else smooth_C2[:, 0]
    masses_CK, rest_C = targets.masses_TK1[:, :-1].to(both_C.dtype), targets.masses_TK1[:, -1].to(both_C.dtype)
    base_scale_C = both_C
    if targets.is_sample:
        entries = LocalEntries(entries.columns_CK, entries.is_here_CK & (masses_CK > 0))  # each token once
        entries.blank_(soft_CV)
    else:
        base_scale_C = both_C * (student.base_C - student.soft_lse_C).exp() - kd_scale_C * rest_C
    is_label_CK = entries.is_here_CK & (entries.columns_CK == local_C[:, None])
    values_CK = both_C[:, None] * (student.picked_CK - student.soft_lse_C[:, None]).exp()
    values_CK = values_CK - kd_scale_C[:, None] * masses_CK - label_scale_C[:, None] * is_label_CK
    base_C = student.base_C.masked_fill(student.base_C == -torch.inf, 0.0)  # no tail: -inf - -inf would be NaN
    nowhere_C = torch.full((len(soft_CV),), -1, device=soft_CV.device)
    ops.vocab_grad_(soft_CV, nowhere_C, base_C, base_scale_C, smooth_T2=smooth_C2, fused=shard.fused)
    entries.add_(soft_CV, values_CK)
    _at_label(local_C.masked_fill(is_label_CK.any(1), -1)).add_(soft_CV, -label_scale_C[:, None])


def _at_label(local_C: Tensor) -> LocalEntries:
    return LocalEntries(local_C.clamp(min=0)[:, None], (local_C >= 0)[:, None])
