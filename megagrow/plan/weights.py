"""How many elements of the parameters each rank stores, and how many it has while they are gathered."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from megagrow.config import ModelConfig
from megagrow.parallel.gradients import has_partial_gradient
from megagrow.parallel.mesh import Axis, Mesh
from megagrow.parallel.shards import chunk, tensor_dim
from megagrow.parallel.stages import Stage
from megagrow.plan.layout import Layout
from megagrow.roles import TIED_EMBEDDING, first_names, last_names, layer_name, leaves, parameter_shapes


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered, used and freed together: those of a block, or all others of a stage.

    Attributes:
        stored: elements that the rank stores: its piece of the tensor axis' piece.
        gathered: elements of the tensor axis' piece.
        matrices: those of `gathered` that stand in matrices.
    """

    stored: int = 0
    gathered: int = 0
    matrices: int = 0

    def __add__(self, other: "Unit") -> "Unit":
        return Unit(self.stored + other.stored, self.gathered + other.gathered, self.matrices + other.matrices)

    def __mul__(self, count: int) -> "Unit":
        return Unit(self.stored * count, self.gathered * count, self.matrices * count)


def block_unit(layout: Layout, tensor_rank: int = 0, shard_rank: int = 0) -> Unit:
    """The parameters of one layer, on a rank at these places of the tensor and the shard axis."""
    return _unit(layer_names(layout.model), layout, tensor_rank, shard_rank)


def other_unit(layout: Layout, stage: Stage, tensor_rank: int = 0, shard_rank: int = 0) -> Unit:
    """The parameters of a stage that stand in none of its layers: embeddings, final norm, head."""
    return _unit(tuple(other_names(layout.model, stage)), layout, tensor_rank, shard_rank)


def stage_unit(layout: Layout, stage: Stage, tensor_rank: int = 0, shard_rank: int = 0) -> Unit:
    """All parameters of a stage, as it holds them."""
    place = (tensor_rank, shard_rank)
    return block_unit(layout, *place) * len(stage.layers) + other_unit(layout, stage, *place)


def learning_unit(layout: Layout, stage: Stage, frozen_layers: int) -> Unit:
    """Of the parameters outside of its layers, those of a stage that get gradients.

    Where layers are frozen, from the first one of the model on, so is all that is below them.
    """
    below = first_names(layout.model) if frozen_layers else []
    return _unit(tuple(name for name in other_names(layout.model, stage) if name not in below), layout, 0, 0)


def rank_unit(layout: Layout, rank: int, tensor_rank: int = 0, shard_rank: int = 0) -> Unit:
    """All parameters of a pipeline rank's stages."""
    return sum((stage_unit(layout, stage, tensor_rank, shard_rank) for stage in layout.rank_stages(rank)), Unit())


def trained_elements(layout: Layout, rank: int) -> int:
    """Elements of a pipeline rank that have moments: a tied embedding counts once where both ends stand on one rank."""
    stages = layout.rank_stages(rank)
    both_ends = stages[0].is_first and stages[-1].is_last and len(stages) > 1
    copy = stored_elements(layout, TIED_EMBEDDING) if both_ends and layout.model.tied_embeddings else 0
    return rank_unit(layout, rank).stored - copy


def tensor_elements(layout: Layout) -> int:
    """Elements of the whole model that a tensor rank holds where nothing but the tensor axis cuts it: a teacher."""
    names = [*parameter_shapes(layout.model)]
    return _unit(tuple(names), layout, 0, 0).gathered


def stored_elements(layout: Layout, name: str) -> int:
    """Elements of one parameter that the first rank of the tensor and the shard axis stores."""
    return _unit((name,), layout, 0, 0).stored


def partial_elements(layout: Layout, stage: Stage) -> int:
    """Stored elements of a stage whose gradient is, on every tensor rank, a part of the whole."""
    mesh = replace(Mesh.single(), tp=Axis(None, 0, layout.tensor), parallel=layout.config.parallel)

    def total(names: Iterable[str]) -> int:
        partial = tuple(name for name in names if has_partial_gradient(name, layout.model, mesh))
        return _unit(partial, layout, 0, 0).stored

    in_layer = total(layer_names(layout.model))
    return in_layer * len(stage.layers) + total(other_names(layout.model, stage))


@lru_cache(maxsize=64)
def layer_names(model: ModelConfig) -> tuple[str, ...]:
    """Names of the first layer's parameters, standing for those of every layer."""
    return tuple(layer_name(0, leaf) for leaf in leaves(model))


def other_names(model: ModelConfig, stage: Stage) -> list[str]:
    """Names of a stage's parameters outside of its layers; a tied embedding is on both ends of a pipeline."""
    names = []
    if stage.is_first:
        names += first_names(model)
    if stage.is_last:
        names += last_names(model)
        names += [TIED_EMBEDDING] * (model.tied_embeddings and not stage.is_first)
    return names


def _unit(names: tuple[str, ...], layout: Layout, tensor_rank: int, shard_rank: int) -> Unit:
    place = (Axis(None, tensor_rank, layout.tensor), Axis(None, shard_rank, layout.shard))
    return _sum(names, layout.model, place, layout.uses_fsdp)


@lru_cache(maxsize=4096)
def _sum(names: tuple[str, ...], model: ModelConfig, place: tuple[Axis, Axis], uses_fsdp: bool) -> Unit:
    tp, shard = place
    shapes, total = _shapes(model), Unit()
    for name in names:
        shape, dim = list(shapes[name]), tensor_dim(name, model, tp)
        if dim is not None:
            shape[dim] = _length(shape[dim], tp)
        gathered = math.prod(shape)
        if uses_fsdp:
            shape[0] = _length(shape[0], shard)
        total += Unit(math.prod(shape), gathered, gathered if len(shape) == 2 else 0)
    return total


@lru_cache(maxsize=16)
def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    return parameter_shapes(model)


def _length(size: int, axis: Axis) -> int:
    piece = chunk(size, axis)
    return piece.stop - piece.start
