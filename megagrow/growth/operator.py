"""One box of one grown parameter: O Θ Iᵀ for the rows and columns that a rank stores.

dims.py       which map acts on a dim, in which form
operator.py   copies, and what is new beside them; learned maps where no kernel serves
dense.py      learned maps by kernels
"""

# Shape suffix legend: R, C = rows and columns of the box; O, I = rows and columns of the source matrix.

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megagrow import ops
from megagrow.growth.dense import grown_densely, write_densely
from megagrow.growth.dims import Dim, Quantity, dims_of, has_new
from megagrow.growth.maps import NEW, DenseMap, ExtendedMap, SparseMap, replica_pairs
from megagrow.growth.noise import mean, normal, root_mean_square
from megagrow.growth.recipe import Recipe
from megagrow.model.transformer import initial_std
from megagrow.parallel.shards import Box
from megagrow.roles import role_of, shape_of

MAX_COPIED = 1 << 18  # entries that are copied at a time: they stay in a core's cache from step to step
MAX_RANDOM = 1 << 18  # random entries that are made at a time: their hashes stay in a cache


def grow_box(
    recipe: Recipe,
    name: str,
    source: Tensor,
    box: Box,
    quantity: Quantity = "value",
    origin: Sequence[int] = (0, 0),
    rms: float | None = None,
) -> Tensor:
    """The range `box` of the target parameter `name`; differentiable in the source and in dense maps.

    Args:
        recipe: gives the maps.
        name: of the target parameter.
        source: the source tensor [O, I] or [O], whole or from `origin` on, mixed over layers already; two layers' rows
            laid end to end where `recipe.reads_next`.
        box: the wanted range of the target, one slice per dim, none empty.
        quantity: what the tensor is: the parameter, its gradient (or a mean of gradients), or the square of that.
        origin: where `source` begins in the whole source tensor, if it is a part of that: rows, where `grows_by_rows`.
        rms: the whole source's root mean square, where `needs_rms`; None: it is taken here, of a whole source.

    Returns:
        [R, C] or [R], in the source's dtype, or a wider one where it was computed in that.
    """
    dims = dims_of(recipe, name, quantity)
    factor, diagonals = _scales(recipe, name, dims, box, quantity)
    seen = _seen_from(origin, box)
    grown = grown_densely(dims, source, seen, factor) if quantity == "value" else None
    if grown is not None:
        return _times(grown, diagonals)
    size = _size(recipe, name, dims, source, factor, quantity, rms)
    x = source = _scaled(source, factor)
    for d in _order(dims, source, box):
        x = dims[d].spread(x, d, seen[d])
    if quantity == "value" and _has_random(dims):
        x = _with_random(recipe, name, dims, size, x, box)
    x = _times(x, diagonals)
    if quantity == "value" and _takes_noise(recipe, dims):
        _add_noise(recipe, name, dims, size, x, box)
    return torch.zeros_like(x) if quantity == "value" and recipe.is_silent(name) else x


