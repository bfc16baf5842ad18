"""Distillation from targets that a teacher has left behind, a few tokens of each position, on vocabulary shards.

    top_k      KD_t = Σ_{v in K} p[v]·(log p[v] − log q[v]) + τ·(log τ − log q_tail)
               τ = 1 − Σ_{v in K} p[v],   q_tail = Σ_{v not in K} q[v]
    sampled    KD_t = − Σ_i (log q[v_i]) / N − H,   v_i drawn from p, H its entropy

With all tokens outside of K as one bucket, KD is the divergence of two coarser distributions: never negative, and never
above the full one (data-processing inequality; Cover & Thomas, 2006, section 2.8). Without the bucket, or with p
renormalised over K, it would be neither. The sampled form, and its gradient, are unbiased estimates of the full ones
(sparse logit sampling; Anshumann et al., 2025, arXiv 2503.16870).

q_tail is summed over the tokens outside of K, not taken as 1 − Σ q, which would lose all its digits where it is small.
"""

# Shape suffix legend: C = tokens of a chunk, V = local vocabulary rows, K = entries of a token, R = tensor ranks.

from dataclasses import dataclass

import torch
from torch import Tensor

from megagrow import ops
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
class Mixture:
    """Weights of the two terms.

    Attributes:
        omega: the share of the distillation term.
        sigma: what the student's logits are divided by in it.
        scale: factor on it.
    """

    omega: float
    sigma: float
    scale: float


@dataclass(frozen=True)
class _Student:
    """What the student gives for each token; soft: with the logits that distillation sees.

    Attributes:
        lse_C, label_logit_C: of the logits; their difference is the cross-entropy.
        soft_lse_C: logsumexp of all soft logits.
        base_C: logsumexp of those outside of the entries (top_k; -inf where there are none), or of all (sampled).
        picked_CK: soft logits of the entries that are on this shard.
        cross_C: Σ mass · soft logit of the entries, over all shards.
    """

    lse_C: Tensor
    label_logit_C: Tensor
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
    mixture: Mixture,
    write_gradient: bool,
) -> Tensor:
    """Returns the sums [loss, CE, KD, p's entropy]; turns the logits into their gradient when asked to."""
    omega, sigma = mixture.omega, mixture.sigma
    one_softmax = sigma == 1 and omega > 0  # serves both terms, and the logits need no copy
    soft_CV = logits_CV if one_softmax else logits_CV.to(_wide(logits_CV)) / sigma
    entries = shard.entries(targets.ids_TK)
    student = _measure(logits_CV, soft_CV, targets, entries, local_C, shard)
    ce = ((student.lse_C - student.label_logit_C) * weights_C).sum()
    kd = (_divergence(student, targets) * weights_C).sum() * mixture.scale
    entropy = (_entropy(targets, ce.dtype) * weights_C).sum()
    if write_gradient:
        ce_scale_C, kd_scale_C = weights_C * (1 - omega), weights_C * (omega * mixture.scale / sigma)
        if one_softmax:
            _soft_gradient_(soft_CV, entries, student, targets, kd_scale_C, ce_scale_C, shard)
            _at_label(local_C).add_(soft_CV, -ce_scale_C[:, None])
        else:
            ops.vocab_grad_(logits_CV, local_C, student.lse_C, ce_scale_C, fused=shard.fused)
            if omega > 0:
                nothing_C = torch.zeros_like(ce_scale_C)
                _soft_gradient_(soft_CV, entries, student, targets, kd_scale_C, nothing_C, shard)
                logits_CV.add_(soft_CV)
    return torch.stack([(1 - omega) * ce + omega * kd, ce, kd, entropy])


def _measure(
    logits_CV: Tensor,
    soft_CV: Tensor,
    targets: CachedTargets,
    entries: LocalEntries,
    local_C: Tensor,
    shard: VocabShard,
) -> _Student:
    """One all-gather brings together what the ranks find; of top_k the entries are blanked afterwards."""
    found = [ops.vocab_stats(logits_CV, local_C, fused=shard.fused)]
    picked_CK = entries.pick(soft_CV)
    masses_CK = targets.masses_TK1[:, :-1].to(picked_CK.dtype)
    if soft_CV is not logits_CV:
        found.append(_max_and_sum(soft_CV, shard))
    if not targets.is_sample:
        entries.blank_(soft_CV)
        found.append(_max_and_sum(soft_CV, shard))
    found.append((masses_CK * picked_CK).sum(-1, keepdim=True))
    max_RC, sum_RC, label_RC, *rest_RC = shard.of_all_ranks(torch.cat(found, -1)).unbind(-1)
    lse_C = soft_lse_C = logsumexp(max_RC, sum_RC)
    if soft_CV is not logits_CV:
        soft_lse_C, rest_RC = logsumexp(rest_RC[0], rest_RC[1]), rest_RC[2:]
    base_C = soft_lse_C if targets.is_sample else (rest_RC[0] + rest_RC[1].log()).logsumexp(0)
    return _Student(lse_C, label_RC.sum(0), soft_lse_C, base_C, picked_CK, rest_RC[-1].sum(0))


def _max_and_sum(soft_CV: Tensor, shard: VocabShard) -> Tensor:
    nowhere_C = torch.full((len(soft_CV),), -1, device=soft_CV.device)
    return ops.vocab_stats(soft_CV, nowhere_C, fused=shard.fused)[:, :2]


def _divergence(student: _Student, targets: CachedTargets) -> Tensor:
    """KD of each token."""
    masses_CK1 = targets.masses_TK1.to(student.lse_C.dtype)
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
    ce_scale_C: Tensor,
    shard: VocabShard,
) -> None:
    """Overwrites soft logits, of top_k with blanked entries, with kd·(q − p) + ce·q; in the tail p is τ·q / q_tail."""
    both_C = kd_scale_C + ce_scale_C
    masses_CK, rest_C = targets.masses_TK1[:, :-1].to(both_C.dtype), targets.masses_TK1[:, -1].to(both_C.dtype)
    values_CK, base_scale_C = -kd_scale_C[:, None] * masses_CK, both_C
    if not targets.is_sample:
        values_CK = values_CK + both_C[:, None] * (student.picked_CK - student.soft_lse_C[:, None]).exp()
        base_scale_C = both_C * (student.base_C - student.soft_lse_C).exp() - kd_scale_C * rest_C
    base_C = student.base_C.masked_fill(student.base_C == -torch.inf, 0.0)  # no tail: -inf - -inf would be NaN
    nowhere_C = torch.full((len(soft_CV),), -1, device=soft_CV.device)
    ops.vocab_grad_(soft_CV, nowhere_C, base_C, base_scale_C, fused=shard.fused)
    entries.add_(soft_CV, values_CK)


def _at_label(local_C: Tensor) -> LocalEntries:
    return LocalEntries(local_C.clamp(min=0)[:, None], (local_C >= 0)[:, None])


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
