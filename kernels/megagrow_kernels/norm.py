"""RMSNorm and LayerNorm, with the residual addition that precedes them in a pre-norm block.

Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4; Ba, Kiros and Hinton, "Layer
Normalization" (2016), equations 3 and 4; eps stands inside the root in both.
Bytes per element with 2-byte activations: forward 4, with residual 8; backward 6, with residual 8, which is the floor.
What is kept is the input (or the sum) and per row 4 bytes, with a mean 8. Rows wider than a block of the backward
kernel, 8192, take two kernels there, since the means over a row come before the first of its gradients: x and dy are
read twice, 10 bytes, with residual 12.

Legend: T = rows (tokens), H = hidden size, G = programs that share the rows out among themselves,
S = statistics of a row: reciprocal deviation, and mean where rows are centred, P = weight, and bias if there is one.
Prefixes: i_ index, o_ offsets, p_ pointer, b_ values of a block, m_ mask.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagrow_kernels.launch import ANY, pick, row_programs, rows_at_once

MAX_HIDDEN_SIZE = ANY["norm_fwd"][-1].block
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Of a tensor's rows at once, up to which the backward kernel has the next ones on their way to shared memory while it
# works. Twice a larger block, of three tensors, would not fit into an A100.
MAX_PREFETCHED_BYTES = 16384


def norm_ref(
    x_TH: Tensor, weight_H: Tensor, bias_H: Tensor | None, eps: float, residual_TH: Tensor | None, centred: bool
) -> tuple[Tensor, Tensor]:
    """The definition, in the precision of its inputs: (normed sum, sum)."""
    sum_TH = x_TH if residual_TH is None else x_TH + residual_TH
    centred_TH = sum_TH - sum_TH.mean(-1, keepdim=True) if centred else sum_TH
    rstd_T1 = (centred_TH.square().mean(-1, keepdim=True) + eps).rsqrt()
    y_TH = centred_TH * rstd_T1 * weight_H
    return y_TH if bias_H is None else y_TH + bias_H, sum_TH


@triton.jit(do_not_specialize=["T"])
def norm_fwd_kernel(
    p_x,
    p_residual,
    p_weight,
    p_bias,
    p_y,
    p_sum,
    p_stats,
    eps,
    T,
    H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CENTRED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Program i does rows i * BLOCK_T and following."""
    S: tl.constexpr = 2 if CENTRED else 1
    i_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    # As wide as the block, so that parameters are loaded in its layout: else they change it in shared memory.
    o_h = tl.broadcast_to(tl.arange(0, BLOCK_H)[None, :], [BLOCK_T, BLOCK_H])
    m_t = i_t < T
    m_h = o_h < H
    m_th = m_t & m_h
    b_x = tl.load(p_x + i_t * H + o_h, mask=m_th, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        b_x += tl.load(p_residual + i_t * H + o_h, mask=m_th, other=0.0).to(tl.float32)
        b_sum = b_x.to(p_sum.dtype.element_ty)
        tl.store(p_sum + i_t * H + o_h, b_sum, mask=m_th)
        # Statistics of the rounded sum: it is all that the backward pass and the next block see.
        b_x = b_sum.to(tl.float32)
    if CENTRED:
        b_mean = tl.sum(b_x, axis=1, keep_dims=True) / H
        tl.store(p_stats + i_t * S + 1, b_mean, mask=m_t)
        b_x = tl.where(m_h, b_x - b_mean, 0.0)
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=1, keep_dims=True) / H + eps)
    tl.store(p_stats + i_t * S, b_rstd, mask=m_t)
    # Read only now, from the cache: held since the start, parameters would take the registers of wide rows.
    b_y = b_x * b_rstd * tl.load(p_weight + o_h, mask=m_h, other=0.0).to(tl.float32)
    if HAS_BIAS:
        b_y += tl.load(p_bias + o_h, mask=m_h, other=0.0).to(tl.float32)
    tl.store(p_y + i_t * H + o_h, b_y.to(p_y.dtype.element_ty), mask=m_th)


@triton.jit
def _both_means(b_a, b_b, H: tl.constexpr):
    """Means over the columns of two blocks [BLOCK_T, BLOCK_H], in one exchange between the warps."""
    b_a_mean, b_b_mean = tl.split(tl.sum(tl.join(b_a, b_b), axis=1) / H)
    return b_a_mean[:, None], b_b_mean[:, None]


