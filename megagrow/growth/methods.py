"""Growth methods by name: a width part, a depth part, or both, joined by "+".

    clone    net2net    fpi    aki    zero_pad    direct_copy    rms_random         width.py
    stack    interleave    insert_identity    middle    dus                         depth.py
    clone+insert_identity    zero_pad+middle    …                                   both at once
    ligo                                                                            ligo.py

A width part alone stacks layers where their number grows too. New tokens of the vocabulary belong to no part: whatever
the method, their rows of embedding and output matrix begin as the mean of the old rows, and old logits stay.
"""

from dataclasses import replace
from functools import lru_cache

import torch

from megagrow.checks import check_growable
from megagrow.config import Breaker, ModelConfig, require
from megagrow.errors import ConfigError
from megagrow.growth.depth import DEPTHS
from megagrow.growth.maps import NEW, AxisMap, SparseMap
from megagrow.growth.recipe import Recipe
from megagrow.growth.width import REPLICATING, WIDTH_METHODS, WIDTHS, Width, split_unequally

METHODS = (*WIDTH_METHODS, *DEPTHS)


def make_recipe(
    method: str,
    source: ModelConfig,
    target: ModelConfig,
    breaker: Breaker = "none",
    breaker_scale: float = 0.3,
    seed: int = 0,
) -> Recipe:
    """The recipe of a named method.

    Args:
        method: parts joined by "+".
        source, target: the two models.
        breaker: what tells replicas apart, for methods that make some. noise: random numbers that are added to the
            readers of one replica and taken from those of another (HyperCloning, arXiv 2409.12903); split: readers
            take unequal shares (LEMON, arXiv 2310.07999). Both keep the function.
        breaker_scale: of noise: its standard deviation relative to the weights around it; of split: how far a share is
            from 1/n at most, relative to that.
        seed: of everything random.

    Raises:
        ConfigError: no such method; the models are of different kinds, or the target is smaller somewhere; the method
            cannot reach these sizes, or has no exact answer where it promises one.
    """
    width_name, depth_name = _parts(method)
    check_growable(source, target)
    width = _width(method, width_name, source, target, seed)
    _check_scale_of_tied_head(method, width, target)
    _check_eps(method, width, source, target)
    _check_breaker(method, width_name, breaker, breaker_scale)
    if breaker == "split":
        width = replace(width, axes=split_unequally(width.axes, source, target, breaker_scale))
    depth = DEPTHS[depth_name](source.num_layers, target.num_layers)
    require(
        not depth.silent or target.norm_place == "before",
        "growth.method=insert_identity cannot insert an identity where each residual sum is normalised "
        "(model.norm_place=after): the norm would act on a layer that adds nothing; use stack or interleave",
    )
    keeps_layers = source.num_layers == target.num_layers or depth_name == "insert_identity"
    return Recipe(
        method,
        source,
        target,
        depth.layers,
        width.axes | _vocabulary(source, target),
        width.keeps_function and keeps_layers,
        next_rows=width.next_rows,
        silent=depth.silent,
        fill=replace(width.fill, average=width.fill.average | {("vocab", "out")}),
        norm_scale=width.norm_scale,
        noise=breaker_scale if breaker == "noise" else 0.0,
        seed=seed,
    )


@lru_cache(maxsize=64)
def needed_eps(method: str, source: ModelConfig, target: ModelConfig) -> float:
    """The `norm_eps` that a method needs in the target: of zeros beside the hidden units norms see a smaller mean.

    Raises:
        ConfigError: no such method, or it cannot reach these sizes.
    """
    width, _ = _parts(method)
    return source.norm_eps * (WIDTH_METHODS[width](source, target, 0).eps_scale if width else 1.0)


def _parts(method: str) -> tuple[str, str]:
    """The width part ("": none) and the depth part of a method's name."""
    parts = method.split("+")
    unknown = [part for part in parts if part not in METHODS]
    if unknown:
        raise ConfigError(f"growth.method={method} does not exist; use {', '.join(METHODS)}, or two joined by +")
    width, depth = ([part for part in parts if part in named] for named in (WIDTH_METHODS, DEPTHS))
    require(
        len(width) <= 1 and len(depth) <= 1,
        f"growth.method={method} joins two methods for the same thing; use one of {', '.join(WIDTH_METHODS)} with one "
        f"of {', '.join(DEPTHS)}",
    )
    return (width or [""])[0], (depth or ["stack"])[0]


def _width(method: str, name: str, source: ModelConfig, target: ModelConfig, seed: int) -> Width:
    if name:
        return WIDTH_METHODS[name](source, target, seed)
    for size in WIDTHS:
        old, new = getattr(source, size), getattr(target, size)
        require(
            old == new,
            f"growth.method={method} grows depth only, but {size} is {old} in the source and {new} in the target; "
            f"make them equal or add a width method, as in clone+{method}",
        )
    return Width({}, keeps_function=True)


def _vocabulary(source: ModelConfig, target: ModelConfig) -> dict[str, AxisMap]:
    """Old tokens keep their rows; new ones have no source."""
    old, new = source.vocab_size, target.vocab_size
    if old == new:
        return {}
    return {"vocab": SparseMap(torch.cat([torch.arange(old), torch.full((new - old,), NEW)]), old)}


def _check_scale_of_tied_head(method: str, width: Width, target: ModelConfig) -> None:
    has_last_norm = not target.is_causal or target.norm_place == "before"
    hidden = width.axes.get("hidden")
    is_scaled = hidden is not None and not (isinstance(hidden.in_scale, float) and hidden.in_scale == 1)
    require(
        has_last_norm or not target.tied_embeddings or not is_scaled,
        f"growth.method={method} widens the embedding, which is the output matrix too: its scale goes into the norm "
        "before the output, and with model.norm_place=after and objective=clm there is none; grow other axes, or use a "
        "model with an untied head",
    )


def _check_eps(method: str, width: Width, source: ModelConfig, target: ModelConfig) -> None:
    """The eps of norms is added to a mean over the hidden units; zeros beside these make the mean smaller."""
    needed = source.norm_eps * width.eps_scale
    require(
        not target.qk_norm or width.eps_scale == 1,
        f"growth.method={method} from hidden_size={source.hidden_size} to {target.hidden_size} needs another eps for "
        "the norms over the hidden axis than for those over queries and keys (qk_norm), but a model has one norm_eps; "
        "use method clone with a multiple of the source's hidden_size",
    )
    require(
        abs(target.norm_eps - needed) <= 1e-9 * needed,
        f"growth.method={method} needs the target's norm_eps={needed!r} (the source has {source.norm_eps}"
        + (f", and its norms average over {target.hidden_size} units instead" if width.eps_scale != 1 else "")
        + f"), but it is {target.norm_eps}; set norm_eps={needed!r}",
    )


def _check_breaker(method: str, width_name: str, breaker: Breaker, scale: float) -> None:
    require(
        breaker == "none" or width_name in REPLICATING,
        f"growth.breaker={breaker} tells replicas apart, and growth.method={method} makes none; use breaker=none, or "
        f"one of {', '.join(REPLICATING)}",
    )
    require(
        breaker != "split" or scale < 1,
        f"growth.breaker_scale={scale} would leave some readers of growth.breaker=split no share; use less than 1",
    )
