"""Tests ../../megagrow/compare/budget.py against the ledgers of finished runs."""

import pytest

from megagrow.compare.budget import affordable_steps, run_flops
from megagrow.compare.experiment import Experiment
from megagrow.compare.suite import NEVER_GROWN, SMALL
from megagrow.compare.sweep import Try
from megagrow.errors import ConfigError
from megagrow.report.run import load_run
from tests.compare.conftest import ARMS

CONTROLS = [NEVER_GROWN, "salt_by_never_grown"]
RAN = [arm for arm in ARMS if arm != "clone_zero_pad"]


@pytest.mark.parametrize("arm", [SMALL, "scratch-0.6", "scratch-1.7", *CONTROLS, *RAN])
def test_the_plan_is_what_the_ledger_says(arm: str, finished: Experiment) -> None:
    """With growth at the start and in mid-run, frozen layers, learned maps, a teacher, and data that it picks."""
    job = finished.job(finished.chosen(arm), 1)
    own = load_run(job.directory).ledger.own()["flops"]
    assert run_flops(job.config, finished.suite.source) == pytest.approx(own, rel=1e-12)


@pytest.mark.parametrize("arm", [NEVER_GROWN, *RAN])
def test_every_arm_takes_the_budget_to_a_step_and_no_more(arm: str, finished: Experiment) -> None:
    spent = load_run(finished.job(finished.chosen(arm), 1).directory).cost("all_in", "flops")
    left = finished.suite.budget - spent
    assert 0 <= left < 2.5 * finished.suite.step_flops(finished.suite.target)


def test_a_budget_that_nothing_is_left_of_is_refused(finished: Experiment) -> None:
    config, source = finished.config(Try("ligo", 1e-3), 1), finished.suite.source
    with pytest.raises(ConfigError, match="takes the budget of 1 FLOPs by itself"):
        affordable_steps(lambda steps: config, source, 0.0, 1.0)


def test_a_control_with_a_finished_teacher_is_charged_that_teacher(finished: Experiment) -> None:
    """All-in; by the papers' convention it costs what the arm does that it is about."""
    runs = [load_run(finished.job(finished.chosen(arm), 1).directory) for arm in ("salt_by_never_grown", "salt")]
    own = [run.ledger.own()["flops"] for run in runs]
    assert own[0] == own[1]
    given = runs[0].cost("all_in", "flops") - own[0]
    assert given == pytest.approx(finished.suite.budget, rel=0.1)
