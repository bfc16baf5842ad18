"""What the state in a manifest may hold."""

import dataclasses
import json
from typing import Any

import pytest

from megagrow.config import ModelConfig, OptimConfig
from megagrow.data.blend import BlendStart
from megagrow.errors import CheckpointError
from megagrow.train.state import RunState

STATE = RunState(
    ModelConfig(),
    "main",
    cursors={"all": 7, "selected": 0},
    blend=BlendStart({"a": 1.0}, 5, {"a": 2}),
    optimizer={"step": 1, "multipliers": {}},
    pending_event={"reason": "plateau", "loss_before": 2.0, "loss_initial": None},
)
HUGE = 10**400
REFUSED: list[tuple[str, Any]] = [
    ("blend", {"weights": {"a": HUGE}, "start": 0, "firsts": {}}),
    ("blend", {"weights": {"a": 1e300, "b": 1e300}, "start": 0, "firsts": {}}),
    ("blend", {"weights": {"a": True}, "start": 0, "firsts": {}}),
    ("blend.start", {"weights": {"a": 1}, "start": 8, "firsts": {}}),
    ("guard", {"losses": [HUGE, 1.0], "bad_steps": 0}),
    ("guard", {"losses": [1e308, 1e308], "bad_steps": 0}),
    ("pending_event", {}),
    ("pending_event", {"reason": "step", "loss_before": "x", "loss_initial": None}),
    ("pending_event", {"reason": "step", "loss_before": HUGE, "loss_initial": None}),
    ("pending_event", {"reason": "step", "loss_before": 1.0, "loss_initial": 1.0, "step": 2}),
    ("pending_event", {"reason": "whim", "loss_before": 1.0, "loss_initial": 1.0}),
    ("pending_event", {"reason": [], "loss_before": 1.0, "loss_initial": 1.0}),
    ("growths", -1),
    ("losses", [HUGE]),
]


def test_a_state_comes_back_as_it_was() -> None:
    found = RunState.from_dict(json.loads(json.dumps(STATE.to_dict())), "m")
    assert found == STATE
    found.guard.accepts(1.0, 1.0, dataclasses.replace(OptimConfig(), spike_sigma=3.0, spike_window=4))


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_what_a_run_could_not_go_on_with_is_refused(name: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"^m: state\.{name}"):
        RunState.from_dict({**STATE.to_dict(), name.split(".")[0]: value}, "m")
