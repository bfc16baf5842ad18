"""Boxes of matrices that grow by learned maps, by the kernels of dense products where these serve.

    grown_densely     O Θ Iᵀ with its gradients; in `tied` and `source_layer` every row is learned
    write_densely     the same straight into a shard, and [I; C], of which only the new blocks are computed

Rows whose parts are fused (gate and up by neuron) are every other row of the target: each part is a product of its own.
"""

# Shape suffix legend: A, B = rows and columns of the source matrix; R, C = of the box; P = fused parts.

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from megagrow import ops
from megagrow.growth.dims import Dim, split_fused
from megagrow.growth.maps import AxisMap, DenseMap, ExtendedMap
from megagrow.parallel.shards import Box


def grown_densely(dims: Sequence[Dim], source: Tensor, box: Box, scale: float) -> Tensor | None:
    """A box of scale · O Θ Iᵀ, differentiable in O, Θ and I; None where the maps are others, or no kernel serves.

    Args:
        dims: of the parameter.
        source: [A, B] the whole source matrix.
        box: the wanted range of the target.
        scale: one number.
    """
    if not _is_served(dims, source, _is_dense):
        return None
    rows, (columns,) = dims[0], dims[1].maps
    source_AB, columns_CB = _only(source, 1, columns, box[1]), _matrix(columns, box[1], source)
    elements_by_part, order = split_fused(box[0], len(rows.maps), rows.unit)
    grown = []
    for axis_map, part_AB, elements in zip(rows.maps, _parts(rows, source_AB), elements_by_part, strict=True):
        rows_RA = _matrix(axis_map, elements, source)
        grown.append(ops.dense_map(_only(part_AB, 0, axis_map, elements), rows_RA, columns_CB, scale))
    return grown[0] if len(grown) == 1 else torch.cat(grown).index_select(0, order.to(source.device))


def write_densely(dims: Sequence[Dim], source: Tensor, box: Box, target: Tensor, scale: float) -> bool:
    """A box of scale · O Θ Iᵀ into `target` [R, C], without gradients; False where nothing was written.

    Args:
        dims, source, box, scale: as in `grown_densely`; learned rows may also be those of [I; C] in this order.
    """
    if target.ndim != 2 or len(dims[0].maps) > 1 < dims[0].unit:  # parts whose rows are not evenly apart
        return False
    is_product = _is_served(dims, source, _is_dense)
    if not is_product and not (scale == 1 and _is_served(dims, source, _is_appended)):
        return False
    (column_map,), columns = dims[1].maps, box[1]
    for row_map, part_AB, rows, piece in _targets(dims[0], source, box[0], target):
        if is_product:
            part_AB = _only(_only(part_AB, 0, row_map, rows), 1, column_map, columns)
            maps = _matrix(row_map, rows, source), _matrix(column_map, columns, source)
            ops.dense_map_(piece, part_AB, *maps, scale)
        else:
            new = _matrix(row_map, slice(None), source), _matrix(column_map, slice(None), source)
            ops.dense_blocks_(piece, part_AB, *new, rows.start, columns.start)
    return True


def _is_served(dims: Sequence[Dim], source: Tensor, serves: Callable[[AxisMap], bool]) -> bool:
    maps = [axis_map for dim in dims for axis_map in dim.maps if axis_map is not None]
    return bool(maps) and source.ndim == 2 and all(map(serves, maps)) and ops.serves("dense_map", source)


def _is_dense(axis_map: AxisMap) -> bool:
    return isinstance(axis_map, DenseMap)


def _is_appended(axis_map: AxisMap) -> bool:
    return isinstance(axis_map, ExtendedMap) and axis_map.is_appended and not axis_map.has_new


def _parts(rows: Dim, source_AB: Tensor) -> Sequence[Tensor]:
    if len(rows.maps) == 1:
        return [source_AB]
    return [part.flatten(0, 1) for part in source_AB.unflatten(0, (-1, len(rows.maps), rows.unit)).unbind(1)]


def _targets(
    dim: Dim, source: Tensor, rows: slice, target: Tensor
) -> Iterator[tuple[AxisMap | None, Tensor, slice, Tensor]]:
    """For each fused part its map, its rows of the source, the range of its rows in the box, and where they go."""
    num_parts = len(dim.maps)
    for part, (axis_map, part_AB) in enumerate(zip(dim.maps, _parts(dim, source), strict=True)):
        first = (part - rows.start) % num_parts
        start = (rows.start + first) // num_parts
        piece = target[first::num_parts]
        yield axis_map, part_AB, slice(start, start + len(piece)), piece


def _matrix(axis_map: AxisMap | None, elements: Tensor | slice, source: Tensor) -> Tensor | None:
    """Learned rows of a map where the source is: of all elements, or of new ones alone."""
    if axis_map is None:
        return None
    assert isinstance(axis_map, DenseMap | ExtendedMap)
    return axis_map.matrix.to(source.device)[elements]


def _only(source: Tensor, dim: int, axis_map: AxisMap | None, elements: Tensor | slice) -> Tensor:
    """The rows or columns of a source that are wanted, of an axis that does not grow."""
    if axis_map is not None:
        return source
    return source[elements] if dim == 0 else source[:, elements]
