"""Grows all of a model's tensors, straight into the shards that this rank stores, streaming over the source.

A rank reads one source tensor at a time (with learned layer maps: that tensor of all source layers), computes the boxes
that its own shards need, and forgets it. No target tensor ever exists whole.
"""

from collections.abc import Callable, Container, Iterator, Mapping

import torch
from torch import Tensor

from megagrow.config import ModelConfig
from megagrow.growth.maps import LayerMap
from megagrow.growth.operator import Quantity, grow_box
from megagrow.growth.recipe import Recipe
from megagrow.parallel import heartbeat
from megagrow.parallel.collectives import broadcast_from
from megagrow.parallel.mesh import Mesh
from megagrow.parallel.shards import box, full, local
from megagrow.parallel.stages import pipeline_stages
from megagrow.roles import (
    first_names,
    layer_name,
    leaves,
    parameter_names,
    parameter_shapes,
    role_of,
    shape_of,
    split_name,
)

# Gives a whole source tensor by name. May be a collective: all ranks ask for the same names in the same order.
Fetch = Callable[[str], Tensor]


def grow_into(recipe: Recipe, fetch: Fetch, targets: Mapping[str, Tensor], quantity: Quantity = "value") -> None:
    """Fills every target's local shard with its part of the grown tensor.

    Growing shards equals growing whole tensors and sharding them; for methods that copy, bit for bit.

    Args:
        recipe: how to grow.
        fetch: the source's tensors.
        targets: this rank's tensors by parameter name, in any layout: plain, or DTensors on tensor and data axes.
        quantity: what the tensors are: parameters, their gradients (exp_avg), or squares of these (exp_avg_sq).
    """
    with torch.no_grad():
        for name, source in mixed_sources(recipe, fetch, targets):
            piece = local(targets[name])
            if piece.numel():
                piece.copy_(grow_box(recipe, name, source.to(piece.device), box(targets[name]), quantity))


def grow_whole(recipe: Recipe, fetch: Fetch, name: str, quantity: Quantity = "value") -> Tensor:
    """One whole target parameter, read on demand, in the dtype that the source has it in."""
    dtypes: list[torch.dtype] = []

    def noting_dtype(source_name: str) -> Tensor:
        source = fetch(source_name)
        dtypes.append(source.dtype)
        return source

    with torch.no_grad():
        source = _mixed_source(recipe, noting_dtype, name)
        whole = tuple(slice(0, size) for size in shape_of(role_of(name), recipe.target))
        return grow_box(recipe, name, source, whole, quantity).to(dtypes[0])


def mixed_sources(recipe: Recipe, fetch: Fetch, wanted: Container[str]) -> Iterator[tuple[str, Tensor]]:
    """Yields the wanted target parameters with Σ_j w_kj Θ_j, which is still of the source's width.

    Every source tensor that the recipe uses is fetched once, whatever is wanted, in an order that depends on the recipe
    alone. Differentiable in learned layer maps.
    """
    for name in parameter_names(recipe.target):
        if split_name(name)[0] is None:
            source = fetch(name)
            if name in wanted:
                yield name, source
            del source
    for leaf in leaves(recipe.target):
        if isinstance(recipe.layers, LayerMap):
            yield from _copied_layers(recipe, recipe.layers, leaf, fetch, wanted)
        else:
            yield from _weighted_layers(recipe, recipe.layers.weights[leaf], leaf, fetch, wanted)


def mesh_fetch(source_tensors: Mapping[str, Tensor], source: ModelConfig, mesh: Mesh) -> Fetch:
    """Reads the shards of a model that lives in this job; every call is a collective over all ranks.

    The pipeline rank that owns a tensor gathers it, then sends it along the pipeline axis.

    Args:
        source_tensors: this rank's tensors by parameter name, of one dtype: parameters, or one of their Adam moments.
        source: the model that they belong to.
        mesh: where the rank stands.
    """
    shapes, owners = parameter_shapes(source), _owners(source, mesh)
    dtype = next(iter(source_tensors.values())).dtype

    def fetch(name: str) -> Tensor:
        owner = owners[name]
        if mesh.pp.rank == owner:
            whole = full(source_tensors[name]).to(mesh.device)  # moments may be in host memory
        else:
            whole = torch.empty(shapes[name], dtype=dtype, device=mesh.device)
        heartbeat.progress()
        return broadcast_from(whole, owner, mesh.pp)

    return fetch


def _owners(model: ModelConfig, mesh: Mesh) -> dict[str, int]:
    """The pipeline rank that holds each parameter; of a tied embedding the first one."""
    first = set(first_names(model))
    stages = pipeline_stages(model.num_layers, mesh.parallel)
    rank_of = {layer: stage.rank for stage in stages for layer in stage.layers}
    owners = {}
    for name in parameter_names(model):
        layer, _ = split_name(name)
        if layer is not None:
            owners[name] = rank_of[layer]
        else:
            owners[name] = stages[0 if name in first else -1].rank
    return owners


def _copied_layers(
    recipe: Recipe, layers: LayerMap, leaf: str, fetch: Fetch, wanted: Container[str]
) -> Iterator[tuple[str, Tensor]]:
    reads_next = recipe.reads_next(layer_name(0, leaf))
    held: dict[int, Tensor] = {}
    for j in sorted(set(layers.index)):
        needed = {j, _next(recipe, j)} if reads_next else {j}
        held = {i: tensor for i, tensor in held.items() if i in needed}
        for i in sorted(needed - held.keys()):
            held[i] = fetch(layer_name(i, leaf))
        source = torch.cat([held[j], held[_next(recipe, j)]]) if reads_next else held[j]
        for k, copied in enumerate(layers.index):
            if copied == j and layer_name(k, leaf) in wanted:
                yield layer_name(k, leaf), source
        del source


def _next(recipe: Recipe, layer: int) -> int:
    """The layer after a source layer; the last one stands for its own."""
    return min(layer + 1, recipe.source.num_layers - 1)


def _weighted_layers(
    recipe: Recipe, weights: Tensor, leaf: str, fetch: Fetch, wanted: Container[str]
) -> Iterator[tuple[str, Tensor]]:
    shape = shape_of(role_of(layer_name(0, leaf)), recipe.source)
    sources = weights.new_empty(recipe.source.num_layers, *shape)
    for j in range(recipe.source.num_layers):
        sources[j] = fetch(layer_name(j, leaf))
    for k in range(recipe.target.num_layers):
        if layer_name(k, leaf) in wanted:
            yield layer_name(k, leaf), (weights[k] @ sources.flatten(1)).view(shape)


def _mixed_source(recipe: Recipe, fetch: Fetch, name: str) -> Tensor:
    layer, leaf = split_name(name)
    if layer is None:
        return fetch(name)
    if isinstance(recipe.layers, LayerMap):
        alone, first = LayerMap((recipe.layers.index[layer],)), layer_name(0, leaf)
        return next(_copied_layers(recipe, alone, leaf, fetch, {first}))[1]
    _, source = next(_weighted_layers(recipe, recipe.layers.weights[leaf], leaf, fetch, {name}))
    return source
