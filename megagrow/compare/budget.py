"""How long an arm may train, so that all that it takes costs what the suite allows."""

from collections.abc import Callable

from megagrow import flops
from megagrow.config import Config, ModelConfig, require
from megagrow.growth.bootstrap import bootstrapped
from megagrow.salt.schedule import with_stage_one_steps
from megagrow.timeline import growth_configs, latest_step, step_tokens


def affordable_steps(build: Callable[[int], Config], source: ModelConfig, small: float, budget: float) -> int:
    """The most steps that keep an arm within its budget.

    Args:
        build: the arm's configuration for a number of steps.
        source: the small model.
        small: FLOPs that it took.
        budget: FLOPs of the arm, all-in.

    Raises:
        ConfigError: fewer than two steps are left, or the configuration is refused.
    """

    def cost(steps: int) -> float:
        config = build(steps)
        inherits = config.init.from_ or config.salt.teacher
        return run_flops(config, source) + (small if inherits else 0.0)

    low, high = 0, 2
    while cost(high) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    require(low > 1, f"what comes before training takes the budget of {budget:.3g} FLOPs by itself")
    return low


def run_flops(config: Config, source: ModelConfig) -> float:
    """FLOPs of a run as its ledger will count them, without what it inherits and without evaluation.

    Args:
        config: of the run.
        source: what `init.from` and `salt.teacher` name.
    """
    config = with_stage_one_steps(bootstrapped(config))
    grows = config.growth.method != "none"
    model = (config.growth.source or source) if grows else config.model
    found, begun, frozen = 0.0, 0, (0, 0)
    for number, growing in enumerate(growth_configs(config, model) if grows else ()):
        grown_at = latest_step(config, number)
        found += _training(config, model, grown_at - begun, *frozen)
        found += _growing(growing, model)
        begun, frozen, model = grown_at, (growing.growth.freeze_steps, model.num_layers), growing.model
    found += _training(config, model, config.train.steps - begun, *frozen)
    return found + _teaching(config, source, config.train.steps - begun)


def _training(config: Config, model: ModelConfig, steps: int, freeze_steps: int, layers: int) -> float:
    """Steps of plain training, in the first of which so many layers stand still."""
    tokens, length = step_tokens(config), config.data.seq_length
    frozen = min(freeze_steps, steps)
    moving = flops.training_flops(model, tokens, length)
    return (steps - frozen) * moving + frozen * flops.training_flops(model, tokens, length, frozen_layers=layers)


def _growing(config: Config, source: ModelConfig) -> float:
    """Learning the maps, if there are any, and applying them once before the first step."""
    growth = config.growth
    if not growth.learns_maps:
        return 0.0
    tokens, length, variant = step_tokens(config), config.data.seq_length, growth.ligo_variant
    learning = flops.ligo_step_flops(source, config.model, tokens, length, variant=variant)
    return growth.ligo_steps * learning + flops.ligo_generation_flops(source, config.model, variant)


def _teaching(config: Config, teacher: ModelConfig, steps: int) -> float:
    """The teacher's passes over what it teaches, and over what it picks from."""
    salt = config.salt
    if not salt.teacher:
        return 0.0
    taught = min(salt.steps, steps)
    batches = (taught if salt.weight > 0 else 0) + (config.growth.ligo_steps if salt.map_weight else 0)
    if salt.online_buffer:
        batches += -(-taught // salt.kept_batches) * salt.online_buffer  # a buffer that is begun is scored whole
    return batches * flops.forward_flops(teacher, step_tokens(config), config.data.seq_length)