@triton.jit
def norm_means_kernel(
    p_x,
    p_weight,
    p_stats,
    p_dy,
    p_means,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """Means of dxhat * xhat, and of dxhat, for rows wider than a block of the backward kernel; one row per program."""
    S: tl.constexpr = 2 if CENTRED else 1
    i_t = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)[:, None]
    b_rstd = tl.load(p_stats + i_t * S)
    b_product = tl.zeros([1, BLOCK_H], dtype=tl.float32)
    b_sum = tl.zeros([1, BLOCK_H], dtype=tl.float32)
    for i_h in range(0, H, BLOCK_H):
        o_h = i_h + tl.arange(0, BLOCK_H)[None, :]
        m_h = o_h < H
        b_x = tl.load(p_x + i_t * H + o_h, mask=m_h, other=0.0).to(tl.float32)
        b_dy = tl.load(p_dy + i_t * H + o_h, mask=m_h, other=0.0).to(tl.float32)
        if CENTRED:
            b_x -= tl.load(p_stats + i_t * S + 1)
        b_dxhat = b_dy * tl.load(p_weight + o_h, mask=m_h, other=0.0).to(tl.float32)
        b_product += b_dxhat * (b_x * b_rstd)
        if CENTRED:
            b_sum += b_dxhat
    if CENTRED:
        b_product_mean, b_mean = _both_means(b_product, b_sum, H)
        tl.store(p_means + i_t * S, b_product_mean)
        tl.store(p_means + i_t * S + 1, b_mean)
    else:
        tl.store(p_means + i_t * S, tl.sum(b_product, axis=1, keep_dims=True) / H)


