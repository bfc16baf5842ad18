"""A range of a parameter whose entries are scaled copies of source entries, and of both its Adam moments with it.

Growth by copies (Net2Net, Chen et al., 2016; HyperCloning, Samragh et al., 2024): rows and columns are gathered, which
interleaves replicas and takes fused rows apart; values are scaled by r·c, first moments by their own r·c, second
moments by its square. Bytes in float32: 4 per entry read and 4 per entry written, of each of the three tensors, which
is the floor; rows that are copied often come from a cache, and so do indices and scales, once for several rows.

Legend: A, B = rows and columns of the source, R, C = of the target's range; 2 = (of values, of gradients).
Prefixes: i_ index, o_ offsets, p_ pointer, b_ values of a block, m_ mask.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagrow_kernels.launch import pick

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ROWS = 8  # of one program, which share what is read of the columns


def sparse_map_ref(
    sources: Sequence[Tensor], rows_R: Tensor, columns_C: Tensor, row_scales_2R: Tensor, column_scales_2C: Tensor
) -> list[Tensor]:
    """The definition, in the precision of its inputs."""
    factor_2RC = row_scales_2R[:, :, None] * column_scales_2C[:, None, :]
    is_old_RC = (rows_R >= 0)[:, None] & (columns_C >= 0)
    factors = factor_2RC[0], factor_2RC[1], factor_2RC[1] ** 2
    return [
        torch.where(is_old_RC, source_AB[rows_R][:, columns_C] * factor_RC, 0.0)
        for source_AB, factor_RC in zip(sources, factors, strict=False)
    ]


@triton.jit
def _write(p_source, p_target, o_from, o_c, m_from, m_c, b_factor):
    b_x = tl.load(p_source + o_from, mask=m_from, other=0.0).to(tl.float32) * b_factor
    tl.store(p_target + o_c, b_x.to(p_target.dtype.element_ty), mask=m_c)


@triton.jit(do_not_specialize=["R"])
def sparse_map_kernel(
    p_source,
    p_source_m,
    p_source_s,
    p_target,
    p_target_m,
    p_target_s,
    p_rows,
    p_columns,
    p_row_scales,
    p_column_scales,
    R,
    C,
    stride_source,
    stride_target,
    stride_target_m,
    stride_target_s,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_MOMENTS: tl.constexpr,
):
    """Grid (blocks of ROWS rows, blocks of columns); suffixes m, s: first and second moment."""
    i_first = tl.program_id(0).to(tl.int64) * ROWS
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o_from = tl.load(p_columns + o_c, mask=m_c, other=-1)
    m_old = o_from >= 0
    b_value = tl.load(p_column_scales + o_c, mask=m_c, other=0.0)
    if HAS_MOMENTS:
        b_gradient = tl.load(p_column_scales + C + o_c, mask=m_c, other=0.0)
    for i_r in range(i_first, tl.minimum(i_first + ROWS, R)):
        i_from = tl.load(p_rows + i_r).to(tl.int64)
        m_from = m_old & (i_from >= 0)
        i_at = i_from * stride_source
        b_factor = b_value * tl.load(p_row_scales + i_r)
        _write(p_source + i_at, p_target + i_r * stride_target, o_from, o_c, m_from, m_c, b_factor)
        if HAS_MOMENTS:
            b_factor = b_gradient * tl.load(p_row_scales + R + i_r)
            _write(p_source_m + i_at, p_target_m + i_r * stride_target_m, o_from, o_c, m_from, m_c, b_factor)
            b_factor = b_factor * b_factor
            _write(p_source_s + i_at, p_target_s + i_r * stride_target_s, o_from, o_c, m_from, m_c, b_factor)


def _check(targets, sources, rows_R, columns_C, row_scales_2R, column_scales_2C) -> None:
    if len(targets) not in (1, 3) or len(sources) != len(targets):
        raise ValueError(f"sparse_map_: {len(targets)} targets of {len(sources)} sources, must be 1 or 3 of as many")
    R, C = len(rows_R), len(columns_C)
    for name, tensors, shape in (("targets", targets, (R, C)), ("sources", sources, sources[0].shape)):
        for i, x in enumerate(tensors):
            if x.dtype not in DTYPES or x.dtype != tensors[0].dtype:
                raise ValueError(
                    f"sparse_map_: {name}[{i}] is {x.dtype}; all must be one of float16, bfloat16, float32"
                )
            if x.dim() != 2 or x.shape != shape:
                raise ValueError(f"sparse_map_: {name}[{i}] has shape {tuple(x.shape)}, must be {tuple(shape)}")
    if any(x.stride(1) != 1 and x.shape[1] > 1 for x in targets):
        raise ValueError("sparse_map_: a target's columns lie apart, only rows may")
    if rows_R.dtype != torch.int64 or columns_C.dtype != torch.int64:
        raise ValueError(f"sparse_map_: indices are {rows_R.dtype} and {columns_C.dtype}, must be torch.int64")
    if row_scales_2R.shape != (2, R) or column_scales_2C.shape != (2, C):
        shapes = tuple(row_scales_2R.shape), tuple(column_scales_2C.shape)
        raise ValueError(f"sparse_map_: scales have shapes {shapes[0]} and {shapes[1]}, must be {(2, R)} and {(2, C)}")


@torch.library.custom_op("megagrow_kernels::sparse_map_", mutates_args=("targets",))
def _sparse_map_(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    rows_R: Tensor,
    columns_C: Tensor,
    row_scales_2R: Tensor,
    column_scales_2C: Tensor,
) -> None:
    R, C = len(rows_R), len(columns_C)
    if R == 0 or C == 0:
        return
    launch = pick("sparse_map", C, targets[0].device)
    sources, targets = [x.contiguous() for x in sources], list(targets)
    has_moments = len(targets) == 3
    named = [*sources, *([None] * 2 if not has_moments else []), *targets, *([None] * 2 if not has_moments else [])]
    sparse_map_kernel[(triton.cdiv(R, ROWS), triton.cdiv(C, launch.block))](
        *named,
        rows_R.to(torch.int32),
        columns_C.to(torch.int32),
        row_scales_2R.to(torch.float32).contiguous(),
        column_scales_2C.to(torch.float32).contiguous(),
        R,
        C,
        sources[0].stride(0),
        *(x.stride(0) for x in (targets if has_moments else targets * 3)),
        BLOCK_C=launch.block,
        ROWS=ROWS,
        HAS_MOMENTS=has_moments,
        num_warps=launch.num_warps,
    )


@_sparse_map_.register_fake
def _(targets, sources, rows_R, columns_C, row_scales_2R, column_scales_2C):
    return None


@torch.no_grad()
def sparse_map_(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    rows_R: Tensor,
    columns_C: Tensor,
    row_scales_2R: Tensor,
    column_scales_2C: Tensor,
) -> None:
    """Writes target[r, c] = row_scale[r] · column_scale[c] · source[rows[r], columns[c]], and 0 where an index is -1.

    Args:
        targets: the weight, or the weight and both moments, all of one dtype.
        sources: likewise, whole.
        rows_R, columns_C: int64; each in the source's range, or -1: not checked.
        row_scales_2R, column_scales_2C: for values and for gradients.

    Raises:
        ValueError: a shape or dtype does not fit, in one line.
    """
    _check(targets, sources, rows_R, columns_C, row_scales_2R, column_scales_2C)
    _sparse_map_(targets, sources, rows_R, columns_C, row_scales_2R, column_scales_2C)
