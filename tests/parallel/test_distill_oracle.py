"""Every option of the loss, and all of them together, against a dense float64 definition: gradients above all."""

# Shape suffix legend: T = tokens, H = hidden, G = the teacher's hidden, V = vocabulary.

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import cycle, product
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megagrow.parallel import loss_terms
from megagrow.parallel.collectives import copy_to
from megagrow.parallel.loss import LossOptions, vocab_parallel_loss
from megagrow.parallel.mesh import Axis
from megagrow.parallel.shards import chunk
from megagrow.plan.measure import peak_memory
from tests.ranks import run_ranks

VOCAB, TOKENS = 29, 13  # neither 2 nor 4 divides the vocabulary
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
DIVERGENCES = ("forward_kl", "reverse_kl", "cross_entropy")
SMOOTH = ({"label_smoothing": 0.1}, {"z_loss": 0.01}, {"label_smoothing": 0.2, "z_loss": 0.1})


@dataclass(frozen=True)
class Given:
    """What the loss takes, whole; the last weights and labels are those of tokens that do not count."""

    hidden_TH: Tensor
    head_VH: Tensor
    bias_V: Tensor
    labels_T: Tensor
    weights_T: Tensor
    teacher_TG: Tensor
    teacher_head_VG: Tensor
    has_teacher: bool = True
    num_common: int | None = None

    def to(self, dtype: torch.dtype) -> "Given":
        floats = {name: x.to(dtype) for name, x in vars(self).items() if torch.is_tensor(x) and x.is_floating_point()}
        return replace(self, **floats)


Result = dict[str, Tensor]


def make(tokens: int = TOKENS, vocab: int = VOCAB, **changes: object) -> Given:
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels_T = torch.randint(vocab, (tokens,), generator=generator)
    weights_T = 0.1 + torch.rand(tokens, generator=generator, dtype=torch.float64)
    labels_T[-2:], weights_T[-2:] = -100, 0.0
    labels_T[0], labels_T[1] = 0, vocab - 1
    heads = normal(vocab, 6), normal(vocab), labels_T, weights_T, normal(tokens, 5), normal(vocab, 5)
    return replace(Given(normal(tokens, 6), *heads), **changes)


def oracle(given: Given, options: LossOptions) -> Result:
    """The definition of every term from whole logits in float64, differentiated by autograd."""
    given = given.to(torch.float64)
    leaves = {"hidden": given.hidden_TH, "head": given.head_VH, "bias": given.bias_V}
    hidden_TH, head_VH, bias_V = (leaf.clone().requires_grad_() for leaf in leaves.values())
    logits_TV = hidden_TH @ head_VH.T + bias_V

    def total(values_T: Tensor) -> Tensor:
        return (values_T * given.weights_T).sum()

    ce = total(F.cross_entropy(logits_TV, given.labels_T, reduction="none"))
    smoothed_T = F.cross_entropy(logits_TV, given.labels_T, reduction="none", label_smoothing=options.label_smoothing)
    hard = total(smoothed_T + options.z_loss * logits_TV.logsumexp(-1) ** 2)
    loss, kd, entropy = hard, torch.zeros_like(ce), torch.zeros_like(ce)
    if given.has_teacher:
        common = slice(0, given.num_common)
        teacher_TV = (given.teacher_TG @ given.teacher_head_VG.T)[:, common] / options.temperature
        student_TV = logits_TV[:, common] / (options.temperature if options.both else 1.0)
        p_TV, q_TV = teacher_TV.softmax(-1), student_TV.softmax(-1)
        terms_TV = {
            "forward_kl": p_TV * (p_TV / q_TV).log(),
            "reverse_kl": q_TV * (q_TV / p_TV).log(),
            "cross_entropy": -p_TV * q_TV.log(),
        }
        kd = options.scale * total(terms_TV[options.divergence].sum(-1))
        entropy = total(-(p_TV * p_TV.log()).sum(-1))
        loss = (1 - options.weight) * hard + options.weight * kd
    gradients = torch.autograd.grad(loss, (hidden_TH, head_VH, bias_V))
    return dict(zip(leaves, gradients, strict=True)) | {"sums": torch.stack((loss, ce, kd, entropy)).detach()}


