"""Tests ../megagrow/report/savings.py on curves whose savings are known."""

import math
import random
import statistics
from itertools import pairwise
from typing import Any

import pytest

from megagrow.report.savings import cost_at_loss, loss_at_cost, over_seeds, pareto_front, saving_at

BUDGETS = (0.6, 1.0, 1.7)


def loss_of(cost: float, power: float = 0.3) -> float:
    """What scratch comes to: a power law above what cannot be learned."""
    return 2.0 + 1.5 * cost**-power


def saving(spent: float, loss: float, noise: tuple[float, ...] = (0.0, 0.0, 0.0), power: float = 0.3) -> dict[str, Any]:
    """Of a model that cost so much, against the baseline."""
    front = pareto_front([(cost, loss_of(cost, power) + shift) for cost, shift in zip(BUDGETS, noise, strict=True)])
    return saving_at(spent, loss, front, max(BUDGETS))


@pytest.mark.parametrize("true", [-0.3, 0.0, 0.2, 0.35])
@pytest.mark.parametrize("spent", [0.8, 0.9, 1.0])
@pytest.mark.parametrize(("power", "points"), [(0.3, 0.1), (0.6, 0.5), (0.9, 1.0)])
def test_a_known_saving_is_found_to_a_point(true: float, spent: float, power: float, points: float) -> None:
    """Chords between the budgets would overstate it by 1.3 points for the first power, by 3 for the last."""
    found = saving(spent, loss_of(spent / (1 - true), power), power=power)
    assert abs(found["value"] - true) < points / 100
    assert found["reason"] is found["bound"] is None


@pytest.mark.parametrize("cost", [0.6, 0.7, 0.99, 1.0, 1.01, 1.5, 1.7])
def test_cost_and_loss_of_the_baseline_are_each_others_inverse(cost: float) -> None:
    front = pareto_front([(each, loss_of(each, 0.8)) for each in BUDGETS])
    assert cost_at_loss(front, loss_at_cost(front, cost)) == pytest.approx(cost, rel=1e-12)


@pytest.mark.parametrize("last", [2.0, 2.9, 2.99, 2.999999])
def test_a_parabola_never_rises_between_budgets(last: float) -> None:
    """After a steep fall hardly any: as bent as it may be, its lowest point is the last budget."""
    front = [(0.6, 4.0), (1.0, 3.0), (1.7, last)]
    losses = [loss_at_cost(front, 0.6 + 0.01 * step) for step in range(110)] + [last]
    assert losses == sorted(losses, reverse=True)
    for loss in losses:
        assert loss_at_cost(front, cost_at_loss(front, loss)) == pytest.approx(loss, abs=1e-9)


def test_a_saving_does_not_jump_where_the_parabola_is_held_back() -> None:
    """Its lowest point passes the last budget where the second slope is a third of the first, or so."""
    savings = [
        saving_at(0.85, (3.0 + last) / 2, [(0.6, 4.0), (1.0, 3.0), (1.7, last)], 1.7)["value"]
        for last in (2.3 + 0.001 * step for step in range(690))
    ]
    assert max(abs(a - b) for a, b in pairwise(savings)) < 0.002


@pytest.mark.parametrize("beyond", [1e-9, 1e-10, 1e-11, 1e-12, 1e-13, 1e-14, 0.0])
def test_a_parabola_that_is_flat_at_a_budget_has_a_cost_there(beyond: float) -> None:
    for lowest in (1.7, 1.8, 2.0, 3.0):
        middle, vertex = math.sqrt(0.6 * lowest), math.log(lowest) + beyond
        front = [(cost, 2 + (math.log(cost) - vertex) ** 2) for cost in (0.6, middle, lowest)]
        for _, loss in front:
            assert 0.6 * 0.999 < cost_at_loss(front, loss) < lowest * 1.001


def test_two_budgets_are_joined_by_a_chord() -> None:
    assert cost_at_loss([(1.0, 3.0), (4.0, 2.0)], 2.5) == pytest.approx(2.0)


def test_at_a_budget_of_the_baseline_the_saving_is_exact() -> None:
    assert saving(0.75, loss_of(1.0))["value"] == pytest.approx(0.25)
    assert saving(1.25, loss_of(1.0))["value"] == pytest.approx(-0.25)


