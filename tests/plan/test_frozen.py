"""Training in which layers stand still at first (MSLT): phases of their own, with less memory and fewer FLOPs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megagrow import flops
from megagrow.config import Config, GrowthConfig, ModelConfig, SaltConfig, TrainConfig
from megagrow.earlier_growth import EarlierGrowth
from megagrow.parallel.mesh import Mesh
from megagrow.plan import Plan, make_plan, to_dict
from megagrow.plan.dry_run import fake_ranks
from megagrow.plan.layout import Layout
from megagrow.plan.memory import Extra, step_memory
from megagrow.plan.phases import phases
from megagrow.train.learner import Learner
from tests.models import as_bert
from tests.plan.test_memory import LONG, MODEL, changed, measured, model_learner, off
from tests.ranks import run_ranks

FROZEN = 4  # of 6 layers


def learner_above(config: Config, mesh: Mesh) -> Learner:
    """Trains the layers from number `FROZEN` on."""
    learner = model_learner(config, mesh)
    learner.part.freeze(FROZEN)
    return learner


CASES = {
    "long sequences": (LONG, 1),
    "tied embeddings": (replace(LONG, model=replace(MODEL, tied_embeddings=True, vocab_size=8000)), 1),
    "vocabulary, accumulation": (changed(replace(LONG, model=replace(MODEL, vocab_size=8000)), microbatch_size=2), 1),
    "encoder": (replace(LONG, model=as_bert(MODEL, vocab_size=2000)), 1),
    "data": (changed(), 2),
    "tensor": (changed(parallel={"tensor": 2}), 2),
}


@pytest.mark.parametrize("case", CASES)
def test_a_real_step_with_frozen_layers_needs_what_the_plan_says(case: str) -> None:
    config, world_size = CASES[case]
    with fake_ranks(world_size, 0):
        _, peak = measured(config, learner_above)
    (held,) = step_memory(Layout(config, world_size), "cpu", Extra(frozen_layers=FROZEN))
    assert off(held, peak) < 0.1, (held.total, peak, held.parts, held.moment)


@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B"])
def test_a_pipeline_with_frozen_layers_needs_what_the_plan_says(schedule: Any) -> None:
    """1F1B: one stage of frozen layers alone, one with a frozen layer below."""
    config = changed(parallel={"pipeline": 2, "schedule": schedule}, microbatch_size=1)
    planned = step_memory(Layout(config, 2), "cpu", Extra(frozen_layers=FROZEN))
    for rank, peak in run_ranks(measured, 2, config, learner_above):
        assert off(planned[rank], peak) < 0.1, (schedule, rank, planned[rank].total, peak, planned[rank].parts)


def small(num_layers: int) -> ModelConfig:
    return replace(MODEL, num_layers=num_layers)


STAGES = GrowthConfig(
    "stack",
    source=small(2),
    at_step=10,
    freeze_steps=6,
    earlier=(EarlierGrowth(num_layers=3, at_step=4, freeze_steps=5),),
)
STAGED = replace(LONG, growth=STAGES, train=TrainConfig(global_batch_size=8, steps=30))


def described(config: Config) -> list[tuple[str, int, int]]:
    return [(each.name, each.frozen_layers, each.steps) for each in phases(Layout(config, 1))[0]]


def test_each_growth_is_followed_by_steps_in_which_only_new_layers_learn() -> None:
    grown = [("small", 0, 4), ("growing", 0, 0), ("small", 2, 5), ("small", 0, 1), ("growing", 0, 0)]
    assert described(STAGED) == [*grown, ("train", 3, 6), ("train", 0, 14)]
    for steps, expected in {
        4: [("salt", 3, 4), ("train", 3, 2), ("train", 0, 14)],
        9: [("salt", 3, 6), ("salt", 0, 3), ("train", 0, 11)],
        20: [("salt", 3, 6), ("salt", 0, 14)],
    }.items():
        selects = SaltConfig(scores="scores", steps=steps)
        assert described(replace(STAGED, salt=selects)) == [*grown, *expected], steps


def test_frozen_layers_cost_their_forward_pass_alone() -> None:
    plan = make_plan(STAGED, 1)
    assert isinstance(plan, Plan)
    frozen, learning = plan.phases[-2:]
    layers = 3 * flops.layer_flops_per_token(MODEL, 256) * 8 * 256
    assert learning.flops["full"] - frozen.flops["full"] == pytest.approx(2 * layers, rel=1e-12)
    less, more = (phase.memory[0].parts for phase in (frozen, learning))
    assert less["gradients"] < more["gradients"] and less["activations"] < more["activations"]
    assert less["moments"] == more["moments"] > 0
    written = to_dict(plan)["phases"]
    assert [phase["frozen_layers"] for phase in written] == [0, 0, 2, 0, 0, 3, 0]
    assert frozen.title == "train, 3 layers frozen" and learning.title == "train"


def test_what_stands_still_is_not_known_without_the_source(tmp_path: Path) -> None:
    growth = replace(STAGES, source=None, earlier=())
    config = replace(STAGED, growth=growth, init=replace(STAGED.init, from_=str(tmp_path / "none")))
    found, notes = phases(Layout(config, 1))
    assert [phase.frozen_layers for phase in found] == [0]
    assert any("growth.freeze_steps: how many layers stand still is not known" in note for note in notes)
