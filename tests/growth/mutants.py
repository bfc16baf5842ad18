"""Mistakes that growth has been made with elsewhere, as patches to our code; every one must fail a check.

`test_mutants.py` runs the checks on the code as it is and under each mutant.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megagrow.config import ModelConfig
from megagrow.growth import dims, methods, moments, width
from megagrow.growth.dims import Quantity
from megagrow.growth.exchange import Exchange
from megagrow.growth.grow import Fetch, grow_into
from megagrow.growth.maps import AxisMap, Form, SparseMap
from megagrow.growth.recipe import Recipe
from megagrow.growth.width import Width
from megagrow.roles import role_of
from megagrow.train import growing

Mutant = Callable[[], AbstractContextManager[Any]]


def tiled_query_heads() -> AbstractContextManager[Any]:
    """0 1 2 3 0 1 2 3 instead of 0 0 1 1 2 2 3 3: with fixed key/value heads, queries meet others' keys."""
    head_axes = width._head_axes

    def tiled(source: ModelConfig, target: ModelConfig, pick: width.Pick) -> dict[str, AxisMap]:
        axes = head_axes(source, target, pick)
        if "query" in axes:
            heads = torch.arange(target.num_heads) % source.num_heads
            axes["query"] = axes["heads"] = width.copies(heads, source.num_heads, source.head_dim)
        return axes

    return mock.patch.object(width, "_head_axes", tiled)


def gains_without_factor() -> AbstractContextManager[Any]:
    """Zeros beside the hidden units, and norms' gains as they were."""
    zero_pad = width.zero_pad

    def without(source: ModelConfig, target: ModelConfig, seed: int) -> Width:
        return replace(zero_pad(source, target, seed), norm_scale=1.0)

    return mock.patch.dict(methods.WIDTH_METHODS, zero_pad=without)


def eps_without_factor() -> AbstractContextManager[Any]:
    """Zeros beside the hidden units, and the norms' eps as it was."""
    zero_pad = width.zero_pad

    def without(source: ModelConfig, target: ModelConfig, seed: int) -> Width:
        return replace(zero_pad(source, target, seed), eps_scale=1.0)

    return mock.patch.dict(methods.WIDTH_METHODS, zero_pad=without)


def tied_head_without_scale() -> AbstractContextManager[Any]:
    """A shared matrix grows as the embedding, and nothing divides by the copies that it reads."""
    forms, embeddings = dims._forms, ("embedding", "positions", "token_types")

    def without(name: str, model: ModelConfig) -> tuple[Form, Form]:
        return forms(name, model) if role_of(name).kind in embeddings else ("out", "in")

    return mock.patch.object(dims, "_forms", without)


def sixteen_bit_masters() -> AbstractContextManager[Any]:
    """The 16-bit copies of the weights grow, instead of the weights."""
    fetch = growing.Exchange.fetch

    def rounded(exchange: Exchange, tensors: dict[str, Tensor], *args: Any) -> Fetch:
        return fetch(exchange, {name: t.detach().bfloat16().to(t.dtype) for name, t in tensors.items()}, *args)

    return mock.patch.object(growing.Exchange, "fetch", rounded)


def copied_moments() -> AbstractContextManager[Any]:
    """Moments are copied like units, without the factors of gradients."""

    def copied(recipe: Recipe, fetch: Fetch, targets: dict[str, Tensor], quantity: Quantity = "value") -> None:
        maps = {name: axis for name, axis in recipe.axes.items() if isinstance(axis, SparseMap)}
        plain = {name: SparseMap(axis.index, axis.num_source) for name, axis in maps.items()}
        grow_into(replace(recipe, axes=plain), fetch, targets, quantity)

    return mock.patch.object(moments, "grow_into", copied)


def moments_of_all_copies() -> AbstractContextManager[Any]:
    """[S, S] where [S, 0] was asked for: copies that share moments stay copies."""
    return mock.patch.object(moments, "_clear_new_entries", lambda kept, tensors: None)


# mutant -> the check that finds it
MUTANTS: dict[str, tuple[Mutant, str]] = {
    "tiled query heads with fixed key/value heads": (tiled_query_heads, "query heads"),
    "no gain rule": (gains_without_factor, "padding"),
    "no eps rule": (eps_without_factor, "padding"),
    "unscaled tied head": (tied_head_without_scale, "tied head"),
    "bf16 masters": (sixteen_bit_masters, "masters"),
    "copied moments": (copied_moments, "optimizer step"),
    "moments of all copies": (moments_of_all_copies, "replicas part"),
}
