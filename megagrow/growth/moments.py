"""Adam's state of a grown model, and the step sizes that go with it.

For copies, with W' = R(W)·v and grad' = R(grad)·g (v = 1/n_in, g = 1/n_out, R plain replication), Adam's state

    exp_avg' = R(exp_avg)·g      exp_avg_sq' = R(exp_avg_sq)·g²      step' = step

with the settings  lr·v, eps·g, weight_decay/v  of each tensor makes the grown model follow the small one's trajectory
exactly: the update lr·m/(√s + eps) does not see g, and is scaled by v like the weights. Gradient clipping is outside
the rule: the norm of each tensor's gradient changes by √(n_in/n_out). Dense maps have no such rule.

A policy says which entries get moments by that rule; the moments of the others are zero. *First copies* are entries
whose units are the first copies of their source units on both dims, in the first copy of their source layer.

    policy       moments by the rule   steps of each tensor   suits
    exact        all entries           lr·v, eps·g, wd/v      clone, stack and other even copies, alone or together:
                                                              goes where the small model goes; copies never part
                                                              without a breaker of symmetry
    asymmetric   first copies          as in the source       clone, net2net, fpi, aki, stack, insert_identity, …: even
                                                              or uneven copies, which part because of it ([S, 0])
    zero_pad     all with a source     as in the source       zero_pad, rms_random, direct_copy: the old block goes on
    reset        none, step' = 0       as configured          any, and the only one for learned maps (ligo)

Under `asymmetric` and `zero_pad` the entries without moments count their own updates (`new_part`), as if they had an
Adam of their own. Refused: whatever needs a source entry per target entry where there is none, or one rate per tensor
where units are copied unequally often, or equal gradients where copies of a key/value head share out its queries (there
g = 1/n_out is what the first copy gets on average).

Source: SPARKLING (2026, arXiv 2602.02472) for [S, 0]; MSG (Yao et al., 2024, arXiv 2305.02869) for padding by zeros.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, cast

import torch
from torch import Tensor

from megagrow.config import GrowthConfig, ModelConfig, Policy, require
from megagrow.config_file import from_dict, to_dict
from megagrow.errors import CheckpointError, ConfigError
from megagrow.growth.dims import Quantity
from megagrow.growth.grow import Fetch, grow_into, grow_whole
from megagrow.growth.maps import NEW, AxisMap, LayerMap, SparseMap, first_copies
from megagrow.growth.methods import make_recipe
from megagrow.growth.operator import uniform_scale
from megagrow.growth.recipe import Recipe
from megagrow.new_part import Kept, NewPart, Schedule
from megagrow.optim import Multipliers
from megagrow.parallel.shards import Box, box, local
from megagrow.roles import axis_size, axis_unit, parameter_names, role_of, split_name

QUANTITIES: dict[str, Quantity] = {"exp_avg": "gradient", "exp_avg_sq": "squared_gradient"}

NO_OLD_PART = (
    "growth.rewarmup_part=new needs a part that is old: learned maps (ligo) make every entry anew; "
    "use growth.rewarmup_part=all"
)


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
        policy: see above.
        sources: moment (`exp_avg`, `exp_avg_sq`) -> reads the source's whole tensors by parameter name; unused by
            `reset`.
        targets: moment -> parameter name -> this rank's tensor, laid out like the parameter.
        step: updates that the source's moments have seen.

    Returns:
        The number of updates from which the grown optimizer counts on.

    Raises:
        ConfigError: the policy has no rule for the recipe.
    """
    if policy == "reset":
        for tensors in targets.values():
            for tensor in tensors.values():
                local(tensor).zero_()
        return 0
    check_policy(recipe, policy)
    for moment, quantity in QUANTITIES.items():
        grow_into(recipe, sources[moment], targets[moment], quantity)
        if policy != "exact":
            _clear_new_entries(kept_entries(recipe, policy, targets[moment]), targets[moment])
    return step


def grow_whole_moment(recipe: Recipe, policy: Policy, fetch: Fetch, moment: str, name: str) -> Tensor:
    """One whole moment of a target parameter, read on demand; what `grow_optimizer` fills a tensor with.

    Args:
        recipe: how the model grew.
        policy: one that has a rule for it, not `reset`.
        fetch: reads this moment of the source by parameter name.
        moment: `exp_avg` or `exp_avg_sq`.
        name: of the target parameter.
    """
    grown = {name: grow_whole(recipe, fetch, name, QUANTITIES[moment])}
    if policy != "exact":
        _clear_new_entries(kept_entries(recipe, policy, grown), grown)
    return grown[name]


