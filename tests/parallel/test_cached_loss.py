"""Distillation from a few tokens of each position against the same written densely in float64, gradients above all."""

# Shape suffix legend: T = tokens, H = hidden, V = vocabulary, K = entries of a token.

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megagrow.parallel.cached_loss import CachedTargets
from megagrow.parallel.collectives import copy_to
from megagrow.parallel.loss import LossOptions, vocab_parallel_loss
from megagrow.parallel.mesh import Axis
from megagrow.parallel.shards import chunk
from tests.parallel.test_loss import (
    OMEGAS,
    TOLERANCE,
    VOCAB,
    Problem,
    Result,
    assert_matches,
    evaluate,
    problem,
    tp_axis,
    worst_error,
)
from tests.ranks import run_ranks

Case = tuple[CachedTargets, LossOptions]
SMOOTH = ({"label_smoothing": 0.1}, {"z_loss": 0.01}, {"label_smoothing": 0.2, "z_loss": 0.1})


def soft_teacher(p: Problem, rho: float = 1.0) -> Tensor:
    """Probabilities [T, V]."""
    return (p.teacher_TG.double() @ p.teacher_head_VG.double().T / rho).softmax(-1)


def top_k(p_TV: Tensor, k: int) -> CachedTargets:
    masses_TK, ids_TK = p_TV.topk(k)
    rest_TV = p_TV.scatter(1, ids_TK, 0.0)
    return CachedTargets(ids_TK, torch.cat([masses_TK, rest_TV.sum(-1, keepdim=True)], 1), is_sample=False)


def sampled(p_TV: Tensor, count: int) -> CachedTargets:
    """Draws with repeats, whose mass is where each token comes first."""
    ids_TK = torch.multinomial(p_TV, count, replacement=True).sort(-1).values
    first_TK = torch.cat([torch.ones(len(ids_TK), 1, dtype=torch.bool), ids_TK[:, 1:] != ids_TK[:, :-1]], 1)
    counts_TK = (ids_TK[:, :, None] == ids_TK[:, None]).sum(-1) * first_TK
    entropy_T1 = -torch.special.xlogy(p_TV, p_TV).sum(-1, keepdim=True)
    return CachedTargets(ids_TK, torch.cat([counts_TK.double() / count, entropy_T1], 1), is_sample=True)


def divergence(logits_TV: Tensor, targets: CachedTargets) -> Tensor:
    """KD of each token, with the tail as one more token of a coarser vocabulary; differentiable."""
    log_q_TV = logits_TV.log_softmax(-1)
    masses_TK, rest_T = targets.masses_TK1[:, :-1], targets.masses_TK1[:, -1]
    picked_TK = log_q_TV.gather(1, targets.ids_TK)
    if targets.is_sample:
        return -(masses_TK * picked_TK).sum(-1) - rest_T
    is_tail_TV = torch.ones_like(log_q_TV, dtype=torch.bool).scatter(1, targets.ids_TK, False)
    kd_T = (torch.special.xlogy(masses_TK, masses_TK) - masses_TK * picked_TK).sum(-1)
    if targets.ids_TK.shape[1] == log_q_TV.shape[1]:
        return kd_T
    log_tail_T = log_q_TV.masked_fill(~is_tail_TV, -torch.inf).logsumexp(-1)
    return kd_T + torch.special.xlogy(rest_T, rest_T) - rest_T * log_tail_T


def oracle(p: Problem, targets: CachedTargets, options: LossOptions, num_common: int = VOCAB) -> Result:
    """The definition, through torch's softmax and autograd, in float64."""
    p = p.to(torch.float64)
    hidden_TH, head_VH = (x.clone().requires_grad_() for x in (p.hidden_TH, p.head_VH))
    logits_TV, labels_T = hidden_TH @ head_VH.T, p.labels_T.clamp(min=0)
    ce = (F.cross_entropy(logits_TV, labels_T, reduction="none") * p.weights_T).sum()
    hard_T = F.cross_entropy(logits_TV, labels_T, reduction="none", label_smoothing=options.label_smoothing)
    hard = ((hard_T + options.z_loss * logits_TV.logsumexp(-1) ** 2) * p.weights_T).sum()
    soft_TV = logits_TV[:, :num_common] / (options.temperature if options.both else 1.0)
    masses_TK1 = targets.masses_TK1.double()
    entropy_T = masses_TK1[:, -1] if targets.is_sample else torch.special.entr(masses_TK1).sum(-1)
    kd_T = divergence(soft_TV, targets) + (entropy_T if options.divergence == "cross_entropy" else 0.0)
    kd = options.scale * (kd_T * p.weights_T).sum()
    loss = (1 - options.weight) * hard + options.weight * kd
    loss.backward()
    assert hidden_TH.grad is not None and head_VH.grad is not None
    sums = torch.stack([loss, ce, kd, (entropy_T * p.weights_T).sum()]).detach()
    return Result(sums[:1], sums, hidden_TH.grad, head_VH.grad)


