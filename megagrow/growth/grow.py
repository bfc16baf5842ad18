"""Grows all of a model's tensors, straight into the shards that this rank stores, streaming over the source.

A rank reads one source tensor at a time (with learned layer maps: that tensor of all source layers), computes the boxes
that its own shards need, and forgets it. No target tensor ever exists whole.
"""

# Shape suffix legend: P = fused parts; K, J = target and source layers; N = elements of one part; R = rows of a box.

import math
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from megagrow import ops
from megagrow.config import ModelConfig
from megagrow.growth.dims import Quantity
from megagrow.growth.maps import LayerMap, LayerMix
from megagrow.growth.noise import root_mean_square, root_mean_squares_over
from megagrow.growth.operator import grow_box, grows_by_rows, needs_rms, write_box
from megagrow.growth.recipe import Recipe
from megagrow.parallel import heartbeat
from megagrow.parallel.collectives import broadcast_from
from megagrow.parallel.mesh import Mesh
from megagrow.parallel.shards import Box, box, counted_here, full, local
from megagrow.parallel.stages import pipeline_stages
from megagrow.roles import (
    TIED_EMBEDDING,
    axis_unit,
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

ROWS = 4096  # of an embedding or output matrix, that are grown at a time
MOST_MIXED_LAYERS = 128  # of a source, which the kernel that mixes them holds in registers


@dataclass(frozen=True)
class Ranges:
    """A `Fetch`, for recipes that copy, that gives only a range of each tensor.

    Attributes:
        read: gives the range.
        origin: gives where it begins in the whole tensor.
        rms: gives the root mean square of the whole tensor, where `operator.needs_rms`.
    """

    read: Fetch
    origin: Callable[[str], tuple[int, ...]]
    rms: Callable[[str], float | None]

    def __call__(self, name: str) -> Tensor:
        return self.read(name)


@dataclass(frozen=True)
class Shards:
    """A `Fetch` of a model whose shards are cut like those of the target, each axis of which that does not grow alike.

    Attributes:
        read: gathers a whole tensor; a collective.
        piece: gives what this rank stores of a tensor; no collective.
        rms: gives the root mean square of a whole tensor, taken once; a collective the first time, so that all ranks
            ask for the same names in the same order.
    """

    read: Fetch
    piece: Fetch
    rms: Callable[[str], float]

    def __call__(self, name: str) -> Tensor:
        return self.read(name)


def grow_into(recipe: Recipe, fetch: Fetch, targets: Mapping[str, Tensor], quantity: Quantity = "value") -> None:
    """Fills every target's local shard with its part of the grown tensor.

    Growing shards equals growing whole tensors and sharding them; for methods that copy, bit for bit.

    Args:
        recipe: how to grow.
        fetch: the source's tensors.
        targets: this rank's tensors by parameter name, in any layout: plain, or DTensors on tensor and data axes.
        quantity: what the tensors are: parameters, their gradients (exp_avg), or squares of these (exp_avg_sq).
    """
    pieces = {name: local(tensor) for name, tensor in targets.items()}
    boxes = {name: box(tensor) for name, tensor in targets.items() if pieces[name].numel()}
    device = next((piece.device for piece in pieces.values()), torch.device("cpu"))
    with torch.no_grad():
        if recipe.copies:
            for name, source in _copied_sources(recipe, fetch, boxes):
                origin: tuple[int, ...] = (0, 0)
                rms = None
                if isinstance(fetch, Ranges):
                    origin, rms = fetch.origin(recipe.source_name(name)), fetch.rms(recipe.source_name(name))
                write_box(recipe, name, source.to(device), boxes[name], pieces[name], quantity, origin, rms)
            return
        if recipe.source_axes is not None:
            for name, rows, grown in grown_boxes(recipe, fetch, boxes, device, quantity):
                pieces[name][rows].copy_(grown)
            return
        for each in _operands(recipe, fetch, boxes, quantity):
            piece = pieces[each.name][each.rows]
            write_box(recipe, each.name, each.source.to(device), each.box, piece, quantity, each.origin, each.rms)
            del each


def grow_whole(recipe: Recipe, fetch: Fetch, name: str, quantity: Quantity = "value") -> Tensor:
    """One whole target parameter, read on demand, in the dtype that the source has it in."""
    dtypes: list[torch.dtype] = []

    def noting_dtype(source_name: str) -> Tensor:
        source = fetch(source_name)
        dtypes.append(source.dtype)
        return source

    shape = shape_of(role_of(name), recipe.target)
    whole = tuple(slice(0, size) for size in shape)
    boxes, (layer, leaf) = {name: whole}, split_name(name)
    with torch.no_grad():
        if layer is None:
            operand = _whole(name, noting_dtype(name), whole)
        elif isinstance(recipe.layers, LayerMix) and recipe.source_axes is not None:
            found = _widened_then_mixed(recipe, recipe.layers, leaf, noting_dtype, boxes, torch.device("cpu"))
            ((_, grown),) = found
            return grown.to(dtypes[0])
        else:
            (operand,) = _layer_operands(recipe, leaf, noting_dtype, boxes, {layer})
        grown = torch.empty(shape, dtype=dtypes[0], device=operand.source.device)
        write_box(recipe, name, operand.source, whole, grown, quantity, rms=operand.rms)
        return grown


def grown_boxes(
    recipe: Recipe, fetch: Fetch, boxes: Mapping[str, Box], device: torch.device, quantity: Quantity = "value"
) -> Iterator[tuple[str, slice, Tensor]]:
    """Yields the box of each target parameter in `boxes`, grown: (name, rows of the box, what they become).

    Every source tensor that must be gathered is fetched once, whatever is wanted, in an order that depends on the
    recipe alone. What grows row by row, as an embedding does, comes in pieces of rows, from this rank's own shard where
    `fetch` has one. Differentiable in learned maps: the caller goes backward from each piece before it asks for more.
    """
    if isinstance(recipe.layers, LayerMix) and recipe.source_axes is not None:
        for leaf in leaves(recipe.target):
            for name, grown in _widened_then_mixed(recipe, recipe.layers, leaf, fetch, boxes, device):
                yield name, slice(0, len(grown)), grown
                del grown
        operands = _operands_outside_layers(recipe, fetch, boxes, quantity)
    else:
        operands = _operands(recipe, fetch, boxes, quantity)
    for each in operands:
        grown = grow_box(recipe, each.name, each.source.to(device), each.box, quantity, each.origin, each.rms)
        yield each.name, each.rows, grown
        del each, grown  # before the next one is made


@dataclass(frozen=True)
class Operand:
    """Some rows of a wanted box, and what they are grown from.

    Attributes:
        name: of the target parameter.
        box: of these rows, in the whole target parameter.
        rows: where they are in the wanted box.
        source: the source parameter, or its rows from `origin` on.
        origin: where `source` begins in the whole source parameter.
        rms: how large the source is that random entries are as large as; None: as large as `source`.
    """

    name: str
    box: Box
    rows: slice
    source: Tensor
    origin: tuple[int, ...] = (0, 0)
    rms: float | None = None


def _operands(recipe: Recipe, fetch: Fetch, boxes: Mapping[str, Box], quantity: Quantity) -> Iterator[Operand]:
    """What the boxes in `boxes` are grown from, layers mixed already."""
    for leaf in leaves(recipe.target):
        yield from _layer_operands(recipe, leaf, fetch, boxes)
    yield from _operands_outside_layers(recipe, fetch, boxes, quantity)


def _operands_outside_layers(
    recipe: Recipe, fetch: Fetch, boxes: Mapping[str, Box], quantity: Quantity
) -> Iterator[Operand]:
    for name in parameter_names(recipe.target):
        if split_name(name)[0] is not None:
            continue
        if grows_by_rows(recipe, name):
            yield from _by_rows(fetch, name, boxes, quantity == "value" and needs_rms(recipe, name))
            continue
        source = fetch(name)
        if name in boxes:
            yield _whole(name, source, boxes[name])
        del source


def _whole(name: str, source: Tensor, wanted: Box, rms: float | None = None) -> Operand:
    first, *_ = wanted
    return Operand(name, wanted, slice(0, first.stop - first.start), source, rms=rms)


def _by_rows(fetch: Fetch, name: str, boxes: Mapping[str, Box], takes_rms: bool) -> Iterator[Operand]:
    """The rows of a wanted box in pieces, each with the rows of the source that stand in the same places."""
    if isinstance(fetch, Shards):
        rms = fetch.rms(name) if takes_rms else None
        own = fetch.piece(name) if name in boxes else None
    else:
        whole = fetch(name)
        rms = root_mean_square(whole) if takes_rms and name in boxes else None
        own = whole[boxes[name][0]] if name in boxes else None
        del whole
    if own is None:
        return
    first, *columns = boxes[name]
    assert len(own) == first.stop - first.start, "rows that do not grow are cut alike"
    for start in range(0, len(own), ROWS):
        rows = slice(start, min(start + ROWS, len(own)))
        place = slice(first.start + rows.start, first.start + rows.stop)
        yield Operand(name, (place, *columns), rows, own[rows], (place.start, 0), rms)


def _copied_sources(recipe: Recipe, fetch: Fetch, wanted: Container[str]) -> Iterator[tuple[str, Tensor]]:
    """The wanted target parameters with the source tensors that they copy, fetched in an order that all ranks share."""
    assert isinstance(recipe.layers, LayerMap), "mixed layers are no copies"
    for name in parameter_names(recipe.target):
        if split_name(name)[0] is None:
            source = fetch(name)
            if name in wanted:
                yield name, source
            del source
    for leaf in leaves(recipe.target):
        yield from _copied_layers(recipe, recipe.layers, leaf, fetch, wanted)


def mesh_fetch(source_tensors: Mapping[str, Tensor], source: ModelConfig, mesh: Mesh) -> Shards:
    """Reads the shards of a model that lives in this job; every whole tensor takes a collective over all ranks.

    The pipeline rank that owns a tensor gathers it, then sends it along the pipeline axis.

    Args:
        source_tensors: this rank's tensors by parameter name, of one dtype: parameters, or one of their Adam moments.
            They must not change as long as they are read: what `rms` gives is taken once.
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

    def piece(name: str) -> Tensor:
        return local(source_tensors[name].detach()).to(mesh.device)

    @cache
    def rms(name: str) -> float:
        counted = {name: piece(name)} if is_counted(name, source_tensors, mesh) else {}
        return root_mean_squares_over(counted, {name: math.prod(shapes[name])}, mesh.world, mesh.device)[name]

    return Shards(fetch, piece, rms)


def is_counted(name: str, tensors: Mapping[str, Tensor], mesh: Mesh) -> bool:
    """Whether this rank's piece of a tensor enters sums over all ranks; equal pieces of several ranks enter once."""
    if name not in tensors or (name == TIED_EMBEDDING and not mesh.pp.is_first):
        return False
    return counted_here(tensors[name]) and local(tensors[name]).numel() > 0


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


def _layer_operands(
    recipe: Recipe, leaf: str, fetch: Fetch, boxes: Mapping[str, Box], read_for: Collection[int] | None = None
) -> Iterator[Operand]:
    """One parameter of all layers that are wanted; copies read the sources of the layers `read_for` only, or of all."""
    if isinstance(recipe.layers, LayerMix):
        yield from _weighted_layers(recipe, recipe.layers.weights[leaf], leaf, fetch, boxes)
        return
    for name, source in _copied_layers(recipe, recipe.layers, leaf, fetch, boxes, read_for):
        yield _whole(name, source, boxes[name])
        del source


def _copied_layers(
    recipe: Recipe,
    layers: LayerMap,
    leaf: str,
    fetch: Fetch,
    wanted: Container[str],
    read_for: Collection[int] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    reads_next = recipe.reads_next(layer_name(0, leaf))
    held: dict[int, Tensor] = {}
    for j in sorted({copied for k, copied in enumerate(layers.index) if read_for is None or k in read_for}):
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
    recipe: Recipe, weights_PKJ: Tensor, leaf: str, fetch: Fetch, boxes: Mapping[str, Box]
) -> Iterator[Operand]:
    """Mixes the layers at the source's width; parts that are fused stand apart meanwhile."""
    shape, unit = shape_of(role_of(layer_name(0, leaf)), recipe.source), _unit(recipe, leaf)
    targets = [k for k in range(recipe.target.num_layers) if layer_name(k, leaf) in boxes]
    sources_PJN, sizes = _read_layers(recipe, leaf, fetch, targets, weights_PKJ)
    of_parts, fits = list[Tensor](), sources_PJN.shape[1] <= MOST_MIXED_LAYERS
    if targets and fits and not torch.is_grad_enabled() and ops.serves("layer_mix", sources_PJN):  # all in one read
        of_parts = [ops.layer_mix(x, w[targets]) for x, w in zip(sources_PJN, weights_PKJ, strict=True)]
    for i, k in enumerate(targets):
        if of_parts:
            mixed_PN = torch.stack([mixed_KN[i] for mixed_KN in of_parts])
        else:
            mixed_PN = (weights_PKJ[:, k : k + 1] @ sources_PJN).squeeze(1)
        mixed = mixed_PN.reshape(len(mixed_PN), -1, unit, *shape[1:]).movedim(0, 1).reshape(shape)
        yield _whole(layer_name(k, leaf), mixed, boxes[layer_name(k, leaf)], sizes.get(k))
        del mixed, mixed_PN


def _read_layers(
    recipe: Recipe, leaf: str, fetch: Fetch, targets: Collection[int], like: Tensor
) -> tuple[Tensor, dict[int, float]]:
    """One parameter of all source layers, [P, J, N]; and target layer -> how large its random entries are."""
    num_parts, names = len(like), [layer_name(j, leaf) for j in range(recipe.source.num_layers)]
    # Told by what every rank has alike: of its layers' own maps it may hold some only.
    takes_rms = recipe.fill.std == "source" and leaf in (recipe.fill_scales or {})
    copied = recipe.first_layers if takes_rms else None
    first = {} if copied is None else dict(enumerate(copied.index))
    sized = {*first.values()} if isinstance(fetch, Shards) else {first[k] for k in targets if k in first}
    size = math.prod(shape_of(role_of(names[0]), recipe.source)) // num_parts
    sources_PJN, sizes = like.new_empty(num_parts, len(names), size), dict[int, float]()
    for j, name in enumerate(names):
        layer = fetch(name)
        sources_PJN[:, j] = layer.unflatten(0, (-1, num_parts, _unit(recipe, leaf))).movedim(1, 0).flatten(1)
        if j in sized:
            sizes[j] = fetch.rms(name) if isinstance(fetch, Shards) else root_mean_square(layer)
        del layer
    return sources_PJN, {k: sizes[first[k]] for k in targets if k in first}


def _unit(recipe: Recipe, leaf: str) -> int:
    """Rows of one part that stand together in a fused parameter of the source."""
    return axis_unit(role_of(layer_name(0, leaf)).out, recipe.source)


def _widened_then_mixed(
    recipe: Recipe, layers: LayerMix, leaf: str, fetch: Fetch, boxes: Mapping[str, Box], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Widens each source layer once, by its own maps, then mixes; what a rank stores of this leaf is one box."""
    assert recipe.source_axes is not None
    names = [name for k in range(recipe.target.num_layers) if (name := layer_name(k, leaf)) in boxes]
    widened = []
    for j in range(recipe.source.num_layers):
        source = fetch(layer_name(j, leaf))
        if names:
            own = replace(recipe, axes=recipe.source_axes[j])
            widened.append(grow_box(own, names[0], source.to(device), boxes[names[0]]))
        del source
    # Mixing goes backward once for each target layer, widening once for all of them: here the graph is cut.
    ends = [wide.detach().requires_grad_(wide.requires_grad) for wide in widened]
    for name in names:
        assert boxes[name] == boxes[names[0]], "all layers are sharded alike"
        yield name, _mixed_box(recipe, layers.weights[leaf], name, ends, boxes[name])
    for wide, end in zip(widened, ends, strict=True):
        if end.grad is not None:
            wide.backward(end.grad)


def _mixed_box(recipe: Recipe, weights_PKJ: Tensor, name: str, boxes: Sequence[Tensor], rows: Box) -> Tensor:
    """Σ_j w_kj · (box of layer j): rows of different fused parts have different weights."""
    role, (k, _) = role_of(name), split_name(name)
    part = torch.arange(rows[0].start, rows[0].stop) // axis_unit(role.out, recipe.target) % len(role.parts)
    weights_RJ = weights_PKJ[part.to(weights_PKJ.device), k].to(boxes[0].device)
    mixed = torch.zeros_like(boxes[0])
    for j, wide in enumerate(boxes):
        mixed = mixed + wide * (weights_RJ[:, j, None] if wide.ndim == 2 else weights_RJ[:, j])
    return mixed
