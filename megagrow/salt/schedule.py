"""Which stage a step belongs to, and how much the teacher weighs in it."""

from megagrow.config import SaltConfig


def is_stage_one(step_in_phase: int, salt: SaltConfig) -> bool:
    """Whether a step, counted from 0 at the start of the (grown) model's training, is in stage 1."""
    return step_in_phase < salt.steps


def teacher_weight(step_in_phase: int, salt: SaltConfig) -> float:
    """ω of the step: 0 in stage 2, and in stage 1 that of the configuration, all along or times 1 − t / steps.

    Source: `constant`, SALT (Rawat et al., 2024, arXiv 2410.18779); `linear` from ω = 1, knowledge inheritance (Qin et
    al., 2022, arXiv 2105.13880).
    """
    if not salt.teaches or not is_stage_one(step_in_phase, salt):
        return 0.0
    return salt.weight * (1 - step_in_phase / salt.steps) if salt.schedule == "linear" else salt.weight