def evaluate_cached(
    p: Problem, targets: CachedTargets, options: LossOptions, tp: Axis | None = None, num_common: int | None = None
) -> Result:
    """The loss on this rank's shard of the vocabulary."""
    tp = tp or Axis()
    rows = chunk(len(p.head_VH), tp)
    hidden_TH, head_VH = p.hidden_TH.clone().requires_grad_(), p.head_VH[rows].clone().requires_grad_()
    given = copy_to(hidden_TH, tp), head_VH, p.labels_T, p.weights_T, len(p.head_VH), tp
    loss, sums = vocab_parallel_loss(*given, targets=targets, options=options, num_common=num_common)
    loss.backward()
    assert hidden_TH.grad is not None and head_VH.grad is not None
    return Result(loss.detach(), sums, hidden_TH.grad, head_VH.grad)


def evaluate_here(p: Problem, cases: list[Case], num_common: int | None = None) -> list[Result]:
    return [evaluate_cached(p, targets, options, tp_axis(), num_common) for targets, options in cases]


def on_ranks(p: Problem, cases: list[Case], world: int, num_common: int | None = None) -> list[Result]:
    """One result per case: all ranks must agree on what is whole; the head's rows are put together."""
    merged = []
    for results in zip(*run_ranks(evaluate_here, world, p, cases, num_common), strict=True):
        for other in results[1:]:
            assert all(torch.equal(getattr(other, n), getattr(results[0], n)) for n in ("loss", "sums", "grad_hidden"))
        merged.append(replace(results[0], grad_head=torch.cat([r.grad_head for r in results])))
    return merged


def all_cases(p: Problem) -> list[Case]:
    """One entry, a few, all but one, all; drawn ones; with all ω, temperatures, and ρ² as a factor."""
    torch.manual_seed(3)
    cases = []
    for rho, both in ((0.25, False), (1.0, False), (2.0, False), (2.0, True)):
        p_TV, more = soft_teacher(p, rho), (both, rho**2 if both else 1.0, 5)
        cases += [(top_k(p_TV, k), LossOptions(1 / 3, rho, *more)) for k in (1, VOCAB - 1, VOCAB)]
        cases += [(t, LossOptions(w, rho, *more)) for t in (top_k(p_TV, 5), sampled(p_TV, 6)) for w in OMEGAS]
    return cases


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_gradients_of_the_mixture(world: int, dtype: torch.dtype) -> None:
    p = problem(dtype)
    cases = all_cases(p)
    for (targets, options), result in zip(cases, on_ranks(p, cases, world), strict=True):
        assert result.grad_hidden.dtype == result.grad_head.dtype == dtype
        assert_matches(result, oracle(p, targets, options), TOLERANCE[dtype])


def smooth_cases(p: Problem, num_common: int = VOCAB) -> list[Case]:
    """All that can stand beside the cross-entropy with the labels, where both terms share a softmax and where not."""
    torch.manual_seed(4)
    p_TV = (p.teacher_TG.double() @ p.teacher_head_VG[:num_common].double().T / 2).softmax(-1)
    kinds = top_k(p_TV, 5), sampled(p_TV, 6), top_k(p_TV, num_common)
    mixtures = product(OMEGAS, (False, True), ({}, *SMOOTH))
    return [
        (
            kinds[i % 3],
            LossOptions(w, 2.0, both, chunk_tokens=5, divergence=("forward_kl", "cross_entropy")[i % 2], **more),
        )
        for i, (w, both, more) in enumerate(mixtures)
    ]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_smoothing_and_z_loss_stand_beside_the_targets(world: int, dtype: torch.dtype) -> None:
    p = problem(dtype)
    cases = smooth_cases(p)
    assert {t.is_sample for t, o in cases if o.is_smooth and 0 < o.weight < 1 and not o.both} == {False, True}
    for (targets, options), result in zip(cases, on_ranks(p, cases, world), strict=True):
        assert_matches(result, oracle(p, targets, options), TOLERANCE[dtype])


