"""Cross-entropy and distillation on vocabulary shards, from hidden states, chunked over tokens.

The gradients of the local logits are written while the logits of a chunk are at hand (loss_terms.py says what the loss
of a token is), so that no logits survive the chunk. (Summing the final scalar with a differentiable all-reduce instead
would make every gradient `tp` times too large while the loss looks right.)
"""

# Shape suffix legend: T = tokens, C = tokens of a chunk, H = hidden, V = local vocabulary rows.

import math
from typing import Any

import torch
from torch import Tensor

from megagrow import ops
from megagrow.parallel.cached_loss import CachedTargets, cached_distillation
from megagrow.parallel.collectives import max_over, sum_over
from megagrow.parallel.loss_terms import LossOptions, cross_entropy, distillation
from megagrow.parallel.mesh import Axis
from megagrow.parallel.shards import chunk
from megagrow.parallel.vocab_shard import VocabShard

__all__ = [
    "CACHES",
    "NUM_SUMS",
    "LossOptions",
    "cache_size",
    "token_scores",
    "tokens_at_once",
    "vocab_parallel_loss",
    "whole_logits",
]

CACHES = {"cuda": 50 * 2**20, "cpu": 32 * 2**20}  # bytes: an H100's L2, and what some cores of a server share
LOGIT_BYTES = 2**28  # that exist at a time at most, unless 256 tokens have more
NUM_SUMS = 4  # loss, cross-entropy, distillation term, the teacher's entropy


