"""PyTorch twins of growth's kernels: same names and parameters, on any device, in any dtype. `ops` is the door to both.

Legend: as in growth_ops.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def layer_mix(sources_JN: Tensor, weights_KJ: Tensor) -> Tensor:
    return weights_KJ @ sources_JN.to(weights_KJ.dtype)


@torch.no_grad()
def sparse_map_(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    rows_R: Tensor,
    columns_C: Tensor,
    row_scales_2R: Tensor,
    column_scales_2C: Tensor,
) -> None:
    """Scales are multiplied with one another first, so that a scale of 1 leaves the copies as they are."""
    is_new_RC = (rows_R < 0)[:, None] | (columns_C < 0)
    rows_R, columns_C = rows_R.clamp(min=0), columns_C.clamp(min=0)
    for i, (target_RC, source_AB) in enumerate(zip(targets, sources, strict=True)):
        which = min(i, 1)
        wide = torch.promote_types(source_AB.dtype, torch.float32)
        factor_RC = row_scales_2R[which, :, None].to(wide) * column_scales_2C[which].to(wide)
        factor_RC = factor_RC.square() if i == 2 else factor_RC
        copied_RC = source_AB.index_select(0, rows_R).index_select(1, columns_C).to(wide)
        target_RC.copy_((copied_RC * factor_RC).masked_fill_(is_new_RC, 0.0))


def dense_map(
    source_AB: Tensor, rows_RA: Tensor | None = None, columns_CB: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """In the cheaper of the two orders."""
    x = source_AB.to(next(x.dtype for x in (rows_RA, columns_CB, source_AB) if x is not None))
    if rows_RA is None or columns_CB is None:
        x = x if rows_RA is None else rows_RA @ x
        x = x if columns_CB is None else x @ columns_CB.T
    elif rows_first(source_AB, rows_RA, columns_CB):
        x = (rows_RA @ x) @ columns_CB.T
    else:
        x = rows_RA @ (x @ columns_CB.T)
    return x if scale == 1 else x * scale


def rows_first(source_AB: Tensor, rows_RA: Tensor, columns_CB: Tensor) -> bool:
    """Whether R·B·(A + C), the cost of growing rows first, is not more than A·C·(B + R)."""
    (A, B), R, C = source_AB.shape, len(rows_RA), len(columns_CB)
    return R * B * (A + C) <= A * C * (B + R)


@torch.no_grad()
def dense_map_(
    target_RC: Tensor,
    source_AB: Tensor,
    rows_RA: Tensor | None = None,
    columns_CB: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    target_RC.copy_(dense_map(source_AB, rows_RA, columns_CB, scale))


@torch.no_grad()
def dense_blocks_(
    target_RC: Tensor,
    source_AB: Tensor,
    new_rows_XA: Tensor | None = None,
    new_columns_YB: Tensor | None = None,
    first_row: int = 0,
    first_column: int = 0,
) -> None:
    x = source_AB.to(next(x.dtype for x in (new_rows_XA, new_columns_YB, source_AB) if x is not None))
    rows, new_rows = old_and_new(len(x), first_row, len(target_RC))
    columns, new_columns = old_and_new(x.shape[1], first_column, target_RC.shape[1])
    x_AC = x[:, columns]
    if new_columns_YB is not None:
        x_AC = torch.cat((x_AC, x @ new_columns_YB[new_columns].T), dim=1)
    num_old = rows.stop - rows.start
    target_RC[:num_old] = x_AC[rows]
    if new_rows_XA is not None:
        target_RC[num_old:] = new_rows_XA[new_rows] @ x_AC


def old_and_new(num_old: int, first: int, length: int) -> tuple[slice, slice]:
    """The parts of [first, first + length) before and after `num_old`; the second is counted from there."""
    last = first + length
    return (
        slice(min(first, num_old), min(last, num_old)),
        slice(max(first - num_old, 0), max(last - num_old, 0)),
    )
