"""Stages."""

import dataclasses

import pytest

from megagrow.config import Config, SaltConfig, TrainConfig
from megagrow.errors import ConfigError
from megagrow.salt.schedule import is_stage_one, teacher_weight, with_stage_one_steps


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


def test_the_weight_falls_along_half_a_cosine() -> None:
    salt = SaltConfig(teacher="small", steps=4, weight=0.8, schedule="cosine")
    expected = [0.8, 0.8 * (2 + 2**0.5) / 4, 0.4, 0.8 * (2 - 2**0.5) / 4, 0.0]
    assert [teacher_weight(step, salt) for step in range(5)] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("share", "steps"), [(0.173, 36), (1.0, 208), (0.001, 1), (0.5, 104)])
def test_a_share_is_one_of_the_steps_of_the_run(share: float, steps: int) -> None:
    """36 of 208 (thousand) in the paper; at least one."""
    config = Config(train=TrainConfig(steps=208), salt=SaltConfig(teacher="small", share=share))
    found = with_stage_one_steps(config).salt
    assert (found.steps, found.share) == (steps, 0.0)
    assert dataclasses.replace(found, steps=0, share=share) == config.salt


def test_steps_stay_as_they_are() -> None:
    config = Config(salt=SaltConfig(teacher="small", steps=3))
    assert with_stage_one_steps(config) is config
    with pytest.raises(ConfigError, match="salt.steps=3 and salt.share=0.1 both say how long stage 1 is; leave one"):
        SaltConfig(steps=3, share=0.1)
