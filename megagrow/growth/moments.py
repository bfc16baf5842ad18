"""Adam's state of a grown model, and the step sizes that go with it.

For copies, with W' = R(W)·v and grad' = R(grad)·g (v = 1/n_in, g = 1/n_out, R plain replication), Adam's state

    exp_avg' = R(exp_avg)·g      exp_avg_sq' = R(exp_avg_sq)·g²      step' = step

with the settings  lr·v, eps·g, weight_decay/v  of each tensor makes the grown model follow the small one's trajectory
exactly: the update lr·m/(√s + eps) does not see g, and is scaled by v like the weights. Gradient clipping is outside
the rule: the norm of each tensor's gradient changes by √(n_in/n_out). Dense maps have no such rule.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from megagrow.errors import ConfigError
from megagrow.growth.grow import Fetch, grow_into
from megagrow.growth.operator import Quantity, uniform_scale
from megagrow.growth.recipe import Recipe
from megagrow.optim import Multipliers
from megagrow.parallel.shards import local
from megagrow.roles import parameter_names

Policy = Literal["exact", "reset"]

QUANTITIES: dict[str, Quantity] = {"exp_avg": "gradient", "exp_avg_sq": "squared_gradient"}


def grow_optimizer(
    recipe: Recipe,
    policy: Policy,
    sources: Mapping[str, Fetch],
    targets: Mapping[str, Mapping[str, Tensor]],
    step: int,
) -> int:
    """Fills the grown model's Adam moments, shard by shard.

    Args:
        recipe: how the model grew.
        policy: `exact` carries the moments over, `reset` clears them.
        sources: moment (`exp_avg`, `exp_avg_sq`) -> reads the source's whole tensors by parameter name; unused by
            `reset`.
        targets: moment -> parameter name -> this rank's tensor, laid out like the parameter.
        step: updates that the source's moments have seen.

    Returns:
        The number of updates from which the grown optimizer counts on.

    Raises:
        ConfigError: `exact` for a recipe that does not copy.
    """
    if policy == "reset":
        for tensors in targets.values():
            for tensor in tensors.values():
                local(tensor).zero_()
        return 0
    _check_copies(recipe)
    for moment, quantity in QUANTITIES.items():
        grow_into(recipe, sources[moment], targets[moment], quantity)
    return step


def grow_multipliers(
    recipe: Recipe, policy: Policy, old: Mapping[str, Multipliers] | None = None
) -> dict[str, Multipliers]:
    """The step sizes of every target tensor, relative to the optimizer's settings.

    Args:
        recipe: how the model grew.
        policy: `reset` leaves all settings as they are configured.
        old: those of the source, when it was grown before; None: all 1.

    Raises:
        ConfigError: `exact` for a recipe that does not copy every unit of an axis equally often.
    """
    names = parameter_names(recipe.target)
    if policy == "reset":
        return {name: Multipliers() for name in names}
    _check_copies(recipe)
    return {name: _grown(recipe, name, (old or {}).get(recipe.source_name(name), Multipliers())) for name in names}


def value_scale(recipe: Recipe, name: str) -> float:
    """v: what a target parameter's entries are multiplied by when they are copied, 1/n_in."""
    return _uniform(recipe, name, "value")


def gradient_scale(recipe: Recipe, name: str) -> float:
    """g: what the entries of a target parameter's gradient are multiplied by, 1/n_out."""
    return _uniform(recipe, name, "gradient")


def _grown(recipe: Recipe, name: str, old: Multipliers) -> Multipliers:
    v, g = value_scale(recipe, name), gradient_scale(recipe, name)
    return Multipliers(old.lr * v, old.eps * g, old.weight_decay / v)


def _uniform(recipe: Recipe, name: str, quantity: Quantity) -> float:
    scale = uniform_scale(recipe, name, quantity)
    if scale is None:
        raise ConfigError(
            f"growth.optimizer=exact: {recipe.method} copies units of {name} unequally often, so that no one learning "
            "rate fits the whole tensor; use growth.optimizer=reset"
        )
    return scale


def _check_copies(recipe: Recipe) -> None:
    if not recipe.copies:
        raise ConfigError(
            f"growth.optimizer=exact has no rule for the learned maps of {recipe.method}; "
            "use growth.optimizer=reset with growth.rewarmup_steps"
        )
