"""Growth by dense maps, O·W·Iᵀ, written straight into a range of the target, and the gradients to O, I and W.

Wang et al., "Learning to Grow Pretrained Models" (2023, arXiv 2303.00980), Algorithm 1. Two products in the cheaper
order, of those rows of O and I only that the range needs; what stands between them has the source's size on one side.
With O = [I; C] the source is copied, and only new blocks are computed: C times the rows above, which are grown already.
Operands of any dtype are multiplied in float32.

Legend: A, B = rows and columns of the source, R, C = of the target's range, X, Y = new ones; M, N, K = of a product.
Prefixes: i_ index, o_ offsets, p_ pointer, b_ values of a block, m_ mask.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagrow_kernels.launch import DOT_PRECISION, pick

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BLOCK_M, BLOCK_K = 64, 32


def dense_map_ref(
    source_AB: Tensor, rows_RA: Tensor | None = None, columns_CB: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """The definition, in the precision of its inputs."""
    x = source_AB if rows_RA is None else rows_RA @ source_AB
    return scale * (x if columns_CB is None else x @ columns_CB.T)


@triton.jit
def product_kernel(
    p_a,
    p_b,
    p_c,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bn,
    stride_bk,
    stride_c,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """c[m, n] = scale · Σ_k a[m, k]·b[n, k]; grid (blocks of M, blocks of N)."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K).to(tl.int64)
    m_m, m_n = o_m < M, o_n < N
    p_rows, p_columns = p_a + o_m[:, None] * stride_am, p_b + o_n[None, :] * stride_bn
    b_c = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for i_k in range(0, K, BLOCK_K):
        m_k = o_k < K - i_k
        b_a = tl.load(p_rows + (i_k + o_k)[None, :] * stride_ak, mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_b = tl.load(p_columns + (i_k + o_k)[:, None] * stride_bk, mask=m_k[:, None] & m_n[None, :], other=0.0)
        b_c = tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), b_c, input_precision=PRECISION)
    p_out = p_c + o_m[:, None] * stride_c + o_n[None, :]
    tl.store(p_out, (b_c * scale).to(p_c.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


def _product_(c_MN: Tensor, a_MK: Tensor, b_NK: Tensor, scale: float = 1.0) -> Tensor:
    """Overwrites c, whose columns stand side by side, with scale·a·bᵀ; a and b may have any strides."""
    (M, N), K = c_MN.shape, a_MK.shape[1]
    if M == 0 or N == 0:
        return c_MN
    launch = pick("dense_map", N, c_MN.device)
    BLOCK_N = max(launch.block, 16)
    product_kernel[(triton.cdiv(M, BLOCK_M), triton.cdiv(N, BLOCK_N))](
        a_MK,
        b_NK,
        c_MN,
        M,
        N,
        K,
        *a_MK.stride(),
        *b_NK.stride(),
        c_MN.stride(0),
        scale,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        PRECISION=DOT_PRECISION,
        num_warps=launch.num_warps,
    )
    return c_MN


def _product(a_MK: Tensor, b_NK: Tensor, scale: float = 1.0) -> Tensor:
    """Likewise in new memory, in float32."""
    c_MN = torch.empty(len(a_MK), len(b_NK), dtype=torch.float32, device=a_MK.device)
    return _product_(c_MN, a_MK, b_NK, scale)


def _write_(
    target_RC: Tensor, source_AB: Tensor, rows_RA: Tensor | None, columns_CB: Tensor | None, scale: float
) -> None:
    if rows_RA is None:
        if columns_CB is None:
            target_RC.copy_(source_AB if scale == 1 else source_AB.float() * scale)
        else:
            _product_(target_RC, source_AB, columns_CB, scale)
    elif columns_CB is None:
        _product_(target_RC, rows_RA, source_AB.T, scale)
    elif _rows_first(source_AB, rows_RA, columns_CB):
        _product_(target_RC, _product(rows_RA, source_AB.T), columns_CB, scale)
    else:
        _product_(target_RC, rows_RA, _product(columns_CB, source_AB), scale)


def _rows_first(source_AB: Tensor, rows_RA: Tensor, columns_CB: Tensor) -> bool:
    (A, B), R, C = source_AB.shape, len(rows_RA), len(columns_CB)
    return R * B * (A + C) <= A * C * (B + R)


def _check(
    name: str, target_RC: Tensor | None, source_AB: Tensor, rows_RA: Tensor | None, columns_CB: Tensor | None
) -> None:
    given = {"target": target_RC, "source": source_AB, "rows": rows_RA, "columns": columns_CB}
    for key, x in given.items():
        if x is not None and (x.dtype not in DTYPES or x.dim() != 2):
            raise ValueError(
                f"{name}: {key} is {x.dtype} {tuple(x.shape)}, the kernel takes float16, bfloat16 or float32 matrices"
            )
    for key, x, size in (("rows", rows_RA, len(source_AB)), ("columns", columns_CB, source_AB.shape[1])):
        if x is not None and x.shape[1] != size:
            raise ValueError(f"{name}: {key} have shape {tuple(x.shape)}, the source needs (…, {size})")
    if target_RC is not None and target_RC.shape[1] > 1 and target_RC.stride(1) != 1:
        raise ValueError(f"{name}: the target's columns lie apart, only rows may")


def _check_range(name: str, target_RC: Tensor, *wanted: int) -> None:
    if target_RC.shape != wanted:
        raise ValueError(f"{name}: target has shape {tuple(target_RC.shape)}, the maps give {wanted}")


def _dtype(source_AB: Tensor, rows_RA: Tensor | None, columns_CB: Tensor | None) -> torch.dtype:
    return next(x.dtype for x in (rows_RA, columns_CB, source_AB) if x is not None)


def _size(source_AB: Tensor, rows_RA: Tensor | None, columns_CB: Tensor | None) -> tuple[int, int]:
    A, B = source_AB.shape
    return A if rows_RA is None else rows_RA.shape[0], B if columns_CB is None else columns_CB.shape[0]


@torch.library.custom_op("megagrow_kernels::dense_map", mutates_args=())
def _dense_map(source_AB: Tensor, rows_RA: Tensor | None, columns_CB: Tensor | None, scale: float) -> Tensor:
    given = source_AB, rows_RA, columns_CB
    target_RC = torch.empty(_size(*given), dtype=_dtype(*given), device=source_AB.device)
    _write_(target_RC, *given, scale)
    return target_RC


@torch.library.custom_op("megagrow_kernels::dense_map_", mutates_args=("target_RC",))
def _dense_map_(
    target_RC: Tensor, source_AB: Tensor, rows_RA: Tensor | None, columns_CB: Tensor | None, scale: float
) -> None:
    _write_(target_RC, source_AB, rows_RA, columns_CB, scale)


@torch.library.custom_op("megagrow_kernels::dense_map_backward", mutates_args=())
def _dense_map_backward(
    dtarget_RC: Tensor,
    source_AB: Tensor,
    rows_RA: Tensor | None,
    columns_CB: Tensor | None,
    scale: float,
    wants_source: bool,
    wants_rows: bool,
    wants_columns: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dW, dO, dI in float32; one that is not wanted has no elements."""
    dsource_AB, drows_RA, dcolumns_CB = (dtarget_RC.new_empty(0, dtype=torch.float32) for _ in range(3))
    if wants_rows or wants_source:
        by_columns_RB = dtarget_RC if columns_CB is None else _product(dtarget_RC, columns_CB.T)
    if wants_rows:
        drows_RA = _product(by_columns_RB, source_AB, scale)
    if wants_source and rows_RA is None:
        dsource_AB = by_columns_RB.float() * scale
    elif wants_source:
        assert rows_RA is not None
        dsource_AB = _product(rows_RA.T, by_columns_RB.T, scale)
    if wants_columns:
        by_rows_AC = dtarget_RC if rows_RA is None else _product(rows_RA.T, dtarget_RC.T)
        dcolumns_CB = _product(by_rows_AC.T, source_AB.T, scale)
    return dsource_AB, drows_RA, dcolumns_CB


@torch.library.custom_op("megagrow_kernels::dense_blocks_", mutates_args=("target_RC",))
def _dense_blocks_(
    target_RC: Tensor,
    source_AB: Tensor,
    new_rows_XA: Tensor | None,
    new_columns_YB: Tensor | None,
    first_row: int,
    first_column: int,
) -> None:
    (A, B), (R, C) = source_AB.shape, target_RC.shape
    rows, new_rows = _old_and_new(A, first_row, R)
    columns, new_columns = _old_and_new(B, first_column, C)
    num_rows, num_columns = rows.stop - rows.start, columns.stop - columns.start
    target_RC[:num_rows, :num_columns] = source_AB[rows, columns]
    has_new_rows = new_rows_XA is not None and new_rows.start < new_rows.stop
    if new_columns_YB is not None and new_columns.start < new_columns.stop:
        # All rows of the source where new ones are made of them: in the target already, if it holds them exactly.
        all_above = has_new_rows and not (num_rows == A and target_RC.dtype == torch.float32)
        above_AY = _product(source_AB, new_columns_YB[new_columns]) if all_above else None
        if above_AY is not None:
            target_RC[:num_rows, num_columns:] = above_AY[rows]
        else:
            above_AY = _product_(target_RC[:num_rows, num_columns:], source_AB[rows], new_columns_YB[new_columns])
        if new_rows_XA is not None and has_new_rows:
            _product_(target_RC[num_rows:, num_columns:], new_rows_XA[new_rows], above_AY.T)
    if new_rows_XA is not None and has_new_rows:
        _product_(target_RC[num_rows:, :num_columns], new_rows_XA[new_rows], source_AB[:, columns].T)


def _old_and_new(num_old: int, first: int, length: int) -> tuple[slice, slice]:
    """The parts of [first, first + length) before and after `num_old`; the second is counted from there."""
    last = first + length
    old = slice(min(first, num_old), min(last, num_old))
    return old, slice(max(first - num_old, 0), max(last - num_old, 0))


@_dense_map.register_fake
def _(source_AB: Tensor, rows_RA: Tensor | None, columns_CB: Tensor | None, scale: float) -> Tensor:
    given = source_AB, rows_RA, columns_CB
    return source_AB.new_empty(_size(*given), dtype=_dtype(*given))


@_dense_map_.register_fake
def _(target_RC, source_AB, rows_RA, columns_CB, scale):
    return None


@_dense_blocks_.register_fake
def _(target_RC, source_AB, new_rows_XA, new_columns_YB, first_row, first_column):
    return None


@_dense_map_backward.register_fake
def _(dtarget_RC, source_AB, rows_RA, columns_CB, scale, wants_source, wants_rows, wants_columns):
    wanted = (source_AB, wants_source), (rows_RA, wants_rows), (columns_CB, wants_columns)
    return tuple(dtarget_RC.new_empty(x.shape if wants else 0, dtype=torch.float32) for x, wants in wanted)


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, Tensor | None, Tensor | None, float], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dtarget_RC: Tensor) -> tuple[Tensor | None, ...]:
    given, wants = ctx.saved_tensors, ctx.needs_input_grad[:3]
    found = _dense_map_backward(dtarget_RC, *given, ctx.scale, *wants)
    return *(dx.to(x.dtype) if want else None for dx, x, want in zip(found, given, wants, strict=True)), None


_dense_map.register_autograd(_gradients, setup_context=_keep_inputs)


def dense_map(
    source_AB: Tensor, rows_RA: Tensor | None = None, columns_CB: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """scale · rows · source · columnsᵀ, in the maps' dtype.

    Args:
        source_AB: float16, bfloat16 or float32, any strides, as all others.
        rows_RA, columns_CB: rows of O and of I; None: that dim does not grow.
        scale: one number.

    Raises:
        ValueError: a shape or dtype does not fit, in one line.
    """
    _check("dense_map", None, source_AB, rows_RA, columns_CB)
    return _dense_map(source_AB, rows_RA, columns_CB, scale)


@torch.no_grad()
def dense_map_(
    target_RC: Tensor,
    source_AB: Tensor,
    rows_RA: Tensor | None = None,
    columns_CB: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """`dense_map` written into `target_RC`, whose rows may lie apart.

    Raises:
        ValueError: a shape or dtype does not fit, in one line.
    """
    _check("dense_map_", target_RC, source_AB, rows_RA, columns_CB)
    _check_range("dense_map_", target_RC, *_size(source_AB, rows_RA, columns_CB))
    _dense_map_(target_RC, source_AB, rows_RA, columns_CB, scale)


@torch.no_grad()
def dense_blocks_(
    target_RC: Tensor,
    source_AB: Tensor,
    new_rows_XA: Tensor | None = None,
    new_columns_YB: Tensor | None = None,
    first_row: int = 0,
    first_column: int = 0,
) -> None:
    """`dense_map_` with O = [I; new_rows] and I = [I; new_columns]: copies the source, computes the new blocks.

    Args:
        target_RC: the range of the target that begins at (first_row, first_column); its rows may lie apart.
        source_AB, new_rows_XA, new_columns_YB: as those of `dense_map`.
        first_row, first_column: where the range begins.

    Raises:
        ValueError: a shape or dtype does not fit, in one line.
    """
    _check("dense_blocks_", target_RC, source_AB, new_rows_XA, new_columns_YB)
    sizes = [
        size + (0 if new is None else len(new))
        for size, new in zip(source_AB.shape, (new_rows_XA, new_columns_YB), strict=True)
    ]
    ends = first_row + len(target_RC), first_column + target_RC.shape[1]
    if min(first_row, first_column) < 0 or any(end > size for end, size in zip(ends, sizes, strict=True)):
        raise ValueError(f"dense_blocks_: the range ends at {ends}, beyond the target's {tuple(sizes)}")
    _dense_blocks_(target_RC, source_AB, new_rows_XA, new_columns_YB, first_row, first_column)
