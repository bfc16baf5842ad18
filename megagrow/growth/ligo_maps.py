"""Which maps each variant of LiGO has, and where they start.

    variant        maps                                  what is learned of them      order
    tied           one for each axis                     all                          mix layers, then widen
    source_layer   one for each axis and source layer    all                          widen, then mix
    target_layer   one for each axis and target layer    the new rows: [I; C]         mix, then widen
    full_rank      as target_layer, and a scale for the random new block of each matrix

The map of the residual stream is one for all layers in every variant. docs/ligo.md says which is whose.
That of the vocabulary is not learned: old tokens keep their rows, new ones begin as the mean of these.
"""

# Shape suffix legend: T, N = all and new target elements, S = source elements of an axis; P = fused parts;
# K, J = target and source layers.

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from megagrow.config import ModelConfig, require
from megagrow.growth.maps import NEW, AxisMap, LayerMap, SparseMap, first_copies
from megagrow.growth.methods import make_recipe
from megagrow.growth.operator import has_random_entries
from megagrow.growth.recipe import Recipe
from megagrow.growth.width import unit_axes
from megagrow.model.transformer import name_seed
from megagrow.roles import layer_name, leaves, parameter_names, role_of, split_name

Variant = Literal["tied", "source_layer", "target_layer", "full_rank"]

AUTHORS = "authors"  # the initial maps of the authors' code, which no sparse method has
SHARED_AXES = ("hidden", "transform")
VOCABULARY = "vocab"
DEPTH_NOISE = 0.03  # upper end of the authors' noise on layer weights (their `stackbert_noisy`)


def start_recipe(init: str, source: ModelConfig, target: ModelConfig, seed: int = 0) -> Recipe:
    """The recipe at which maps start.

    Args:
        init: `authors`, or a sparse method by name; `clone` copies unevenly where the sizes do not divide.
        source, target: the two models.
        seed: of everything random, the maps' initial values included.

    Raises:
        ConfigError: no such method, it cannot reach these sizes, or maps cannot express it.
    """
    recipe = make_recipe("ligo" if init in ("clone", AUTHORS) else init, source, target, seed=seed)
    if init == AUTHORS:
        recipe = replace(recipe, axes=_appended_axes(source, target) | fixed_axes(recipe))
    require(
        recipe.copies and recipe.next_rows is None,
        f"growth.ligo_init={init} takes more than copies of one layer, where learned maps cannot start; use clone",
    )
    return replace(recipe, method=init)


def keeps_old_rows(variant: Variant) -> bool:
    """Whether old units stay what they are and only the rows of new ones are learned."""
    return variant in ("target_layer", "full_rank")


def fixed_axes(recipe: Recipe) -> dict[str, AxisMap]:
    """The maps of a recipe that are not learned."""
    return {axis: axis_map for axis, axis_map in recipe.axes.items() if axis == VOCABULARY}


def is_alias(start: Recipe, axis: str) -> bool:
    """Whether a map is another's: under multi-head attention the output reads the axis that the values write."""
    return axis == "heads" and axis in start.axes and start.axes[axis] is start.axes.get("value")


def width_maps(start: Recipe, variant: Variant) -> dict[str, tuple[str, int | None]]:
    """Name of each map -> its axis and its layer (None: all layers share it)."""
    axes = [axis for axis in start.axes if axis != VOCABULARY and not is_alias(start, axis)]
    if keeps_old_rows(variant) and "hidden" in axes and not start.target.is_causal:
        axes.append("transform")
    num_layers = {"tied": 0, "source_layer": start.source.num_layers}.get(variant, start.target.num_layers)
    maps: dict[str, tuple[str, int | None]] = {}
    for axis in axes:
        layers = [None] if variant == "tied" or axis in SHARED_AXES else range(num_layers)
        maps |= {f"width.{axis}" if i is None else f"width.layers.{i}.{axis}": (axis, i) for i in layers}
    return maps


