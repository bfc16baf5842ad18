"""Larger models that a small one can grow into: by which method, at which rate, in which layout, and on whose evidence.

A target multiplies the small model's depth by one of DEPTHS and its width by one of WIDTHS: hidden size, heads,
key/value heads and FFN alike, the size of a head stays. Those of one kind of growth come together, in the order of the
evidence for it; the first of a kind is nearest to the middle of what was asked for.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

from megagrow import flops
from megagrow.checkpoint import hf
from megagrow.checks import problems
from megagrow.config import Config, GrowthConfig, ModelConfig, require
from megagrow.errors import ConfigError
from megagrow.growth.bootstrap import source_tokens
from megagrow.growth.methods import make_recipe, needed_eps
from megagrow.plan.speed import Machine
from megagrow.plan.suggest import Suggestion, suggest
from megagrow.plan.suggest import to_dict as layout_dict
from megagrow.roles import num_parameters
from megagrow.timeline import step_tokens

DEPTHS = tuple(map(Fraction, ("1", "3/2", "2", "3", "4")))
WIDTHS = tuple(map(Fraction, ("1", "5/4", "4/3", "3/2", "2", "3", "4")))
SHAPES = (30, 320)  # hidden size per layer: GPT-2 XL has 33, Llama 70B 102; beyond lies what nobody trains

Kind = Literal["depth", "both", "width"]


@dataclass(frozen=True)
class Way:
    """How a kind of growth is done, and what is known about it.

    Attributes:
        method: of `growth.method`.
        saving: FLOPs that others found saved, in words.
        rests_on: who found that, where, and what speaks against it.
    """

    method: str
    saving: str
    rests_on: str


DECODERS: dict[Kind, Way] = {
    "depth": Way(
        "stack",
        "33 to 35 %",
        "published as speed-ups of 49 to 55 % at 1.1B, 3B and 7B, the small model charged: G_stack (Du et al., 2024); "
        "here, at toy scale, 48 %, and 35 % with the small model charged (docs/results.md)",
    ),
    "both": Way(
        "rms_random+stack",
        "22 %",
        "published for GPT-2 base to medium by learned maps, the small model not charged: LiGO (Wang et al., 2023); "
        "here, at toy scale, rms_random+stack saved 41 %, 26 % with that charged, of a Llama, 27 and 8 % of a GPT-2 "
        "that widened by a third, LiGO less (docs/results.md)",
    ),
    "width": Way(
        "rms_random",
        "20 to 35 %, or nothing",
        "published: SPARKLING (2026) on a mixture of experts, grown in mid-run with the old units' moments, which a "
        "growth at start-up does not have; Du et al. (2024) found no growth in width that beat scratch at equal FLOPs; "
        "here, at toy scale, 24 %, and 6 % with the small model charged, of three seeds -9 to 25 (docs/results.md)",
    ),
}
ENCODERS: dict[Kind, Way] = {
    "depth": Way("stack", "34 %", "published: StackBERT, as Wang et al. (2023) measured it on BERT-Base"),
    "both": Way(
        "aki+stack",
        "24 to 29 %",
        "published: bert2BERT (Chen et al., 2022), BERT of 6 x 512 to 12 x 768; the higher one by Wang et al. (2023)",
    ),
    "width": Way(
        "aki",
        "38 %",
        "published: bert2BERT (Chen et al., 2022), BERT-Base; 45 % with two-stage training, not done here",
    ),
}


@dataclass(frozen=True)
class Target:
    """A larger model and the run that grows into it.

    Attributes:
        config: the whole run: model, growth, rate, steps, and the layout where one fits.
        depth, width: by what the small model's are multiplied.
        way: how it grows, and on what evidence.
        flops: of training it, teachers and scoring left out.
        suggestion: the fastest layout that fits; None where none does.
        problem: why none does, where a rule of the configuration is broken.
    """

    config: Config
    depth: Fraction
    width: Fraction
    way: Way
    flops: float
    suggestion: Suggestion | None
    problem: str = ""

    @property
    def is_stacked_decoder(self) -> bool:
        """Whether it grows as in G_stack's paper."""
        return self.way is DECODERS["depth"]

    @property
    def tokens(self) -> int:
        """On which it is trained."""
        return self.config.train.steps * step_tokens(self.config)

    @property
    def source_tokens(self) -> float:
        """Tokens on which G_stack's rule (growth/bootstrap.py) trains the small model of this target."""
        return source_tokens(num_parameters(self.config.model), self.flops)

    @property
    def seconds(self) -> float | None:
        """Of training it, by the model of time."""
        return self.suggestion.time.step * self.config.train.steps if self.suggestion else None


