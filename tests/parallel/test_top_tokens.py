"""The likeliest tokens and draws, on vocabulary shards, against a dense sort."""

# Shape suffix legend: T = tokens, H = hidden, V = vocabulary, K = entries of a token.

import pytest
import torch
from torch import Tensor

from megagrow.parallel.loss import token_scores
from megagrow.parallel.mesh import Axis
from megagrow.parallel.shards import chunk
from megagrow.parallel.top_tokens import drawn_tokens, top_tokens
from megagrow.plan.measure import peak_memory
from tests.parallel.test_loss import tp_axis
from tests.ranks import run_ranks

VOCAB, TOKENS = 29, 40


def coarse_logits(vocab: int = VOCAB, dtype: torch.dtype = torch.float64) -> Tensor:
    """On a grid, so that many are equal."""
    generator = torch.Generator().manual_seed(4)
    return torch.randn(TOKENS, vocab, generator=generator).mul(4).round().div(2).to(dtype)


def top_here(logits_TV: Tensor, count: int, temperature: float) -> tuple[Tensor, ...]:
    """Through the identity as output matrix, which hands the logits on unchanged."""
    tp, vocab = tp_axis(), logits_TV.shape[1]
    head_VH = torch.eye(vocab, dtype=logits_TV.dtype)[chunk(vocab, tp)]
    return top_tokens(logits_TV, head_VH, count, temperature, vocab, tp, chunk_tokens=16)


def expected_top(logits_TV: Tensor, count: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """By a stable sort of everything."""
    log_TV = (logits_TV.double() / temperature).log_softmax(-1)
    order_TV = logits_TV.double().sort(dim=-1, descending=True, stable=True).indices
    ids_TK, rest = order_TV[:, :count], order_TV[:, count:]
    return ids_TK, log_TV.gather(1, ids_TK), log_TV.gather(1, rest).logsumexp(-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 4, 28, 29])
