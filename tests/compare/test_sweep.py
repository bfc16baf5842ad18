"""Tests ../../megagrow/compare/sweep.py: tries and choices."""

import math
from collections.abc import Sequence
from functools import partial

import pytest

from megagrow.compare.sweep import Sweep, Tried, Try
from megagrow.errors import ConfigError

RATES = (1e-3, 4e-3)


def measure(tries: Sequence[Try]) -> list[Tried]:
    """A loss that is lowest at 4e-3 and maps at 1e-4; `bad` diverges."""
    return [
        Tried(
            each.arm,
            each.lr,
            each.map_lr,
            None if each.arm == "bad" else abs(each.lr - 4e-3) + abs((each.map_lr or 1e-3) - 1e-4),
        )
        for each in tries
    ]


def test_every_arm_has_as_many_tries() -> None:
    sweep = Sweep()
    sweep.tune(["plain", "maps"], RATES, measure, lambda arm: arm == "maps")
    plain, maps = ([row.key for row in sweep.rows if row.arm == arm] for arm in ("plain", "maps"))
    assert len(plain) == len(maps) == 4
    assert [each.lr for each in plain] == pytest.approx([1e-3, 4e-3, 8e-3, 16e-3])
    assert [(each.lr, each.map_lr) for each in maps[2:]] == [(4e-3, 3e-4), (4e-3, 1e-4)]
    assert sweep.best("plain") == Try("plain", 4e-3)
    assert sweep.best("maps") == Try("maps", 4e-3, 1e-4)
    assert sweep.knows(["plain"]) and not sweep.knows(["plain", "other"])


def test_without_refinement_there_is_one_round() -> None:
    sweep = Sweep()
    sweep.tune(["plain"], RATES, measure)
    assert len(sweep.rows) == 2


def test_an_arm_that_always_diverges_is_told() -> None:
    sweep = Sweep()
    sweep.tune(["bad"], RATES, measure)
    with pytest.raises(ConfigError, match="bad: no learning rate was tried that does not diverge"):
        sweep.best("bad")


def test_a_fixed_rate_stands_in_for_all() -> None:
    assert Sweep(fixed=1e-3).best("any") == Try("any", 1e-3)
    assert Sweep(fixed=1e-3).knows(["any"])


def best_at(rate: float, tries: Sequence[Try]) -> list[Tried]:
    """A loss that is lowest at a rate."""
    return [Tried(each.arm, each.lr, each.map_lr, abs(math.log(each.lr / rate))) for each in tries]


@pytest.mark.parametrize(
    ("rate", "second", "end"),
    [
        (2.1e-3, [1.414e-3, 2.828e-3], None),
        (5.5e-3, [5.657e-3, 8e-3], None),
        (1e-2, [5.657e-3, 8e-3], "highest"),
        (1e-4, [0.7071e-3, 0.5e-3], "lowest"),
    ],
)
def test_the_second_round_goes_outward_where_the_best_is_at_an_end(
    rate: float, second: list[float], end: str | None
) -> None:
    """Half a step about the best of the first round, or beyond it; what is still at an end is known as such."""
    sweep = Sweep()
    sweep.tune(["plain"], (1e-3, 2e-3, 4e-3), partial(best_at, rate), lambda arm: False)
    assert [row.lr for row in sweep.rows[3:]] == pytest.approx(second, rel=1e-3)
    assert sweep.at_end("plain") == end


def test_only_arms_that_have_not_been_tried_are() -> None:
    sweep, asked = Sweep(), []

    def remembering(tries: Sequence[Try]) -> list[Tried]:
        asked.extend(each.arm for each in tries)
        return measure(tries)

    sweep.tune(["plain"], RATES, remembering)
    sweep.tune(["plain", "bad", "other"], RATES, remembering)
    assert asked == ["plain"] * 2 + ["bad"] * 2 + ["other"] * 2
    assert len(sweep.rows) == 6 and sweep.diverging(["plain", "bad", "new"]) == ["bad"]


def test_an_arm_of_which_a_try_has_not_ended_is_not_known() -> None:
    """Else it would be reported at the best of fewer tries than others had."""
    sweep = Sweep()
    sweep.tune(["plain", "maps"], RATES, lambda tries: measure(tries)[1:])
    assert sweep.knows(["maps"]) and not sweep.knows(["plain"])
    sweep.tune(["plain", "maps"], RATES, measure)
    assert sweep.knows(["plain"]) and len(sweep.rows) == 4


def test_the_best_arm_is_that_of_the_lowest_try() -> None:
    sweep = Sweep()
    sweep.tune(["bad", "maps", "plain"], RATES, measure, lambda arm: arm == "maps")
    assert sweep.best_arm(["bad", "maps", "plain"]) == "maps"
    assert sweep.best_arm(["bad"]) is None and Sweep(fixed=1e-3).best_arm(["plain"]) is None


def test_names_of_runs_tell_tries_apart() -> None:
    names = [Try("ligo", 1e-3).name, Try("ligo", 1.414e-3).name, Try("ligo", 1e-3, 1e-2).name]
    assert names == ["ligo-lr0.001", "ligo-lr0.00141", "ligo-lr0.001-maps0.01"]
