"""The arms of comparisons by name: how a configuration of the large model becomes one way of getting it.

A recipe takes the configuration of a run from random weights, its length and learning rate already set, and changes its
sections `growth`, `salt` and `init`. Whatever has to be learned anew after growing is: moments are forgotten, and the
learning rate rises as in any run, unless the recipe is about moments. What a recipe cannot do for a pair of models is
refused by the configuration's own rules, and the report says why.

    @_recipe("width")
    def my_arm(config: Config, pair: Pair) -> Config:
        \"\"\"What it does (source).\"\"\"
        return _grown(config, pair, pair.method("clone"), breaker="noise")
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from megagrow.compare.pair import Pair
from megagrow.compare.sweep import MAP_RATES
from megagrow.config import Config, GrowthConfig, SaltConfig, require
from megagrow.earlier_growth import SIZES, EarlierGrowth
from megagrow.growth.bootstrap import bootstrapped
from megagrow.growth.ligo_maps import AUTHORS
from megagrow.growth.methods import needed_eps

Axis = Literal["width", "depth"]
Build = Callable[[Config, Pair], Config]

WIDTH = "rms_random"  # for recipes of depth, where width grows too
SALT_SHARE = 36 / 208  # steps of stage 1, as in SALT's paper
INHERITED_SHARE = 55 / 125  # as in knowledge inheritance
ONLINE_BUFFER = 4  # batches that are scored to keep half of them


@dataclass(frozen=True)
class Recipe:
    """One arm.

    Attributes:
        name: what it is called in suites and reports.
        build: makes its configuration.
        about: what it does, and whose idea it is.
        axes: what has to grow for it to differ from others.
    """

    name: str
    build: Build
    about: str
    axes: tuple[Axis, ...] = ()

    def __call__(self, config: Config, pair: Pair) -> Config:
        """The configuration of a run.

        Args:
            config: of a run from random weights.
            pair: the two models; `config.model` is the target.

        Raises:
            ConfigError: the recipe is not for this pair.
        """
        for axis, grows in (("width", pair.widens), ("depth", pair.deepens)):
            require(grows or axis not in self.axes, f"{self.name} is about {axis}, which does not grow here")
        return self.build(config, pair)


RECIPES: dict[str, Recipe] = {}


def _recipe(*axes: Axis) -> Callable[[Build], Build]:
    def register(build: Build) -> Build:
        name = build.__name__
        RECIPES[name] = Recipe(name, build, " ".join((build.__doc__ or "").split()), axes)
        return build

    return register


def _variants(build: Callable[..., Config], about: str, axes: tuple[Axis, ...], **variants: dict[str, Any]) -> None:
    """Recipes that differ in arguments only."""
    for name, arguments in variants.items():
        text = about.format(**arguments)
        RECIPES[name] = Recipe(name, partial(build, **arguments), text, axes)


def _grown(config: Config, pair: Pair, method: str, **growth: Any) -> Config:
    """The run that grows the small model before its first step."""
    given = GrowthConfig(**({"method": method, "optimizer": "reset"} | growth))
    eps = needed_eps(_start(given), pair.source, config.model)
    start = replace(config.init, from_=pair.small)
    return replace(config, model=replace(config.model, norm_eps=eps), init=start, growth=given)


def _start(growth: GrowthConfig) -> str:
    """The method by whose sizes the target goes: that at which learned maps start."""
    if not growth.learns_maps:
        return growth.method
    return "ligo" if growth.maps_start in ("clone", AUTHORS) else growth.maps_start


def _taught(config: Config, pair: Pair, **salt: Any) -> Config:
    """The same run with the small model as its teacher."""
    given: dict[str, Any] = {"teacher": pair.small, "share": SALT_SHARE}
    return replace(config, salt=SaltConfig(**(given | salt)))


# From nothing, and copies of layers


@_recipe()
def scratch(config: Config, pair: Pair) -> Config:
    """Random weights: the baseline."""
    return config


@_recipe("depth")
def stack(config: Config, pair: Pair) -> Config:
    """The layers once more on top (StackBERT, Gong et al., 2019; G_stack, Du et al., 2024)."""
    require(not pair.widens, f"with width this is {WIDTH}, which stacks layers too")
    return _grown(config, pair, "stack")


@_recipe("depth")
def interleave(config: Config, pair: Pair) -> Config:
    """Each layer beside its copy (interpolation)."""
    return _grown(config, pair, pair.method(WIDTH, "interleave"))


@_recipe()
def mslt(config: Config, pair: Pair) -> Config:
    """Three stages of growing depth, new layers learning alone at first; moments are kept (MSLT, Yang et al., 2020)."""
    layers, steps = config.model.num_layers, config.train.steps
    first, second = -(-layers // 3), -(-2 * layers // 3)
    require(first < second < layers, f"mslt needs three stages, and the model has {layers} layers")
    frozen = max(steps // 10, 1)
    growth = GrowthConfig(
        method="stack",
        source=replace(config.model, num_layers=first),
        earlier=(EarlierGrowth(num_layers=second, at_step=steps // 5, freeze_steps=frozen),),
        at_step=2 * steps // 5,
        freeze_steps=frozen,
    )
    return replace(config, growth=growth)


@_recipe()
def bootstrap(config: Config, pair: Pair) -> Config:
    """A small model of its own, trained first in the same run by G_stack's rule (Du et al., 2024), then stacked."""
    growth = GrowthConfig(method="stack", optimizer="reset", rewarmup_steps=config.optim.warmup_steps, bootstrap=True)
    return bootstrapped(replace(config, growth=growth))