@pytest.mark.parametrize("num_common", [28, 23, 7])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_tokens_that_the_teacher_lacks_are_left_out_of_the_divergence(world: int, num_common: int) -> None:
    """On four ranks the shards hold 8, 8, 8 and 5 tokens: some have none in common with the teacher."""
    p = problem()
    cases = smooth_cases(p, num_common)
    for (targets, options), result in zip(cases, on_ranks(p, cases, world, num_common), strict=True):
        assert_matches(result, oracle(p, targets, options, num_common), 1e-10)


@pytest.mark.parametrize("world", [1, 4])
def test_bfloat16_stays_near_the_truth(world: int) -> None:
    p = problem(torch.bfloat16)
    cases = [(top_k(soft_teacher(p, 0.5), 5), LossOptions(1 / 3, 0.5)), (sampled(soft_teacher(p), 6), LossOptions(1.0))]
    cases += [(targets, replace(options, **SMOOTH[2])) for targets, options in cases]
    for (targets, options), result in zip(cases, on_ranks(p, cases, world), strict=True):
        assert_matches(result, oracle(p, targets, options), 2e-2)


@pytest.mark.parametrize("is_sample", [False, True], ids=["top_k", "sampled"])
@pytest.mark.parametrize("q", [0.9, 0.99, 0.999])
def test_bfloat16_rounds_the_gradient_of_a_confident_label_once(q: float, is_sample: bool) -> None:
    """Student and teacher agree: what the label and p take from q nearly cancels, and must not be rounded before."""
    vocab, omega = 32, 0.5
    logits_TV = torch.zeros(1, vocab, dtype=torch.double)
    logits_TV[0, 3] = math.log(q / (1 - q) * (vocab - 1))
    hidden_TH = logits_TV.bfloat16().requires_grad_()
    p_TV = hidden_TH.detach().double().softmax(-1)
    masses = [p_TV[0, 3].item(), 1 - p_TV[0, 3].item() if not is_sample else 0.1]
    targets = CachedTargets(torch.tensor([[3]]), torch.tensor([masses]).double(), is_sample)
    label, weight_T = torch.tensor([3]), torch.ones(1)
    given = torch.eye(vocab, dtype=torch.bfloat16), label, weight_T, vocab, Axis()
    loss, _ = vocab_parallel_loss(hidden_TH, *given, targets=targets, options=LossOptions(omega))
    loss.backward()
    expected = (1 - omega) * (p_TV[0, 3] - 1)  # of the labels' term; the divergence is at its minimum
    assert hidden_TH.grad[0, 3].item() == pytest.approx(expected.item(), rel=2**-7)


def test_more_ranks_than_vocabulary_chunks() -> None:
    """Five rows on four ranks: 2, 2, 1 and none at all."""
    p = problem(vocab=5)
    cases = [(top_k(soft_teacher(p), k), LossOptions(0.5)) for k in (1, 2, 5)]
    cases.append((sampled(soft_teacher(p), 3), LossOptions(0.5, 2.0, both=True)))
    for (targets, options), result in zip(cases, on_ranks(p, cases, 4), strict=True):
        assert_matches(result, oracle(p, targets, options), 1e-10)


@pytest.mark.parametrize("rho", [0.25, 1.0, 2.0])
@pytest.mark.parametrize("both", [False, True])
def test_all_tokens_are_the_full_divergence(rho: float, both: bool) -> None:
    p, options = problem(), LossOptions(1 / 3, rho, both)
    found = evaluate_cached(p, top_k(soft_teacher(p, rho), VOCAB), options)
    assert_matches(found, evaluate(p, options), 1e-12)


def kd_of(logits_TV: Tensor, targets: CachedTargets) -> Tensor:
    """KD of each token by the code, in the precision of the logits: the identity as output matrix hands them on."""
    num_tokens, vocab = logits_TV.shape
    given = torch.eye(vocab, dtype=logits_TV.dtype), torch.zeros(1, dtype=torch.long), torch.ones(1).to(logits_TV)
    found = []
    for t in range(num_tokens):
        rows = targets.rows(slice(t, t + 1))
        options = LossOptions(1.0)
        _, sums = vocab_parallel_loss(logits_TV[t : t + 1], *given, vocab, Axis(), targets=rows, options=options)
        found.append(sums[2])
    return torch.stack(found)


