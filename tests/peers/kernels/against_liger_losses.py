"""Cross-entropy and KL divergence against liger-kernel's Triton kernels, losses and every gradient.

Compared: cross-entropy with ignored labels and weights of tokens, and its mean; vocabulary-parallel cross-entropy on
one rank (on two: against_shards.py); fused linear cross-entropy, KL divergence, and JSD at beta 0, which is KL
divergence, with megagrow's loss from hidden states, in chunks there and here; the two divergences also on logits.
Less exact there: losses of cross-entropy are bfloat16 if the logits are, gradients are rounded once more when they are
weighted, and the head's gradient is added up in bfloat16 over the chunks. Less exact here, in float32: exponents of the
divergence are differences of a logit over its temperature and a logarithm, both of some size; there, of logarithms of
probabilities, which are in memory.
Could not run: nothing of these. Liger has no rank of a label, no cross-entropy and KL divergence in one pass, and no KL
divergence on shards.
"""

import pytest
import torch
from torch import Tensor

from megagrow.parallel.loss import LossOptions
from tests.peers.kernels import theirs
from tests.peers.kernels.agreement import (
    DTYPES,
    ONCE,
    Bound,
    Tensors,
    assert_agree,
    coarse,
    normal,
    outputs_and_gradients,
)
from tests.peers.kernels.losses import (
    IGNORED,
    Tokens,
    assert_agree_on_hidden,
    cross_entropy,
    exact_cross_entropy,
    exact_kl_divergence,
    heads,
    kl_divergence,
    of_logits,
    tokens,
    weighted,
)

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
T, V, H = 13, 203, 24


def logits(seed: int, dtype: torch.dtype) -> Tensor:
    return 3 * normal(seed, T, V, dtype=dtype)


@each_dtype
def test_cross_entropy(dtype: torch.dtype) -> None:
    logits_TV, given = logits(0, dtype), tokens(T, V)

    def liger(logits: Tensor) -> Tensor:
        losses = theirs.LigerCrossEntropyFunction.apply(logits, given.labels_T, None, IGNORED, 0.0, 0.0, "none")
        return weighted(losses[0], given)

    ours, truth = cross_entropy(logits_TV, given), exact_cross_entropy(logits_TV, given)
    bounds = {"loss": coarse(dtype, 0.5), "dlogits": Bound(roundings=2)}
    assert_agree("liger cross_entropy", dtype, ours, of_logits(liger, logits_TV), truth, their_bounds=bounds)


@each_dtype
def test_mean_cross_entropy(dtype: torch.dtype) -> None:
    logits_TV, given = logits(0, dtype), tokens(T, V).averaged()

    def liger(logits: Tensor) -> Tensor:
        return theirs.LigerCrossEntropyFunction.apply(logits, given.labels_T, None, IGNORED, 0.0, 0.0, "mean")[0]

    ours, truth = (summed(function(logits_TV, given)) for function in (cross_entropy, exact_cross_entropy))
    peer = outputs_and_gradients(liger, {"logits": logits_TV}, {"loss": torch.ones(())})
    bounds = {"loss": coarse(dtype, 0.5), "dlogits": ONCE}
    assert_agree("liger mean cross_entropy", dtype, ours, peer, truth, their_bounds=bounds)


def summed(found: Tensors) -> Tensors:
    return found | {"loss": found["loss"].sum()}


@each_dtype
def test_vocab_parallel_cross_entropy_on_one_rank(dtype: torch.dtype) -> None:
    logits_TV, given = logits(0, dtype), tokens(T, V)

    def liger(logits: Tensor) -> Tensor:
        arguments = None, IGNORED, 0.0, "pytorch", "global"
        losses_T1 = theirs.LigerVocabParallelCEFunction.apply(logits[:, None], given.labels_T[:, None], *arguments)
        return weighted(losses_T1[:, 0], given)

    ours, truth = cross_entropy(logits_TV, given), exact_cross_entropy(logits_TV, given)
    assert_agree("liger vocab_parallel_ce", dtype, ours, of_logits(liger, logits_TV), truth)


@each_dtype
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_fused_linear_cross_entropy(reduction: str, dtype: torch.dtype) -> None:
    of = tokens(T, V).averaged() if reduction == "mean" else tokens(T, V)

    def liger(hidden: Tensor, head: Tensor) -> Tensor:
        arguments = of.labels_T, None, None, IGNORED, 0.0, 0.0, reduction
        losses = theirs.LigerFusedLinearCrossEntropyFunction.apply(hidden, head, *arguments)[0]
        return losses if reduction == "mean" else weighted(losses, of).sum()

    name = f"liger fused_linear_cross_entropy, {reduction}"
    assert_agree_on_hidden(name, dtype, liger, heads(T, V, H, dtype), of, LossOptions(chunk_tokens=5), of_head=1.5)


@each_dtype
@pytest.mark.parametrize("name", ["kl_div", "jsd"])
@pytest.mark.parametrize("rho, sigma", [(1.0, 1.0), (2.0, 0.75)])
def test_kl_divergence(name: str, rho: float, sigma: float, dtype: torch.dtype) -> None:
    """From logarithms of probabilities, which are in float32 there."""
    logits_TV, teacher_TV = logits(0, dtype), logits(1, dtype)
    given = Tokens(tokens(T, V).labels_T, torch.full((T,), 1 / T))
    target_TV = (teacher_TV.double() / rho).log_softmax(-1).float()

    def liger(logits: Tensor) -> Tensor:
        student_TV = (logits.float() / sigma).log_softmax(-1)
        if name == "jsd":
            return theirs.LigerJSDFunction.apply(student_TV, target_TV, None, 0.0, IGNORED, None, None)
        return theirs.LigerKLDivLossFunction.apply(student_TV, target_TV, "batchmean", True)

    arguments = logits_TV, teacher_TV, given, rho, sigma
    ours, truth = (summed(function(*arguments)) for function in (kl_divergence, exact_kl_divergence))
    peer = outputs_and_gradients(liger, {"logits": logits_TV}, {"loss": torch.ones(())})
    title = f"liger {name}, temperatures {rho} and {sigma}"
    assert_agree(title, dtype, ours, peer, truth, our_bounds={"loss": ONCE, "dlogits": Bound(row=18)})


@each_dtype
@pytest.mark.parametrize("name", ["kl_div", "jsd"])
def test_fused_linear_kl_divergence(name: str, dtype: torch.dtype) -> None:
    given, of = heads(T, V, H, dtype), tokens(T, V).averaged()
    options = LossOptions(weight=1.0, temperature=2.0, both=True, chunk_tokens=5)
    target_TV = (given.teacher_logits_TV.double() / 2.0).softmax(-1).float()

    def liger(hidden: Tensor, head: Tensor) -> Tensor:
        if name == "kl_div":
            arguments = target_TV, of.labels_T, "batchmean", IGNORED, 2.0
            return theirs.LigerFusedLinearKLDivFunction.apply(hidden, head, *arguments)
        teacher = given.teacher_hidden, given.teacher_head
        arguments = of.labels_T, 0.0, IGNORED, 2.0, None, None, None
        return theirs.LigerFusedLinearJSDFunction.apply(hidden, head, *teacher, *arguments)

    assert_agree_on_hidden(f"liger fused_linear_{name}", dtype, liger, given, of, options)