def write_box(
    recipe: Recipe,
    name: str,
    source: Tensor,
    box: Box,
    target: Tensor,
    quantity: Quantity = "value",
    origin: Sequence[int] = (0, 0),
    rms: float | None = None,
) -> None:
    """`grow_box` into `target`, without gradients. Copies come out bit for bit, in pieces of rows that stay in a cache.

    Args:
        recipe, name, source, box, quantity: as in `grow_box`.
        target: [R, C] or [R], overwritten.
        origin: as in `grow_box`; a part of what is copied holds `copied_box` at least.
        rms: as in `grow_box`; needed where `source` is not the whole source tensor.
    """
    dims = dims_of(recipe, name, quantity)
    factor, diagonals = _scales(recipe, name, dims, box, quantity)
    if not recipe.copies:
        is_plain = quantity == "value" and not any(each is not None for each in diagonals)
        if not (is_plain and write_densely(dims, source, _seen_from(origin, box), target, factor)):
            target.copy_(grow_box(recipe, name, source, box, quantity, origin, rms))
        return
    if quantity == "value" and recipe.is_silent(name):
        target.zero_()
        return
    indices = [dim.index(part) for dim, part in zip(dims, box, strict=True)]
    shifted = (torch.where(each == NEW, NEW, each - start) for each, start in zip(indices, origin, strict=False))
    rows_R, *columns = (index.to(source.device) for index in shifted)
    size = _size(recipe, name, dims, source, factor, quantity, rms)
    takes_noise = quantity == "value" and _takes_noise(recipe, dims)
    if takes_noise and target.dtype.itemsize < torch.float32.itemsize:  # rounded once, with the noise
        result, target = target, torch.empty_like(target, dtype=torch.float32)
    else:
        result = target
    averages = [dim.new == "average" for dim in dims]
    if target.ndim == 2 and not any(averages) and ops.serves("sparse_map", target):
        (columns_C,) = columns
        row_scales_2R, column_scales_2C = map(_doubled, diagonals, (rows_R, columns_C))
        ops.sparse_map_([target], [source], rows_R, columns_C, row_scales_2R * factor, column_scales_2C)
    else:
        _copy_pieces(source, target, rows_R, columns, factor, diagonals, averages)
    if quantity == "value" and _has_random(dims):
        dtype = source.dtype if factor == 1 else torch.promote_types(source.dtype, torch.float32)
        _write_random(recipe, name, dims, size, target, box, dtype, diagonals)
    if takes_noise:
        _add_noise(recipe, name, dims, size, target, box)
    if result is not target:
        result.copy_(target)


def _seen_from(origin: Sequence[int], box: Box) -> Box:
    """A box as counted from an origin."""
    return tuple(slice(each.start - start, each.stop - start) for each, start in zip(box, origin, strict=False))


