"""The mixed loss against softmax and KL divergence written densely in float64, gradients above
all.
"""

# Shape suffix legend: T = tokens, H = hidden, G = the teacher's hidden, V = vocabulary.

from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megagrow import ops
from megagrow.config import ParallelConfig
from megagrow.model import transformer
from megagrow.parallel import loss as loss_module
from megagrow.parallel.collectives import copy_to, reduce_from
from megagrow.parallel.loss import LossOptions, token_scores, tokens_at_once, vocab_parallel_loss, whole_logits
from megagrow.parallel.mesh import Axis, Mesh, make_mesh
from megagrow.parallel.shards import chunk
from tests.ranks import run_ranks
from tests.salt.test_teacher import make_student

VOCAB = 29  # neither 2 nor 4 divides it
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
OMEGAS = (0.0, 1 / 3, 1.0)
RHOS = (0.25, 1.0, 2.0)


@dataclass(frozen=True)
class Problem:
    """Inputs of the loss, whole."""

    hidden_TH: Tensor
    head_VH: Tensor
    labels_T: Tensor
    weights_T: Tensor
    teacher_TG: Tensor
    teacher_head_VG: Tensor

    def to(self, dtype: torch.dtype) -> "Problem":
        cast = {k: v.to(dtype) for k, v in vars(self).items() if v.is_floating_point()}
        return replace(self, **cast)


@dataclass(frozen=True)
class Result:
    """What one evaluation gives; the gradient of the head is that of the rank's rows."""

    loss: Tensor
    sums: Tensor
    grad_hidden: Tensor
    grad_head: Tensor


def problem(dtype: torch.dtype = torch.float64, vocab: int = VOCAB, tokens: int = 13) -> Problem:
    """Logits of a few units, uneven weights, of which one is zero and its label ignored."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    labels_T = torch.randint(vocab, (tokens,), generator=generator)
    weights_T = torch.rand(tokens, generator=generator) + 0.25
    labels_T[3], weights_T[3] = -100, 0.0
    hidden_TH, head_VH = normal(tokens, 7), normal(vocab, 7)
    teacher_TG, teacher_head_VG = normal(tokens, 5), normal(vocab, 5)
    return Problem(hidden_TH, head_VH, labels_T, weights_T, teacher_TG, teacher_head_VG).to(dtype)


def oracle(p: Problem, options: LossOptions, with_teacher: bool = True) -> Result:
    """The definition, through torch's softmax, KL divergence and autograd, in float64."""
    p = p.to(torch.float64)
    hidden_TH, head_VH = (x.clone().requires_grad_() for x in (p.hidden_TH, p.head_VH))
    logits_TV = hidden_TH @ head_VH.T
    counted = p.labels_T >= 0
    ce_T = F.cross_entropy(logits_TV, p.labels_T.clamp(min=0), reduction="none")
    ce = (ce_T * p.weights_T)[counted].sum()
    loss, kd, entropy = ce, torch.zeros_like(ce), torch.zeros_like(ce)
    if with_teacher:
        rho = options.temperature
        target_TV = (p.teacher_TG @ p.teacher_head_VG.T / rho).softmax(-1)
        student_TV = (logits_TV / (rho if options.both else 1.0)).log_softmax(-1)
        kl_T = F.kl_div(student_TV, target_TV, reduction="none").sum(-1)
        kd = options.scale * (kl_T * p.weights_T).sum()
        entropy = -((target_TV * target_TV.log()).sum(-1) * p.weights_T).sum()
        loss = (1 - options.weight) * ce + options.weight * kd
    loss.backward()
    assert hidden_TH.grad is not None and head_VH.grad is not None
    sums = torch.stack([loss, ce, kd, entropy]).detach()
    return Result(sums[:1], sums, hidden_TH.grad, head_VH.grad)


