"""How each dim of one parameter grows: which map acts on it, in which form, and what its new elements become.

    dim                                        form
    rows of matrices; biases; norm gains       O    (they write to the axis)
    columns of matrices and of an untied head  I    (they read from it)
    columns of embeddings                      O    (stored vocab x hidden, but they write the residual stream)
    last norm of a tied model                  I    (the shared matrix cannot both write and read: the norm before the
                                                     head takes the head's scale)

For gradients the two forms change places: a gradient is shared among the n copies of what writes an axis, because
readers divide by n, and comes whole to every copy of what reads it. So W' = R(W)/n_in and grad' = R(grad)/n_out, where
R is plain replication. Entries without a source have no old gradient: theirs is 0.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megagrow.config import ModelConfig
from megagrow.growth.maps import NEW, AxisMap, Elements, ExtendedMap, Form, Scale, SparseMap
from megagrow.growth.recipe import Recipe, Use
from megagrow.roles import Axis, Role, after_transform, axis_unit, role_of

Quantity = Literal["value", "gradient", "squared_gradient"]  # weights; exp_avg; exp_avg_sq
New = Literal["zero", "free", "average"]  # what elements without a source become, see `recipe.Fill`


@dataclass(frozen=True)
class Dim:
    """How one dim of a parameter grows.

    Attributes:
        maps: that of each fused part; None: the axis does not grow.
        form: which of O and I acts.
        unit: elements of one unit (head, neuron) of one part.
        new: what elements without a source become.
    """

    maps: tuple[AxisMap | None, ...]
    form: Form
    unit: int
    new: New

    def spread(self, x: Tensor, dim: int, box: slice) -> Tensor:
        """M applied to dim `dim` of x, for the target range `box`, without scales."""
        average = self.new == "average"
        if len(self.maps) == 1:
            return _spread(self.maps[0], x, dim, box, average)
        assert dim == 0, "only output rows are fused"
        elements_by_part, order = split_fused(box, len(self.maps), self.unit)
        parts = x.unflatten(0, (-1, len(self.maps), self.unit)).unbind(1)
        grown = [
            _spread(axis_map, part.flatten(0, 1), 0, elements, average)
            for axis_map, part, elements in zip(self.maps, parts, elements_by_part, strict=True)
        ]
        return torch.cat(grown).index_select(0, order.to(x.device))

    def scale(self, box: slice) -> Scale:
        """The diagonal of O or I over the target range `box`; one number where it is constant."""
        scales = [_scale(axis_map, self.form) for axis_map in self.maps]
        if all(isinstance(scale, float) and scale == scales[0] for scale in scales):
            return scales[0]
        elements_by_part, order = split_fused(box, len(scales), self.unit)
        pieces = [
            scale[elements] if isinstance(scale, Tensor) else torch.full(elements.shape, scale, dtype=torch.double)
            for scale, elements in zip(scales, elements_by_part, strict=True)
        ]
        return torch.cat(pieces)[order]

    def index(self, box: slice) -> Tensor:
        """The source row (column) of each target row (column) of the range; NEW where there is none. Of copies only."""
        if len(self.maps) == 1:
            (axis_map,), elements = self.maps, torch.arange(box.start, box.stop)
            assert axis_map is None or isinstance(axis_map, SparseMap), "only copies have an index"
            return elements if axis_map is None else axis_map.index[elements]
        elements_by_part, order = split_fused(box, len(self.maps), self.unit)
        found = []
        for part, (axis_map, elements) in enumerate(zip(self.maps, elements_by_part, strict=True)):
            assert axis_map is None or isinstance(axis_map, SparseMap), "only copies have an index"
            copied = elements if axis_map is None else axis_map.index[elements]
            row = (copied // self.unit * len(self.maps) + part) * self.unit + copied % self.unit
            found.append(torch.where(copied == NEW, NEW, row))
        return torch.cat(found)[order]

    def is_new(self, box: slice) -> Tensor:
        """Which elements of the range [box] nothing of the source goes into."""
        if self.new == "average" or not any(has_new(axis_map) for axis_map in self.maps):
            return torch.zeros(box.stop - box.start, dtype=torch.bool)
        elements_by_part, order = split_fused(box, len(self.maps), self.unit)
        pairs = zip(self.maps, elements_by_part, strict=True)
        return torch.cat([_is_new(axis_map, elements) for axis_map, elements in pairs])[order]


def dims_of(recipe: Recipe, name: str, quantity: Quantity) -> list[Dim]:
    """How the dims of a parameter grow, one for each, or those of its gradient."""
    role, axes = role_of(name), recipe.axes_of(name)
    rows = recipe.next_rows if recipe.next_rows is not None and recipe.reads_next(name) else axes
    out_maps, in_map = tuple(map(rows.get, role.out_maps)), axes.get(role.in_map)
    if "transform" in axes and name in after_transform(recipe.target):
        out_maps, in_map = (out_maps, axes["transform"]) if role.kind == "head" else ((axes["transform"],), in_map)
    out_form, in_form = _forms(name, recipe.target)
    dims = [_dim(recipe, role, out_maps, (role.out_maps[0], out_form), role.out, quantity)]
    if role.in_ is not None:
        dims.append(_dim(recipe, role, (in_map,), (role.in_map, in_form), role.in_, quantity))
    return dims


def _dim(recipe: Recipe, role: Role, maps: tuple[AxisMap | None, ...], use: Use, axis: Axis, quantity: Quantity) -> Dim:
    form, unit = use[1], axis_unit(axis, recipe.target)
    if quantity == "value":
        return Dim(maps, form, unit, _new(recipe, role, use))
    return Dim(maps, "in" if form == "out" else "out", unit, "zero")


def _new(recipe: Recipe, role: Role, use: Use) -> New:
    """What the new elements of an axis become in a parameter."""
    if role.kind in ("norm_gain", "norm_bias"):
        return "average" if role.kind == "norm_gain" else "zero"
    if use in recipe.fill.average:
        return "average"
    return "free" if use in recipe.fill.free and role.kind != "bias" else "zero"


def _forms(name: str, model: ModelConfig) -> tuple[Form, Form]:
    """The form that acts on each dim of a parameter's value."""
    role = role_of(name)
    if role.kind in ("embedding", "positions", "token_types"):
        return "out", "out"
    last_norm = "final_norm." if model.is_causal else "mlm_head.norm."
    feeds_tied_head = model.tied_embeddings and name.startswith(last_norm)
    return "in" if feeds_tied_head else "out", "in"