def evaluate(given: Given, options: LossOptions) -> Result:
    """The loss of this rank's shard; gradients of the head and its bias are those of its rows."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    tp = Axis(dist.group.WORLD, dist.get_rank(), world) if world > 1 else Axis()
    vocab = len(given.head_VH)
    rows = chunk(vocab, tp)
    hidden_TH = given.hidden_TH.clone().requires_grad_()
    head_VH, bias_V = (x[rows].clone().requires_grad_() for x in (given.head_VH, given.bias_V))
    teacher = {}
    if given.has_teacher:
        common = slice(rows.start, min(rows.stop, given.num_common or vocab))
        teacher = {"teacher_hidden": given.teacher_TG, "teacher_head": given.teacher_head_VG[common]}
    loss, sums = vocab_parallel_loss(
        copy_to(hidden_TH, tp),
        head_VH,
        given.labels_T,
        given.weights_T,
        vocab,
        tp,
        **teacher,
        options=options,
        head_bias=bias_V,
        num_common=given.num_common,
    )
    (3 * loss).backward()
    assert torch.equal(loss[0], sums[0])
    found = {"hidden": hidden_TH.grad, "head": head_VH.grad, "bias": bias_V.grad}
    return {name: x / 3 for name, x in found.items() if x is not None} | {"sums": sums}


def evaluate_all(given: Given, choices: list[LossOptions]) -> list[Result]:
    return [evaluate(given, options) for options in choices]


def on_ranks(world: int, given: Given, choices: list[LossOptions]) -> list[Result]:
    """One result per choice: what is whole must be the same on every rank, the rows are put together."""
    results = []
    for of_ranks in zip(*run_ranks(evaluate_all, world, given, choices), strict=True):
        for name in ("hidden", "sums"):
            assert all(torch.equal(other[name], of_ranks[0][name]) for other in of_ranks), name
        results.append(of_ranks[0] | {name: torch.cat([r[name] for r in of_ranks]) for name in ("head", "bias")})
    return results


def assert_close(found: Result, expected: Result, tolerance: float, options: LossOptions) -> None:
    """Errors are relative to the largest entry of each tensor, or to 1 where that is smaller."""
    assert set(found) == set(expected)
    for name, truth in expected.items():
        assert found[name].shape == truth.shape, name
        error = (found[name].double() - truth).abs().max() / truth.abs().max().clamp(min=1.0)
        assert error <= tolerance, f"{name} is off by {error:.3g} with {options}"


def mixtures() -> Iterator[LossOptions]:
    """Every weight, temperature and divergence, in turn plain and with each of the additions to the cross-entropy."""
    additions = cycle(({}, *SMOOTH))
    for omega, rho, both, divergence in product((0.0, 1 / 3, 1.0), (0.25, 1.0, 2.0), (False, True), DIVERGENCES):
        scale = rho**2 if both else 1.0
        yield LossOptions(omega, rho, both, scale, chunk_tokens=5, divergence=divergence, **next(additions))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_gradients_of_every_option(world: int, dtype: torch.dtype) -> None:
    given, choices = make().to(dtype), list(mixtures())
    for options, found in zip(choices, on_ranks(world, given, choices), strict=True):
        assert all(found[name].dtype == dtype for name in ("hidden", "head", "bias"))
        assert_close(found, oracle(given, options), TOLERANCE[dtype], options)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_without_a_teacher(world: int, dtype: torch.dtype) -> None:
    given = make(has_teacher=False).to(dtype)
    choices = [LossOptions(chunk_tokens=5), *(LossOptions(chunk_tokens=5, **more) for more in SMOOTH)]
    for options, found in zip(choices, on_ranks(world, given, choices), strict=True):
        assert_close(found, oracle(given, options), TOLERANCE[dtype], options)
        assert found["sums"][2:].tolist() == [0, 0]


@pytest.mark.parametrize("num_common", [28, 23, 7])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_tokens_that_the_teacher_lacks_are_left_out_of_the_divergence(world: int, num_common: int) -> None:
    """On four ranks the shards hold 8, 8, 8 and 5 tokens: some have none in common with the teacher."""
    given = make(num_common=num_common)
    choices = [
        LossOptions(1 / 3, 0.5, both, chunk_tokens=5, divergence=divergence, **more)
        for both, divergence, more in product((False, True), DIVERGENCES, ({}, SMOOTH[2]))
    ]
    for options, found in zip(choices, on_ranks(world, given, choices), strict=True):
        assert_close(found, oracle(given, options), 1e-10, options)


def test_what_the_teacher_says_of_tokens_that_are_not_common_has_no_influence() -> None:
    given, options = make(num_common=23), LossOptions(0.5, 2.0)
    changed = replace(given, teacher_head_VG=given.teacher_head_VG.clone())
    changed.teacher_head_VG[23:] = 9.0
    before, after = evaluate(given, options), evaluate(changed, options)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("world", [1, 2])
def test_bfloat16_stays_near_the_truth(world: int) -> None:
    given = make().to(torch.bfloat16)
    choices = [LossOptions(1 / 3, 2.0, True, chunk_tokens=5, divergence=d, **SMOOTH[2]) for d in DIVERGENCES]
    for options, found in zip(choices, on_ranks(world, given, choices), strict=True):
        assert found["sums"].dtype == torch.float32
        assert_close(found, oracle(given, options), 2e-2, options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("more", [{}, *SMOOTH], ids=str)
def test_weight_zero_gives_the_bits_of_the_plain_loss(dtype: torch.dtype, more: dict[str, float]) -> None:
    """Whatever the divergence; also where the teacher's logits exist for a piece of the chunk at a time."""
    given = make(tokens=150).to(dtype)
    plain = evaluate(replace(given, has_teacher=False), LossOptions(chunk_tokens=100, **more))
    with mock.patch.object(loss_terms, "TEACHER_BYTES", {"cpu": 1}):
        for divergence in DIVERGENCES:
            options = LossOptions(0.0, 0.25, chunk_tokens=100, divergence=divergence, **more)
            mixed = evaluate(given, options)
            assert (mixed["sums"][2:] > 0).all()
            assert torch.equal(mixed["sums"][:2], plain["sums"][:2])
            assert all(torch.equal(mixed[name], plain[name]) for name in ("hidden", "head", "bias"))


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("more", [{}, SMOOTH[2]], ids=str)
def test_a_teacher_equal_to_the_student_teaches_nothing(world: int, more: dict[str, float]) -> None:
    given = make()
    given.bias_V.zero_()  # teachers have none
    given = replace(given, teacher_TG=given.hidden_TH, teacher_head_VG=given.head_VH)
    choices = [LossOptions(1 / 3, divergence=divergence, **more) for divergence in DIVERGENCES]
    (plain,) = on_ranks(world, replace(given, has_teacher=False), [LossOptions(**more)])
    for options, found in zip(choices, on_ranks(world, given, choices), strict=True):
        _, _, kd, entropy = found["sums"].tolist()
        assert kd == (entropy if options.divergence == "cross_entropy" else 0.0)
        for name in ("hidden", "head", "bias"):
            torch.testing.assert_close(found[name], 2 / 3 * plain[name], rtol=0, atol=1e-13)