def test_curves_that_cross_save_before_the_crossing_and_waste_after_it() -> None:
    """An arm that begins ahead and improves more slowly: equal at a cost of 1."""
    savings = [saving(cost, 2.0 + 1.5 * cost**-0.15)["value"] for cost in (0.8, 0.9, 1.0, 1.1, 1.2)]
    assert savings[2] == pytest.approx(0.0)
    assert savings == sorted(savings, reverse=True)
    assert savings[1] > 0.02 and savings[3] < -0.02


def test_a_loss_that_scratch_never_reaches_has_a_least_saving() -> None:
    found = saving(0.85, loss_of(1.7) - 0.01)
    assert found["value"] is None
    assert found["bound"] == {"at_least": pytest.approx(0.5)}
    assert "no finished scratch run reaches" in found["reason"]


def test_a_loss_above_all_of_scratch_has_a_greatest_saving() -> None:
    found = saving(0.9, loss_of(0.6) + 0.01)
    assert found["value"] is None
    assert found["bound"] == {"at_most": pytest.approx(-0.5)}
    assert "the smallest scratch budget already reaches" in found["reason"]


def test_a_saving_just_inside_the_range_joins_the_bound_just_outside() -> None:
    low, high = (saving(0.85, loss_of(1.7) + shift) for shift in (-1e-9, 1e-9))
    assert high["value"] == pytest.approx(low["bound"]["at_least"], abs=1e-6)


def test_noise_moves_single_savings_and_hardly_their_mean() -> None:
    """Noise of 0.01 nats, where the range of the baseline is 0.47: 900 comparisons of a saving of 25 %."""
    draw = random.Random(0)
    found = []
    for _ in range(900):
        noise = draw.gauss(0, 0.01), draw.gauss(0, 0.01), draw.gauss(0, 0.01)
        found.append(saving(0.85, loss_of(0.85 / 0.75) + draw.gauss(0, 0.01), noise)["value"])
    assert statistics.fmean(found) == pytest.approx(0.25, abs=0.01)
    assert 0.015 < statistics.stdev(found) < 0.035
    spread = over_seeds([{"value": value, "reason": None, "bound": None} for value in found])
    assert spread["min"] < 0.22 and spread["max"] > 0.28


def test_a_dearer_scratch_run_that_had_bad_luck_is_left_out() -> None:
    """At 1.0 worse than at 0.6: only the other two count, whatever happened in between."""
    unlucky, luckier = (saving(0.85, loss_of(1.2), (0.0, shift, 0.0)) for shift in (0.5, 0.9))
    assert unlucky == luckier
    assert unlucky["value"] is not None


KNOWN = [{"value": value, "reason": None, "bound": None} for value in (0.1, 0.4, 0.25)]
ABOVE = {"value": None, "reason": "never reached", "bound": {"at_least": 0.3}}
BELOW = {"value": None, "reason": "reached at once", "bound": {"at_most": -0.2}}
UNKNOWN = {"value": None, "reason": "unknown cost", "bound": None}


def test_seeds_have_a_mean_and_a_spread() -> None:
    found = over_seeds(KNOWN)
    assert (found["value"], found["min"], found["max"]) == (pytest.approx(0.25), 0.1, 0.4)
    assert found["reason"] is found["bound"] is None


@pytest.mark.parametrize(
    ("seeds", "bound", "reason"),
    [
        ([*KNOWN, ABOVE], {"at_least": 0.1}, "1 of 4 seeds: never reached"),
        ([ABOVE, ABOVE], {"at_least": 0.3}, "2 of 2 seeds: never reached"),
        ([*KNOWN, BELOW], {"at_most": 0.4}, "1 of 4 seeds: reached at once"),
        ([ABOVE, BELOW], None, "1 of 2 seeds: never reached; 1 of 2 seeds: reached at once"),
        ([*KNOWN, UNKNOWN], None, "1 of 4 seeds: unknown cost"),
        ([], None, "no seed is finished"),
    ],
)
def test_one_seed_that_is_not_known_leaves_a_bound_at_most(
    seeds: list[dict[str, Any]], bound: dict[str, float] | None, reason: str
) -> None:
    found = over_seeds(seeds)
    assert found["value"] is found["min"] is found["max"] is None
    assert (found["bound"], found["reason"]) == (bound, reason)