@given(
    seed=st.integers(0, 2**31),
    vocab=st.integers(2, 40),
    share=st.floats(0, 1),
    sharpness=st.floats(-3, 1.3),
    distance=st.floats(-3, 1),
)
def test_no_truncated_divergence_is_negative_or_above_the_full_one(
    seed: int, vocab: int, share: float, sharpness: float, distance: float
) -> None:
    """Whatever the teacher, the student and k; and it is that of the coarser distributions, whose sign is no matter of
    clamping.
    """
    generator = torch.Generator().manual_seed(seed)
    teacher_TV, noise_TV = torch.randn(2, 3, vocab, generator=generator, dtype=torch.float64) * 10**sharpness
    student_TV = teacher_TV + noise_TV * 10**distance
    p_TV = teacher_TV.softmax(-1)
    targets = top_k(p_TV, max(1, round(share * vocab)))
    full_T = (torch.special.xlogy(p_TV, p_TV) - p_TV * student_TV.log_softmax(-1)).sum(-1)
    found_T, coarse_T = kd_of(student_TV, targets), divergence(student_TV, targets)
    slack_T = 1e-12 * (1 + student_TV.abs().amax(-1))
    assert (coarse_T >= -slack_T).all() and (coarse_T <= full_T + slack_T).all()
    assert (found_T >= 0).all() and ((found_T - coarse_T).abs() <= slack_T).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_truncated_divergence_lies_between_zero_and_the_full_one(dtype: torch.dtype) -> None:
    """Sharp and flat teachers and students, near each other and not, for every k."""
    generator = torch.Generator().manual_seed(1)
    scales_T1 = torch.tensor([1e-3, 0.1, 1.0, 4.0, 15.0]).repeat(8)[:, None].double()
    teacher_TV = torch.randn(40, 13, generator=generator).double() * scales_T1
    noise_TV = torch.randn(40, 13, generator=generator).double() * scales_T1.flip(0).roll(3, 0) / 3
    student_TV = teacher_TV + noise_TV
    p_TV = teacher_TV.softmax(-1)
    full_T = (p_TV * (p_TV.log() - student_TV.log_softmax(-1))).nan_to_num(0.0).sum(-1)
    before_T, slack = torch.zeros(40).double(), 1e-12 if dtype == torch.float64 else 1e-5
    for k in range(1, 14):
        found_T = kd_of(student_TV.to(dtype), top_k(p_TV, k)).double()
        assert (found_T >= 0).all(), k
        assert (found_T <= full_T + slack * (1 + student_TV.abs().amax(-1))).all(), k
        assert (found_T >= before_T - slack * (1 + student_TV.abs().amax(-1))).all(), "a finer split says more"
        before_T = found_T
    torch.testing.assert_close(before_T, full_T, rtol=slack, atol=30 * slack)
    assert (kd_of(teacher_TV.to(dtype), top_k(p_TV, 4)) < 30 * slack).all(), "equal models differ in nothing"


def test_without_its_bucket_it_would_be_negative() -> None:
    """The check above has something to see: the sum over the entries alone is no divergence."""
    p = problem()
    targets = top_k(soft_teacher(p), 3)
    no_tail = replace(targets, masses_TK1=targets.masses_TK1.index_fill(1, torch.tensor([3]), 0.0))
    logits_TV = p.teacher_TG @ p.teacher_head_VG.T + 0.3 * p.hidden_TH @ p.head_VH.T
    masses_TK = no_tail.masses_TK1[:, :-1]
    bare_T = (masses_TK * (masses_TK.log() - logits_TV.log_softmax(-1).gather(1, targets.ids_TK))).sum(-1)
    assert (bare_T < 0).any() and (kd_of(logits_TV, targets) > 0).all()


