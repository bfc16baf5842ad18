"""LiGO: growth by dense linear maps that are learned on the ordinary loss.

One learning step, outside the pipeline and in any layout:

    generate     every rank writes its target shards from the frozen source and the maps
    train step   the ordinary forward and backward passes leave gradients in the ordinary sharded parameters
    pull_back    one vector-Jacobian product takes the shards' gradients to the maps; all ranks' shares are summed
    update       AdamW on the maps, each on one of the ranks that hold it, which sends it to the others

The target needs gradients but no moments, so learning needs less memory than training. A map of one target layer is on
the ranks of that layer's pipeline stage only.

Source: Wang et al., 2023 (arXiv 2303.00980), Algorithm 1, section 3.3, and its authors' code. docs/ligo.md names each
departure; ligo_maps.py says which maps there are.
"""

import dataclasses
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from megagrow.errors import CheckpointError, shown
from megagrow.growth.grow import Fetch, grow_into, grown_boxes, is_counted
from megagrow.growth.ligo_maps import (
    Variant,
    base_map,
    fixed_axes,
    initial_depth,
    initial_fill,
    initial_width,
    is_alias,
    keeps_old_rows,
    kept_index,
    map_shapes,
    width_maps,
)
from megagrow.growth.maps import AxisMap, DenseMap, ExtendedMap, LayerMap, LayerMix
from megagrow.growth.recipe import Recipe
from megagrow.parallel.collectives import broadcast_from, sum_over
from megagrow.parallel.mesh import Mesh
from megagrow.parallel.shards import box, local
from megagrow.parallel.stages import pipeline_stages
from megagrow.roles import leaves


