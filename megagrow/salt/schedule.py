"""Which stage a step belongs to, and how much the teacher weighs in it."""

from megagrow.config import SaltConfig


def is_stage_one(step_in_phase: int, salt: SaltConfig) -> bool:
    """Whether a step, counted from 0 at the start of the (grown) model's training, is in stage
    1.
    """
    return step_in_phase < salt.steps


def teacher_weight(step_in_phase: int, salt: SaltConfig) -> float:
    """ω of the step: that of the configuration in stage 1, then 0 at once."""
    return salt.weight if salt.teacher and is_stage_one(step_in_phase, salt) else 0.0