def vocab_parallel_loss(
    hidden_TH: Tensor,
    head_VH: Tensor,
    labels_T: Tensor,
    weights_T: Tensor,
    vocab_size: int,
    tp: Axis,
    teacher_hidden: Tensor | None = None,
    teacher_head: Tensor | None = None,
    options: LossOptions | None = None,
    head_bias: Tensor | None = None,
    num_common: int | None = None,
    targets: CachedTargets | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighted loss sum over tokens, the same on every tensor rank.

    Args:
        hidden_TH: the model's states after its final norm, as a sharded region needs them (`TensorParallel.enter`):
            whole on every tensor rank, gradients summed over the ranks on the way back.
        head_VH: this rank's rows of the output matrix.
        labels_T: token ids in the whole vocabulary.
        weights_T: weight of each token; 0 leaves it out.
        vocab_size: rows of the whole output matrix.
        tp: the tensor axis.
        teacher_hidden, teacher_head: [T, H_teacher] and [V, H_teacher] of the teacher, or None.
        options: see `LossOptions`; without a teacher weight, temperatures, scale and divergence do not matter.
        head_bias: [V] added to the logits of this rank's rows, or None.
        num_common: tokens, from the first on, that the teacher has too, of which teacher_head has this rank's rows;
            the others are left out of both sides of the divergence. None: all.
        targets: what a teacher left behind, in place of one that is here.

    Returns:
        The loss [1] (pipeline schedules join outputs, which therefore have a dim), differentiable in hidden_TH, head_VH
        and head_bias, and the detached weighted sums [loss, CE, KD, the teacher's entropy]. CE is that of the labels,
        without smoothing and z-loss; KD has `scale` in it.
    """
    options = options or LossOptions()
    shard = VocabShard(tp, vocab_size, num_common, options.compiled)
    needs_gradient = torch.is_grad_enabled() and (hidden_TH.requires_grad or head_VH.requires_grad)
    return _Loss.apply(
        hidden_TH,
        head_VH,
        head_bias,
        labels_T,
        weights_T,
        shard,
        teacher_hidden,
        teacher_head,
        options,
        needs_gradient,
        targets,
    )


def tokens_at_once(wanted: int, num_rows: int, width: int, cache: int) -> int:
    """Tokens whose logits exist at a time: as many as wanted, or as half of a cache holds.

    Not more than `LOGIT_BYTES` hold, nor, because of that or the cache, fewer than 256: the products would read the
    output matrix more often than they compute with it.

    Args:
        wanted: `train.loss_chunk`; 0: what the cache says.
        num_rows: of the output matrix, on the rank that has most: all go through the same chunks together.
        width: bytes of a logit.
        cache: bytes.
    """
    most, cached = (max(size // (max(num_rows, 1) * width) // 128 * 128, 256) for size in (LOGIT_BYTES, cache // 2))
    return min(wanted or cached, most)


def cache_size(device: torch.device) -> int:
    """Bytes of a GPU's L2 cache, or of what a CPU has in its place."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else CACHES["cpu"]


def token_scores(
    hidden_TH: Tensor,
    head_VH: Tensor,
    labels_T: Tensor,
    vocab_size: int,
    tp: Axis,
    chunk_tokens: int = 0,
    *,
    head_bias: Tensor | None = None,
    ties_by_id: bool = False,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood and rank of every label, without gradients.

    The rank is the number of logits strictly greater than the label's, which needs no sort and sums
    over shards. For the same logits both results have the same bits on any number of tensor ranks.

    Args:
        hidden_TH, head_VH, labels_T, vocab_size, tp: as in `vocab_parallel_loss`.
        chunk_tokens: tokens whose logits exist at a time; 0: as many as `tokens_at_once` says.
        head_bias: [V] of this rank's rows, or None.
        ties_by_id: equal logits of lower ids count too, so that rank 0 is the token that an argmax takes.
        compiled: fuse the pass over the logits with torch.compile, where no kernel does it.

    Returns:
        nll_T (float32 or wider, never negative), rank_T (int32), the same on every tensor rank.
    """
    shard = VocabShard(tp, vocab_size, fused=compiled)
    most, width = shard.most_rows, hidden_TH.element_size()
    chunk_tokens = chunk_tokens or tokens_at_once(0, most, width, cache_size(hidden_TH.device))
    nlls, ranks = [], []
    with torch.no_grad():
        head = head_VH.to(hidden_TH.dtype)
        buffer_CV = _buffer(hidden_TH, head, chunk_tokens)
        for hidden_CH, labels_C in zip(hidden_TH.split(chunk_tokens), labels_T.split(chunk_tokens), strict=True):
            logits_CV, local_C = _logits(hidden_CH, head, head_bias, buffer_CV), shard.local_labels(labels_C)
            label_logit_C = sum_over(_label_logits(logits_CV, local_C), tp)
            nll_C, rank_C = _exact_scores(logits_CV, local_C, label_logit_C, shard)
            if ties_by_id:
                rank_C += sum_over(_equal_before(logits_CV, labels_C, label_logit_C, shard.vocab), tp)
            nlls.append(nll_C)
            ranks.append(rank_C)
    return torch.cat(nlls), torch.cat(ranks)


def _buffer(hidden_TH: Tensor, head_VH: Tensor, chunk_tokens: int) -> Tensor:
    """One buffer for the logits of every chunk: to write into fresh memory takes a CPU 1.5 times as long."""
    return hidden_TH.new_empty(min(chunk_tokens, len(hidden_TH)), len(head_VH))


def _logits(hidden_CH: Tensor, head_VH: Tensor, bias_V: Tensor | None, buffer_CV: Tensor) -> Tensor:
    """Of this rank's rows, in the dtype of the states, in the buffer's first rows."""
    logits_CV = ops.product(hidden_CH, head_VH, buffer_CV[: len(hidden_CH)])
    return logits_CV if bias_V is None else logits_CV.add_(bias_V)


def whole_logits(hidden_TH: Tensor, head_VH: Tensor, vocab_size: int, tp: Axis) -> Tensor:
    """Logits [T, vocab_size] of a few tokens, joined over the shards: the same bits on every tensor rank.

    Args:
        hidden_TH, head_VH, vocab_size, tp: as in `vocab_parallel_loss`.
    """
    logits_TV = ops.product(hidden_TH, head_VH.to(hidden_TH.dtype))
    if tp.size == 1:
        return logits_TV
    whole_TV = logits_TV.new_zeros(len(hidden_TH), vocab_size)
    whole_TV[:, chunk(vocab_size, tp)] = logits_TV
    return sum_over(whole_TV, tp)  # shards differ in size; each element is one number and zeros


def _equal_before(logits_CV: Tensor, labels_C: Tensor, label_logit_C: Tensor, vocab: slice) -> Tensor:
    """How many logits of lower ids equal the label's, int32."""
    ids_V = torch.arange(vocab.start, vocab.stop, device=logits_CV.device)
    equal_CV = (logits_CV == label_logit_C[:, None]) & (ids_V < labels_C[:, None])
    return equal_CV.sum(-1, dtype=torch.int32)


def _label_logits(logits_CV: Tensor, local_C: Tensor) -> Tensor:
    """The label's logit, in at least float32; 0 on the shards that do not hold it."""
    wide = torch.promote_types(logits_CV.dtype, torch.float32)
    if logits_CV.shape[1] == 0:
        return torch.zeros(len(logits_CV), dtype=wide, device=logits_CV.device)
    own_C = logits_CV.gather(1, local_C.clamp(min=0).unsqueeze(1)).squeeze(1).to(wide)
    return torch.where(local_C >= 0, own_C, 0.0)


def _exact_scores(
    logits_CV: Tensor, local_C: Tensor, label_logit_C: Tensor, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """lse − label logit, with the exponentials summed in fixed point; the label's rank.

    Integers add up to the same in any order, so the result does not show how the vocabulary is
    split. exp(0) is 2^k units with vocab_size·2^k ≤ 2^62: truncation loses less than vocab_size /
    2^k of the sum, 2^-26 at 262,144 tokens.
    """
    wide, tp = label_logit_C.dtype, shard.tp
    bits = 62 - (shard.vocab_size - 1).bit_length()
    max_C = torch.full_like(label_logit_C, -torch.inf)
    if logits_CV.shape[1] > 0:
        max_C = logits_CV.amax(-1).to(wide)
    # Not every backend's maximum keeps NaN: as infinity it reaches the result of every rank.
    max_C = max_over(max_C.masked_fill(max_C.isnan(), torch.inf), tp)
    units_C, rank_C = ops.vocab_scores(logits_CV, local_C, label_logit_C, max_C, bits, fused=shard.fused)
    log_sum_C = sum_over(units_C, tp).double().log() - bits * math.log(2)
    nll_C = (log_sum_C + (max_C.double() - label_logit_C.double())).clamp(min=0).to(wide)
    return nll_C, sum_over(rank_C, tp)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        head_VH: Tensor,
        bias_V: Tensor | None,
        labels_T: Tensor,
        weights_T: Tensor,
        shard: VocabShard,
        teacher_TH: Tensor | None,
        teacher_head_VH: Tensor | None,
        options: LossOptions,
        needs_gradient: bool,
        targets: CachedTargets | None,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden_TH.dtype, torch.float32)
        head = head_VH.to(hidden_TH.dtype)
        sums = torch.zeros(NUM_SUMS, dtype=wide, device=hidden_TH.device)
        grad_hidden = torch.empty_like(hidden_TH) if needs_gradient else None
        # Summed over many chunks, which the head's own dtype would round each time.
        make_head = torch.empty_like if len(hidden_TH) else torch.zeros_like  # the first chunk writes it
        grad_head = make_head(head_VH, dtype=wide) if needs_gradient and ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias_V, dtype=wide) if needs_gradient and bias_V is not None else None
        buffer_CV = _buffer(hidden_TH, head, options.chunk_tokens)
        for start in range(0, hidden_TH.shape[0], options.chunk_tokens):
            part = slice(start, start + options.chunk_tokens)
            hidden_CH, local_C = hidden_TH[part], shard.local_labels(labels_T[part])
            logits_CV = _logits(hidden_CH, head, bias_V, buffer_CV)
            if targets is not None:
                given = targets.rows(part), local_C, weights_T[part], shard, options
                sums += cached_distillation(logits_CV, *given, needs_gradient)
            elif teacher_TH is None or teacher_head_VH is None:
                sums += cross_entropy(logits_CV, local_C, weights_T[part], shard, options, needs_gradient)
            else:
                sums += distillation(
                    logits_CV,
                    teacher_TH[part],
                    teacher_head_VH,
                    local_C,
                    weights_T[part],
                    shard,
                    options,
                    needs_gradient,
                )
            if grad_hidden is not None:
                grad_hidden[part] = ops.product(logits_CV, head.T)
            if grad_head is not None:
                ops.add_product_(grad_head, logits_CV.T, hidden_CH.T, is_first=start == 0)
            if grad_bias is not None:
                grad_bias += logits_CV.sum(0, dtype=wide)
        ctx.save_for_backward(grad_hidden, grad_head, grad_bias)
        ctx.factor = None
        ctx.mark_non_differentiable(sums)
        return sums[:1].clone(), sums

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        grads = ctx.saved_tensors
        if ctx.factor is None:  # else it is the other half of a split backward pass
            ctx.factor = grad_loss
            for grad in () if _is_one(grad_loss) else [grad for grad in grads if grad is not None]:
                # In place, since the head's is large; in the factor's float32, since 1/3 rounded to bfloat16 would make
                # every gradient 0.2 % off; behind autograd's back, which would refuse to read it again.
                grad.data.mul_(grad_loss)
        elif grad_loss.device.type == "cpu" and not torch.equal(ctx.factor, grad_loss):
            raise RuntimeError("a second backward pass through one loss must have the first one's factor")
        return *grads, *(None,) * 8


def _is_one(factor: Tensor) -> bool:
    """Whether the factor is known to be 1. Only CPUs read it: on a GPU that would wait for all that was queued."""
    return factor.device.type == "cpu" and bool((factor == 1).all())