def evaluate(
    p: Problem,
    options: LossOptions,
    tp: Axis | None = None,
    with_teacher: bool = True,
    mutant: bool = False,
    factor: float = 1.0,
) -> Result:
    """The loss on this rank's shard of the vocabulary; `factor` multiplies the loss before the
    backward pass.

    The mutant sums the final scalar with an all-reduce whose backward pass sums once more: the
    right loss, with gradients that are tp times too large.
    """
    tp = tp or Axis()
    rows = chunk(len(p.head_VH), tp)
    hidden_TH = p.hidden_TH.clone().requires_grad_()
    head_VH = p.head_VH[rows].clone().requires_grad_()
    loss, sums = vocab_parallel_loss(
        copy_to(hidden_TH, tp),
        head_VH,
        p.labels_T,
        p.weights_T,
        len(p.head_VH),
        tp,
        teacher_hidden=p.teacher_TG if with_teacher else None,
        teacher_head=p.teacher_head_VG[rows] if with_teacher else None,
        options=options,
    )
    if mutant:
        own = loss if tp.is_first else loss - loss.detach()
        loss = reduce_from(copy_to(own, tp), tp)
    (loss * factor).backward()
    assert hidden_TH.grad is not None and head_VH.grad is not None
    return Result(loss.detach(), sums, hidden_TH.grad, head_VH.grad)


def tp_axis() -> Axis:
    world = dist.get_world_size() if dist.is_initialized() else 1
    return Axis(dist.group.WORLD, dist.get_rank(), world) if world > 1 else Axis()


def evaluate_all(p: Problem, choices: list[LossOptions], mutant: bool = False) -> list[Result]:
    """What one rank computes for every choice of options."""
    return [evaluate(p, options, tp_axis(), mutant=mutant) for options in choices]


def sharded(p: Problem, choices: list[LossOptions], world: int, mutant: bool = False) -> list[Result]:
    """One result per choice: all ranks must agree on what is whole; the head's rows are put
    together.
    """
    by_rank = run_ranks(evaluate_all, world, p, choices, mutant)
    merged = []
    for results in zip(*by_rank, strict=True):
        for other in results[1:]:
            for name in ("loss", "sums", "grad_hidden"):
                assert torch.equal(getattr(other, name), getattr(results[0], name)), name
        merged.append(replace(results[0], grad_head=torch.cat([r.grad_head for r in results])))
    return merged


def worst_error(result: Result, expected: Result) -> dict[str, float]:
    """Largest error of each part, relative to its largest entry (or to 1 if that is smaller)."""
    errors = {}
    for name, value in vars(result).items():
        truth = getattr(expected, name)
        assert value.shape == truth.shape, name
        scale = max(truth.abs().max().item(), 1.0) if truth.numel() else 1.0
        errors[name] = (value.double() - truth).abs().max().item() / scale
    return errors


def assert_matches(result: Result, expected: Result, tolerance: float) -> None:
    errors = worst_error(result, expected)
    assert max(errors.values()) <= tolerance, errors


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("both", [False, True], ids=["teacher", "both"])
def test_gradients_of_the_mixture(world: int, dtype: torch.dtype, both: bool) -> None:
    choices = [
        LossOptions(omega, rho, both, scale, chunk_tokens=5)
        for omega in OMEGAS
        for rho in RHOS
        for scale in (1.0, rho**2)
    ]
    p = problem(dtype)
    for options, result in zip(choices, sharded(p, choices, world), strict=True):
        assert result.grad_hidden.dtype == result.grad_head.dtype == dtype
        assert_matches(result, oracle(p, options), TOLERANCE[dtype])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_bfloat16_stays_near_the_truth(world: int) -> None:
    options = LossOptions(1 / 3, 0.5, chunk_tokens=5)
    p = problem(torch.bfloat16)
    (result,) = sharded(p, [options], world)
    assert result.loss.dtype == torch.float32
    assert_matches(result, oracle(p, options), 2e-2)


def test_more_ranks_than_vocabulary_chunks() -> None:
    """Five rows on four ranks: 2, 2, 1 and none at all."""
    options = LossOptions(0.5, 2.0)
    p = problem(vocab=5)
    (result,) = sharded(p, [options], 4)
    assert_matches(result, oracle(p, options), 1e-10)


