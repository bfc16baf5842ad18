"""The distillation kernels, interpreted, against float64, PyTorch's KL divergence and each other."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megagrow import torch_vocab_ops
from megagrow_kernels.distill_loss import distill_grad_, distill_grad_ref, distill_stats, distill_stats_ref
from megagrow_kernels.vocab_loss import vocab_grad_, vocab_stats
from tests.kernels.accuracy import assert_as_good_as_twin

pytestmark = pytest.mark.interpreted

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


class Case(NamedTuple):
    """Tokens, columns, how many of these are no padding, temperatures; a block has 4096 columns at most."""

    T: int
    V: int
    num_valid: int | None
    dtype: torch.dtype
    temperature: float = 2.0
    student_temperature: float = 1.0
    teacher_dtype: torch.dtype | None = None


CASES = [
    Case(3, 4096, None, F32),  # one full block, no tail
    Case(4, 64, None, F32, 2.0, 2.0),
    Case(5, 50, 37, F32, 0.5, 0.5),  # a tail only, then padding
    Case(3, 1, None, F32),
    Case(3, 8200, 8193, F32, 2.0, 2.0),  # two full blocks, a tail of one column, padding
    Case(2, 8200, 4096, F32),  # padding that fills a block of its own
    Case(3, 4100, 4097, BF16, 2.0, 2.0),
    Case(3, 4100, None, BF16),
    Case(3, 4100, 4097, F16, 1.0),
    Case(3, 96, None, BF16, 2.0, 1.0, F32),
]


class Given(NamedTuple):
    """The student's rows stand in a wider buffer of NaN: what is read beyond a row shows."""

    logits_TV: Tensor
    teacher_TV: Tensor
    labels_T: Tensor


def make(case: Case) -> Given:
    generator = torch.Generator().manual_seed(case.V)

    def logits(dtype: torch.dtype) -> Tensor:
        buffer = torch.full((case.T, case.V + 24), torch.nan, dtype=dtype)
        rows_TV = buffer[:, 8 : 8 + case.V]
        return rows_TV.copy_(3 * torch.randn(case.T, case.V, generator=generator))

    num_valid = case.V if case.num_valid is None else case.num_valid
    labels_T = torch.tensor([num_valid - 1, -1, -100, num_valid, 2**40][: case.T])
    return Given(logits(case.dtype), logits(case.teacher_dtype or case.dtype), labels_T)


def temperatures(case: Case) -> tuple[float, float]:
    return case.temperature, case.student_temperature


def logsumexps(given: Given, case: Case) -> Tensor:
    s_TV, t_TV = given.logits_TV[:, : case.num_valid].double(), given.teacher_TV[:, : case.num_valid].double()
    soft_T, teacher_T = (s_TV / case.student_temperature).logsumexp(-1), (t_TV / case.temperature).logsumexp(-1)
    return torch.stack((s_TV.logsumexp(-1), soft_T, teacher_T), -1)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_stats_as_good_as_the_twin(case: Case, reverse: bool) -> None:
    given = make(case)
    arguments = (given.labels_T, *temperatures(case), case.num_valid, None, reverse)
    actual_TK = distill_stats(given.logits_TV, given.teacher_TV, *arguments)
    twin_TK = torch_vocab_ops.distill_stats(given.logits_TV, given.teacher_TV, *arguments)
    exact_TK = distill_stats_ref(given.logits_TV.double(), given.teacher_TV.double(), *arguments)
    for column in (0, 2, 4):
        assert torch.equal(actual_TK[:, column].double(), exact_TK[:, column])
    of_teacher_T1, of_student_T1 = ((exact_TK[:, i] * exact_TK[:, j].abs())[:, None] for i, j in ((5, 4), (3, 0)))
    for column, name in ((1, "sum_exp"), (3, "soft_sum"), (5, "t_sum"), (6, "cross"), (7, "t_mean")):
        columns = [each[:, column : column + 1] for each in (actual_TK, twin_TK, exact_TK)]
        # A sum of terms of both signs is as good as its largest terms are.
        terms_T1 = of_student_T1 if column == 6 and reverse else of_teacher_T1
        size_T1 = columns[2] if column < 6 else terms_T1.maximum(columns[2].abs())
        parts = [torch.cat((each, size_T1.to(each.dtype)), -1) for each in columns]
        assert_as_good_as_twin(*parts, name)


