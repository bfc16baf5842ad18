"""Growth without communication: where every rank already holds all that its part of the target is made of.

So it is for copies that stand side by side (`maps.interleave`) on axes that the mesh divides evenly, with layers that
stay on their pipeline rank: the target's shard is then the grown shard of the source. Whether it is so follows from the
recipe and the mesh alone, hence all ranks come to the same answer without asking each other.
"""

from collections.abc import Iterator, Mapping
from itertools import product
from math import prod

import torch
from torch import Tensor

from megagrow.config import ModelConfig
from megagrow.growth.grow import Fetch, mesh_fetch
from megagrow.growth.maps import LayerMap
from megagrow.growth.operator import source_elements
from megagrow.growth.recipe import Recipe
from megagrow.parallel.mesh import Axis, Mesh
from megagrow.parallel.shards import Box, chunk, tensor_dim
from megagrow.parallel.stages import pipeline_stages
from megagrow.roles import axis_unit, first_names, last_names, layer_name, leaves, parameter_shapes, role_of


def shard_fetch(tensors: Mapping[str, Tensor], recipe: Recipe, mesh: Mesh) -> Fetch:
    """Reads the shards of a model that lives in this job, for growing it: by collectives only where that takes some.

    Args:
        tensors: this rank's tensors of the source by parameter name, of one dtype.
        recipe: what they are read for.
        mesh: where the rank stands.
    """
    if not is_local(recipe, mesh):
        return mesh_fetch(tensors, recipe.source, mesh)
    return lambda name: tensors[name].detach() if name in tensors else torch.empty(0)  # other ranks' are not read here


def is_local(recipe: Recipe, mesh: Mesh) -> bool:
    """Whether on every rank the source's shards hold all that the target's shards are copied from."""
    if not recipe.only_copies or not _layers_stay(recipe, mesh):
        return False
    names = [*first_names(recipe.source), *(layer_name(0, leaf) for leaf in leaves(recipe.source))]
    return all(_holds_all(recipe, name, mesh) for name in [*names, *last_names(recipe.source)])


def boxes(name: str, model: ModelConfig, mesh: Mesh) -> Iterator[Box]:
    """The boxes of a parameter that the ranks of one pipeline stage hold, tensor rank by tensor rank."""
    shape, tp = parameter_shapes(model)[name], mesh.tp.size
    num_shards = mesh.tokens.size // mesh.parallel.replicate
    for tp_rank, shard in product(range(tp), range(num_shards)):
        ranges = [slice(0, size) for size in shape]
        for dim, axis in (
            (tensor_dim(name, model, mesh.tp), Axis(None, tp_rank, tp)),
            (0, Axis(None, shard, num_shards)),
        ):
            if dim is not None:
                part, start = chunk(ranges[dim].stop - ranges[dim].start, axis), ranges[dim].start
                ranges[dim] = slice(start + part.start, start + part.stop)
        yield tuple(ranges)


def _layers_stay(recipe: Recipe, mesh: Mesh) -> bool:
    assert isinstance(recipe.layers, LayerMap)
    models = recipe.source, recipe.target
    old, new = (
        {layer: stage.rank for stage in pipeline_stages(model.num_layers, mesh.parallel) for layer in stage.layers}
        for model in models
    )
    return all(new[k] == old[j] for k, j in enumerate(recipe.layers.index))


def _holds_all(recipe: Recipe, name: str, mesh: Mesh) -> bool:
    held, wanted = (boxes(name, model, mesh) for model in (recipe.source, recipe.target))
    return all(_covers(recipe, name, source, target) for source, target in zip(held, wanted, strict=True))


def _covers(recipe: Recipe, name: str, source: Box, target: Box) -> bool:
    """Whether a piece of a source parameter holds what a piece of the target's is copied from."""
    if not prod(part.stop - part.start for part in target):
        return True
    role = role_of(name)
    whole = len(role.parts) * axis_unit(role.out, recipe.source) if len(role.parts) > 1 else 1
    if source[0].start % whole or source[0].stop % whole:
        return False  # rows of fused parts are taken apart unit by unit
    needed = source_elements(recipe, name, target)
    return all(
        part.start <= int(elements.min()) and int(elements.max()) < part.stop
        for part, elements in zip(source, needed, strict=True)
    )