class Ligo:
    """The maps of one variant, which start at a recipe that copies.

    Args:
        start: where the maps start, see `ligo_maps.start_recipe`. Its scales stay; its copies become learned rows.
            Initial maps depend on (its seed, map name) only.
        noise: breaks the symmetry of copies: standard deviation of the entries of rows that are no first copies, times
            √(source size). 0 starts exactly at the recipe, in depth too.
        device, dtype: of the maps, and of the arithmetic.
        variant: which maps there are, and what of them is learned.
        layers: the target layers whose own maps are held here; None: all.

    Attributes:
        widths: map name -> [T, S], or [N, S] where only new rows are learned.
        depth: leaf of a layer -> [parts, target layers, source layers].
        fill: leaf of a layer -> [target layers], or other parameter -> [1]: factors of random entries.
    """

    def __init__(
        self,
        start: Recipe,
        noise: float = 0.0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        variant: Variant = "tied",
        layers: Collection[int] | None = None,
    ) -> None:
        assert start.copies, "only copies can be made dense"
        self.start, self.variant, self.noise, self._dtype = start, variant, noise, dtype
        self._places = {
            name: (axis, layer)
            for name, (axis, layer) in width_maps(start, variant).items()
            if layer is None or variant == "source_layer" or layers is None or layer in layers
        }

        def initial(name: str, place: tuple[str, int | None]) -> Tensor:
            return initial_width(base_map(start, *place), start, variant, noise, name).to(device, dtype)

        self.widths = {name: nn.Parameter(initial(name, place)) for name, place in self._places.items()}
        self.depth = {
            leaf: nn.Parameter(initial_depth(start, leaf, variant, noise).to(device, dtype))
            for leaf in leaves(start.target)
        }
        filled = initial_fill(start, variant)
        self.fill = {name: nn.Parameter(scales.to(device, dtype)) for name, scales in filled.items()}

    def recipe(self) -> Recipe:
        """The maps as they are now, as a recipe; differentiable in them."""
        axes: dict[int | None, dict[str, AxisMap]] = {None: fixed_axes(self.start)}
        for name, matrix in self.widths.items():
            axis, layer = self._places[name]
            axes.setdefault(layer, {})[axis] = self._axis_map(matrix, axis, layer)
        for maps in axes.values():
            maps |= {"heads": maps["value"]} if "value" in maps and is_alias(self.start, "heads") else {}
        shared, first = axes.pop(None), self.start.layers
        assert isinstance(first, LayerMap), "only copies can be made dense"
        own = {layer: shared | maps for layer, maps in axes.items() if layer is not None} or None
        is_by_source = self.variant == "source_layer"
        return dataclasses.replace(
            self.start,
            method="ligo",
            layers=LayerMix(self.depth),
            axes=shared,
            keeps_function=False,
            source_axes=own if is_by_source else None,
            layer_axes=None if is_by_source else own,
            silent=frozenset(),
            first_layers=first,
            fill_scales=self.fill,
        )

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that is learned here, by name: `width.hidden`, `width.layers.3.ffn`, `depth.attention.query.weight`, …"""
        shared = {f"depth.{leaf}": weights for leaf, weights in self.depth.items()}
        return {**self.widths, **shared, **{f"fill.{name}": scales for name, scales in self.fill.items()}}

    def generate(self, fetch: Fetch, targets: Mapping[str, Tensor]) -> None:
        """Writes every target shard of this rank from the source and the maps; see `grow.grow_into`."""
        grow_into(self.recipe(), fetch, targets)

    def pull_back(self, fetch: Fetch, targets: Mapping[str, Tensor], gradients: dict[str, Tensor], mesh: Mesh) -> None:
        """Sets `.grad` of every map to the gradient of the loss that gave the target its gradients; a collective.

        The formula is applied again, one target parameter at a time, and differentiated; so memory is bounded by the
        largest parameter of all source layers (with maps of source layers: widened). The gradients of a map add up over
        the layers, shards and ranks that use it.

        Args:
            fetch: as in `generate`.
            targets: this rank's parameters by name.
            gradients: theirs, whole sums over the batch, laid out like them; the two copies of a tied embedding in a
                pipeline hold the same gradient. Each is taken out once it is used, so that its memory can go.
            mesh: where the rank stands; says which of several equal pieces counts.
        """
        for parameter in self.parameters().values():
            parameter.grad = None  # they come as those of the target go
        boxes = {name: box(tensor) for name, tensor in targets.items() if is_counted(name, targets, mesh)}
        for name in gradients.keys() - boxes.keys():
            del gradients[name]
        with torch.enable_grad():
            for name, rows, grown in grown_boxes(self.recipe(), fetch, boxes, mesh.device):
                gradient = _taken(gradients, name, rows)
                if grown.requires_grad:
                    grown.backward(gradient.to(grown.dtype))
                del grown, gradient
        for name, parameter in self.parameters().items():
            if parameter.grad is None:  # no shard here is made of it
                parameter.grad = torch.zeros_like(parameter)
            for axis in (mesh.tokens, mesh.tp) if self.is_of_stage(name) else (mesh.world,):
                sum_over(parameter.grad, axis)

    def owned(self, mesh: Mesh) -> dict[str, nn.Parameter]:
        """The maps that this rank updates: what all layers share, and its own of those of its stage."""
        owners, me = self._owners(mesh), (mesh.tokens.rank, mesh.tp.rank)
        return {name: parameter for name, parameter in self.parameters().items() if owners.get(name, me) == me}

    def share(self, mesh: Mesh) -> None:
        """Gives every rank of a stage the maps as their owners have them; a collective."""
        parameters = self.parameters()
        for name, (tokens, tensor) in self._owners(mesh).items():
            broadcast_from(parameters[name].data, tensor, mesh.tp)
            broadcast_from(parameters[name].data, tokens, mesh.tokens)

    def _owners(self, mesh: Mesh) -> dict[str, tuple[int, int]]:
        """Map of this stage -> tokens rank and tensor rank of its owner: dealt out evenly, the largest first."""
        sizes = {name: p.numel() for name, p in self.parameters().items() if self.is_of_stage(name)}
        loads, owners = [0] * (mesh.tokens.size * mesh.tp.size), {}
        for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
            owner = loads.index(min(loads))
            loads[owner] += sizes[name]
            owners[name] = divmod(owner, mesh.tp.size)
        return owners

    def gradient_norm(self, mesh: Mesh) -> Tensor:
        """The norm of the gradients of all maps of all ranks, 0-dimensional float64; a collective."""
        sums_2 = torch.zeros(2, dtype=torch.double, device=mesh.device)
        for name, parameter in self.parameters().items():
            if parameter.grad is not None:
                sums_2[int(self.is_of_stage(name))] += parameter.grad.double().square().sum()
        sum_over(sums_2[1:], mesh.pp)
        return sums_2.sum().sqrt()

    def is_of_stage(self, name: str) -> bool:
        """Whether only the ranks of one pipeline stage hold a map."""
        return self._layer_of(name) is not None and self.variant != "source_layer"

    def state_dict(self) -> dict[str, Tensor]:
        """The maps that are held here as plain tensors, by the names of `parameters`."""
        return {name: parameter.detach() for name, parameter in self.parameters().items()}

    def gathered(self, mesh: Mesh) -> dict[str, Tensor]:
        """The maps of all ranks in the first rank's host memory, nothing on the others; a collective."""
        stages = pipeline_stages(self.start.target.num_layers, mesh.parallel)
        owner = {layer: stage.rank for stage in stages for layer in stage.layers}
        here, places = self.state_dict(), width_maps(self.start, self.variant)
        gathered = {}
        for name, shape in map_shapes(self.start, self.variant).items():
            whole = here[name] if name in here else torch.empty(shape, dtype=self._dtype, device=mesh.device)
            if keeps_old_rows(self.variant) and (layer := places.get(name, ("", None))[1]) is not None:
                broadcast_from(whole, owner[layer], mesh.pp)
            if mesh.is_main:
                gathered[name] = whole.cpu()
        return gathered

    def load_state_dict(self, state: Mapping[str, Tensor], where: str = "maps") -> None:
        """Copies saved maps into these.

        Args:
            state: from `state_dict`.
            where: what they were read from, for the message.

        Raises:
            CheckpointError: they belong to another pair of models, or to another variant.
        """
        check_shapes({name: tuple(p.shape) for name, p in self.parameters().items()}, state, where)
        with torch.no_grad():
            for name, parameter in self.parameters().items():
                parameter.copy_(state[name])

    def _layer_of(self, name: str) -> int | None:
        return self._places[name][1] if name in self._places else None

    def _axis_map(self, matrix: Tensor, axis: str, layer: int | None) -> AxisMap:
        base = base_map(self.start, axis, layer)
        if keeps_old_rows(self.variant):
            is_filled = base.is_new if self.variant == "full_rank" else torch.zeros_like(base.is_new)
            return ExtendedMap(kept_index(base), matrix, is_filled, base.out_scale, base.in_scale)
        return DenseMap(matrix, base.out_scale, base.in_scale)


def check_shapes(expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor], where: str) -> None:
    """Raises CheckpointError when saved maps, which come from `where`, are none for this growth."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    odd = sorted(dict(shapes.items() ^ expected.items()))
    if odd:
        found, wanted = (named.get(odd[0], "absent") for named in (shapes, expected))
        raise CheckpointError(
            f"{where}: {shown(odd[0])} is {found}, but this growth needs {wanted}; "
            "use maps that were learned for the same source and target sizes, in the same variant"
        )


def _taken(gradients: dict[str, Tensor], name: str, rows: slice) -> Tensor:
    """Rows of this rank's piece of a gradient, which leaves the mapping with the last of them."""
    piece = local(gradients[name])
    if rows.stop == len(piece):
        del gradients[name]
    return piece[rows]