@pytest.mark.parametrize("options", [LossOptions(1 / 3, 0.5, divergence=d, **SMOOTH[2]) for d in DIVERGENCES], ids=str)
def test_chunks_and_pieces_change_nothing(options: LossOptions) -> None:
    given = make(tokens=150, num_common=27)
    whole = evaluate(given, options)
    for chunk_tokens, teacher_bytes in ((7, 2**26), (150, 1), (100, 1)):
        with mock.patch.object(loss_terms, "TEACHER_BYTES", {"cpu": teacher_bytes}):
            found = evaluate(given, replace(options, chunk_tokens=chunk_tokens))
        assert_close(found, whole, 1e-13, options)


def pieces_here(given: Given, options: LossOptions) -> Result:
    with mock.patch.object(loss_terms, "TEACHER_BYTES", {"cpu": 1}):
        return evaluate(given, options)


def test_all_ranks_go_through_the_same_pieces() -> None:
    """Their shards differ in size, and the last one has no token in common with the teacher."""
    given, options = make(tokens=150, num_common=23), LossOptions(0.5, chunk_tokens=100)
    for found in run_ranks(pieces_here, 4, given, options):
        assert_close({"sums": found["sums"]}, {"sums": oracle(given, options)["sums"]}, 1e-12, options)


def test_the_cross_entropy_to_the_teacher_is_the_forward_kl_and_its_entropy() -> None:
    """With the same gradients, bit by bit."""
    kl, ce = (evaluate(make(), LossOptions(0.5, 2.0, divergence=d)) for d in ("forward_kl", "cross_entropy"))
    assert all(torch.equal(kl[name], ce[name]) for name in ("hidden", "head", "bias"))
    torch.testing.assert_close(ce["sums"][2], kl["sums"][2] + kl["sums"][3], rtol=1e-14, atol=0)
    assert kl["sums"][3] == ce["sums"][3] > 0


