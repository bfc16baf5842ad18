"""What the state in a manifest may hold."""

import dataclasses
import json
from typing import Any

import pytest

from megagrow.config import ModelConfig, OptimConfig
from megagrow.data.blend import BlendStart, DatasetIdentity
from megagrow.errors import CheckpointError
from megagrow.train.state import RunState

STATE = RunState(
    ModelConfig(),
    "main",
    cursors={"all": 7, "selected": 0},
    blend=BlendStart({"a": 1.0}, 5, {"a": 2}, {"a": DatasetIdentity(9, "0" * 64)}),
    optimizer={"step": 1, "multipliers": {}},
    pending_event={"reason": "plateau", "loss_before": 2.0, "loss_initial": None},
    teacher_loss=2.5,
    stage_one_end=4,
)
HUGE = 10**400
NEW_PART: dict[str, Any] = {
    "since": 1,
    "starts_at_zero": True,
    "steps": 4,
    "factor": 1.3,
    "method": "clone",
    "seed": 3,
    "policy": "asymmetric",
    "source": {},
}


def optimizer_with(**fields: Any) -> dict[str, Any]:
    return {"step": 1, "multipliers": {}, "new_part": {**NEW_PART, **fields}}


BLEND = {"weights": {"a": 1}, "start": 0, "firsts": {}, "datasets": {"a": {"num_samples": 9, "sketch": "0" * 64}}}
REFUSED: list[tuple[str, Any]] = [
    ("blend.weights", {**BLEND, "weights": {"a": HUGE}}),
    ("blend.weights", {**BLEND, "weights": {"a": 1e300, "b": 1e300}}),
    ("blend.weights", {**BLEND, "weights": {"a": True}}),
    ("blend.start", {**BLEND, "start": 8}),
    ("blend must hold", {name: value for name, value in BLEND.items() if name != "datasets"}),
    ("blend.datasets", {**BLEND, "datasets": {}}),
    ("blend.datasets", {**BLEND, "firsts": {"b": 1}}),
    ("blend.datasets", {**BLEND, "datasets": {"a": {"num_samples": -1, "sketch": "0" * 64}}}),
    ("blend.datasets", {**BLEND, "datasets": {"a": {"num_samples": 1, "sketch": "0" * 63}}}),
    ("blend.datasets", {**BLEND, "datasets": {"a": {"num_samples": 1}}}),
    ("rolled_back_at", -1.0),
    ("token_ids", {"eos_token_id": "</s>"}),
    ("token_ids", {"other_id": 1}),
    ("guard", {"losses": [HUGE, 1.0], "bad_steps": 0}),
    ("guard", {"losses": [1e308, 1e308], "bad_steps": 0}),
    ("optimizer.new_part", {"step": 1, "multipliers": {}, "new_part": {}}),
    ("optimizer.new_part", optimizer_with(more=1)),
    ("optimizer.new_part.since", optimizer_with(since=2)),
    ("optimizer.new_part.starts_at_zero", optimizer_with(starts_at_zero=1)),
    ("optimizer.new_part.steps", optimizer_with(steps=-1)),
    ("optimizer.new_part.factor", optimizer_with(factor=HUGE)),
    ("optimizer.new_part.method", optimizer_with(method=None)),
    ("optimizer.new_part.seed", optimizer_with(seed=1.5)),
    ("optimizer.new_part.policy", optimizer_with(policy="all")),
    ("optimizer.new_part.source", optimizer_with(source=3)),
    ("pending_event", {}),
    ("pending_event", {"reason": "step", "loss_before": "x", "loss_initial": None}),
    ("pending_event", {"reason": "step", "loss_before": HUGE, "loss_initial": None}),
    ("pending_event", {"reason": "step", "loss_before": 1.0, "loss_initial": 1.0, "step": 2}),
    ("pending_event", {"reason": "whim", "loss_before": 1.0, "loss_initial": 1.0}),
    ("pending_event", {"reason": [], "loss_before": 1.0, "loss_initial": 1.0}),
    ("growths", -1),
    ("losses", [HUGE]),
    ("teacher_loss", HUGE),
    ("teacher_loss", "2.0"),
    ("stage_one_end", -1),
    ("stage_one_end", 2.0),
]


def test_a_state_comes_back_as_it_was() -> None:
    found = RunState.from_dict(json.loads(json.dumps(STATE.to_dict())), "m")
    assert found == STATE
    found.guard.accepts(1.0, 1.0, dataclasses.replace(OptimConfig(), spike_sigma=3.0, spike_window=4))


def test_a_new_part_is_part_of_the_state() -> None:
    state = {**STATE.to_dict(), "optimizer": optimizer_with()}
    assert RunState.from_dict(state, "m").optimizer == state["optimizer"]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_what_a_run_could_not_go_on_with_is_refused(name: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"^m: state\.{name}"):
        RunState.from_dict({**STATE.to_dict(), name.split(".")[0].split()[0]: value}, "m")
