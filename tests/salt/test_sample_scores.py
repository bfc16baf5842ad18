"""Per-sample scores from the losses and ranks of its tokens."""

import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megagrow.parallel.loss import token_scores
from megagrow.parallel.mesh import Axis
from megagrow.salt.score import sample_scores

KNOWN, UNKNOWN = 0, 99  # ranks


def scores_of(nll: list[float], ranks: list[int], top_k: int = 10) -> dict[str, float]:
    arrays = sample_scores(torch.tensor([nll]), torch.tensor([ranks], dtype=torch.int32), top_k)
    return {name: array.item() for name, array in arrays.items()}


def test_the_worked_example() -> None:
    """0.5 without the unknown tokens, 0.1 with zeros in their place (0, 0, 0, 0.1, 0.5, ...)."""
    nll = [2.0, 8.0, 0.1, 9.0, 0.5, 7.0, 1.2]
    ranks = [KNOWN, UNKNOWN, KNOWN, UNKNOWN, KNOWN, UNKNOWN, KNOWN]
    scores = scores_of(nll, ranks)
    assert scores["median_in_top_k"] == np.float32(0.5)
    assert scores["median_zero"] == np.float32(0.1)
    assert scores["mean_nll"] == pytest.approx(sum(nll) / 7, rel=1e-7)
    assert scores["in_top_k_fraction"] == pytest.approx(4 / 7, rel=1e-7)
    assert scores["num_tokens"] == 7


@pytest.mark.parametrize(("nll", "median"), [([3.0, 1.0, 2.0], 2.0), ([4.0, 3.0, 1.0, 2.0], 2.0), ([5.0], 5.0)])
def test_medians_take_the_lower_middle(nll: list[float], median: float) -> None:
    scores = scores_of(nll, [KNOWN] * len(nll))
    assert scores["median_in_top_k"] == scores["median_zero"] == median


def test_an_empty_set_scores_zero() -> None:
    scores = scores_of([3.0, 4.0], [UNKNOWN, UNKNOWN])
    assert [scores[name] for name in ("median_in_top_k", "median_zero")] == [0, 0]
    assert scores["in_top_k_fraction"] == 0 and scores["mean_nll"] == 3.5


def test_the_rank_must_be_below_k() -> None:
    nll, ranks = [1.0, 2.0, 3.0], [0, 1, 2]
    by_k = [scores_of(nll, ranks, k) for k in (1, 2, 3)]
    assert [s["in_top_k_fraction"] for s in by_k] == pytest.approx([1 / 3, 2 / 3, 1])
    assert [s["median_in_top_k"] for s in by_k] == [1, 1, 2]


def test_with_k_as_large_as_the_vocabulary_nothing_is_masked() -> None:
    nll = torch.rand(5, 8)
    arrays = sample_scores(nll, torch.randint(29, (5, 8)), 29)
    assert np.array_equal(arrays["median_in_top_k"], arrays["median_zero"])
    assert np.array_equal(arrays["median_zero"], nll.median(-1).values.numpy())
    assert (arrays["in_top_k_fraction"] == 1).all()


@given(
    st.lists(st.tuples(st.floats(0, 16, width=32), st.integers(0, 4)), min_size=1, max_size=9),
    st.integers(1, 5),
)
def test_against_the_definition(tokens: list[tuple[float, int]], top_k: int) -> None:
    """Samples are scored side by side; a second one must not disturb the first."""
    nll, ranks = (list(x) for x in zip(*tokens, strict=True))
    arrays = sample_scores(
        torch.tensor([nll, nll[::-1]], dtype=torch.float32), torch.tensor([ranks, [0] * len(nll)]), top_k
    )
    known = [x for x, rank in tokens if rank < top_k]
    expected = {
        "median_in_top_k": statistics.median_low(known) if known else 0,
        "median_zero": statistics.median_low([x if r < top_k else 0 for x, r in tokens]),
        "in_top_k_fraction": len(known) / len(tokens),
    }
    for name, value in expected.items():
        assert arrays[name].dtype == np.float32
        assert arrays[name][0] == np.float32(value), name
    assert arrays["mean_nll"][0] == pytest.approx(statistics.fmean(nll), rel=1e-6)
    assert arrays["num_tokens"].dtype == np.int32


def test_the_middle_pair_is_not_averaged() -> None:
    """Four known losses: 0.1, 0.5, 1.2, 2.0. The mean of the middle pair would be 0.85."""
    assert scores_of([2.0, 0.1, 0.5, 1.2], [KNOWN] * 4)["median_in_top_k"] == np.float32(0.5)
    assert scores_of([2.0, 0.1, 0.5], [KNOWN] * 3)["median_in_top_k"] == np.float32(0.5)


@pytest.mark.parametrize(
    ("known", "zeroed"),
    # Of two, three, four and five losses 1, 2, …: the lower middle of a list in which the unknown ones are 0.
    [([1, 0], 0.0), ([1, 1], 1.0), ([0, 1, 1], 2.0), ([0, 1, 0], 0.0), ([0, 0, 1, 1], 0.0), ([0, 1, 1, 1], 2.0)],
)
def test_zeros_count_among_even_and_odd_numbers(known: list[int], zeroed: float) -> None:
    losses = [float(i + 1) for i in range(len(known))]
    ranks = [KNOWN if is_known else UNKNOWN for is_known in known]
    assert scores_of(losses, ranks)["median_zero"] == zeroed


def test_a_tie_with_the_label_counts_for_it() -> None:
    """Ranks count greater logits only: of three equal ones each is the first, and with k = 1 known."""
    logits, labels = torch.tensor([[1.0, 1.0, 1.0, 0.0]] * 4), torch.tensor([0, 1, 2, 3])
    nll, rank = token_scores(logits, torch.eye(4), labels, 4, Axis())
    assert rank.tolist() == [0, 0, 0, 3]
    assert scores_of(nll.tolist(), rank.tolist(), 1)["in_top_k_fraction"] == 0.75
    assert scores_of(nll.tolist(), rank.tolist(), 3)["in_top_k_fraction"] == 0.75
    assert scores_of(nll.tolist(), rank.tolist(), 4)["in_top_k_fraction"] == 1
