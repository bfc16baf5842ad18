"""The schedule of the learning rate, ../megagrow/optim.py."""

from typing import Any

import pytest

from megagrow.config import OptimConfig
from megagrow.optim import lr_at


def rates(schedule: Any, total: int = 100, beyond: int = 0) -> list[float]:
    config = OptimConfig(lr=1.0, warmup_steps=10, schedule=schedule, decay_fraction=0.2, min_lr_ratio=0.1)
    return [lr_at(step, total, config) for step in range(total + beyond)]


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
def test_warm_up_is_linear_and_what_follows_never_rises(schedule: str) -> None:
    found = rates(schedule)
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert found[10] == pytest.approx(1.0)
    assert all(later <= earlier for earlier, later in zip(found[10:], found[11:], strict=False))


def test_where_each_schedule_decays() -> None:
    wsd, cosine = rates("wsd"), rates("cosine")
    assert wsd[10:81] == [1.0] * 71 and wsd[90] == pytest.approx(0.1 + 0.9 / 2)
    assert cosine[55] == pytest.approx(0.1 + 0.9 / 2)
    assert set(rates("constant")[10:]) == {1.0}


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_steps_beyond_the_planned_ones_have_the_least_rate(schedule: str) -> None:
    """A growth that has to wait for good steps can make a run longer; a negative rate would climb."""
    assert rates(schedule, beyond=30)[100:] == pytest.approx([0.1] * 30)