def _copy_pieces(
    source: Tensor,
    target: Tensor,
    rows_R: Tensor,
    columns: Sequence[Tensor],
    factor: float,
    diagonals: list[Tensor | None],
    averages: list[bool],
) -> None:
    """Copies, and means of the source's elements, into the target; all other new entries become 0."""
    is_scaled = any(each is not None for each in diagonals)
    rest_1C = None
    if averages[0] and (rows_R == NEW).any():
        rest_1C = mean(_scaled(source, factor), 0)
    step = max(1, MAX_COPIED // math.prod(target.shape[1:]))
    for start in range(0, len(rows_R), step):
        piece = slice(start, start + step)
        x = _scaled(_gathered(source, 0, rows_R[piece]), factor)
        if rest_1C is not None:
            x[rows_R[piece] == NEW] = rest_1C
        if columns and not is_scaled and _can_take(target[piece], x, columns[0]):
            torch.index_select(x, 1, columns[0], out=target[piece])
            continue
        for columns_C in columns:
            rest_R1 = mean(x, 1) if averages[1] and (columns_C == NEW).any() else None
            x = _gathered(x, 1, columns_C)
            if rest_R1 is not None:
                x[:, columns_C == NEW] = rest_R1
        of_rows, *others = diagonals
        target[piece] = _times(x, [None if of_rows is None else of_rows[piece], *others])


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x.to(torch.promote_types(x.dtype, torch.float32)) * factor


def copied_box(recipe: Recipe, name: str, box: Box, quantity: Quantity = "value") -> Box:
    """The smallest box of the source parameter that the range `box` of the target parameter needs.

    It is the whole where rows come from two layers; where new elements are means, the whole of their dim.
    """
    dims, whole = dims_of(recipe, name, quantity), shape_of(role_of(name), recipe.source)
    if recipe.reads_next(name):
        return tuple(slice(0, size) for size in whole)
    indices = [dim.index(part) for dim, part in zip(dims, box, strict=True)]
    return tuple(
        slice(0, size) if dim.new == "average" and (index == NEW).any() else _hull(index[index != NEW])
        for dim, index, size in zip(dims, indices, whole, strict=True)
    )


def grows_by_rows(recipe: Recipe, name: str) -> bool:
    """Whether each row of a target parameter is made of the row of the source parameter in the same place alone.

    Random entries of a row also need their place, and how large the whole source parameter is.
    """
    return dims_of(recipe, name, "value")[0].maps == (None,)


def needs_rms(recipe: Recipe, name: str) -> bool:
    """Whether random numbers in a target parameter are as large as all of its source."""
    return _draws_as_large(recipe, dims_of(recipe, name, "value"))


def has_random_entries(recipe: Recipe, name: str) -> bool:
    """Whether some entries of a target parameter have no source and become random."""
    return _has_random(dims_of(recipe, name, "value"))


def uniform_scale(recipe: Recipe, name: str, quantity: Quantity) -> float | None:
    """What every entry of a parameter (or of its gradient) is multiplied by when copied; None where entries differ."""
    shape = shape_of(role_of(name), recipe.target)
    scales = [dim.scale(slice(0, size)) for dim, size in zip(dims_of(recipe, name, quantity), shape, strict=True)]
    uniform = [scale for scale in scales if isinstance(scale, float)]
    return math.prod(uniform) * _gain_factor(recipe, name, quantity) if len(uniform) == len(scales) else None


def _gain_factor(recipe: Recipe, name: str, quantity: Quantity) -> float:
    """What a norm's gains (their gradients: the inverse) are multiplied by beside the scales of their axis."""
    if not recipe.scales_gain(name):
        return 1.0
    return recipe.norm_scale if quantity == "value" else 1 / recipe.norm_scale


def _scales(
    recipe: Recipe, name: str, dims: Sequence[Dim], box: Box, quantity: Quantity
) -> tuple[float, list[Tensor | None]]:
    """What all entries of a box are multiplied by, and what those of each row and column besides."""
    power = 2 if quantity == "squared_gradient" else 1
    scales = [dim.scale(part) for dim, part in zip(dims, box, strict=True)]
    factor = math.prod(s for s in scales if isinstance(s, float)) * _gain_factor(recipe, name, quantity)
    return factor**power, [scale**power if isinstance(scale, Tensor) else None for scale in scales]


def _times(x: Tensor, diagonals: list[Tensor | None]) -> Tensor:
    """x with its rows and columns scaled."""
    for d, diagonal in enumerate(diagonals):
        if diagonal is not None:
            scale = diagonal.to(x.device, torch.promote_types(x.dtype, torch.float32))
            x = x * (scale[:, None] if d < x.ndim - 1 else scale)
    return x


def _doubled(diagonal: Tensor | None, index: Tensor) -> Tensor:
    """[2, T] a diagonal as `ops.sparse_map_` takes it: twice, for values and for gradients."""
    scale = torch.ones(len(index)) if diagonal is None else diagonal.float()
    return scale.to(index.device).expand(2, -1)


def _gathered(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """Rows or columns of x, 0 where there are none."""
    is_new = index == NEW
    if not is_new.any():
        return x.index_select(dim, index)
    if is_new.all():  # x may have none at all then
        shape = list(x.shape)
        shape[dim] = len(index)
        return x.new_zeros(shape)
    return x.index_select(dim, index.clamp(min=0)).index_fill(dim, torch.where(is_new)[0], 0)


def _can_take(target: Tensor, x: Tensor, index: Tensor) -> bool:
    """Whether columns of x can be gathered straight into the target."""
    return target.is_contiguous() and target.dtype == x.dtype and not (index == NEW).any()


def _draws_as_large(recipe: Recipe, dims: Sequence[Dim]) -> bool:
    return _takes_noise(recipe, dims) or (recipe.fill.std == "source" and _has_random(dims))


def _size(
    recipe: Recipe,
    name: str,
    dims: Sequence[Dim],
    source: Tensor,
    factor: float,
    quantity: Quantity,
    rms: float | None,
) -> float:
    """The root mean square of the scaled source, if random numbers are drawn in that size."""
    if quantity != "value" or not _draws_as_large(recipe, dims):
        return 0.0
    if rms is None:
        assert tuple(source.shape) == shape_of(role_of(name), recipe.source), (
            "a part does not say how large the whole is"
        )
        rms = root_mean_square(source)
    return factor * rms


def _takes_noise(recipe: Recipe, dims: Sequence[Dim]) -> bool:
    """Whether noise tells replicated columns of a parameter apart."""
    return recipe.noise > 0 and len(dims) == 2 and dims[1].form == "in" and isinstance(dims[1].maps[0], SparseMap)


def _has_random(dims: Sequence[Dim]) -> bool:
    return any(dim.new == "free" and any(map(has_new, dim.maps)) for dim in dims)


def _hull(index: Tensor) -> slice:
    """The smallest range that holds all of an index."""
    if len(index) == 0:
        return slice(0, 0)
    first, last = index.aminmax()
    return slice(int(first), int(last) + 1)


def _with_random(recipe: Recipe, name: str, dims: Sequence[Dim], size: float, x: Tensor, box: Box) -> Tensor:
    """x with random entries where all new dims are free."""
    learned = recipe.fill_scales is not None
    filled = torch.zeros_like(x) if learned else x
    for piece, wanted_RC, random_RC in _random_pieces(recipe, name, dims, size, box, x.dtype, x.device):
        filled[piece] = torch.where(wanted_RC, random_RC, filled[piece])
    return torch.addcmul(x, filled, recipe.fill_scale(name).to(x)) if learned else filled


def _write_random(
    recipe: Recipe,
    name: str,
    dims: Sequence[Dim],
    size: float,
    target: Tensor,
    box: Box,
    dtype: torch.dtype,
    diagonals: list[Tensor | None],
) -> None:
    """Random entries into a target that has all others."""
    of_rows, *others = diagonals
    for piece, wanted_RC, random_RC in _random_pieces(recipe, name, dims, size, box, dtype, target.device):
        scaled_RC = _times(random_RC, [None if of_rows is None else of_rows[piece], *others])
        target[piece] = torch.where(wanted_RC, scaled_RC.to(target.dtype), target[piece])


def _random_pieces(
    recipe: Recipe, name: str, dims: Sequence[Dim], size: float, box: Box, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of a box that have random entries: where they are in it, which entries these are, and what they are."""
    new_R, new_C = (dim.is_new(part).to(device) for dim, part in zip(dims, box, strict=True))
    if not (new_R.any() or new_C.any()):
        return
    std = initial_std(role_of(name), recipe.target) if recipe.fill.std == "initial" else size
    may_R, may_C = (~new | (dim.new == "free") for dim, new in zip(dims, (new_R, new_C), strict=True))
    columns_C = torch.arange(box[1].start, box[1].stop, device=device)
    for piece, rows_R in _pieces(box, device):
        wanted_RC = (new_R[piece, None] | new_C) & may_R[piece, None] & may_C
        if wanted_RC.any():
            random_RC = normal(recipe.seed, name, rows_R, columns_C, _num_columns(recipe, name))
            yield piece, wanted_RC, random_RC.to(dtype) * (std * recipe.fill.ratio)


def _add_noise(recipe: Recipe, name: str, dims: Sequence[Dim], size: float, x: Tensor, box: Box) -> None:
    """Adds noise that cancels between pairs of replicated columns."""
    copies = dims[1].maps[0]
    assert isinstance(copies, SparseMap), "see `_takes_noise`"
    first_C, sign_C = (pair_T[box[1]].to(x.device) for pair_T in replica_pairs(copies.index))
    size *= recipe.noise  # which has the scale already, unless columns differ in it
    size *= float(copies.in_scale.mean()) if isinstance(copies.in_scale, Tensor) else 1.0
    for piece, rows_R in _pieces(box, x.device):
        noise_RC = normal(recipe.seed, f"{name}.replicas", rows_R, first_C, _num_columns(recipe, name))
        x[piece] += noise_RC.to(x.dtype) * (sign_C * size)


def _pieces(box: Box, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a box in pieces of bounded size: where they are in it, and their global numbers."""
    num_rows, num_columns = (part.stop - part.start for part in box)
    step = max(1, MAX_RANDOM // num_columns)
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        yield slice(start, stop), torch.arange(box[0].start + start, box[0].start + stop, device=device)


def _num_columns(recipe: Recipe, name: str) -> int:
    return shape_of(role_of(name), recipe.target)[-1]


def _order(dims: Sequence[Dim], source: Tensor, box: Box) -> list[int]:
    """Which dim to grow first: of copies the rows, whatever the box, since means of means depend on it.

    Of learned maps the cheaper: for [o, i] -> [r, c] rows first cost r·i·(o + c), columns first o·c·(i + r).
    """
    if not any(isinstance(axis_map, DenseMap | ExtendedMap) for dim in dims for axis_map in dim.maps):
        return list(range(source.ndim))
    return sorted(range(source.ndim), key=lambda d: 1 / source.shape[d] - 1 / (box[d].stop - box[d].start))