@pytest.mark.parametrize("more", [False, True], ids=["plain", "smooth and reverse"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_as_good_as_the_twin(case: Case, more: bool) -> None:
    given, lse_T3 = make(case), None
    lse_T3 = logsumexps(given, case).float()
    if more:
        lse_T3[:, 2] = torch.linspace(-1, 1, case.T)
    ce_T, kd_T = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0])[: case.T], torch.tensor([0.5, 2.0, 0.0, 1.0, 0.0])[: case.T]
    smooth_T2 = torch.stack((0.9 * ce_T, 0.01 * ce_T), -1) if more else None
    scales, rest = (ce_T, kd_T), (*temperatures(case), case.num_valid, smooth_T2, more)
    exact_TV = distill_grad_ref(
        given.logits_TV.double(),
        given.teacher_TV.double(),
        given.labels_T,
        lse_T3.double(),
        ce_T.double(),
        kd_T.double(),
        *rest[:3],
        smooth_T2 if smooth_T2 is None else smooth_T2.double(),
        more,
    )
    twin_TV = torch_vocab_ops.distill_grad_(
        given.logits_TV.clone(), given.teacher_TV, given.labels_T, lse_T3, *scales, *rest
    )
    buffer, teacher = given.logits_TV._base, given.teacher_TV.clone()
    actual_TV = distill_grad_(given.logits_TV, given.teacher_TV, given.labels_T, lse_T3, *scales, *rest)
    assert actual_TV is given.logits_TV
    assert_as_good_as_twin(actual_TV, twin_TV, exact_TV, "gradient")
    assert torch.equal(given.teacher_TV, teacher)
    if case.T > 2:
        assert (actual_TV[2] == 0).all()
    assert (actual_TV[:, case.num_valid :] == 0).all() if case.num_valid is not None else True
    assert buffer[:, :8].isnan().all() and buffer[:, 8 + case.V :].isnan().all()


