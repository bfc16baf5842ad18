"""Tests megagrow/data/blend.py: how blends are written, and even draws that can be computed anywhere."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagrow.data.blend import Blend, BlendStart, EvenDraws, parse_blend
from megagrow.errors import ConfigError

weight_lists = st.lists(st.floats(1e-3, 1.0) | st.integers(1, 4).map(float), min_size=1, max_size=7)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("A", Blend(("A",))),
        ("A B C", Blend(("A", "B", "C"))),
        ("A B", Blend(("A", "B"))),
        ("0.7 A 0.3 B", Blend(("A", "B"), (0.7, 0.3))),
        ("30 '/my data/A' 70 B", Blend(("/my data/A", "B"), (30.0, 70.0))),
        (("/my data/A",), Blend(("/my data/A",))),
        ((0.7, "A", "3e-1", "B"), Blend(("A", "B"), (0.7, 0.3))),
        (("1", "2", "3"), Blend(("1", "2", "3"))),
    ],
)
def test_blends_as_megatron_writes_them(value: Any, expected: Blend) -> None:
    assert parse_blend(value) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "data.train is empty"),
        ((), "data.train is empty"),
        ("0.7 A B 0.3", 'in turn, as in "0.7 A 0.3 B"'),
        ("0 A 1 B", "weight of A is 0.0, must be positive"),
        ("1 A -1 B", "weight of B is -1.0"),
        ("1 A nan B", "weight of B is nan"),
        ("1 A 2 A", "'A' more than once"),
        ("1 A 2 ''", "an empty prefix"),
        ("it's", "cannot be split into words"),
    ],
)
def test_what_is_no_blend(value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_blend(value)
    assert message in str(caught.value)


@given(weights=weight_lists, start=st.integers(0, 300), count=st.integers(0, 60))
def test_draws_are_sorted_by_their_times_from_any_place(weights: list[float], start: int, count: int) -> None:
    draws = EvenDraws(weights)
    times = [((n + 0.5) / w, d, n) for d, w in enumerate(draws.weights_D.tolist()) for n in range(start + count + 1)]
    expected = sorted(times)[start : start + count]
    which, nth = draws.at(start, count)
    assert list(zip(which.tolist(), nth.tolist(), strict=True)) == [(d, n) for _, d, n in expected]
    before = np.bincount([d for _, d, _ in sorted(times)[:start]], minlength=len(weights))
    assert draws.counts(start).tolist() == before.tolist()


def test_draws_far_along_are_as_even() -> None:
    draws = EvenDraws([0.7, 0.2, 0.1])
    assert draws.counts(10**12).tolist() == [7 * 10**11, 2 * 10**11, 10**11]
    which, nth = draws.at(10**12 - 7, 1000)
    assert np.bincount(which).tolist() == [700, 200, 100] and nth.min() >= 10**11 - 2


@given(changes=st.lists(st.tuples(st.integers(0, 40), weight_lists), min_size=1, max_size=5))
def test_a_changed_blend_loses_and_repeats_nothing(changes: list[tuple[int, list[float]]]) -> None:
    """Datasets are added, left out and taken up again: each gives its samples in order, without a gap."""
    begun, cursor, seen = BlendStart({"d0": 1.0}), 0, dict[str, list[int]]()
    for count, weights in changes:
        begun = begun.changed({f"d{i}": weight for i, weight in enumerate(weights)}, cursor, {})
        which, nth = EvenDraws(list(begun.weights.values())).at(cursor - begun.start, count)
        for dataset, number in zip(which.tolist(), nth.tolist(), strict=True):
            name = list(begun.weights)[dataset]
            seen.setdefault(name, []).append(begun.firsts.get(name, 0) + number)
        cursor += count
        consumed = begun.consumed(cursor)
        assert sum(consumed.values()) == cursor
        assert {name: len(ids) for name, ids in seen.items()} == {k: v for k, v in consumed.items() if v}
    assert all(ids == list(range(len(ids))) for ids in seen.values())


@pytest.mark.parametrize(
    ("value", "problem"),
    [("data/a ./data/a", "names one dataset as data/a and as ./data/a"), ("1e308 A 1e308 B", "add up to infinity")],
)
def test_one_dataset_twice_and_weights_without_a_sum_are_refused(value: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_blend(value)
