"""Our losses as the suite compares them, and the same in float64: weighted losses and every gradient.

Legend: T = tokens, V = vocabulary, H = hidden size.
"""

from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import megagrow_kernels
from megagrow import ops
from megagrow.parallel.loss import LossOptions, vocab_parallel_loss
from megagrow.parallel.mesh import Axis
from tests.peers.kernels.agreement import (
    F32,
    ONCE,
    Bound,
    Bounds,
    Tensors,
    assert_agree,
    coarse,
    double,
    outputs_and_gradients,
)

IGNORED = -100


@dataclass(frozen=True)
class Tokens:
    """Labels, some of them ignored, and weights, which are 0 for those and have few digits, so that bfloat16 holds
    them: Liger gets them as a gradient in the dtype of its loss."""

    labels_T: Tensor
    weights_T: Tensor

    @property
    def counted_T(self) -> Tensor:
        return self.labels_T != IGNORED

    def averaged(self) -> "Tokens":
        """Weighted alike, such that the weights add up to 1."""
        return Tokens(self.labels_T, self.counted_T / self.counted_T.sum())


def tokens(num_tokens: int, vocab_size: int) -> Tokens:
    generator = torch.Generator().manual_seed(0)
    labels_T = torch.randint(vocab_size, (num_tokens,), generator=generator)
    labels_T[0], labels_T[-1], labels_T[2::5] = 0, vocab_size - 1, IGNORED
    weights_T = torch.randint(1, 16, (num_tokens,), generator=generator) / 8
    return Tokens(labels_T, weights_T.masked_fill(labels_T == IGNORED, 0.0))


def cross_entropy(logits_TV: Tensor, given: Tokens, num_shards: int = 1) -> Tensors:
    """By our kernels, on so many shards, whose statistics merge as `vocab_loss.py` says."""
    shards = [shard_TV.clone() for shard_TV in logits_TV.chunk(num_shards, dim=1)]
    labels, start = [], 0
    for shard_TV in shards:
        inside_T = (given.labels_T >= start) & (given.labels_T < start + shard_TV.shape[1])
        labels.append(torch.where(inside_T, given.labels_T - start, -1))
        start += shard_TV.shape[1]
    stats_RTK = torch.stack([megagrow_kernels.vocab_stats(*pair) for pair in zip(shards, labels, strict=True)])
    max_RT, sum_exp_RT, label_logit_RT = stats_RTK.unbind(-1)
    lse_T = logsumexp(max_RT, sum_exp_RT)
    for shard_TV, local_T in zip(shards, labels, strict=True):
        megagrow_kernels.vocab_grad_(shard_TV, local_T, lse_T, given.weights_T)
    return {"loss": (lse_T - label_logit_RT.sum(0)) * given.weights_T, "dlogits": torch.cat(shards, dim=1)}


def logsumexp(max_RT: Tensor, sum_exp_RT: Tensor, temperature: float = 1.0) -> Tensor:
    max_T = max_RT.amax(0)
    return max_T / temperature + (sum_exp_RT * ((max_RT - max_T) / temperature).exp()).sum(0).log()


def weighted(losses_T: Tensor, given: Tokens) -> Tensor:
    """The losses of the counted tokens, in float32 at least."""
    return losses_T.to(torch.promote_types(losses_T.dtype, torch.float32)) * given.weights_T


def exact_cross_entropy(logits_TV: Tensor, given: Tokens) -> Tensors:
    def loss(logits: Tensor) -> Tensor:
        return weighted(F.cross_entropy(logits, given.labels_T, ignore_index=IGNORED, reduction="none"), given)

    return of_logits(loss, logits_TV.double())


def of_logits(function, logits_TV: Tensor) -> Tensors:
    """Losses of tokens, which the function weights, and the gradient of their sum."""
    return outputs_and_gradients(function, {"logits": logits_TV}, {"loss": torch.ones(len(logits_TV))})


def kl_divergence(logits_TV: Tensor, teacher_TV: Tensor, given: Tokens, rho: float, sigma: float) -> Tensors:
    """By our kernels: weight · KL(softmax(teacher / rho) || softmax(logits / sigma)) of every token."""
    logits_TV = logits_TV.clone()
    stats_TK = megagrow_kernels.distill_stats(logits_TV, teacher_TV, given.labels_T, rho, sigma)
    max_T, sum_T, _, soft_sum_T, teacher_max_T, teacher_sum_T, cross_T, _ = stats_TK.unbind(-1)
    lse_T, soft_lse_T = max_T + sum_T.log(), max_T / sigma + soft_sum_T.log()
    teacher_lse_T = teacher_max_T / rho + teacher_sum_T.log()
    kl_T = cross_T / teacher_sum_T - teacher_lse_T + soft_lse_T
    lses_T3 = torch.stack((lse_T, soft_lse_T, teacher_lse_T), dim=-1)
    scales = torch.zeros_like(kl_T), given.weights_T / sigma
    megagrow_kernels.distill_grad_(logits_TV, teacher_TV, given.labels_T, lses_T3, *scales, rho, sigma)
    return {"loss": kl_T * given.weights_T, "dlogits": logits_TV}