@pytest.mark.parametrize("student_temperature", [1.0, 2.0])
@pytest.mark.parametrize("backend", ["kernel", "twin"])
def test_two_shards_make_the_whole(backend: str, student_temperature: float) -> None:
    stats, grad_ = {
        "kernel": (distill_stats, distill_grad_),
        "twin": (torch_vocab_ops.distill_stats, torch_vocab_ops.distill_grad_),
    }[backend]
    rho, sigma, omega = 2.0, student_temperature, 0.3
    V, shard = 4163, 2096  # the second shard ends in padding
    generator = torch.Generator().manual_seed(0)
    logits_TV, teacher_TV = (4 * torch.randn(4, V, generator=generator) for _ in range(2))
    labels_T = torch.tensor([0, shard - 1, shard, V - 1])
    weights_T = torch.tensor([1.0, 0.5, 2.0, 1.0])

    whole_TV = logits_TV.double().requires_grad_()
    ce_T = F.cross_entropy(whole_TV, labels_T, reduction="none")
    q_TV, p_TV = (whole_TV / sigma).log_softmax(-1), (teacher_TV.double() / rho).softmax(-1)
    kd_T = F.kl_div(q_TV, p_TV, reduction="none").sum(-1)
    (((1 - omega) * ce_T + omega * kd_T) * weights_T).sum().backward()

    cut = [(slice(0, shard), 0), (slice(shard, V), 2 * shard - V)]
    students, teachers = ([F.pad(x[:, at], (0, pad)) for at, pad in cut] for x in (logits_TV, teacher_TV))
    locals_T, valid = [labels_T, labels_T - shard], [shard, V - shard]
    label_logits_T = logits_TV[torch.arange(4), labels_T]
    parts_RTK = torch.stack(
        [
            stats(s, t, local, rho, sigma, num, label_logits_T)
            for s, t, local, num in zip(students, teachers, locals_T, valid, strict=True)
        ]
    ).double()
    max_RT, sum_RT, label_RT, soft_RT, t_max_RT, t_sum_RT, cross_RT, t_mean_RT, rank_RT = parts_RTK.unbind(-1)

    def lse(max_RT: Tensor, sum_RT: Tensor, temperature: float) -> Tensor:
        return (max_RT / temperature + sum_RT.log()).logsumexp(0)

    lse_T, soft_T, teacher_T = lse(max_RT, sum_RT, 1.0), lse(max_RT, soft_RT, sigma), lse(t_max_RT, t_sum_RT, rho)
    found_kd_T = (cross_RT * (t_max_RT / rho - teacher_T).exp()).sum(0) - teacher_T + soft_T
    entropy_T = teacher_T - (t_mean_RT * (t_max_RT / rho - teacher_T).exp()).sum(0)
    torch.testing.assert_close(entropy_T, -(p_TV * p_TV.log()).sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse_T - label_RT.sum(0), ce_T.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found_kd_T, kd_T.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(rank_RT.sum(0), (logits_TV > label_logits_T[:, None]).sum(-1).double())
    lse_T3 = torch.stack((lse_T, soft_T, teacher_T), -1).float()
    for s, t, local, num in zip(students, teachers, locals_T, valid, strict=True):
        grad_(s, t, local, lse_T3, weights_T * (1 - omega), weights_T * omega / sigma, rho, sigma, num)
    gradient_TV = torch.cat(students, dim=1)
    torch.testing.assert_close(gradient_TV[:, :V].double(), whole_TV.grad, rtol=1e-4, atol=1e-7)
    assert (gradient_TV[:, V:] == 0).all()


def test_without_distillation_it_is_cross_entropy() -> None:
    given = make(Case(3, 4100, 4097, F32))
    stats_TK = distill_stats(*given, 2.0, 1.0, 4097)
    assert torch.equal(stats_TK[:, :3], vocab_stats(given.logits_TV, given.labels_T, 4097))
    assert torch.equal(stats_TK[:, 3], stats_TK[:, 1])
    lse_T, ones_T = stats_TK[:, 0] + stats_TK[:, 1].log(), torch.ones(3)
    lse_T3 = torch.stack((lse_T, lse_T, torch.zeros(3)), -1)
    expected_TV = vocab_grad_(given.logits_TV.clone(), given.labels_T, lse_T, ones_T, 4097)
    actual_TV = distill_grad_(*given, lse_T3, ones_T, 0 * ones_T, 2.0, 1.0, 4097)
    torch.testing.assert_close(actual_TV, expected_TV, rtol=0, atol=0)


def test_the_teacher_is_the_student() -> None:
    logits_TV = 3 * torch.randn(3, 4100, generator=torch.Generator().manual_seed(1))
    stats_TK = distill_stats(logits_TV, logits_TV.clone(), torch.tensor([0, 1, 2]), 2.0, 2.0)
    assert torch.equal(stats_TK[:, 3], stats_TK[:, 5])
    assert stats_TK[:, 6].abs().max() == 0


@pytest.mark.parametrize("stats", [distill_stats, torch_vocab_ops.distill_stats], ids=["kernel", "twin"])
def test_infinities(stats) -> None:
    student_TV, teacher_TV = torch.zeros(3, 4100), torch.zeros(3, 4100)
    student_TV[0, 9], teacher_TV[0, 9] = -torch.inf, -torch.inf  # no probability on either side
    teacher_TV[1, :4096] = -torch.inf  # the first block has nothing
    student_TV[2, 3] = torch.nan
    stats_TK = stats(student_TV, teacher_TV, torch.tensor([0, 0, 0]), 1.0, 1.0)
    assert stats_TK[:2].tolist() == [[0, 4099, 0, 4099, 0, 4099, 0, 0], [0, 4100, 0, 4100, 0, 4, 0, 0]]
    assert stats_TK[2, 1].isnan() and stats_TK[2, 6].isnan()


@pytest.mark.parametrize("backend", ["kernel", "twin"])
def test_reverse_divergence(backend: str) -> None:
    """Two shards, and where the student gives no probability at all."""
    stats, grad_ = (
        (distill_stats, distill_grad_)
        if backend == "kernel"
        else (
            torch_vocab_ops.distill_stats,
            torch_vocab_ops.distill_grad_,
        )
    )
    rho, sigma, cut = 0.5, 2.0, 60
    generator = torch.Generator().manual_seed(0)
    logits_TV, teacher_TV = (3 * torch.randn(4, 100, generator=generator) for _ in range(2))
    logits_TV[1, 7] = teacher_TV[1, 7] = -1e30
    labels_T, zeros_T, ones_T = torch.full((4,), -1), torch.zeros(4), torch.ones(4)
    whole_TV = logits_TV.double().requires_grad_()
    log_q_TV, log_p_TV = (whole_TV / sigma).log_softmax(-1), (teacher_TV.double() / rho).log_softmax(-1)
    kl_T = (log_q_TV.exp() * (log_q_TV - log_p_TV)).sum(-1)
    kl_T.sum().backward()

    shards = [(x[:, :cut].clone(), x[:, cut:].clone()) for x in (logits_TV, teacher_TV)]
    found_RTK = torch.stack([stats(s, t, labels_T, rho, sigma, reverse=True) for s, t in zip(*shards, strict=True)])
    max_RT, sum_RT, _, soft_RT, t_max_RT, t_sum_RT, cross_RT, _ = found_RTK.double().unbind(-1)
    lse_T, soft_T = ((max_RT / s + x.log()).logsumexp(0) for s, x in ((1.0, sum_RT), (sigma, soft_RT)))
    mean_T = (cross_RT * (max_RT / sigma - soft_T).exp()).sum(0)
    found_T = mean_T - soft_T + (t_max_RT / rho + t_sum_RT.log()).logsumexp(0)
    torch.testing.assert_close(found_T, kl_T.detach(), rtol=1e-5, atol=1e-5)
    lse_T3 = torch.stack((lse_T, soft_T, mean_T), -1).float()
    for s, t in zip(*shards, strict=True):
        grad_(s, t, labels_T, lse_T3, zeros_T, ones_T / sigma, rho, sigma, reverse=True)
    torch.testing.assert_close(torch.cat(shards[0], 1).double(), whole_TV.grad, rtol=1e-4, atol=1e-6)


def test_shard_of_padding_only_and_no_tokens() -> None:
    logits_TV, labels_T = torch.full((2, 16), 5.0), torch.tensor([3, -1])
    stats_TK = distill_stats(logits_TV, logits_TV.clone(), labels_T, 2.0, 2.0, 0)
    assert stats_TK.tolist() == [[-torch.inf, 0.0, 0.0, 0.0, -torch.inf, 0.0, 0.0, 0.0]] * 2
    assert torch.equal(stats_TK, torch_vocab_ops.distill_stats(logits_TV, logits_TV, labels_T, 2.0, 2.0, 0))
    ones_T = torch.ones(2)
    rest = labels_T, torch.ones(2, 3), ones_T, ones_T, 2.0, 2.0, 0
    for more in ((None, False), (torch.ones(2, 2), True)):
        assert (distill_grad_(logits_TV.clone(), logits_TV.clone(), *rest, *more) == 0).all()
    empty = torch.zeros(0, 16), torch.zeros(0, 16), torch.zeros(0, dtype=torch.int64)
    assert distill_stats(*empty, 2.0, 2.0).shape == (0, 8)
    assert distill_grad_(*empty, torch.zeros(0, 3), torch.zeros(0), torch.zeros(0), 2.0, 2.0).shape == (0, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_TV": torch.ones(2, 9)}, r"the teacher's logits have shape \(2, 9\), the student's \(2, 8\)"),
        ({"teacher_TV": torch.ones(2, 8, dtype=torch.float64)}, "logits are torch.float64"),
        ({"temperature": 0.0}, "must be positive"),
        ({"labels_T": torch.zeros(3, dtype=torch.int64)}, r"labels has shape \(3,\), 2 tokens"),
    ],
    ids=["shape", "dtype", "temperature", "labels"],
)
def test_refusals(changes: dict, message: str) -> None:
    arguments = {
        "logits_TV": torch.ones(2, 8),
        "teacher_TV": torch.ones(2, 8),
        "labels_T": torch.zeros(2, dtype=torch.int64),
        "temperature": 1.0,
        "student_temperature": 1.0,
    } | changes
    with pytest.raises(ValueError, match=message) as refusal:
        distill_stats(**arguments)
    assert "\n" not in str(refusal.value)


def test_registered_operations() -> None:
    logits_TV, teacher_TV, labels_T = torch.randn(3, 40), torch.randn(3, 40), torch.tensor([0, 39, -1])
    own, ones_T = torch.ops.megagrow_kernels, torch.ones(3)
    for wanted in (None, torch.zeros(3)):
        torch.library.opcheck(own.distill_stats.default, (logits_TV, teacher_TV, labels_T, 2.0, 1.0, 40, wanted, True))
    rest = (torch.ones(3, 3), ones_T, ones_T, 2.0, 1.0, 40)
    more = torch.ones(3, 2), True
    torch.library.opcheck(own.distill_grad_.default, (logits_TV, teacher_TV, labels_T, *rest, *more))
