"""Which stage a step belongs to, and how much the teacher weighs in it."""

import math
from dataclasses import replace

from megagrow.config import Config, SaltConfig


def with_stage_one_steps(config: Config) -> Config:
    """The configuration with `salt.share` as `salt.steps`, at least one; all steps have as many tokens."""
    salt = config.salt
    if salt.share == 0:
        return config
    return replace(config, salt=replace(salt, steps=max(1, round(salt.share * config.train.steps)), share=0.0))


def is_stage_one(step_in_phase: int, salt: SaltConfig) -> bool:
    """Whether a step, counted from 0 at the start of the (grown) model's training, is in stage 1 as it is planned."""
    return step_in_phase < salt.steps


def teacher_weight(step_in_phase: int, salt: SaltConfig) -> float:
    """ω of the step: 0 in stage 2, and in stage 1 that of the configuration, all along or falling to 0 at its end.

    At t of n steps ω is multiplied by 1 − t/n (`linear`) or (1 + cos(π·t/n)) / 2 (`cosine`).
    Source: `constant`, SALT (Rawat et al., 2024, arXiv 2410.18779); `linear` from ω = 1, knowledge inheritance (Qin et
    al., 2022, arXiv 2105.13880).
    """
    if not salt.teaches or not is_stage_one(step_in_phase, salt):
        return 0.0
    done = step_in_phase / salt.steps
    factors = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return salt.weight * factors[salt.schedule]