def test_gradients_that_are_tp_times_too_large_would_be_seen() -> None:
    options = LossOptions(1 / 3)
    p = problem()
    (result,) = sharded(p, [options], 2, mutant=True)
    expected = oracle(p, options)
    errors = worst_error(result, expected)
    assert errors["loss"] <= 1e-10 and errors["sums"] <= 1e-10
    assert torch.allclose(result.grad_head, 2 * expected.grad_head)
    with pytest.raises(AssertionError):
        assert_matches(result, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("omega", OMEGAS)
@pytest.mark.parametrize("chunk_tokens", [1, 4, 12])
def test_chunks_change_nothing(chunk_tokens: int, omega: float) -> None:
    options = LossOptions(omega, 0.5)
    whole = evaluate(problem(), options)
    assert_matches(evaluate(problem(), replace(options, chunk_tokens=chunk_tokens)), whole, 1e-13)


@pytest.mark.parametrize("omega", [1 / 3, 1.0])
@pytest.mark.parametrize("world", [1, 2])
def test_a_teacher_equal_to_the_student_teaches_nothing(world: int, omega: float) -> None:
    p = problem()
    p = replace(p, teacher_TG=p.hidden_TH, teacher_head_VG=p.head_VH)
    options = LossOptions(omega)
    (result,) = sharded(p, [options], world)
    plain = evaluate(p, options, with_teacher=False)
    assert result.sums[2] == 0.0
    scaled = Result(*((1 - omega) * x for x in (plain.loss, plain.sums, plain.grad_hidden, plain.grad_head)))
    errors = worst_error(replace(result, sums=scaled.sums), scaled)
    assert max(errors.values()) <= 1e-13, errors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_weight_zero_is_bit_equal_to_the_plain_loss(dtype: torch.dtype) -> None:
    p = problem(dtype)
    mixed = evaluate(p, LossOptions(0.0, 0.25, chunk_tokens=4))
    plain = evaluate(p, LossOptions(chunk_tokens=4), with_teacher=False)
    assert mixed.sums[2] > 0
    for name in ("loss", "grad_hidden", "grad_head"):
        assert torch.equal(getattr(mixed, name), getattr(plain, name)), name


def test_plain_loss_matches_cross_entropy() -> None:
    p = problem()
    result = evaluate(p, LossOptions(chunk_tokens=4), with_teacher=False)
    assert_matches(result, oracle(p, LossOptions(), with_teacher=False), 1e-10)


@pytest.mark.parametrize("with_teacher", [False, True])
def test_tokens_of_weight_zero_have_no_influence(with_teacher: bool) -> None:
    p = problem()
    changed = replace(
        p,
        hidden_TH=p.hidden_TH.index_fill(0, torch.tensor([3]), 9.0),
        teacher_TG=p.teacher_TG.index_fill(0, torch.tensor([3]), -9.0),
        labels_T=p.labels_T.index_fill(0, torch.tensor([3]), 1),
    )
    options = LossOptions(1 / 3)
    before, after = (evaluate(x, options, with_teacher=with_teacher) for x in (p, changed))
    for name, value in vars(before).items():
        assert torch.equal(value, getattr(after, name)), name
    assert not before.grad_hidden[3].any()


def test_the_gradient_follows_what_multiplies_the_loss() -> None:
    options = LossOptions(1 / 3)
    once, thrice = (evaluate(problem(), options, factor=f) for f in (1.0, 3.0))
    torch.testing.assert_close(thrice.grad_hidden, 3 * once.grad_hidden, rtol=1e-14, atol=0)
    torch.testing.assert_close(thrice.grad_head, 3 * once.grad_head, rtol=1e-14, atol=0)


def test_a_second_backward_pass_gives_the_same_gradients_or_is_refused() -> None:
    """Schedules that split the backward pass ask for one gradient at a time; the factor is multiplied in once."""
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(5, 4, generator=generator, requires_grad=True)
    head_VH = torch.randn(7, 4, generator=generator, requires_grad=True)
    loss, _ = vocab_parallel_loss(hidden_TH, head_VH, torch.arange(5), torch.ones(5), 7, Axis())
    both = torch.autograd.grad(3 * loss.sum(), (hidden_TH, head_VH), retain_graph=True)
    halves = [torch.autograd.grad(3 * loss.sum(), x, retain_graph=True)[0] for x in (hidden_TH, head_VH)]
    assert all(torch.equal(once, again) for once, again in zip(both, halves, strict=True))
    with pytest.raises(RuntimeError, match="must have the first one's factor"):
        torch.autograd.grad(5 * loss.sum(), hidden_TH)


def test_a_factor_is_not_rounded_to_the_activations() -> None:
    """1/3 in bfloat16 is 0.2 % too large, and every gradient would be."""
    p = problem(torch.bfloat16)
    once, third = (evaluate(p, LossOptions(), with_teacher=False, factor=f) for f in (1.0, 1 / 3))
    ratio = third.grad_hidden.double().norm() / once.grad_hidden.double().norm()
    assert abs(ratio.item() * 3 - 1) < 5e-4


def test_without_gradients_only_the_value_is_computed() -> None:
    p, options = problem(), LossOptions(1 / 3, 0.5)
    expected = evaluate(p, options)
    with torch.no_grad():
        loss, sums = vocab_parallel_loss(
            p.hidden_TH.requires_grad_(),
            p.head_VH,
            p.labels_T,
            p.weights_T,
            VOCAB,
            Axis(),
            p.teacher_TG,
            p.teacher_head_VG,
            options,
        )
    assert not loss.requires_grad
    assert torch.equal(loss, expected.loss) and torch.equal(sums, expected.sums)


def given_logits(tokens: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits on a coarse grid, so that many are equal, and labels."""
    generator = torch.Generator().manual_seed(3)
    logits_TV = torch.randn(tokens, vocab, generator=generator).mul(8).round().div(4).to(dtype)
    return logits_TV, torch.randint(vocab, (tokens,), generator=generator)


def score_given_logits(
    logits_TV: Tensor, labels_T: Tensor, chunk_tokens: int, ties_by_id: bool = False
) -> list[Tensor]:
    """Scores through the identity as output matrix, which hands the logits on unchanged."""
    tp, vocab = tp_axis(), logits_TV.shape[1]
    head_VH = torch.eye(vocab, dtype=logits_TV.dtype)[chunk(vocab, tp)]
    return list(token_scores(logits_TV, head_VH, labels_T, vocab, tp, chunk_tokens, ties_by_id=ties_by_id))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [5, 29, 515])
def test_scores_of_given_logits_are_bit_equal_on_any_number_of_ranks(vocab: int, dtype: torch.dtype) -> None:
    logits_TV, labels_T = given_logits(50, vocab, dtype)
    nll_T, rank_T = score_given_logits(logits_TV, labels_T, 16)
    truth_TV = logits_TV.double()
    expected_T = F.cross_entropy(truth_TV, labels_T, reduction="none")
    label_T1 = truth_TV.gather(1, labels_T[:, None])
    assert nll_T.dtype == torch.promote_types(dtype, torch.float32) and (nll_T >= 0).all()
    torch.testing.assert_close(nll_T.double(), expected_T, rtol=1e-6, atol=1e-6)
    assert rank_T.dtype == torch.int32
    assert torch.equal(rank_T, (truth_TV > label_T1).sum(-1).int())
    assert ((truth_TV == label_T1).sum(-1) > 1).any(), "the test should contain ties"
    for world in (2, 4):
        for scores in run_ranks(score_given_logits, world, logits_TV, labels_T, 7):
            assert torch.equal(scores[0], nll_T) and torch.equal(scores[1], rank_T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_logits_can_be_ranked_by_id(dtype: torch.dtype) -> None:
    """Rank 0 is then the first of the largest logits, and every token of the vocabulary has a rank of its own."""
    logits_TV, _ = given_logits(1, 29, dtype)
    logits_TV[0, 3] = logits_TV[0, 28] = logits_TV.max()
    all_TV, labels_T = logits_TV.expand(29, -1), torch.arange(29)
    expected_T = logits_TV[0].double().argsort(descending=True, stable=True).argsort().int()
    assert sorted(expected_T.tolist()) == list(range(29)) and expected_T[3] == 0
    for world in (1, 2, 4):
        for _, rank_T in run_ranks(score_given_logits, world, all_TV, labels_T, 8, True):
            assert torch.equal(rank_T, expected_T)


def join_logits(p: Problem) -> Tensor:
    tp = tp_axis()
    return whole_logits(p.hidden_TH, p.head_VH[chunk(VOCAB, tp)], VOCAB, tp)


def test_logits_are_joined_over_shards_of_any_size() -> None:
    p = problem()
    for world in (1, 2, 4):
        first, *others = run_ranks(join_logits, world, p)
        torch.testing.assert_close(first, p.hidden_TH @ p.head_VH.T, rtol=0, atol=1e-13)
        assert all(torch.equal(other, first) for other in others)


def test_scores_from_hidden_states_agree_in_double_precision() -> None:
    p = problem()
    labels_T = p.labels_T.clamp(min=0)
    nll_T, rank_T = token_scores(p.hidden_TH, p.head_VH, labels_T, VOCAB, Axis())
    logits_TV = p.hidden_TH @ p.head_VH.T
    torch.testing.assert_close(nll_T, F.cross_entropy(logits_TV, labels_T, reduction="none"), rtol=0, atol=1e-13)
    for world in (2, 4):
        for nll_rank_T, rank_rank_T in run_ranks(score_hidden, world, p, labels_T):
            torch.testing.assert_close(nll_rank_T, nll_T, rtol=0, atol=1e-13)
            assert torch.equal(rank_rank_T, rank_T)


def score_hidden(p: Problem, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    tp = tp_axis()
    return token_scores(p.hidden_TH, p.head_VH[chunk(VOCAB, tp)], labels_T, VOCAB, tp)


def loss_and_nll(p: Problem) -> tuple[Tensor, Tensor]:
    return evaluate(p, LossOptions(1 / 3), tp_axis()).loss, score_hidden(p, p.labels_T)[0]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("row", [0, 20])
def test_a_damaged_row_of_the_head_shows_on_every_rank(world: int, row: int) -> None:
    """Maxima and integers forget NaN, but one shard with NaN must not give a loss that looks good."""
    p = problem()
    p.head_VH[row] = torch.nan
    for loss, nll_T in run_ranks(loss_and_nll, world, p):
        assert loss.isnan() and not nll_T.isfinite().any()


@pytest.mark.parametrize(
    ("wanted", "rows", "width", "expected"),
    [
        (1024, 32_000, 2, 1024),
        (1024, 128_000, 4, 512),
        (0, 8_000, 2, 1536),
        (0, 32_000, 2, 384),
        (0, 128_256, 2, 256),
        (0, 0, 4, 2**20 * 25 // 4),
    ],
)
def test_logits_of_a_chunk_fit_in_half_of_the_cache(wanted: int, rows: int, width: int, expected: int) -> None:
    found = tokens_at_once(wanted, rows, width, cache=50 * 2**20)
    assert found == expected
    assert found * rows * width <= 2**28 or found == 256
    assert wanted or found == 256 or found * rows * width <= 25 * 2**20


def model_loss_here() -> float:
    """Of 512 tokens, with a cache in which the logits of 358 fit on the rank with 15 rows, of 384 on that with 14."""
    mesh = make_mesh(ParallelConfig(tensor=2)) if dist.is_initialized() else Mesh.single()
    model = make_student(mesh)
    ids_BS = torch.arange(2 * 256).view(2, 256) % VOCAB
    with mock.patch.object(transformer, "cache_size", lambda _: 2 * 8 * 384 * 14):
        return model(ids_BS, ids_BS.flip(1)).item()


def test_shards_of_unequal_size_go_through_the_same_chunks() -> None:
    """Else their collectives would not match."""
    assert run_ranks(model_loss_here, 2) == [pytest.approx(model_loss_here(), rel=1e-12)] * 2


def loss_with_bias(
    dtype: torch.dtype, options: LossOptions, with_teacher: bool
) -> tuple[Result, Tensor, Tensor, Tensor]:
    """The loss of a head with a bias, the gradient of this rank's part of it, and the scores of the tokens."""
    p, tp = problem_with_bias().to(dtype), tp_axis()
    rows = chunk(VOCAB, tp)
    hidden_TH = p.hidden_TH[:, :-1].clone().requires_grad_()
    head_VH, bias_V = (x[rows].clone().requires_grad_() for x in (p.head_VH[:, :-1], p.head_VH[:, -1]))
    teacher = {"teacher_hidden": p.teacher_TG, "teacher_head": p.teacher_head_VG[rows]} if with_teacher else {}
    given = copy_to(hidden_TH, tp), head_VH, p.labels_T, p.weights_T, VOCAB, tp
    loss, sums = vocab_parallel_loss(*given, **teacher, options=options, head_bias=bias_V)
    (3 * loss).backward()
    assert hidden_TH.grad is not None and head_VH.grad is not None and bias_V.grad is not None
    labels_T = p.labels_T.clamp(min=0)
    nll_T, rank_T = token_scores(hidden_TH.detach(), head_VH, labels_T, VOCAB, tp, 5, head_bias=bias_V)
    return Result(loss.detach(), sums, hidden_TH.grad / 3, head_VH.grad / 3), bias_V.grad / 3, nll_T, rank_T


def problem_with_bias() -> Problem:
    """A bias is a column of the head whose state is always 1."""
    p = problem()
    p.hidden_TH[:, -1] = 1
    return p


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("with_teacher", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_bias_of_the_head_is_exact(dtype: torch.dtype, with_teacher: bool, ranks: int) -> None:
    options = LossOptions(weight=1 / 3, temperature=2.0, both=True, chunk_tokens=5)
    p = problem_with_bias()
    expected = oracle(p, options, with_teacher)
    logits_TV, labels_T = p.hidden_TH @ p.head_VH.T, p.labels_T.clamp(min=0)
    nlls_T = F.cross_entropy(logits_TV, labels_T, reduction="none")
    ranks_T = (logits_TV > logits_TV.gather(1, labels_T[:, None])).sum(-1)
    found = run_ranks(loss_with_bias, ranks, dtype, options, with_teacher)
    close = {"rtol": 0, "atol": 10 * TOLERANCE[dtype], "check_dtype": False}
    for rank, (result, grad_bias_V, nll_T, rank_T) in enumerate(found):
        rows = chunk(VOCAB, Axis(rank=rank, size=ranks))
        torch.testing.assert_close(result.sums[:2], expected.sums[:2], **close)
        torch.testing.assert_close(result.grad_hidden, expected.grad_hidden[:, :-1], **close)
        torch.testing.assert_close(result.grad_head, expected.grad_head[rows, :-1], **close)
        torch.testing.assert_close(grad_bias_V, expected.grad_head[rows, -1], **close)
        torch.testing.assert_close(nll_T, nlls_T, **close)
        assert torch.equal(rank_T.long(), ranks_T)


def test_the_logits_of_all_chunks_share_a_buffer() -> None:
    p, places = problem(torch.float32), list[int]()

    def noted(a_MK: Tensor, b_NK: Tensor, out_MN: Tensor | None = None) -> Tensor:
        if out_MN is not None:
            places.append(out_MN.data_ptr())
        return torch.mm(a_MK, b_NK.T, out=out_MN)

    given = p.hidden_TH, p.head_VH, p.labels_T.clamp(min=0)
    with mock.patch.object(ops, "product", noted):
        token_scores(*given, VOCAB, Axis(), chunk_tokens=4)
        assert len(places) == 4 and len(set(places)) == 1
        places.clear()
        vocab_parallel_loss(*given, p.weights_T, VOCAB, Axis(), options=LossOptions(chunk_tokens=4))
        assert len(places) == 4 and len(set(places)) == 1


def test_scores_take_as_many_tokens_at_a_time_as_a_cache_holds() -> None:
    p, sizes = problem(torch.float32), list[int]()

    def noted(a_MK: Tensor, b_NK: Tensor, out_MN: Tensor | None = None) -> Tensor:
        sizes.append(len(a_MK))
        return torch.mm(a_MK, b_NK.T, out=out_MN)

    with mock.patch.object(ops, "product", noted), mock.patch.object(loss_module, "tokens_at_once", lambda *_: 5):
        token_scores(p.hidden_TH, p.head_VH, p.labels_T.clamp(min=0), VOCAB, Axis())
    assert sizes == [5, 5, 3]