def map_shapes(start: Recipe, variant: Variant) -> dict[str, tuple[int, ...]]:
    """Shape of everything that a variant learns, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (axis, layer) in width_maps(start, variant).items():
        base = base_map(start, axis, layer)
        rows = int((~first_copies(base.index)).sum()) if keeps_old_rows(variant) else len(base.index)
        shapes[name] = rows, base.num_source
    depth = start.target.num_layers, start.source.num_layers
    return (
        shapes
        | {f"depth.{leaf}": (len(role_of(layer_name(0, leaf)).parts), *depth) for leaf in leaves(start.target)}
        | {f"fill.{name}": tuple(scales.shape) for name, scales in initial_fill(start, variant).items()}
    )


def base_map(start: Recipe, axis: str, layer: int | None = None) -> SparseMap:
    """The copies at which a map starts."""
    axes = start.axes if layer is None else (start.layer_axes or {}).get(layer, start.axes)
    base = axes["hidden" if axis == "transform" else axis]
    assert isinstance(base, SparseMap)
    return base


def kept_index(base: SparseMap) -> Tensor:
    """[T] the source element of each first copy, NEW for all others."""
    return torch.where(first_copies(base.index), base.index, NEW)


def initial_width(base: SparseMap, start: Recipe, variant: Variant, noise: float, name: str) -> Tensor:
    """A map's initial rows [T, S], or those of the new units [N, S].

    Copies, and what is neither copied nor filled otherwise, get normal noise of standard deviation noise / √S; the
    authors' new rows are uniform numbers divided by their sum.
    """
    index, generator = base.index, _generator(start.seed, name)
    matrix_TS = one_hot(index.clamp(min=0), base.num_source).double() * (index != NEW)[:, None]
    new = ~first_copies(index)
    shape = (int(new.sum()), base.num_source)
    if start.method == AUTHORS:
        uniform_NS = torch.rand(shape, generator=generator, dtype=torch.double)
        rows_NS = uniform_NS / uniform_NS.sum(1, keepdim=True)
    else:
        noise_NS = torch.randn(shape, generator=generator, dtype=torch.double) * (noise / math.sqrt(base.num_source))
        is_filled = (index[new] == NEW) if variant == "full_rank" else torch.zeros(shape[0], dtype=torch.bool)
        rows_NS = matrix_TS[new] + noise_NS.masked_fill(is_filled[:, None], 0.0)
    if keeps_old_rows(variant):
        return rows_NS
    matrix_TS[new] = rows_NS
    return matrix_TS


def initial_depth(start: Recipe, leaf: str, variant: Variant, noise: float) -> Tensor:
    """[P, K, J] the recipe's layer copies; if the depth grows, with a little of every layer.

    Rows sum to 1; where a layer begins as the identity, those of what it adds to the residual stream are 0.
    """
    assert isinstance(start.layers, LayerMap)
    parts = len(role_of(layer_name(0, leaf)).parts)
    copies = one_hot(torch.tensor(start.layers.index), start.source.num_layers).double()
    copies = copies.expand(parts, -1, -1).clone()
    silent = [start.is_silent(layer_name(k, leaf)) for k in range(start.target.num_layers)]
    copies[:, silent] = 0
    grows = start.target.num_layers != start.source.num_layers
    if start.method != AUTHORS and (not noise or not grows or variant == "full_rank"):
        return copies
    uniform = torch.rand(copies.shape, generator=_generator(start.seed, f"depth.{leaf}"), dtype=torch.double)
    weights = torch.where(copies == 1, 1.0, uniform * DEPTH_NOISE)
    weights /= weights.sum(-1, keepdim=True)
    weights[:, silent] = 0
    return weights


def initial_fill(start: Recipe, variant: Variant) -> dict[str, Tensor]:
    """Leaf of a layer -> [K] the factors of its random entries, other parameter -> [1]; in `full_rank` only."""
    if variant != "full_rank":
        return {}
    scales: dict[str, Tensor] = {}
    for name in parameter_names(start.target):
        layer, leaf = split_name(name)
        if has_random_entries(start, name):
            scales.setdefault(leaf, torch.ones(1 if layer is None else start.target.num_layers))
            scales[leaf][layer or 0] = 0.0 if start.is_silent(name) else 1.0
    return scales


def _appended_axes(source: ModelConfig, target: ModelConfig) -> dict[str, AxisMap]:
    """Old units first, then new ones without a source, and no scales: the form of the authors' code."""

    def appended(axis: str, num_source: int, num_target: int) -> Tensor:
        return torch.cat([torch.arange(num_source), torch.full((num_target - num_source,), NEW)])

    return unit_axes(source, target, appended)


def _generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(name_seed(seed, f"ligo.{name}"))
