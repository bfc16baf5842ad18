"""The growths of a run in their order: what each of them grows into, by which settings, and when at the latest.

growth.source, or the model of init.from  ──earlier[0]──▶ … ──earlier[n - 1]──▶  ──growth──▶  model
growth number                                   0                  n - 1            n
"""

import math
from dataclasses import replace
from typing import Any, cast

from megagrow.config import Config, GrowthConfig, ModelConfig, Policy
from megagrow.earlier_growth import CHANGES, EarlierGrowth

SETTLED = 1e-4  # once β^n is less, a count of n corrects like any larger one


def num_growths(growth: GrowthConfig) -> int:
    """How often a run's model grows."""
    return 0 if growth.method == "none" else len(growth.earlier) + 1


def growth_settings(growth: GrowthConfig, number: int) -> GrowthConfig:
    """The settings of one of a run's growths, counted from 0, as if it were the only one; with a policy."""
    own = growth if number == len(growth.earlier) else _earlier_settings(growth, growth.earlier[number])
    return replace(own, optimizer=policy_of(own), earlier=())


def growth_name(growth: GrowthConfig, number: int) -> str:
    """The section of the configuration that holds one of a run's growths."""
    return "growth" if number == len(growth.earlier) else f"growth.earlier[{number}]"


def policy_of(growth: GrowthConfig) -> Policy:
    """What becomes of the moments; where nothing is said `exact`, which refuses what it has no rule for."""
    return growth.optimizer or ("reset" if growth.learns_maps else "exact")


def _earlier_settings(growth: GrowthConfig, own: EarlierGrowth) -> GrowthConfig:
    return replace(
        growth,
        method=own.method or growth.method,
        optimizer=cast(Any, own.optimizer or growth.optimizer),
        at_step=own.at_step,
        at_tokens=own.at_tokens,
        at_plateau=own.at_plateau,
        rewarmup_steps=growth.rewarmup_steps if own.rewarmup_steps < 0 else own.rewarmup_steps,
        freeze_steps=own.freeze_steps,
    )


def growth_config(config: Config, number: int, source: ModelConfig) -> Config:
    """The run's configuration as one growth sees it: `model` is its target, `growth` its own settings.

    Args:
        config: of the run.
        number: of the growth, from 0.
        source: the model that it grows.
    """
    earlier = config.growth.earlier
    model = config.model if number >= len(earlier) else resized(source, earlier[number])
    return replace(config, model=model, growth=growth_settings(config.growth, number))


def growth_configs(config: Config, source: ModelConfig, first: int = 0) -> list[Config]:
    """`growth_config` of all growths from number `first` on, which grows `source`."""
    found: list[Config] = []
    for number in range(first, num_growths(config.growth)):
        found.append(growth_config(config, number, found[-1].model if found else source))
    return found


def last_source(config: Config, source: ModelConfig, first: int = 0) -> ModelConfig:
    """The model that the last growth of the run grows, where growth number `first` grows `source`."""
    coming = growth_configs(config, source, first)
    return coming[-2].model if len(coming) > 1 else source


def resized(model: ModelConfig, sizes: EarlierGrowth) -> ModelConfig:
    """The model with other sizes, and its own where none are given; all else stays as it is."""
    given = {name: getattr(sizes, name) for name in CHANGES if getattr(sizes, name)}
    if "num_heads" in given and "num_kv_heads" not in given and model.num_kv_heads == model.num_heads:
        given["num_kv_heads"] = given["num_heads"]
    return replace(model, **given)


def models(config: Config) -> list[tuple[str, ModelConfig]]:
    """The models that this run builds, as far as the configuration says, with the section that each comes from."""
    source = config.growth.source
    if source is None:
        return [("model", config.model)]
    between = [each.model for each in growth_configs(config, source)[:-1]]
    named = [(f"growth.earlier[{number}]", model) for number, model in enumerate(between)]
    return [("growth.source", source), *named, ("model", config.model)]


def step_tokens(config: Config) -> int:
    """Tokens of a step."""
    return config.train.global_batch_size * config.data.seq_length


def learning_steps(growth: GrowthConfig, first: int = 0, end: int | None = None) -> int:
    """Steps that learn operators, which the schedule does not count, in growths number `first` to `end`."""
    numbers = range(num_growths(growth))[first:end]
    return growth.ligo_steps * sum(growth_settings(growth, number).learns_maps for number in numbers)


def latest_step(config: Config, number: int) -> int:
    """The step of the schedule before which a growth comes at the latest."""
    own = growth_settings(config.growth, number)
    if own.at_tokens == 0:
        return own.at_step
    return max(-(-own.at_tokens // step_tokens(config)) - learning_steps(config.growth, end=number), 0)


def may_grow_early(config: Config) -> bool:
    """Whether a growth of the run comes before its latest step where the loss is flat."""
    return any(growth_settings(config.growth, number).at_plateau > 0 for number in range(num_growths(config.growth)))


def order_size(config: Config) -> int:
    """Samples that an order which is made for a whole run has to have."""
    steps = config.train.steps + learning_steps(config.growth)
    return config.data.num_samples or steps * config.train.global_batch_size


def settling_steps(beta1: float, beta2: float) -> int:
    """Updates after which moments that began at zero are corrected like those of a longer past."""
    beta = max(beta1, beta2)
    return math.floor(math.log(SETTLED) / math.log(beta)) if beta > 0 else 0