def test_the_top_is_that_of_a_stable_sort_on_any_number_of_ranks(count: int, dtype: torch.dtype) -> None:
    logits_TV = coarse_logits(dtype=dtype)
    ids_TK, log_probs_TK, tail_T = expected_top(logits_TV, count, 0.5)
    boundary_T2 = logits_TV.double().sort(-1, descending=True).values[:, count - 1 : count + 1]
    assert count == VOCAB or (boundary_T2[:, 0] == boundary_T2[:, -1]).any(), "some ties should be cut"
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    for world in (1, 2, 4):
        for found in run_ranks(top_here, world, logits_TV, count, 0.5):
            assert torch.equal(found[0], ids_TK)
            torch.testing.assert_close(found[1].double(), log_probs_TK, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(found[2].double(), tail_T, rtol=tolerance, atol=tolerance)


def test_more_ranks_than_rows() -> None:
    """Five rows on four ranks: 2, 2, 1 and none at all."""
    logits_TV = coarse_logits(5)
    for count in (1, 3, 5):
        ids_TK, log_probs_TK, tail_T = expected_top(logits_TV, count, 1.0)
        for found in run_ranks(top_here, 4, logits_TV, count, 1.0):
            assert torch.equal(found[0], ids_TK)
            torch.testing.assert_close(found[1], log_probs_TK, rtol=0, atol=1e-13)
            torch.testing.assert_close(found[2], tail_T, rtol=0, atol=1e-13)


def test_a_small_tail_keeps_its_digits() -> None:
    """e^-60 of the mass: 1 − Σ p would be 0."""
    logits_TV = torch.tensor([[60.0, 0.0, -1.0]])
    _, _, (tail,) = top_here(logits_TV, 1, 1.0)
    assert tail.item() == pytest.approx(-60 + torch.tensor([0.0, -1.0]).logsumexp(0).item(), rel=1e-6)


def drawn_here(logits_TV: Tensor, count: int, uniform_T: Tensor) -> tuple[Tensor, Tensor]:
    tp, vocab = tp_axis(), logits_TV.shape[1]
    head_VH = torch.eye(vocab, dtype=logits_TV.dtype)[chunk(vocab, tp)]
    return drawn_tokens(logits_TV, head_VH, count, 0.5, uniform_T, vocab, tp, chunk_tokens=16)


def counts_of(ids_TK: Tensor, vocab: int) -> Tensor:
    return torch.zeros(len(ids_TK), vocab).double().scatter_add(1, ids_TK, torch.ones_like(ids_TK).double())


@pytest.mark.parametrize(("vocab", "count"), [(5, 12), (VOCAB, 1), (VOCAB, 12), (VOCAB, 300)])
def test_draws_come_as_often_as_their_probability_says(vocab: int, count: int) -> None:
    """Never further than one from it, and on average exactly; the same on any number of ranks."""
    logits_TV = coarse_logits(vocab)
    p_TV, num_draws = (logits_TV / 0.5).softmax(-1), 32
    uniform_N = (torch.arange(num_draws).double() + 0.5) / num_draws
    total_TV = torch.zeros_like(p_TV)
    for uniform in uniform_N:
        ids_TK, entropy_T = drawn_here(logits_TV, count, uniform.expand(TOKENS))
        assert (ids_TK[:, 1:] >= ids_TK[:, :-1]).all()
        counts_TV = counts_of(ids_TK, vocab)
        assert ((counts_TV - count * p_TV).abs() < 1 + 1e-9).all()
        total_TV += counts_TV
    # Over evenly spaced numbers the mean is the integral, but for one draw in num_draws at either edge.
    assert ((total_TV / num_draws - count * p_TV).abs() <= 1 / num_draws + 1e-9).all()
    torch.testing.assert_close(entropy_T, -torch.special.xlogy(p_TV, p_TV).sum(-1), rtol=1e-12, atol=1e-12)
    for world in (2, 4):
        for found in run_ranks(drawn_here, world, logits_TV, count, uniform_N[7].expand(TOKENS)):
            assert torch.equal(found[0], drawn_here(logits_TV, count, uniform_N[7].expand(TOKENS))[0])
            torch.testing.assert_close(found[1], entropy_T, rtol=1e-12, atol=1e-12)


def test_the_ends_of_the_unit_interval_stay_inside_of_the_vocabulary() -> None:
    logits_TV = coarse_logits()
    logits_TV[:, -3:] = -1000.0  # no mass at the end
    for uniform in (0.5 / 2**32, 1 - 0.5 / 2**32):
        for world in (1, 4):
            uniform_T = torch.full((TOKENS,), uniform, dtype=torch.float64)
            for ids_TK, _ in run_ranks(drawn_here, world, logits_TV, 12, uniform_T):
                assert (ids_TK >= 0).all() and (ids_TK < VOCAB - 3).all()


@pytest.mark.parametrize("kind", ["scored", "top", "drawn"])
def test_the_logits_of_one_chunk_exist_at_a_time(kind: str) -> None:
    """Four chunks take what one does, and their results."""
    vocab, chunk_tokens = 8000, 128
    head_VH, uniform_T = torch.randn(vocab, 16), torch.rand(4 * chunk_tokens, dtype=torch.float64)

    def peak(num_chunks: int) -> int:
        hidden_TH = torch.randn(num_chunks * chunk_tokens, 16)
        places, given = slice(0, len(hidden_TH)), (vocab, Axis())
        calls = {
            "scored": lambda: token_scores(hidden_TH, head_VH, torch.arange(len(hidden_TH)), *given, chunk_tokens),
            "top": lambda: top_tokens(hidden_TH, head_VH, 4, 0.5, *given, chunk_tokens=chunk_tokens),
            "drawn": lambda: drawn_tokens(
                hidden_TH, head_VH, 4, 0.5, uniform_T[places], *given, chunk_tokens=chunk_tokens
            ),
        }
        return peak_memory(calls[kind])

    logits = 4 * vocab * chunk_tokens
    assert logits < peak(1) <= peak(4) < peak(1) + logits / 4
