"""Growing without a small model at hand: which one to train first, and for how long.

Source: Du et al., 2024 (G_stack, arXiv 2405.15319), section 4: the small model of a target with N parameters, whose run
takes C = 6·N·D FLOPs, is trained on d tokens, log10 d = 0.88·log10 N + 163.27 / log10 C - 5.74, and grows by a factor
of 4 in depth; 2 to 4 did about equally well there, and small models of one layer badly.
"""

import math
from dataclasses import replace

from megagrow.config import Config, ModelConfig, require
from megagrow.roles import num_parameters
from megagrow.timeline import step_tokens

FACTORS = (4, 3, 2)  # of depth, the best first
LARGEST_SHARE = 0.25  # of the run's steps; the rule asks for 0.04 % (Llama 3 8B) to 10 % where it was measured


def source_tokens(parameters: float, flops: float) -> float:
    """Tokens that the rule trains the small model on.

    Args:
        parameters: N, of the target.
        flops: C, of training the target on all of its tokens; for small runs the rule exceeds any of them.
    """
    return float(10 ** (0.88 * math.log10(parameters) + 163.27 / math.log10(flops) - 5.74))


def derived_source(target: ModelConfig) -> ModelConfig:
    """The target with its depth divided by 4, or by the nearest smaller divisor, or else halved; two layers at least.

    Raises:
        ConfigError: the target has too few layers.
    """
    depth = target.num_layers
    require(
        depth >= 3,
        f"growth.bootstrap: a small model of at least 2 layers does not fit below model.num_layers={depth}; give one "
        "as growth.source, or use a deeper model",
    )
    fitting = [depth // factor for factor in FACTORS if depth % factor == 0 and depth // factor >= 2]
    return replace(target, num_layers=fitting[0] if fitting else max(depth // 2, 2))


def bootstrapped(config: Config) -> Config:
    """The configuration with `growth.source` and `growth.at_step` filled in where `growth.bootstrap` leaves them open.

    Raises:
        ConfigError: something else says already what grows.
    """
    growth = config.growth
    if not growth.bootstrap or growth.method == "none":
        return config
    require(
        not config.init.from_,
        "growth.bootstrap trains a small model, but init.from names one; leave one of them out",
    )
    require(
        not growth.earlier,
        "growth.bootstrap sets the time of one growth, growth.earlier holds more; give growth.source and each at_step",
    )
    source = growth.source or derived_source(config.model)
    at_step = growth.at_step if growth.at_step or growth.at_tokens else _derived_step(config)
    return replace(config, growth=replace(growth, source=source, at_step=at_step))


def explain(config: Config) -> str:
    """What is trained first, and why so long, in words; "" without `growth.bootstrap`."""
    growth = config.growth
    if not growth.bootstrap or growth.source is None:
        return ""
    asked, when = _rule(config), f"before step {growth.at_step}" if growth.at_step else f"at {growth.at_tokens} tokens"
    by_rule = -(-asked // step_tokens(config))
    layers = f"growth.bootstrap: a model of {growth.source.num_layers} layers is trained first, and grows {when}"
    if growth.at_step != _derived_step(config):
        return f"{layers}, as the configuration says; G_stack's rule asks for {asked:.3g} tokens ({by_rule:.3g} steps)"
    if by_rule <= growth.at_step:
        return f"{layers}, after the {asked:.3g} tokens that G_stack's rule asks for"
    return (
        f"{layers}; G_stack's rule, made for far longer runs, asks for {asked:.3g} tokens ({by_rule:.3g} steps), but "
        f"no more than {LARGEST_SHARE:.0%} of train.steps={config.train.steps} are taken"
    )


def _derived_step(config: Config) -> int:
    steps = min(-(-_rule(config) // step_tokens(config)), config.train.steps * LARGEST_SHARE)
    return max(int(steps), 1)


def _rule(config: Config) -> float:
    parameters = num_parameters(config.model)
    return source_tokens(parameters, 6.0 * parameters * config.train.steps * step_tokens(config))
