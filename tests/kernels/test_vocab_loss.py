"""The vocabulary kernels, interpreted, against float64, PyTorch's cross-entropy and each other."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megagrow import torch_vocab_ops
from megagrow_kernels.vocab_loss import (
    vocab_grad_,
    vocab_grad_ref,
    vocab_scores,
    vocab_scores_ref,
    vocab_stats,
    vocab_stats_ref,
)
from tests.kernels.accuracy import assert_as_good_as_twin

pytestmark = pytest.mark.interpreted

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


class Case(NamedTuple):
    """Tokens, columns, how many of these are no padding; a block has 4096 columns at most."""

    T: int
    V: int
    num_valid: int | None
    dtype: torch.dtype


CASES = [
    Case(4, 4096, None, F32),  # one full block, no tail
    Case(4, 64, None, F32),
    Case(5, 50, 37, F32),  # a tail only, then padding
    Case(3, 1, None, F32),
    Case(4, 8200, 8193, F32),  # two full blocks, a tail of one column, padding
    Case(3, 12291, 4096, F32),  # padding that fills blocks of its own
    Case(4, 8200, 8193, BF16),
    Case(4, 4100, None, BF16),
    Case(4, 4100, 4097, F16),
    Case(5, 96, None, F16),
]


def logits_and_labels(case: Case) -> tuple[Tensor, Tensor]:
    """Rows within a wider buffer of NaN: what is read beyond a row shows. The labels: here, on
    another shard, ignored, in the padding, beyond it."""
    generator = torch.Generator().manual_seed(case.V)
    buffer = torch.full((case.T, case.V + 24), torch.nan, dtype=case.dtype)
    logits_TV = buffer[:, 8 : 8 + case.V]
    logits_TV.copy_(3 * torch.randn(case.T, case.V, generator=generator))
    num_valid = case.V if case.num_valid is None else case.num_valid
    labels = [num_valid - 1, -1, -100, num_valid, 2**40]
    return logits_TV, torch.tensor(labels[: case.T])


def logsumexp(logits_TV: Tensor, num_valid: int | None) -> Tensor:
    return logits_TV[:, :num_valid].double().logsumexp(-1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stats_as_good_as_the_twin(case: Case) -> None:
    logits_TV, labels_T = logits_and_labels(case)
    actual_T3 = vocab_stats(logits_TV, labels_T, case.num_valid)
    twin_T3 = torch_vocab_ops.vocab_stats(logits_TV, labels_T, case.num_valid)
    exact_T3 = vocab_stats_ref(logits_TV.double(), labels_T, case.num_valid)
    assert torch.equal(actual_T3[:, [0, 2]].double(), exact_T3[:, [0, 2]])
    assert_as_good_as_twin(actual_T3[:, 1:2], twin_T3[:, 1:2], exact_T3[:, 1:2], "sum_exp")


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_as_good_as_the_twin(case: Case, smooth: bool) -> None:
    logits_TV, labels_T = logits_and_labels(case)
    logsumexp_T = logsumexp(logits_TV, case.num_valid).float()
    scale_T = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0])[: case.T]
    smooth_T2 = torch.stack((0.9 * scale_T, scale_T / 300), -1) if smooth else None
    exact = (labels_T, logsumexp_T.double(), scale_T.double(), case.num_valid, smooth_T2.double() if smooth else None)
    exact_TV = vocab_grad_ref(logits_TV.double(), *exact)
    given = labels_T, logsumexp_T, scale_T, case.num_valid, smooth_T2
    twin_TV = torch_vocab_ops.vocab_grad_(logits_TV.clone(), *given)
    buffer = logits_TV._base
    actual_TV = vocab_grad_(logits_TV, *given)
    assert actual_TV is logits_TV
    assert_as_good_as_twin(actual_TV, twin_TV, exact_TV, "gradient")
    # A row's largest gradient is its label's: the bound of the row says nothing about the others.
    ulps = {F32: 2**-19, F16: 2**-10, BF16: 2**-7}[case.dtype]
    torch.testing.assert_close(actual_TV.double(), exact_TV, rtol=ulps, atol=2**-24 * (4 if smooth else 1))
    assert (actual_TV[scale_T == 0] == 0).all()
    assert (actual_TV[:, case.num_valid :] == 0).all() if case.num_valid is not None else True
    assert buffer[:, :8].isnan().all() and buffer[:, 8 + case.V :].isnan().all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rank_is_exact_with_ties(case: Case) -> None:
    logits_TV, labels_T = logits_and_labels(case)
    logits_TV.copy_(logits_TV.float().round())  # about 20 different values
    labels_T[-1] = 0
    label_logits_T = vocab_stats(logits_TV, labels_T, case.num_valid)[:, 2]
    arguments = (logits_TV, labels_T, case.num_valid, label_logits_T)
    stats_T4 = vocab_stats(*arguments)
    exact_T4 = vocab_stats_ref(logits_TV.double(), *arguments[1:])
    assert torch.equal(stats_T4[:, 3].double(), exact_T4[:, 3])
    assert torch.equal(stats_T4[:, 3], torch_vocab_ops.vocab_stats(*arguments)[:, 3])
    assert torch.equal(stats_T4[:, :3], vocab_stats(*arguments[:3]))
    if (stats_T4[:, 0] > -torch.inf).all():
        rank_T = vocab_scores(logits_TV, labels_T, label_logits_T, stats_T4[:, 0], 40, case.num_valid)[1]
        assert rank_T.dtype == torch.int32
        assert torch.equal(rank_T.float(), stats_T4[:, 3])


@pytest.mark.parametrize("stats", [vocab_stats, torch_vocab_ops.vocab_stats], ids=["kernel", "twin"])
def test_rank_skips_the_label_itself(stats: Callable[..., Tensor]) -> None:
    logits_TV = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    below_T = torch.nextafter(logits_TV[:, 2], torch.tensor(-1.0))  # not the stored bits
    assert stats(logits_TV, torch.tensor([2]), None, below_T)[0, 3] == 2
    assert stats(logits_TV, torch.tensor([-1]), None, below_T)[0, 3] == 3


@pytest.mark.parametrize("case", [case for case in CASES if case.num_valid != 0], ids=str)
def test_scores_as_good_as_the_twin(case: Case) -> None:
    logits_TV, labels_T = logits_and_labels(case)
    stats_T3, bits = vocab_stats(logits_TV, labels_T, case.num_valid), 48
    arguments = (labels_T, stats_T3[:, 2], stats_T3[:, 0], bits, case.num_valid)
    units_T, rank_T = vocab_scores(logits_TV, *arguments)
    twin_T, twin_rank_T = torch_vocab_ops.vocab_scores(logits_TV, *arguments)
    exact_T, exact_rank_T = vocab_scores_ref(logits_TV.double(), *arguments)
    assert torch.equal(rank_T, exact_rank_T) and torch.equal(twin_rank_T, exact_rank_T)
    sums = [(each.double() / 2**bits).float()[:, None] for each in (units_T, twin_T)]
    assert_as_good_as_twin(*sums, (exact_T.double() / 2**bits)[:, None], "sum of exponentials")


def test_scores_do_not_show_how_the_vocabulary_is_cut() -> None:
    logits_TV = 4 * torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
    max_T, labels_T = logits_TV.amax(-1), torch.tensor([0, 1, 2])
    label_logits_T = logits_TV[torch.arange(3), labels_T]
    whole_T, rank_T = vocab_scores(logits_TV, labels_T, label_logits_T, max_T, 49)
    for at in (1, 1234, 4097):
        parts = [
            vocab_scores(part, labels_T - start, label_logits_T, max_T, 49)
            for start, part in ((0, logits_TV[:, :at]), (at, logits_TV[:, at:]))
        ]
        assert torch.equal(parts[0][0] + parts[1][0], whole_T)
        assert torch.equal(parts[0][1] + parts[1][1], rank_T)


@pytest.mark.parametrize("descending", [False, True])
def test_sum_follows_the_running_maximum(descending: bool) -> None:
    logits_1V = torch.linspace(-80, 80, 3 * 4096).sort(descending=descending).values[None]
    stats_13 = vocab_stats(logits_1V, torch.tensor([-1]))
    exact = logits_1V.double().logsumexp(-1)
    torch.testing.assert_close((stats_13[:, 1].log() + stats_13[:, 0]).double(), exact)


def test_infinities() -> None:
    logits_TV = torch.full((4, 4100), -torch.inf)
    logits_TV[1, 4099] = 5.0  # the first block has nothing
    logits_TV[2, 0] = 7.0  # the last one has nothing
    logits_TV[3, 9] = torch.nan
    stats_T3 = vocab_stats(logits_TV, torch.tensor([0, 4099, 0, 0]))
    assert stats_T3[:3].tolist() == [[-torch.inf, 0, -torch.inf], [5, 1, 5], [7, 1, 7]]
    assert stats_T3[3, 1].isnan()
    assert torch.equal(stats_T3[:3], torch_vocab_ops.vocab_stats(logits_TV[:3], torch.tensor([0, 4099, 0])))


def test_shard_of_padding_only() -> None:
    logits_TV, labels_T = torch.full((2, 16), 5.0), torch.tensor([3, -1])
    label_logits_T = torch.zeros(2)
    stats_T3 = vocab_stats(logits_TV, labels_T, 0)
    assert stats_T3.tolist() == [[-torch.inf, 0.0, 0.0]] * 2
    assert torch.equal(stats_T3, torch_vocab_ops.vocab_stats(logits_TV, labels_T, 0))
    for scores in (vocab_scores, torch_vocab_ops.vocab_scores):
        found = scores(logits_TV, labels_T, label_logits_T, label_logits_T, 40, 0)
        assert [each.tolist() for each in found] == [[0, 0], [0, 0]]
    assert (vocab_grad_(logits_TV, labels_T, torch.ones(2), torch.ones(2), 0) == 0).all()


def test_no_tokens() -> None:
    logits_TV, labels_T = torch.zeros(0, 16), torch.zeros(0, dtype=torch.int64)
    assert vocab_stats(logits_TV, labels_T).shape == (0, 3)
    assert vocab_scores(logits_TV, labels_T, torch.zeros(0), torch.zeros(0), 9)[0].shape == (0,)
    assert vocab_grad_(logits_TV, labels_T, torch.zeros(0), torch.zeros(0)).shape == (0, 16)


@pytest.mark.parametrize("backend", ["kernel", "twin"])
def test_two_shards_make_the_whole(backend: str) -> None:
    stats, grad_ = {
        "kernel": (vocab_stats, vocab_grad_),
        "twin": (torch_vocab_ops.vocab_stats, torch_vocab_ops.vocab_grad_),
    }[backend]
    V, shard = 4163, 2096  # the second shard ends in padding
    logits_TV = 4 * torch.randn(5, V, generator=torch.Generator().manual_seed(0))
    labels_T = torch.tensor([0, shard - 1, shard, V - 1, -100])
    scale_T = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.0])

    whole_TV = logits_TV.double().requires_grad_()
    loss_T = F.cross_entropy(whole_TV, labels_T, reduction="none", ignore_index=-100)
    (loss_T * scale_T).sum().backward()

    shards = [logits_TV[:, :shard].clone(), F.pad(logits_TV[:, shard:], (0, 2 * shard - V))]
    valid = [shard, V - shard]
    locals_T = [labels_T, labels_T - shard]
    parts_R = [stats(*shard) for shard in zip(shards, locals_T, valid, strict=True)]
    parts_RT3 = torch.stack(parts_R)
    max_T = parts_RT3[..., 0].amax(0)
    sum_exp_T = (parts_RT3[..., 1] * (parts_RT3[..., 0] - max_T).exp()).sum(0)
    label_logit_T, logsumexp_T = parts_RT3[..., 2].sum(0), max_T + sum_exp_T.log()
    ranks_R = [
        stats(shard_TV, local_T, num, label_logit_T)[:, 3]
        for shard_TV, local_T, num in zip(shards, locals_T, valid, strict=True)
    ]
    for shard_TV, local_T, num in zip(shards, locals_T, valid, strict=True):
        grad_(shard_TV, local_T, logsumexp_T, scale_T, num)
    gradient_TV = torch.cat(shards, dim=1)

    torch.testing.assert_close((logsumexp_T - label_logit_T)[:4].double(), loss_T[:4].detach())
    torch.testing.assert_close(gradient_TV[:, :V].double(), whole_TV.grad, rtol=1e-5, atol=1e-9, msg="gradient")
    assert (gradient_TV[:, V:] == 0).all()
    for t in range(4):
        expected = (logits_TV[t] > logits_TV[t, labels_T[t]]).sum()
        assert ranks_R[0][t] + ranks_R[1][t] == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits_TV": torch.ones(2, 8, dtype=torch.float64)}, "logits are torch.float64"),
        ({"logits_TV": torch.ones(8, 2).T}, "2 elements apart"),
        ({"labels_T": torch.zeros(3, dtype=torch.int64)}, r"labels has shape \(3,\), 2 tokens"),
        ({"num_valid": 9}, r"num_valid=9 lies outside 0\.\.8"),
    ],
    ids=["dtype", "stride", "labels", "num_valid"],
)
def test_refusals(changes: dict, message: str) -> None:
    arguments = {
        "logits_TV": torch.ones(2, 8),
        "labels_T": torch.zeros(2, dtype=torch.int64),
    } | changes
    with pytest.raises(ValueError, match=message) as refusal:
        vocab_stats(**arguments)
    assert "\n" not in str(refusal.value)


def test_registered_operations() -> None:
    """Fakes, schemas and mutations as `torch.compile` relies on them."""
    logits_TV, labels_T = torch.randn(3, 40), torch.tensor([0, 39, -1])
    own = torch.ops.megagrow_kernels
    for label_logits_T in (None, torch.zeros(3)):
        torch.library.opcheck(own.vocab_stats.default, (logits_TV, labels_T, 39, label_logits_T))
    torch.library.opcheck(
        own.vocab_scores.default, (logits_TV, labels_T, torch.zeros(3), torch.full((3,), 9.0), 30, 40)
    )
    rest = torch.ones(3), torch.ones(3), 40, torch.ones(3, 2)
    torch.library.opcheck(own.vocab_grad_.default, (logits_TV, labels_T, *rest))


def test_torch_compile_takes_them_whole() -> None:
    def loss_and_gradient(logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
        max_T, sum_exp_T, label_logit_T = vocab_stats(logits_TV, labels_T).unbind(-1)
        logsumexp_T = max_T + sum_exp_T.log()
        return logsumexp_T - label_logit_T, vocab_grad_(logits_TV, labels_T, logsumexp_T, torch.ones(3))

    logits_TV, labels_T = torch.randn(3, 40), torch.tensor([0, 39, 5])
    expected = loss_and_gradient(logits_TV.clone(), labels_T)
    compiled = torch.compile(loss_and_gradient, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(compiled(logits_TV.clone(), labels_T), expected, strict=True):
        assert torch.equal(actual, wanted)