@_recipe()
def progressive(config: Config, pair: Pair) -> Config:
    """Two growths instead of one, the second after a quarter of the run; random new units, stacked layers."""
    middle = pair.between()
    first = EarlierGrowth(**{size: getattr(middle, size) for size in SIZES})
    later = {"at_step": max(config.train.steps // 4, 1), "rewarmup_steps": config.optim.warmup_steps}
    grown = _grown(config, pair, pair.method(WIDTH), **later)
    return replace(grown, growth=replace(grown.growth, earlier=(first,)))


# Copies of units


def _by(config: Config, pair: Pair, method: str) -> Config:
    return _grown(config, pair, pair.method(method))


_variants(
    _by,
    "{method}, layers stacked where depth grows",
    ("width",),
    net2net={"method": "net2net"},
    fpi={"method": "fpi"},
    aki={"method": "aki"},
    zero_pad={"method": "zero_pad"},
    direct_copy={"method": "direct_copy"},
    rms_random={"method": "rms_random"},  # which is also what ligo_full_rank starts from
)


def _clone(config: Config, pair: Pair, policy: str) -> Config:
    new = {"rewarmup_part": "new", "rewarmup_steps": max(config.train.steps // 20, 1)} if policy == "asymmetric" else {}
    return _grown(config, pair, pair.method("clone"), optimizer=policy, **new)


_variants(
    _clone,
    "copies side by side; moments: {policy}",
    ("width",),
    clone_exact={"policy": "exact"},
    clone_asymmetric={"policy": "asymmetric"},
    clone_zero_pad={"policy": "zero_pad"},
    clone_reset={"policy": "reset"},
)


@_recipe("width")
def clone_noise(config: Config, pair: Pair) -> Config:
    """Copies side by side, told apart by noise that cancels (HyperCloning, Samragh et al., 2024)."""
    return _grown(config, pair, pair.method("clone"), breaker="noise")


# Learned maps


def _ligo(config: Config, pair: Pair, times: float = 1, **ligo: Any) -> Config:
    """LiGO with `times` the usual learning steps; as by default, its maps are of full rank."""
    usual = {"ligo_steps": round(times * pair.ligo_steps), "ligo_lr": MAP_RATES[0]}
    return _grown(config, pair, "ligo", **(usual | ligo))


def _ligo_by(config: Config, pair: Pair, variant: str, init: str, times: float, lr: float) -> Config:
    return _ligo(config, pair, times, ligo_variant=variant, ligo_init=init, ligo_lr=lr)


_TIED = {"variant": "tied", "init": "clone", "times": 1, "lr": MAP_RATES[0]}
_ABOUT = (
    "LiGO (Wang et al., 2023), maps {variant} from {init}, {times} x the usual learning steps at {lr:g}, unless tuned"
)
_variants(
    _ligo_by,
    _ABOUT,
    (),
    ligo=_TIED,
    ligo_0=_TIED | {"times": 0},
    ligo_10x=_TIED | {"times": 10},
    ligo_slow=_TIED | {"lr": 3e-4},
    ligo_fast=_TIED | {"lr": 1e-2},
)
_variants(  # which are all one where depth alone grows
    _ligo_by,
    _ABOUT,
    ("width",),
    ligo_source_layer=_TIED | {"variant": "source_layer"},
    ligo_target_layer=_TIED | {"variant": "target_layer", "init": AUTHORS},
    ligo_full_rank=_TIED | {"variant": "full_rank", "init": "rms_random"},
)


# A teacher


@_recipe()
def salt(config: Config, pair: Pair) -> Config:
    """Random weights, taught by the small model in the first 17 % of the run (SALT, Rawat et al., 2024)."""
    return _taught(config, pair)


@_recipe()
def kd(config: Config, pair: Pair) -> Config:
    """Random weights, taught by the small model to the end."""
    return _taught(config, pair, share=1.0)


@_recipe()
def ki(config: Config, pair: Pair) -> Config:
    """Random weights, the teacher's share falling from 1 to 0 (knowledge inheritance, Qin et al., 2022)."""
    both: dict[str, Any] = {"temperature": 2.0, "temperature_on": "both", "scale_by_temperature_squared": True}
    return _taught(config, pair, share=INHERITED_SHARE, weight=1.0, schedule="linear", **both)


@_recipe()
def salt_selected(config: Config, pair: Pair) -> Config:
    """SALT on the half of the samples that the small model scores higher."""
    return _taught(config, pair, online_buffer=ONLINE_BUFFER)


@_recipe()
def selected(config: Config, pair: Pair) -> Config:
    """Random weights, on the samples that the small model scores higher in the first 17 % of the run; no teacher."""
    return _taught(config, pair, online_buffer=ONLINE_BUFFER, weight=0.0)


@_recipe()
def ligo_salt(config: Config, pair: Pair) -> Config:
    """LiGO at full rank, then SALT."""
    return _taught(_ligo(config, pair), pair)


@_recipe()
def ligo_taught(config: Config, pair: Pair) -> Config:
    """LiGO at full rank, its maps learned from the small model's distribution and from the data, half and half."""
    return _taught(_ligo(config, pair), pair, share=0.0, map_weight=0.5)


@_recipe("depth")
def stack_salt(config: Config, pair: Pair) -> Config:
    """Stacked layers (random new units where width grows), then SALT."""
    return _taught(_grown(config, pair, pair.method(WIDTH)), pair)