def test_a_tail_that_the_student_hardly_sees_keeps_its_digits() -> None:
    """q_tail is e^-40 of the whole: as 1 − Σ q it would be 0, and the divergence infinite."""
    logits_TV = torch.tensor([[50.0, 49.0, 8.0, 9.0, 7.5]], dtype=torch.float64)
    p_TV = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04]], dtype=torch.float64)
    targets, weights_T = top_k(p_TV, 2), torch.ones(1, dtype=torch.float64)
    expected = logits_TV.clone().requires_grad_()
    kd = divergence(expected, targets).sum()
    kd.backward()
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        hidden_TH = logits_TV.detach().to(dtype, copy=True).requires_grad_()
        given = torch.eye(5, dtype=dtype), torch.zeros(1, dtype=torch.long), weights_T.to(dtype), 5, Axis()
        loss, _ = vocab_parallel_loss(hidden_TH, *given, targets=targets, options=LossOptions(1.0))
        loss.backward()
        assert loss.item() == pytest.approx(kd.item(), rel=tolerance) and kd > 5
        torch.testing.assert_close(hidden_TH.grad, expected.grad.to(dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_sample", [False, True], ids=["top_k", "sampled"])
@pytest.mark.parametrize("more", [{}, *SMOOTH], ids=str)
def test_weight_zero_is_bit_equal_to_the_plain_loss(
    dtype: torch.dtype, is_sample: bool, more: dict[str, float]
) -> None:
    p = problem(dtype)
    targets = (sampled if is_sample else top_k)(soft_teacher(p), 5)
    mixed = evaluate_cached(p, targets, LossOptions(0.0, 0.25, chunk_tokens=4, **more))
    plain = evaluate(p, LossOptions(chunk_tokens=4, **more), with_teacher=False)
    assert mixed.sums[2] > 0
    for name in ("loss", "grad_hidden", "grad_head"):
        assert torch.equal(getattr(mixed, name), getattr(plain, name)), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_teacher_equal_to_the_student_teaches_nothing(dtype: torch.dtype) -> None:
    """All of its tokens are there: KD is rounding, and the gradient that of the labels' term, less its share."""
    p = problem(dtype)
    own_TV = (p.hidden_TH.double() @ p.head_VH.double().T).softmax(-1)
    for targets in (top_k(own_TV, VOCAB), top_k(own_TV, 4)):
        found = evaluate_cached(p, targets, LossOptions(1 / 3, **SMOOTH[2]))
        plain = evaluate(p, LossOptions(**SMOOTH[2]), with_teacher=False)
        assert 0 <= found.sums[2] <= 10 * TOLERANCE[dtype]
        for name in ("grad_hidden", "grad_head"):
            expected = 2 / 3 * getattr(plain, name)
            torch.testing.assert_close(getattr(found, name), expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("chunk_tokens", [1, 4, 12])
def test_chunks_change_nothing(chunk_tokens: int) -> None:
    p, options = problem(), LossOptions(1 / 3, **SMOOTH[2])
    targets = top_k(soft_teacher(p), 5)
    found = evaluate_cached(p, targets, replace(options, chunk_tokens=chunk_tokens))
    assert_matches(found, evaluate_cached(p, targets, options), 1e-13)


def test_drawn_targets_give_the_full_gradient_on_average() -> None:
    """Mean over 4,000 draws of the loss and of each token's gradient, within five standard errors of the full ones."""
    p, num_draws = problem(tokens=4), 4000
    p = replace(p, weights_T=torch.ones(4).double(), labels_T=p.labels_T.clamp(min=0))
    expected = evaluate(p, LossOptions(0.5))
    torch.manual_seed(0)
    whole = {name: getattr(p, name).repeat(num_draws, 1) for name in ("hidden_TH", "teacher_TG")}
    whole |= {name: getattr(p, name).repeat(num_draws) for name in ("labels_T", "weights_T")}
    many = replace(p, **whole)
    targets = sampled(soft_teacher(many), 2)
    found = evaluate_cached(many, targets, LossOptions(0.5))
    grads = found.grad_hidden.view(num_draws, 4, -1)
    error = grads.std(0) / num_draws**0.5
    assert (error > 0).all() and ((grads.mean(0) - expected.grad_hidden).abs() <= 5 * error).all()
    kd = divergence(many.hidden_TH @ p.head_VH.T, targets).view(num_draws, 4).sum(-1)
    assert abs(found.sums[2] / num_draws - expected.sums[2]) <= 5 * kd.std() / num_draws**0.5


def test_gradients_of_a_tail_left_out_would_be_seen() -> None:
    """Renormalised over the entries, as some do, the gradient is another."""
    p, options = problem(), LossOptions(1.0)
    targets = top_k(soft_teacher(p), 3)
    masses_TK = targets.masses_TK1[:, :-1] / targets.masses_TK1[:, :-1].sum(-1, keepdim=True)
    other = replace(targets, masses_TK1=F.pad(masses_TK, (0, 1)))
    errors = worst_error(evaluate_cached(p, other, options), oracle(p, targets, options))
    assert errors["grad_hidden"] > 1e-2 and errors["grad_head"] > 1e-2


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("row", [0, 20])
def test_a_damaged_row_of_the_head_shows_on_every_rank(world: int, row: int) -> None:
    p = problem()
    targets = top_k(soft_teacher(p), 5)
    p.head_VH[row] = torch.nan
    for (result,) in run_ranks(evaluate_here, world, p, [(targets, LossOptions(1 / 3))]):
        assert result.loss.isnan()
