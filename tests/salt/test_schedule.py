"""Stages."""

from megagrow.config import SaltConfig
from megagrow.salt.schedule import is_stage_one, teacher_weight


def test_stage_one_is_the_first_steps() -> None:
    salt = SaltConfig(teacher="small", steps=3, weight=0.4)
    assert [is_stage_one(step, salt) for step in range(5)] == [True, True, True, False, False]
    assert [teacher_weight(step, salt) for step in range(5)] == [0.4, 0.4, 0.4, 0.0, 0.0]


def test_without_salt_there_is_no_stage_one() -> None:
    assert not is_stage_one(0, SaltConfig())
    assert teacher_weight(0, SaltConfig()) == 0.0


def test_selection_alone_has_a_stage_one_without_a_teacher() -> None:
    salt = SaltConfig(scores="folder", steps=3)
    assert is_stage_one(2, salt) and teacher_weight(2, salt) == 0.0


def test_the_weight_falls_linearly_to_zero() -> None:
    """a_t = max(0, 1 - t / T_kd) of knowledge inheritance."""
    salt = SaltConfig(teacher="small", steps=4, weight=1.0, schedule="linear")
    assert [teacher_weight(step, salt) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    half = SaltConfig(teacher="small", steps=4, weight=0.5, schedule="linear")
    assert [teacher_weight(step, half) for step in range(4)] == [0.5, 0.375, 0.25, 0.125]
