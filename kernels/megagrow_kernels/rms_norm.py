"""RMSNorm, with the residual addition that precedes it in a pre-norm block.

Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4, with eps inside the
root as in Llama.
Bytes per element with 2-byte activations: forward 4, with residual 8; backward 6, with residual 8.

Legend: T = rows (tokens), H = hidden size, G = programs that share the rows out among themselves.
Prefixes: i_ index, o_ offsets, p_ pointer, b_ values of a block, m_ mask.
"""

import torch
import triton
import triton.language as tl

from megagrow_kernels.launch import ANY, pick, row_programs

MAX_HIDDEN_SIZE = ANY["rms_norm_fwd"][-1].block
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def rms_norm_ref(
    x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, residual_TH: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, in the precision of its inputs: (normed and weighted sum, sum)."""
    sum_TH = x_TH if residual_TH is None else x_TH + residual_TH
    rstd_T1 = (sum_TH.square().mean(-1, keepdim=True) + eps).rsqrt()
    return sum_TH * rstd_T1 * weight_H, sum_TH


@triton.jit
def rms_norm_fwd_kernel(
    p_x,
    p_residual,
    p_weight,
    p_y,
    p_sum,
    p_rstd,
    eps,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, BLOCK_H)
    m_h = o_h < H
    b_x = tl.load(p_x + i_t * H + o_h, mask=m_h, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        b_x += tl.load(p_residual + i_t * H + o_h, mask=m_h, other=0.0).to(tl.float32)
        b_sum = b_x.to(p_sum.dtype.element_ty)
        tl.store(p_sum + i_t * H + o_h, b_sum, mask=m_h)
        # Statistics of the rounded sum: it is all that the backward pass and the next block see.
        b_x = b_sum.to(tl.float32)
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=0) / H + eps)
    b_weight = tl.load(p_weight + o_h, mask=m_h, other=0.0).to(tl.float32)
    tl.store(p_rstd + i_t, b_rstd)
    tl.store(p_y + i_t * H + o_h, (b_x * b_rstd * b_weight).to(p_y.dtype.element_ty), mask=m_h)


@triton.jit
def rms_norm_dot_kernel(
    p_x,
    p_weight,
    p_rstd,
    p_dy,
    p_dot,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Mean of (weight * dy) * (x * rstd), for rows wider than a block of the backward kernel."""
    i_t = tl.program_id(0).to(tl.int64)
    b_dot = tl.zeros([BLOCK_H], dtype=tl.float32)
    for i_h in range(0, H, BLOCK_H):
        o_h = i_h + tl.arange(0, BLOCK_H)
        m_h = o_h < H
        b_x = tl.load(p_x + i_t * H + o_h, mask=m_h, other=0.0).to(tl.float32)
        b_dy = tl.load(p_dy + i_t * H + o_h, mask=m_h, other=0.0).to(tl.float32)
        b_weight = tl.load(p_weight + o_h, mask=m_h, other=0.0).to(tl.float32)
        b_dot += b_weight * b_dy * b_x
    b_rstd = tl.load(p_rstd + i_t)
    tl.store(p_dot + i_t, tl.sum(b_dot, axis=0) * b_rstd / H)


@triton.jit(do_not_specialize=["T"])
def rms_norm_bwd_kernel(
    p_x,
    p_weight,
    p_rstd,
    p_dot,
    p_dy,
    p_dsum,
    p_dx,
    p_dweight,
    T,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HAS_DSUM: tl.constexpr,
):
    """Grid (G, column blocks): program (i_g, i_h) does rows i_g, i_g + G, ... of its block."""
    ONE_BLOCK: tl.constexpr = H <= BLOCK_H
    i_g = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_h = o_h < H
    b_weight = tl.load(p_weight + o_h, mask=m_h, other=0.0).to(tl.float32)
    b_dweight = tl.zeros([BLOCK_H], dtype=tl.float32)
    for i_t in range(i_g, T, tl.num_programs(0)):
        b_rstd = tl.load(p_rstd + i_t)
        b_dy = tl.load(p_dy + i_t * H + o_h, mask=m_h, other=0.0).to(tl.float32)
        b_xhat = tl.load(p_x + i_t * H + o_h, mask=m_h, other=0.0).to(tl.float32) * b_rstd
        b_dxhat = b_dy * b_weight
        b_dweight += b_dy * b_xhat
        b_dot = tl.sum(b_dxhat * b_xhat, axis=0) / H if ONE_BLOCK else tl.load(p_dot + i_t)
        b_dx = (b_dxhat - b_xhat * b_dot) * b_rstd
        if HAS_DSUM:
            b_dx += tl.load(p_dsum + i_t * H + o_h, mask=m_h, other=0.0).to(tl.float32)
        tl.store(p_dx + i_t * H + o_h, b_dx.to(p_dx.dtype.element_ty), mask=m_h)
    tl.store(p_dweight + i_g * H + o_h, b_dweight, mask=m_h)


def _check(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> None:
    hidden_size = x.shape[-1]
    if weight.shape != (hidden_size,):
        raise ValueError(f"rms_norm: weight has shape {tuple(weight.shape)}, x needs ({hidden_size},)")
    if hidden_size > MAX_HIDDEN_SIZE:
        raise ValueError(f"rms_norm: hidden size {hidden_size} exceeds the kernel's {MAX_HIDDEN_SIZE}")
    if x.dtype not in DTYPES:
        raise ValueError(f"rms_norm: x is {x.dtype}, the kernel takes float16, bfloat16 or float32")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"rms_norm: residual is {residual.dtype} {tuple(residual.shape)},"
            f" x is {x.dtype} {tuple(x.shape)}; both must agree"
        )


def _forward(
    x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, residual_TH: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    T, H = x_TH.shape
    y_TH = torch.empty_like(x_TH)
    sum_TH = x_TH if residual_TH is None else torch.empty_like(x_TH)
    rstd_T = torch.empty(T, dtype=torch.float32, device=x_TH.device)
    launch = pick("rms_norm_fwd", H, x_TH.device)
    if T > 0:
        rms_norm_fwd_kernel[(T,)](
            x_TH,
            residual_TH,
            weight_H,
            y_TH,
            sum_TH,
            rstd_T,
            eps,
            H=H,
            BLOCK_H=launch.block,
            HAS_RESIDUAL=residual_TH is not None,
            num_warps=launch.num_warps,
        )
    return y_TH, sum_TH, rstd_T


def _backward(
    x_TH: torch.Tensor,
    weight_H: torch.Tensor,
    rstd_T: torch.Tensor,
    dy_TH: torch.Tensor,
    dsum_TH: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    T, H = x_TH.shape
    launch = pick("rms_norm_bwd", H, x_TH.device)
    num_blocks = triton.cdiv(H, launch.block)
    G = row_programs(T, x_TH.device)
    dx_TH = torch.empty_like(x_TH)
    dweight_GH = torch.empty(G, H, dtype=torch.float32, device=x_TH.device)
    dot_T = None
    if T > 0 and num_blocks > 1:
        dot_T = torch.empty_like(rstd_T)
        rms_norm_dot_kernel[(T,)](
            x_TH,
            weight_H,
            rstd_T,
            dy_TH,
            dot_T,
            H=H,
            BLOCK_H=launch.block,
            num_warps=launch.num_warps,
        )
    if T > 0:
        rms_norm_bwd_kernel[(G, num_blocks)](
            x_TH,
            weight_H,
            rstd_T,
            dot_T,
            dy_TH,
            dsum_TH,
            dx_TH,
            dweight_GH,
            T,
            H=H,
            BLOCK_H=launch.block,
            HAS_DSUM=dsum_TH is not None,
            num_warps=launch.num_warps,
        )
    return dx_TH, dweight_GH.sum(0).to(weight_H.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, residual):
        ctx.set_materialize_grads(False)
        x_TH = x.reshape(-1, x.shape[-1]).contiguous()
        residual_TH = None if residual is None else residual.reshape(x_TH.shape).contiguous()
        y_TH, sum_TH, rstd_T = _forward(x_TH, weight.contiguous(), eps, residual_TH)
        ctx.save_for_backward(sum_TH, weight, rstd_T)
        if residual is None:
            return y_TH.view(x.shape)
        return y_TH.view(x.shape), sum_TH.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dsum=None):
        if dy is None:  # only the sum was used
            return dsum, None, None, dsum
        sum_TH, weight, rstd_T = ctx.saved_tensors
        dy_TH = dy.reshape(sum_TH.shape).contiguous()
        dsum_TH = None if dsum is None else dsum.reshape(sum_TH.shape).contiguous()
        dx_TH, dweight_H = _backward(sum_TH, weight.contiguous(), rstd_T, dy_TH, dsum_TH)
        dx = dx_TH.view(dy.shape)
        return dx, dweight_H, None, dx if ctx.needs_input_grad[3] else None


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
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
    _check(x, weight, residual)
    return _RMSNorm.apply(x, weight, eps, residual)