def grow_multipliers(
    recipe: Recipe, policy: Policy, old: Mapping[str, Multipliers] | None = None
) -> dict[str, Multipliers]:
    """The step sizes of every target tensor, relative to the optimizer's settings.

    Args:
        recipe: how the model grew.
        policy: see above.
        old: those of the source, when it was grown before; None: all 1.

    Raises:
        ConfigError: the policy has no rule for the recipe.
    """
    names = parameter_names(recipe.target)
    if policy == "reset":
        return {name: Multipliers() for name in names}
    check_policy(recipe, policy)
    of_source = {name: (old or {}).get(recipe.source_name(name), Multipliers()) for name in names}
    if policy != "exact":
        return of_source
    return {name: _grown(recipe, name, multipliers) for name, multipliers in of_source.items()}


def grow_new_part(
    recipe: Recipe, policy: Policy, growth: GrowthConfig, step: int, tensors: Mapping[str, Tensor]
) -> NewPart | None:
    """The entries that the optimizer must treat otherwise than the old ones beside them; None: there are none.

    Args:
        recipe: how the model grew.
        policy: what became of the moments.
        growth: whether and how the new part warms up.
        step: updates from which the grown optimizer counts on.
        tensors: this rank's parameters by name.

    Raises:
        ConfigError: the recipe's maps are learned, so that no part of the model is the old one.
    """
    starts_at_zero = policy in ("asymmetric", "zero_pad")
    warms_up = growth.rewarmup_part == "new" and growth.rewarmup_steps > 0
    if not starts_at_zero and not warms_up:
        return None
    require(recipe.copies, NO_OLD_PART)
    schedule = Schedule(step, starts_at_zero, growth.rewarmup_steps * warms_up, growth.rewarmup_factor)
    origin = {"method": recipe.method, "seed": recipe.seed, "policy": policy, "source": to_dict(recipe.source)}
    return NewPart(schedule, kept_entries(recipe, policy, tensors), origin)


def restored_new_part(saved: Mapping[str, Any], target: ModelConfig, tensors: Mapping[str, Tensor]) -> NewPart:
    """The inverse of `NewPart.state`, in any layout.

    Args:
        saved: what the checkpoint has.
        target: the model that has grown.
        tensors: this rank's parameters by name.

    Raises:
        CheckpointError: no such growth leads to the target.
    """
    schedule = Schedule(**{field.name: saved[field.name] for field in fields(Schedule)})
    origin = {name: saved[name] for name in saved if name not in asdict(schedule)}
    try:
        source = cast(ModelConfig, from_dict(saved["source"], ModelConfig, "the source"))
        recipe = make_recipe(saved["method"], source, target, seed=saved["seed"])
        require(recipe.copies, NO_OLD_PART)
    except ConfigError as error:
        raise CheckpointError(f"state.optimizer.new_part: {error}") from None
    return NewPart(schedule, kept_entries(recipe, saved["policy"], tensors), origin)


def kept_entries(recipe: Recipe, policy: Policy, tensors: Mapping[str, Tensor]) -> dict[str, Kept]:
    """Which entries of this rank's tensors are old, by parameter name; without the tensors that are old as a whole.

    Under `zero_pad` these are all that have a source, otherwise the first copies only.
    """
    found = {}
    for name, tensor in tensors.items():
        kept = _kept(recipe, policy, name, box(tensor), local(tensor).device)
        if kept.has_new:
            found[name] = kept
    return found


def lasting_copies(
    recipe: Recipe, policy: Policy, has_moments: bool, warms_new_part: bool = False, dropout: float = 0.0
) -> list[str]:
    """The axes whose units are copied and stay copies for ever, as their gradients, moments and rates are equal.

    Args:
        recipe: how the model grows.
        policy: what becomes of the moments.
        has_moments: whether there are any: before the first update all are 0, kept or not.
        warms_new_part: whether the new entries' rate is warmed up by itself.
        dropout: of hidden units, which parts their copies, but not those of neurons and heads.
    """
    parts = policy == "asymmetric" and has_moments or policy != "zero_pad" and warms_new_part
    if parts or recipe.noise or recipe.next_rows is not None or not recipe.copies:
        return []
    axes = ["ffn", "heads"] if dropout else ["hidden", "ffn", "heads"]
    return [name for name in axes if _has_equal_copies(recipe.axes.get(name))]


def copies_warning(
    recipe: Recipe, axes: list[str], settings: str = "growth.breaker=noise, or growth.optimizer=asymmetric"
) -> str:
    """What to set where `lasting_copies` has found some axes, in one line; "" where it has found none."""
    if not axes:
        return ""
    return (
        f"warning: {recipe.method} copies units of {' and '.join(axes)}, and nothing tells copies apart: they learn "
        f"the same and stay equal for ever; set {settings} where the small model has moments of Adam"
    )


def _has_equal_copies(axis: AxisMap | None) -> bool:
    """Whether elements with one source weigh the same for what reads them."""
    if not isinstance(axis, SparseMap):
        return False
    index = axis.index.double()
    weight = torch.as_tensor(axis.in_scale, dtype=torch.double, device=index.device).expand_as(index)
    old = torch.stack((index, weight))[:, ~axis.is_new]
    return old.unique(dim=1).shape[1] < old.shape[1]


