"""When the run's next growth is due, from its state alone, so that a resumed run grows at the same step.

Whichever of these comes first:

    step      `at_step` steps of the schedule are done; 0, and nothing else: at start-up
    tokens    the run has trained on `at_tokens` tokens
    plateau   the training loss (`loss` of metrics.jsonl) is flat: its mean over the last `plateau_window` steps is
              above (1 - `at_plateau`) times that over as many steps before. Steps of a warm-up and
              steps that were refused do not count, nor do those with frozen layers, nor those of the model before the
              last growth.

A growth waits while layers stand still, and while entries that the one before it added have updates of their own.
"""

import math

from megagrow.config import Config, GrowthConfig
from megagrow.parallel.collectives import told_by_first
from megagrow.parallel.mesh import Mesh
from megagrow.timeline import growth_settings, latest_step
from megagrow.train.learner import StepResult
from megagrow.train.state import RunState


def due(state: RunState, config: Config, mesh: Mesh) -> str | None:
    """Why the model grows before the next step (`start`, `step`, `tokens`, `plateau`), the same on every rank; or None.

    A collective where the growth waits for a plateau.
    """
    if state.phase != "small" or frozen_layers(state, config) or restarts(state, config):
        return None
    growth = growth_settings(config.growth, state.growths)
    if growth.at_tokens:
        if state.tokens >= growth.at_tokens:
            return "tokens"
    elif state.train_step >= growth.at_step:
        return "step" if latest_step(config, state.growths) else "start"
    if growth.at_plateau:  # the first rank's losses are those that a checkpoint holds
        flat = is_flat(state.losses, growth.plateau_window, growth.at_plateau)
        return "plateau" if told_by_first(flat, mesh.world, mesh.device) else None
    return None


def note_loss(state: RunState, result: StepResult, config: Config) -> None:
    """Keeps the losses that `due` looks at."""
    if state.phase != "small" or not result.accepted:
        return
    growth = growth_settings(config.growth, state.growths)
    if growth.at_plateau and state.train_step > _end_of_warmup(state, config):
        state.losses = [*state.losses, result.loss][-2 * growth.plateau_window :]


def is_flat(losses: list[float], window: int, threshold: float) -> bool:
    """Whether the mean of the last `window` losses is above (1 - threshold) times that of the `window` before them."""
    if len(losses) < 2 * window:
        return False
    before, last = math.fsum(losses[-2 * window : -window]), math.fsum(losses[-window:])
    return last > (1 - threshold) * before


def frozen_layers(state: RunState, config: Config) -> int:
    """How many layers, from the first on, stand still in the next step, with the embedding below them.

    Multi-stage layerwise training (MSLT): a growth adds layers on top, which alone learn at first, with the head; then
    all do.
    """
    if state.phase == "ligo":
        return 0
    return state.layers_before if (_steps_since(state) or 0) < _last_growth(state, config).freeze_steps else 0


def restarts(state: RunState, config: Config) -> bool:
    """Whether the optimizer begins anew before the next step, in which layers that stood still learn again.

    It does under the policy `reset`: their moments are zero, but the count of updates has gone on, so that Adam's
    correction of such moments would be missing.
    """
    if state.phase == "ligo" or state.grown_at is None:
        return False
    growth = _last_growth(state, config)
    return _restarts_after(growth) and growth.freeze_steps == _steps_since(state)


def rewarmup(state: RunState, config: Config) -> float:
    """What the learning rate of the next step is multiplied by, as the last growth is recent.

    It rises again where the optimizer has begun anew. That of the new part alone is the optimizer's affair.
    """
    growth, since = _last_growth(state, config), _steps_since(state)
    if since is None or growth.rewarmup_steps == 0 or growth.rewarmup_part == "new":
        return 1.0
    if _restarts_after(growth) and since >= growth.freeze_steps:
        since -= growth.freeze_steps
    return min(1.0, (since + 1) / growth.rewarmup_steps)


def _steps_since(state: RunState) -> int | None:
    return None if state.grown_at is None else state.train_step - state.grown_at


def _last_growth(state: RunState, config: Config) -> GrowthConfig:
    return growth_settings(config.growth, max(state.growths - 1, 0))


def _restarts_after(growth: GrowthConfig) -> bool:
    return growth.optimizer == "reset" and growth.freeze_steps > 0


def _end_of_warmup(state: RunState, config: Config) -> int:
    """The step of the schedule from which on losses show how the whole model learns."""
    if state.grown_at is None:
        return config.optim.warmup_steps
    growth = _last_growth(state, config)
    frozen, rises = growth.freeze_steps, growth.rewarmup_steps
    after = frozen + rises if _restarts_after(growth) else max(frozen, rises)
    return max(config.optim.warmup_steps, state.grown_at + after)