def _spread(axis_map: AxisMap | None, x: Tensor, dim: int, elements: Elements, average: bool) -> Tensor:
    if axis_map is not None:
        return axis_map.spread(x, dim, elements, average)
    return x[elements] if dim == 0 else x[:, elements]


def has_new(axis_map: AxisMap | None) -> bool:
    return isinstance(axis_map, SparseMap | ExtendedMap) and axis_map.has_new


def _is_new(axis_map: AxisMap | None, elements: Tensor) -> Tensor:
    if isinstance(axis_map, SparseMap | ExtendedMap):
        return axis_map.is_new[elements]
    return elements < 0


def _scale(axis_map: AxisMap | None, form: Form) -> Scale:
    if axis_map is None:
        return 1.0
    return axis_map.out_scale if form == "out" else axis_map.in_scale


def split_fused(box: slice, num_parts: int, unit: int) -> tuple[list[Tensor], Tensor]:
    """Takes a range of fused rows (unit, part, element) apart.

    Returns:
        For each part the elements of its map that the range holds; and for each row of the range, where it stands when
        these are laid end to end.
    """
    rows = torch.arange(box.start, box.stop)
    group, within = rows // (num_parts * unit), rows % (num_parts * unit)
    part, element = within // unit, group * unit + within % unit
    by_part = part.argsort(stable=True)
    return [element[part == p] for p in range(num_parts)], by_part.argsort()
