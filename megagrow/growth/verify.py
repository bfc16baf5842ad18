"""What a grown model must satisfy, as numbers: for tests, and for users who want to see it on their own model.

All of them run in one process on whole tensors.
"""

# Shape suffix legend: B = batch, S = sequence, V = vocabulary.

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from megagrow.growth.grow import grow_whole
from megagrow.growth.maps import AxisMap, LayerMap, SparseMap, first_copies
from megagrow.growth.recipe import Recipe
from megagrow.model import Transformer
from megagrow.roles import parameter_names


def function_change(small: Transformer, grown: Transformer, ids_BS: Tensor) -> float:
    """Largest difference of the logits on a batch, relative to the largest logit; 0 when the function is kept."""
    with torch.no_grad():
        small_BSV, grown_BSV = small.logits(ids_BS), grown.logits(ids_BS)
    return _distance(grown_BSV, small_BSV)


def gradient_errors(recipe: Recipe, small: Mapping[str, Tensor], grown: Mapping[str, Tensor]) -> dict[str, float]:
    """How far each gradient of the grown model is from the grown gradient R(grad)/n_out; 0 for exact methods.

    Args:
        recipe: one that copies and keeps the function.
        small, grown: gradients of the two models on the same batch, by parameter name.
    """
    return {
        name: _distance(grown[name], grow_whole(recipe, small.__getitem__, name, "gradient"))
        for name in parameter_names(recipe.target)
    }


def replica_distances(recipe: Recipe, grown: Mapping[str, Tensor]) -> dict[str, float]:
    """How far the copies of each unit have moved apart, by parameter: 0 right after copying.

    While it stays 0, the grown model learns nothing that the small one could not.
    """
    to_first = _first_replicas(recipe)
    return {
        name: _distance(grown[name], grow_whole(to_first, grown.__getitem__, name))
        for name in parameter_names(recipe.target)
    }


def _first_replicas(recipe: Recipe) -> Recipe:
    """From the target to itself: every unit becomes the first copy of the source unit that it is a copy of."""
    axes: dict[str, AxisMap] = {}
    for name, copies in recipe.axes.items():
        assert isinstance(copies, SparseMap), "only copies have replicas"
        first_place = torch.zeros(copies.num_source, dtype=torch.long)
        places = first_copies(copies.index).nonzero().flatten()
        first_place[copies.index[places]] = places
        axes[name] = SparseMap(first_place[copies.index], len(copies.index))
    same_layers = LayerMap(tuple(range(recipe.target.num_layers)))
    return dataclasses.replace(recipe, source=recipe.target, layers=same_layers, axes=axes)


def _distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    scale = max(found.abs().max().item(), expected.abs().max().item())
    return (found - expected).abs().max().item() / scale if scale else 0.0
