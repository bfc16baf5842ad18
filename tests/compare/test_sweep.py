"""Tests ../../megagrow/compare/sweep.py: tries, choices and records."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from megagrow.compare.suite import SMALL
from megagrow.compare.suites import SIZES, SUITES, suite
from megagrow.compare.sweep import RECORDED, Sweep, Tried, Try, record, recorded
from megagrow.errors import ConfigError

RATES = (1e-3, 4e-3)


def measure(tries: Sequence[Try]) -> list[Tried]:
    """A loss that is lowest at 4e-3 and maps at 1e-2; `bad` diverges."""
    return [
        Tried(
            each.arm,
            each.lr,
            each.map_lr,
            None if each.arm == "bad" else abs(each.lr - 4e-3) + abs((each.map_lr or 3e-3) - 1e-2),
        )
        for each in tries
    ]


def test_every_arm_has_as_many_tries_and_the_second_round_lies_about_the_best() -> None:
    sweep = Sweep()
    sweep.tune(["plain", "maps"], RATES, measure, lambda arm: arm == "maps")
    plain, maps = ([row.key for row in sweep.rows if row.arm == arm] for arm in ("plain", "maps"))
    assert len(plain) == len(maps) == 4
    assert [each.lr for each in plain] == pytest.approx([1e-3, 4e-3, 2e-3, 8e-3])
    assert [(each.lr, each.map_lr) for each in maps[2:]] == [(4e-3, 1e-3), (4e-3, 1e-2)]
    assert sweep.best("plain") == Try("plain", 4e-3)
    assert sweep.best("maps") == Try("maps", 4e-3, 1e-2)
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


def test_a_record_reads_back_and_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    assert recorded("a-core", path) is None
    sweep = Sweep()
    sweep.tune(["plain", "bad"], RATES, measure)
    record("b-core", sweep, {"corpus": "1"}, path)
    record("a-core", Sweep(sweep.rows[:1]), {"corpus": "2"}, path)
    found = recorded("b-core", path)
    assert found is not None and (found.rows, found.facts) == (sweep.rows, {"corpus": "1"})
    assert len((recorded("a-core", path) or Sweep()).rows) == 1


def test_names_of_runs_tell_tries_apart() -> None:
    names = [Try("ligo", 1e-3).name, Try("ligo", 1.414e-3).name, Try("ligo", 1e-3, 1e-2).name]
    assert names == ["ligo-lr0.001", "ligo-lr0.00141", "ligo-lr0.001-maps0.01"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SUITES)
def test_what_is_recorded_in_the_project_has_every_arm(name: str, size: str) -> None:
    found, asked = recorded(f"{name}-{size}"), suite(name, size)
    if found is not None:
        assert found.knows([SMALL, *asked.scratch_arms, *asked.arms]), RECORDED
        assert {"corpus", "date", "commit", "machine"} <= set(found.facts)
