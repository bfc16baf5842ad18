"""Growth's part of the door to the kernels: see `ops`, which hands it on. Plain local tensors; no process group.

Legend: J, K = source and target layers, N = elements of one leaf; A, B = rows and columns of a source matrix; R, C = of
the range of the target that is written; X, Y = new rows and columns; 2 = (of values, of gradients).
"""

from collections.abc import Sequence

from torch import Tensor

from megagrow import torch_growth_ops as twins
from megagrow.serving import kernels_for


def layer_mix(sources_JN: Tensor, weights_KJ: Tensor) -> Tensor:
    """Σ_j w_kj Θ_j of all target layers in one read of the sources; differentiable in both.

    Args:
        sources_JN: one leaf of every source layer.
        weights_KJ: of the wanted target layers; the result has their dtype.

    Returns:
        [K, N]
    """
    kernels = kernels_for("layer_mix", sources_JN)
    return twins.layer_mix(sources_JN, weights_KJ) if kernels is None else kernels.layer_mix(sources_JN, weights_KJ)


def sparse_map_(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    rows_R: Tensor,
    columns_C: Tensor,
    row_scales_2R: Tensor,
    column_scales_2C: Tensor,
) -> None:
    """Writes a range of a parameter whose entries are scaled copies, and of both its Adam moments with it.

        target[r, c] = row_scale[r] · column_scale[c] · source[rows[r], columns[c]]          0 where an index is -1

    The first moment takes the scales of gradients, the second their squares.

    Args:
        targets: [R, C] the weight, or the weight and both moments; overwritten. Rows may lie apart, columns not.
        sources: [A, B] likewise; whole.
        rows_R, columns_C: int64, the source's row and column of each target row and column.
        row_scales_2R, column_scales_2C: for values and for gradients.
    """
    kernels = kernels_for("sparse_map", targets[0])
    write = twins.sparse_map_ if kernels is None else kernels.sparse_map_
    write(targets, sources, rows_R, columns_C, row_scales_2R, column_scales_2C)


def dense_map(
    source_AB: Tensor, rows_RA: Tensor | None = None, columns_CB: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """scale · O·W·Iᵀ for a range of the rows of O and of those of I; differentiable in source and maps.

    Source: Wang et al., 2023 (arXiv 2303.00980), Algorithm 1.

    Args:
        source_AB: W.
        rows_RA: of O; None: the rows do not grow.
        columns_CB: rows of I, that is columns of the target; None: the columns do not grow.
        scale: one number.

    Returns:
        [R, C] in the maps' dtype.
    """
    kernels = kernels_for("dense_map", source_AB)
    grow = twins.dense_map if kernels is None else kernels.dense_map
    return grow(source_AB, rows_RA, columns_CB, scale)


def dense_map_(
    target_RC: Tensor,
    source_AB: Tensor,
    rows_RA: Tensor | None = None,
    columns_CB: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """`dense_map` written straight into a shard, which may have rows that lie apart and another dtype."""
    kernels = kernels_for("dense_map", target_RC)
    grow = twins.dense_map_ if kernels is None else kernels.dense_map_
    grow(target_RC, source_AB, rows_RA, columns_CB, scale)


def dense_blocks_(
    target_RC: Tensor,
    source_AB: Tensor,
    new_rows_XA: Tensor | None = None,
    new_columns_YB: Tensor | None = None,
    first_row: int = 0,
    first_column: int = 0,
) -> None:
    """`dense_map_` with O = [I; new_rows] and I = [I; new_columns]: the source is copied, only new blocks are computed.

        W           W Dᵀ
        C W         C W Dᵀ          C = new_rows, D = new_columns

    Source: the authors' code of LiGO (Wang et al., 2023), which learns C and D of each target layer.

    Args:
        target_RC: the range [first_row, first_row + R) x [first_column, first_column + C) of it.
        source_AB: W.
        new_rows_XA: C; None: the rows do not grow.
        new_columns_YB: D; None: the columns do not grow.
        first_row, first_column: where the range begins.
    """
    kernels = kernels_for("dense_map", target_RC)
    grow = twins.dense_blocks_ if kernels is None else kernels.dense_blocks_
    grow(target_RC, source_AB, new_rows_XA, new_columns_YB, first_row, first_column)
