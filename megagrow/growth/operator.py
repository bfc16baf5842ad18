"""One box of one grown parameter: O Θ Iᵀ for the rows and columns that a rank stores.

Which map acts on a dim, and in which form, follows from the parameter's role:

    dim                                        form
    rows of matrices; biases; norm gains       O    (they write to the axis)
    columns of matrices and of an untied head  I    (they read from it)
    columns of embeddings                      O    (stored vocab x hidden, but they write the residual stream)
    last norm of a tied model                  I    (the shared matrix cannot both write and read: the norm before the
                                                     head takes the head's scale)

For gradients the two forms change places: a gradient is shared among the n copies of what writes an axis, because
readers divide by n, and comes whole to every copy of what reads it. So W' = R(W)/n_in and grad' = R(grad)/n_out, where
R is plain replication.
"""

# Shape suffix legend: R, C = rows and columns of the box; O, I = rows and columns of the source matrix.

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megagrow.config import ModelConfig
from megagrow.growth.maps import AxisMap, Elements, Form, Scale
from megagrow.growth.methods import Recipe
from megagrow.parallel.shards import Box
from megagrow.roles import after_transform, axis_unit, role_of, shape_of

Quantity = Literal["value", "gradient", "squared_gradient"]  # weights; exp_avg; exp_avg_sq


@dataclass(frozen=True)
class _Dim:
    """How one dim of a parameter grows.

    Attributes:
        maps: that of each fused part; None: the axis does not grow.
        form: which of O and I acts.
        unit: elements of one unit (head, neuron) of one part.
    """

    maps: tuple[AxisMap | None, ...]
    form: Form
    unit: int

    def spread(self, x: Tensor, dim: int, box: slice) -> Tensor:
        """M applied to dim `dim` of x, for the target range `box`, without scales."""
        if len(self.maps) == 1:
            return _spread(self.maps[0], x, dim, box)
        assert dim == 0, "only output rows are fused"
        elements_by_part, order = _split_fused(box, len(self.maps), self.unit)
        parts = x.unflatten(0, (-1, len(self.maps), self.unit)).unbind(1)
        grown = [
            _spread(axis_map, part.flatten(0, 1), 0, elements)
            for axis_map, part, elements in zip(self.maps, parts, elements_by_part, strict=True)
        ]
        return torch.cat(grown).index_select(0, order.to(x.device))

    def scale(self, box: slice) -> Scale:
        """The diagonal of O or I over the target range `box`; one number where it is constant."""
        scales = [_scale(axis_map, self.form) for axis_map in self.maps]
        if all(isinstance(scale, float) and scale == scales[0] for scale in scales):
            return scales[0]
        elements_by_part, order = _split_fused(box, len(scales), self.unit)
        pieces = [
            scale[elements] if isinstance(scale, Tensor) else torch.full(elements.shape, scale, dtype=torch.double)
            for scale, elements in zip(scales, elements_by_part, strict=True)
        ]
        return torch.cat(pieces)[order]


def grow_box(recipe: Recipe, name: str, source: Tensor, box: Box, quantity: Quantity = "value") -> Tensor:
    """The range `box` of the target parameter `name`; differentiable in the source and in dense maps.

    Args:
        recipe: gives the maps.
        name: of the target parameter.
        source: the whole source tensor [O, I] or [O], mixed over layers already.
        box: the wanted range of the target, one slice per dim, none empty.
        quantity: what the tensor is: the parameter, its gradient (or a mean of gradients), or the square of that.

    Returns:
        [R, C] or [R], in the source's dtype, or a wider one where it was computed in that.
    """
    dims = _dims(recipe, name, quantity)
    power = 2 if quantity == "squared_gradient" else 1
    scales = [dim.scale(part) for dim, part in zip(dims, box, strict=True)]
    factor = math.prod(s for s in scales if isinstance(s, float)) ** power
    wide = torch.promote_types(source.dtype, torch.float32)
    x = source if factor == 1 else source.to(wide) * factor
    for d in _cheaper_order(source, box):
        x = dims[d].spread(x, d, box[d])
    for d, scale in enumerate(scales):
        if isinstance(scale, Tensor):
            diagonal = scale.to(x.device, torch.promote_types(x.dtype, wide)) ** power
            x = x * (diagonal[:, None] if d < x.ndim - 1 else diagonal)
    return x


def uniform_scale(recipe: Recipe, name: str, quantity: Quantity) -> float | None:
    """What every entry of a parameter (or of its gradient) is multiplied by when copied; None where entries differ."""
    shape = shape_of(role_of(name), recipe.target)
    scales = [dim.scale(slice(0, size)) for dim, size in zip(_dims(recipe, name, quantity), shape, strict=True)]
    uniform = [scale for scale in scales if isinstance(scale, float)]
    return math.prod(uniform) if len(uniform) == len(scales) else None


def _dims(recipe: Recipe, name: str, quantity: Quantity) -> list[_Dim]:
    role, target = role_of(name), recipe.target
    forms = _forms(name, target)
    if quantity != "value":
        forms = tuple("in" if form == "out" else "out" for form in forms)
    axes, (out_maps, in_map) = recipe.axes_of(name), (role.out_maps, role.in_map)
    if "transform" in axes and name in after_transform(target):
        out_maps, in_map = (out_maps, "transform") if role.kind == "head" else (("transform",), in_map)
    dims = [_Dim(tuple(map(axes.get, out_maps)), forms[0], axis_unit(role.out, target))]
    if role.in_ is not None:
        dims.append(_Dim((axes.get(in_map),), forms[1], axis_unit(role.in_, target)))
    return dims


def _forms(name: str, model: ModelConfig) -> tuple[Form, ...]:
    """The form that acts on each dim of a parameter's value."""
    role = role_of(name)
    if role.kind in ("embedding", "positions", "token_types"):
        return "out", "out"
    last_norm = "final_norm." if model.is_causal else "mlm_head.norm."
    feeds_tied_head = model.tied_embeddings and name.startswith(last_norm)
    return "in" if feeds_tied_head else "out", "in"


def _spread(axis_map: AxisMap | None, x: Tensor, dim: int, elements: Elements) -> Tensor:
    if axis_map is not None:
        return axis_map.spread(x, dim, elements)
    return x[elements] if dim == 0 else x[:, elements]


def _scale(axis_map: AxisMap | None, form: Form) -> Scale:
    if axis_map is None:
        return 1.0
    return axis_map.out_scale if form == "out" else axis_map.in_scale


def _split_fused(box: slice, num_parts: int, unit: int) -> tuple[list[Tensor], Tensor]:
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


def _cheaper_order(source: Tensor, box: Box) -> list[int]:
    """Which dim to grow first: for [o, i] -> [r, c] rows first cost r·i·(o + c), columns first o·c·(i + r)."""
    return sorted(range(source.ndim), key=lambda d: 1 / source.shape[d] - 1 / (box[d].stop - box[d].start))
