"""Tests ../../megagrow/plan/schedule.py against the formulas of the papers, and by hand."""

import pytest

from megagrow.config import V_SCHEDULES
from megagrow.plan.schedule import (
    Action,
    Held,
    StageTimes,
    actions,
    gatherings,
    peaks,
    rank_stages,
    walk,
)

EVEN = StageTimes(1.0, 1.0, 1.0)
SCHEDULES = [
    ("1F1B", 1),
    ("Interleaved1F1B", 2),
    ("Interleaved1F1B", 3),
    ("InterleavedZeroBubble", 2),
    ("ZBVZeroBubble", 2),
    ("DualPipeV", 2),
]


@pytest.mark.parametrize(("pipeline", "microbatches"), [(2, 2), (4, 8), (8, 64), (3, 7)])
def test_1f1b_idles_p_minus_1_of_m_plus_p_minus_1_turns(pipeline: int, microbatches: int) -> None:
    walked = walk("1F1B", pipeline, 1, microbatches, [EVEN] * pipeline)
    assert walked.bubble == pytest.approx((pipeline - 1) / (microbatches + pipeline - 1))
    assert walked.idle == pytest.approx(walked.bubble)


@pytest.mark.parametrize(("pipeline", "stages", "microbatches"), [(4, 2, 8), (4, 3, 16), (2, 4, 6)])
def test_interleaving_divides_the_bubble_by_the_stages_of_a_rank(pipeline: int, stages: int, microbatches: int) -> None:
    walked = walk("Interleaved1F1B", pipeline, stages, microbatches, [EVEN] * (pipeline * stages))
    assert walked.bubble == pytest.approx((pipeline - 1) / (stages * microbatches + pipeline - 1))


@pytest.mark.parametrize("schedule", ["InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"])
def test_weight_gradients_fill_two_thirds_of_the_bubble(schedule: str) -> None:
    walked = walk(schedule, 4, 2, 16, [EVEN] * 8)
    assert walked.seconds == 3 * 2 * 16 + 3  # p - 1 turns of one third of a stage's work are left


@pytest.mark.parametrize(("schedule", "stages"), SCHEDULES)
def test_every_microbatch_passes_every_stage_once_in_each_direction(schedule: str, stages: int) -> None:
    done = [action for own in actions(schedule, 4, stages, 8) for action in own]
    assert len(done) == len(set(done))
    assert {(a.stage, a.microbatch) for a in done if a.kind == "F"} == {
        (s, m) for s in range(4 * stages) for m in range(8)
    }
    whole = {(a.stage, a.microbatch) for a in done if a.kind == "B"}
    halves = [{(a.stage, a.microbatch) for a in done if a.kind == kind} for kind in "IW"]
    assert halves[0] == halves[1] and not whole & halves[0]
    assert len(whole | halves[0]) == 4 * stages * 8


@pytest.mark.parametrize(("schedule", "stages"), SCHEDULES)
def test_actions_stand_on_the_rank_of_their_stage(schedule: str, stages: int) -> None:
    for own, held in zip(actions(schedule, 4, stages, 8), rank_stages(schedule, 4, stages), strict=True):
        assert {action.stage for action in own} == set(held)


def test_the_second_half_of_a_v_comes_back_over_the_ranks() -> None:
    assert all(rank_stages(schedule, 3, 2) == ((0, 5), (1, 4), (2, 3)) for schedule in V_SCHEDULES)
    assert rank_stages("Interleaved1F1B", 3, 2) == ((0, 3), (1, 4), (2, 5))


def test_1f1b_holds_as_many_microbatches_as_stages_follow() -> None:
    assert peaks("1F1B", 4, 1, 8) == tuple(((Held(4 - rank, 0, True),),) for rank in range(4))


def test_what_a_first_backward_pass_meets_has_no_gradients_yet() -> None:
    assert peaks("1F1B", 2, 1, 2) == (((Held(2, 0, False),),), ((Held(1, 0, True),),))


def test_split_backward_passes_hold_microbatches_between_their_halves() -> None:
    assert any(held.halved for state in peaks("InterleavedZeroBubble", 4, 2, 8)[3] for held in state)
    assert not any(held.halved for state in peaks("Interleaved1F1B", 4, 2, 8)[3] for held in state)


def test_no_state_of_the_walk_exceeds_the_peaks() -> None:
    for own, stages, found in zip(
        actions("ZBVZeroBubble", 4, 2, 8),
        rank_stages("ZBVZeroBubble", 4, 2),
        peaks("ZBVZeroBubble", 4, 2, 8),
        strict=True,
    ):
        counts = dict.fromkeys(stages, 0)
        for kind, stage, _ in own:
            counts[stage] += {"F": 1, "B": -1, "I": 0, "W": -1}[kind]
            held = [[h.whole + h.halved for h in state] for state in found]
            assert any(all(a <= b for a, b in zip(counts.values(), h, strict=True)) for h in held)


def test_ranks_wait_for_the_one_that_has_more_to_do() -> None:
    slow_head = [EVEN] * 3 + [StageTimes(2.0, 2.0, 2.0)]
    walked = walk("1F1B", 4, 1, 32, slow_head)
    assert walked.busy == (96, 96, 96, 192)
    assert walked.idle > 0.35 > 0.1 > walked.bubble


def test_the_first_stage_leaves_its_backward_pass_to_the_second_half() -> None:
    own = actions("InterleavedZeroBubble", 2, 2, 4)[0]
    assert Action("I", 0, 0) in own
    assert walk("InterleavedZeroBubble", 2, 2, 4, [EVEN] * 4).busy == (24, 24)


def test_three_stages_of_a_rank_stay_gathered_and_more_take_turns() -> None:
    assert gatherings("Interleaved1F1B", 4, 3, 8) == (1,) * 12
    assert max(gatherings("Interleaved1F1B", 4, 5, 8)) > 1