@pytest.mark.parametrize("has_teacher", [False, True])
def test_tokens_of_weight_zero_have_no_influence(has_teacher: bool) -> None:
    given = make(has_teacher=has_teacher)
    changed = replace(given, hidden_TH=given.hidden_TH.clone(), labels_T=given.labels_T.clone())
    changed.hidden_TH[-2:], changed.labels_T[-2:] = 9.0, 1
    for divergence in DIVERGENCES:
        options = LossOptions(1 / 3, divergence=divergence, **SMOOTH[2])
        before, after = evaluate(given, options), evaluate(changed, options)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert not before["hidden"][-2:].any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_weight_of_a_token_weighs_its_gradient(divergence: str) -> None:
    """Weights are no parameters: the gradients are linear in them."""
    given, options = make(), LossOptions(1 / 3, 0.5, divergence=divergence, **SMOOTH[2])
    parts = [torch.where(torch.arange(TOKENS) % 3 == i, given.weights_T, 0.0) for i in range(3)]
    found = [evaluate(replace(given, weights_T=part), options) for part in parts]
    whole = evaluate(given, options)
    for name, value in whole.items():
        torch.testing.assert_close(sum(each[name] for each in found), value, rtol=1e-12, atol=1e-13)


def test_two_whole_tensors_of_logits_never_exist() -> None:
    """The student's logits of a chunk, the teacher's of a piece of it, and little else."""
    vocab, tokens, hidden, chunk_tokens = 8000, 512, 16, 256
    hidden_TH, head_VH = torch.randn(tokens, hidden, requires_grad=True), torch.randn(vocab, hidden, requires_grad=True)
    teacher = torch.randn(tokens, hidden), torch.randn(vocab, hidden)
    labels_T, weights_T = torch.randint(vocab, (tokens,)), torch.rand(tokens)
    options = LossOptions(1 / 3, 0.5, chunk_tokens=chunk_tokens)

    def step() -> None:
        given = hidden_TH, head_VH, labels_T, weights_T, vocab, Axis(), *teacher
        vocab_parallel_loss(*given, options=options)[0].sum().backward()

    with mock.patch.object(loss_terms, "TEACHER_BYTES", {"cpu": 64 * vocab * 4}):
        peak = peak_memory(step)
    gradients = 4 * hidden * (vocab + tokens)
    logits = 4 * vocab * (chunk_tokens + 64)
    assert logits < peak - gradients < logits + 4 * 8 * 2**18 + 2**20 < 4 * vocab * 2 * tokens