def check_policy(recipe: Recipe, policy: Policy) -> None:
    """Raises ConfigError when there is no rule for what becomes of the moments."""
    problem = rule_problem(recipe, policy)
    if problem:
        raise ConfigError(f"growth.optimizer={policy} {problem}")


def rule_problem(recipe: Recipe, policy: Policy) -> str | None:
    """Why a policy has no rule for a recipe, and what to use; None where it has one."""
    method, makes_new = recipe.method, _makes_new(recipe)
    if policy == "reset":
        return None
    if not recipe.copies:
        return f"has no rule for the learned maps of {method}; use growth.optimizer=reset with growth.rewarmup_steps"
    if policy == "exact" and (makes_new or recipe.silent):
        what = "has entries without a source" if makes_new else "begins some layers as the identity"
        return f"has no rule for {method}, which {what}; use {'zero_pad' if makes_new else 'asymmetric'}, or reset"
    if policy == "zero_pad" and not makes_new:
        return f"has nothing to pad: {method} gives every entry a source; use exact, asymmetric or reset"
    uneven = next((n for n in parameter_names(recipe.target) if _is_uneven(recipe, n)), None)
    if policy == "exact" and uneven is not None:
        return (
            f"has no rule for {method} here: it copies units of {uneven} unequally often, so that no one learning "
            "rate fits the whole tensor; use growth.optimizer=asymmetric or reset"
        )
    if policy == "exact" and recipe.splits_groups:
        return (
            f"has no rule for {method} here: copies of a key/value head share out its query heads, so that each gets "
            "gradients of its own; use growth.optimizer=asymmetric or reset"
        )
    return None


def fitting_policy(recipe: Recipe, wanted: Policy) -> Policy:
    """The policy that is wanted if it has a rule for the recipe, else the first that has one; `reset` always has."""
    policies: tuple[Policy, ...] = (wanted, "zero_pad", "asymmetric", "reset")
    return next(policy for policy in policies if rule_problem(recipe, policy) is None)


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
    assert scale is not None, "`check_policy` comes first"
    return scale


def _is_uneven(recipe: Recipe, name: str) -> bool:
    return any(uniform_scale(recipe, name, quantity) is None for quantity in ("value", "gradient"))


def _makes_new(recipe: Recipe) -> bool:
    """Whether there are entries without a source."""
    maps = [axis for axes in (recipe.axes, *(recipe.layer_axes or {}).values()) for axis in axes.values()]
    return any(isinstance(axis, SparseMap) and axis.has_new for axis in maps)


def _clear_new_entries(kept: Mapping[str, Kept], tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, old in kept.items():
            piece = local(tensors[name])
            piece[~old.rows] = 0
            if piece.ndim == 2:
                piece[:, ~old.columns] = 0


def _kept(recipe: Recipe, policy: Policy, name: str, where: Box, device: torch.device) -> Kept:
    role, axes = role_of(name), recipe.axes_of(name)
    rows = _old_rows(recipe, policy, name)[where[0]] & _is_old_layer(recipe, policy, name)
    columns = torch.ones(1, dtype=torch.bool)
    if role.in_ is not None:
        size = axis_size(role.in_, recipe.target) * axis_unit(role.in_, recipe.target)
        columns = _old_elements(axes.get(role.in_map), policy, size)[where[1]]
    return Kept(rows.to(device), columns.to(device))


def _old_rows(recipe: Recipe, policy: Policy, name: str) -> Tensor:
    """[R] bool: which rows of a whole parameter are old ones."""
    role, axes = role_of(name), recipe.axes_of(name)
    unit = axis_unit(role.out, recipe.target)
    size = axis_size(role.out, recipe.target) * unit
    if recipe.next_rows is not None and recipe.reads_next(name):
        parts = [_old_elements(recipe.next_rows.get(part), policy, size, num_layers=2) for part in role.out_maps]
    else:
        parts = [_old_elements(axes.get(part), policy, size) for part in role.out_maps]
    return torch.stack([part.view(-1, unit) for part in parts], 1).flatten()


def _old_elements(axis: AxisMap | None, policy: Policy, size: int, num_layers: int = 1) -> Tensor:
    """[size] bool: which elements of an axis are old ones; of several source layers' those of the first one."""
    if axis is None:
        return torch.ones(size, dtype=torch.bool)
    assert isinstance(axis, SparseMap), "only copies have an old part"
    is_old = axis.index != NEW if policy == "zero_pad" else first_copies(axis.index)
    return is_old & (axis.index < axis.num_source // num_layers)


def _is_old_layer(recipe: Recipe, policy: Policy, name: str) -> bool:
    layer, _ = split_name(name)
    if layer is None:
        return True
    assert isinstance(recipe.layers, LayerMap), "only copies have an old part"
    index = recipe.layers.index
    return layer not in recipe.silent and (policy == "zero_pad" or index.index(index[layer]) == layer)