def exact_kl_divergence(logits_TV: Tensor, teacher_TV: Tensor, given: Tokens, rho: float, sigma: float) -> Tensors:
    target_TV = (teacher_TV.double() / rho).log_softmax(-1)

    def loss(logits: Tensor) -> Tensor:
        kl_TV = F.kl_div((logits / sigma).log_softmax(-1), target_TV, reduction="none", log_target=True)
        return weighted(kl_TV.sum(-1), given)

    return of_logits(loss, logits_TV.double())


@dataclass(frozen=True)
class Heads:
    """Hidden states and output matrices of a student and of a teacher."""

    hidden: Tensor
    head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor

    @property
    def leaves(self) -> Tensors:
        return {"hidden": self.hidden, "head": self.head}

    @property
    def teacher_logits_TV(self) -> Tensor:
        return self.teacher_hidden @ self.teacher_head.T


def heads(num_tokens: int, vocab_size: int, hidden_size: int, dtype: torch.dtype) -> Heads:
    """Of so few digits that all logits, of a few units, are exact in bfloat16: some round them, and some do not."""
    generator = torch.Generator().manual_seed(0)

    def few_digits(rows: int, step: float) -> Tensor:
        return (torch.randint(-4, 5, (rows, hidden_size), generator=generator) * step).to(dtype)

    states = (few_digits(num_tokens, 1 / 2) for _ in range(2))
    matrices = (few_digits(vocab_size, 1 / 4) for _ in range(2))
    (hidden, teacher_hidden), (head, teacher_head) = states, matrices
    given = Heads(hidden, head, teacher_hidden, teacher_head)
    for states, matrix in ((hidden, head), (teacher_hidden, teacher_head)):
        assert torch.equal((states @ matrix.T).double(), states.double() @ matrix.double().T)
    return given


def loss_of_hidden(given: Heads, of: Tokens, options: LossOptions) -> Tensors:
    """By megagrow's loss with our kernels at work, in several chunks; with the teacher if it has a weight."""
    teacher = (given.teacher_hidden, given.teacher_head) if options.weight > 0 else (None, None)

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        return vocab_parallel_loss(
            hidden, head, of.labels_T, of.weights_T, len(head), Axis(), *teacher, options=options
        )[0][0]

    with mock.patch.object(ops, "kernels_for", lambda name, x: megagrow_kernels):
        return outputs_and_gradients(loss, given.leaves, {"loss": torch.ones(())})


def exact_loss_of_hidden(given: Heads, of: Tokens, options: LossOptions) -> Tensors:
    target_TV = (given.teacher_logits_TV.double() / options.temperature).log_softmax(-1)

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        logits_TV = hidden @ head.T
        ce_T = F.cross_entropy(logits_TV, of.labels_T, ignore_index=IGNORED, reduction="none")
        student_TV = (logits_TV / (options.temperature if options.both else 1.0)).log_softmax(-1)
        kd_T = F.kl_div(student_TV, target_TV, reduction="none", log_target=True).sum(-1)
        mixed_T = (1 - options.weight) * ce_T + options.weight * options.scale * kd_T
        return weighted(mixed_T, of).sum()

    return outputs_and_gradients(loss, double(given.leaves), {"loss": torch.ones(())})


def assert_agree_on_hidden(
    name: str, dtype: torch.dtype, function, given: Heads, of: Tokens, options: LossOptions, **rows: float
) -> None:
    """Of somebody's loss from hidden states, whose bounds in bfloat16 are `rows`."""
    ours, truth = loss_of_hidden(given, of, options), exact_loss_of_hidden(given, of, options)
    theirs = outputs_and_gradients(function, given.leaves, {"loss": torch.ones(())})
    bounds = bounds_of_hidden(dtype), bounds_of_hidden(dtype, **rows)
    assert_agree(name, dtype, ours, theirs, truth, *bounds)


def bounds_of_hidden(dtype: torch.dtype, of_hidden: float = 0.25, of_head: float = 1.2) -> Bounds:
    """Of products of the logits' gradient, which 16-bit inputs round to 16 bits; of the head's gradient some rows are
    small, since tokens cancel in them."""
    if dtype == F32:
        return {"loss": ONCE, "dhidden": Bound(row=14), "dhead": Bound(row=14)}
    return {"loss": ONCE, "dhidden": coarse(dtype, of_hidden), "dhead": coarse(dtype, of_head)}
