"""Tests `Outcome.steps_to_recover` of ../../megagrow/compare/results.py on curves whose answer is known."""

import pytest

from megagrow.compare.record import Line
from megagrow.compare.results import Outcome
from megagrow.compare.sweep import Try
from megagrow.config import Config, GrowthConfig
from megagrow.ledger import Ledger

LEARNED = GrowthConfig(method="ligo", ligo_steps=24)
COPIED = GrowthConfig(method="stack")


@pytest.mark.parametrize(
    ("growth", "grown_at", "after", "curve", "steps"),
    [
        (LEARNED, 24, 5.2, [(25, 5.1), (48, 4.99), (60, 4.9)], 48),
        (LEARNED, 24, 5.2, [(25, 4.9), (48, 5.1), (60, 4.9)], 60),  # the first dip did not last
        (LEARNED, 24, 4.9, [(25, 4.8), (48, 4.7)], 24),
        (COPIED, 100, 5.0, [(101, 5.0), (120, 4.9)], 0),
        (COPIED, 100, 5.0, [(101, 5.1), (120, 4.9)], 20),
        (COPIED, 100, 5.2, [(90, 4.0), (101, 5.1), (120, 5.1)], None),
    ],
)
def test_steps_until_the_loss_of_the_small_model_is_there_for_good(
    growth: GrowthConfig, grown_at: int, after: float, curve: list[tuple[int, float]], steps: int | None
) -> None:
    ledger = Ledger()
    ledger.add_event("growth", grown_at, loss_before=5.0, loss_after=after)
    *points, (step, loss) = curve
    evaluated = [[at, found, None, None] for at, found in points]
    line = Line("key", "arm", step, loss, "", ledger.to_dict(), evaluated, None, {}, "machine", 1, "0123", "2026-01-02")
    assert Outcome(Try("arm", 1e-3), 1, line, line.run(Config(growth=growth))).steps_to_recover() == steps