@triton.jit(do_not_specialize=["T"])
def norm_bwd_kernel(
    p_x,
    p_weight,
    p_stats,
    p_means,
    p_dy,
    p_dsum,
    p_dx,
    p_dparams,
    T,
    H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CENTRED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DSUM: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """dx = rstd (dxhat - mean(dxhat) - xhat mean(dxhat xhat)) + dsum with dxhat = weight dy; no mean if not centred.

    Grid (G, column blocks): program (i_g, i_h) does row blocks i_g, i_g + G, ... of its columns. Loads of rows to come
    run past the stores of this one: dx may share memory with nothing that is read.
    """
    S: tl.constexpr = 2 if CENTRED else 1
    P: tl.constexpr = 2 if HAS_BIAS else 1
    i_g = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    m_h = o_h < H
    # As wide as the block, lest the loop take the layout that a single row has.
    o_weight = tl.broadcast_to(o_h, [BLOCK_T, BLOCK_H])
    b_weight = tl.load(p_weight + o_weight, mask=o_weight < H, other=0.0).to(tl.float32)
    b_dweight = tl.zeros([BLOCK_T, BLOCK_H], dtype=tl.float32)
    b_dbias = tl.zeros([BLOCK_T, BLOCK_H], dtype=tl.float32)
    for i_b in tl.range(i_g, tl.cdiv(T, BLOCK_T), tl.num_programs(0), num_stages=NUM_STAGES):
        i_t = i_b * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
        m_t = i_t < T
        m_th = m_t & m_h
        b_rstd = tl.load(p_stats + i_t * S, mask=m_t, other=0.0)
        b_dy = tl.load(p_dy + i_t * H + o_h, mask=m_th, other=0.0).to(tl.float32)
        b_x = tl.load(p_x + i_t * H + o_h, mask=m_th, other=0.0).to(tl.float32)
        if CENTRED:
            b_x -= tl.load(p_stats + i_t * S + 1, mask=m_t, other=0.0)
        b_xhat = b_x * b_rstd
        b_dweight += b_dy * b_xhat
        if HAS_BIAS:
            b_dbias += b_dy
        b_dx = b_dy * b_weight
        if H > BLOCK_H:
            b_product_mean = tl.load(p_means + i_t * S, mask=m_t, other=0.0)
            if CENTRED:
                b_dx -= tl.load(p_means + i_t * S + 1, mask=m_t, other=0.0)
        elif CENTRED:
            b_product_mean, b_mean = _both_means(b_dx * b_xhat, b_dx, H)
            b_dx -= b_mean
        else:
            b_product_mean = tl.sum(b_dx * b_xhat, axis=1, keep_dims=True) / H
        b_dx = (b_dx - b_xhat * b_product_mean) * b_rstd
        if HAS_DSUM:
            b_dx += tl.load(p_dsum + i_t * H + o_h, mask=m_th, other=0.0).to(tl.float32)
        tl.store(p_dx + i_t * H + o_h, b_dx.to(p_dx.dtype.element_ty), mask=m_th)
    tl.store(p_dparams + i_g * P * H + o_h, tl.sum(b_dweight, axis=0, keep_dims=True), mask=m_h)
    if HAS_BIAS:
        tl.store(p_dparams + (i_g * P + 1) * H + o_h, tl.sum(b_dbias, axis=0, keep_dims=True), mask=m_h)


def _check(name: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"{name}: x is {x.dtype}, the kernel takes float16, bfloat16 or float32")
    if x.dim() == 0:
        raise ValueError(f"{name}: x has no dimension, needs [..., H]")
    hidden_size = x.shape[-1]
    for argument, tensor in {"weight": weight, "bias": bias}.items():
        if tensor is not None and tensor.shape != (hidden_size,):
            raise ValueError(f"{name}: {argument} has shape {tuple(tensor.shape)}, x needs ({hidden_size},)")
    if not 0 < hidden_size <= MAX_HIDDEN_SIZE:
        raise ValueError(f"{name}: hidden size {hidden_size} lies outside the kernel's 1..{MAX_HIDDEN_SIZE}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"{name}: residual is {residual.dtype} {tuple(residual.shape)},"
            f" x is {x.dtype} {tuple(x.shape)}; both must agree"
        )


def num_stages(block_t: int, block_h: int, element_size: int) -> int:
    """Of the backward kernel's loop: with 3 it works on rows while the next are on their way to shared memory.

    With 2 all come through shared memory likewise, which spares registers, but one after the other.
    """
    return 3 if block_t * block_h * element_size <= MAX_PREFETCHED_BYTES else 2


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, the sum where there is a residual, statistics [T, S]."""
    H = x.shape[-1]
    T = x.numel() // H
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = None if residual is None else torch.empty_like(y)
    stats_TS = torch.empty(T, 1 + centred, dtype=torch.float32, device=x.device)
    launch = pick("norm_fwd", H, x.device)
    block_t = rows_at_once(launch)
    if T > 0:
        norm_fwd_kernel[(triton.cdiv(T, block_t),)](
            x.contiguous(),
            None if residual is None else residual.contiguous(),
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            y,
            total,
            stats_TS,
            eps,
            T,
            H=H,
            BLOCK_T=block_t,
            BLOCK_H=launch.block,
            CENTRED=centred,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            num_warps=launch.num_warps,
        )
    return y, total, stats_TS


@torch.library.custom_op("megagrow_kernels::norm", mutates_args=())
def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    y, _, stats_TS = _forward(x, None, weight, bias, eps, centred)
    return y, stats_TS


@torch.library.custom_op("megagrow_kernels::add_norm", mutates_args=())
def _add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y, total, stats_TS = _forward(x, residual, weight, bias, eps, centred)
    assert total is not None
    return y, total, stats_TS


@torch.library.custom_op("megagrow_kernels::norm_backward", mutates_args=())
def _norm_backward(
    x: Tensor, weight: Tensor, stats_TS: Tensor, dy: Tensor, dsum: Tensor | None, has_bias: bool
) -> tuple[Tensor, Tensor]:
    """dx [..., H], and in float32 the gradients of weight and bias [P, H]."""
    H = x.shape[-1]
    T, S = stats_TS.shape
    x, dy, weight = x.contiguous(), dy.contiguous(), weight.contiguous()
    launch = pick("norm_bwd", H, x.device)
    block_t, num_blocks = rows_at_once(launch), triton.cdiv(H, launch.block)
    G = row_programs(triton.cdiv(T, block_t), x.device, launch.num_warps)
    dx = torch.empty_like(x)
    dparams_GPH = torch.empty(G, 1 + has_bias, H, dtype=torch.float32, device=x.device)
    means_TS = _means(x, weight, stats_TS, dy) if num_blocks > 1 else None
    if T > 0:
        norm_bwd_kernel[(G, num_blocks)](
            x,
            weight,
            stats_TS,
            means_TS,
            dy,
            None if dsum is None else dsum.contiguous(),
            dx,
            dparams_GPH,
            T,
            H=H,
            BLOCK_T=block_t,
            BLOCK_H=launch.block,
            CENTRED=S == 2,
            HAS_BIAS=has_bias,
            HAS_DSUM=dsum is not None,
            NUM_STAGES=num_stages(block_t, launch.block, x.element_size()),
            num_warps=launch.num_warps,
        )
    return dx, dparams_GPH.sum(0)


def _means(x: Tensor, weight: Tensor, stats_TS: Tensor, dy: Tensor) -> Tensor:
    """What the backward kernel needs to know of rows wider than its block, like the statistics in shape."""
    T, S = stats_TS.shape
    H = x.shape[-1]
    means_TS = torch.empty_like(stats_TS)
    launch = pick("norm_bwd", H, x.device)
    if T > 0:
        norm_means_kernel[(T,)](
            x,
            weight,
            stats_TS,
            dy,
            means_TS,
            H=H,
            BLOCK_H=launch.block,
            CENTRED=S == 2,
            num_warps=launch.num_warps,
        )
    return means_TS


@_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    stats_TS = x.new_empty(x.numel() // x.shape[-1], 1 + centred, dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), stats_TS


@_add_norm.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    stats_TS = x.new_empty(x.numel() // x.shape[-1], 1 + centred, dtype=torch.float32)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, torch.empty_like(y), stats_TS


@_norm_backward.register_fake
def _(
    x: Tensor, weight: Tensor, stats_TS: Tensor, dy: Tensor, dsum: Tensor | None, has_bias: bool
) -> tuple[Tensor, Tensor]:
    dparams_PH = x.new_empty(1 + has_bias, x.shape[-1], dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), dparams_PH


def _keep(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stats_TS: Tensor) -> None:
    ctx.mark_non_differentiable(stats_TS)
    ctx.set_materialize_grads(False)  # an output that is not used has no gradient, rather than one of zeros
    ctx.save_for_backward(x, weight, stats_TS)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _keep_x(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _, _ = inputs
    _keep(ctx, x, weight, bias, output[1])


def _keep_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, weight, bias, _, _ = inputs
    _keep(ctx, output[1], weight, bias, output[2])


def _gradients(ctx: Any, dy: Tensor, dsum: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of x, weight and bias."""
    x, weight, stats_TS = ctx.saved_tensors
    has_bias = ctx.bias_dtype is not None
    dx, dparams_PH = _norm_backward(x, weight, stats_TS, dy, dsum, has_bias)
    return dx, dparams_PH[0].to(weight.dtype), dparams_PH[1].to(ctx.bias_dtype) if has_bias else None


def _norm_gradients(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None, None, None
    return *_gradients(ctx, dy, None), None, None


def _add_norm_gradients(ctx: Any, dy: Tensor | None, dsum: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:  # only the sum was used
        return dsum, dsum, None, None, None, None
    dx, dweight, dbias = _gradients(ctx, dy, dsum)
    return dx, dx, dweight, dbias, None, None


_norm.register_autograd(_norm_gradients, setup_context=_keep_x)
_add_norm.register_autograd(_add_norm_gradients, setup_context=_keep_sum)


def _normed(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None, centred: bool
) -> Tensor | tuple[Tensor, Tensor]:
    if residual is None:
        return _norm(x, weight, bias, eps, centred)[0]
    return _add_norm(x, residual, weight, bias, eps, centred)[:2]


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square norm over the last dimension, times `weight`; statistics in float32.

    Args:
        x: [..., H] float16, bfloat16 or float32 with H <= 32768; the output has its dtype.
        weight: [H], any floating dtype.
        eps: added to the mean square, inside the root.
        residual: like x; added to it before the norm.

    Returns:
        y of x's shape; with a residual the pair (y, x + residual).

    Raises:
        ValueError: a shape or dtype does not fit, in one line.
    """
    _check("rms_norm", x, weight, None, residual)
    return _normed(x, weight, None, eps, residual, centred=False)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer norm over the last dimension, times `weight`, plus `bias`; statistics in float32.

    Args:
        x: [..., H] float16, bfloat16 or float32 with H <= 32768; the output has its dtype.
        weight: [H], any floating dtype.
        bias: likewise, or None.
        eps: added to the variance, inside the root.
        residual: like x; added to it before the norm.

    Returns:
        y of x's shape; with a residual the pair (y, x + residual).

    Raises:
        ValueError: a shape or dtype does not fit, in one line.
    """
    _check("layer_norm", x, weight, bias, residual)
    return _normed(x, weight, bias, eps, residual, centred=True)