def find_targets(
    config: Config, source: ModelConfig, bounds: tuple[float, float], world_size: int, machine: Machine, count: int = 6
) -> list[Target]:
    """The first `count` targets within the bounds.

    Args:
        config: of the run: its data, batch, steps, and the rate that the small model was trained at; `init.from` names
            the small model. Its model and growth are replaced.
        source: the small model.
        bounds: parameters, at least and at most.
        world_size: ranks.
        machine: what they are.
        count: how many.

    Raises:
        ConfigError: no model within the bounds can be grown.
    """
    shapes = [shape for shape in _shapes(source) if bounds[0] <= num_parameters(shape[2]) <= bounds[1]]
    growing, refused = [], ""
    for shape in shapes:
        try:
            growing.append(_growing(config, source, *shape))
        except ConfigError as error:
            refused = refused or str(error)
    require(bool(growing) or not refused, refused)
    low, high = (f"{bound:.3g}" for bound in bounds)
    require(
        bool(growing),
        f"no model of {low} to {high} parameters has a multiple of the depth or width of {config.init.from_} "
        f"({num_parameters(source):.3g} parameters); ask for a wider range",
    )
    middle = math.sqrt(bounds[0] * bounds[1])
    growing.sort(key=lambda each: _preference(each, middle))
    return [_laid_out(each, world_size, machine) for each in growing[:count]]


def _shapes(source: ModelConfig) -> Iterator[tuple[Fraction, Fraction, ModelConfig]]:
    """Every depth and width whose sizes are whole numbers, in a shape that others train, too, or the source has."""
    shape = source.hidden_size / source.num_layers
    low, high = min(SHAPES[0], shape), max(SHAPES[1], shape)
    for depth in DEPTHS:
        for width in WIDTHS:
            sizes: dict[str, Fraction] = {"num_layers": source.num_layers * depth}
            for name in ("hidden_size", "num_heads", "num_kv_heads", "ffn_size"):
                sizes[name] = getattr(source, name) * width
            if depth * width == 1 or any(size.denominator > 1 for size in sizes.values()):
                continue
            whole: dict[str, Any] = {name: int(size) for name, size in sizes.items()}
            if low <= whole["hidden_size"] / whole["num_layers"] <= high:
                yield depth, width, replace(source, **whole)


def _growing(config: Config, source: ModelConfig, depth: Fraction, width: Fraction, model: ModelConfig) -> Target:
    """The run that grows into a model.

    Raises:
        ConfigError: the method cannot make it, or no Hugging Face folder can hold it.
    """
    kind: Kind = "depth" if width == 1 else "width" if depth == 1 else "both"
    way = (DECODERS if source.is_causal else ENCODERS)[kind]
    model = replace(model, norm_eps=needed_eps(way.method, source, model))
    make_recipe(way.method, source, model)
    hf.check_exportable(model)
    lr = float(f"{config.optim.lr / width:.3g}")
    run = replace(
        config,
        model=model,
        growth=GrowthConfig(way.method, optimizer="reset"),
        optim=replace(config.optim, lr=lr),
    )
    step = flops.training_flops(model, step_tokens(run), run.data.seq_length)
    return Target(run, depth, width, way, step * run.train.steps, None)


def _preference(target: Target, middle: float) -> tuple[int, float]:
    kinds = [*(DECODERS if target.config.model.is_causal else ENCODERS).values()]
    return kinds.index(target.way), abs(math.log(num_parameters(target.config.model) / middle))


def _laid_out(target: Target, world_size: int, machine: Machine) -> Target:
    """With the fastest layout that serves both models, or why there is none."""
    found = suggest(target.config, world_size, machine)
    if found:
        return replace(target, config=found[0].config, suggestion=found[0])
    broken = problems(target.config, world_size)
    limit = machine.memory * machine.usable / 2**30
    return replace(target, problem=broken[0] if broken else f"none needs less than {limit:.3g} GiB a GPU")


def to_dict(target: Target) -> dict[str, Any]:
    """A target as plain data: its model, how it grows and on what evidence, its cost, its layout."""
    config = target.config
    return {
        "model": vars(config.model),
        "parameters": num_parameters(config.model),
        "depth": float(target.depth),
        "width": float(target.width),
        "method": config.growth.method,
        "lr": config.optim.lr,
        "steps": config.train.steps,
        "flops": target.flops,
        "seconds": target.seconds,
        "saving": target.way.saving,
        "rests_on": target.way.rests_on,
        "layout": None if target.suggestion is None else layout_dict(target.suggestion),
        "problem": target.problem,
    }
