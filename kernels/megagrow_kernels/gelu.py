"""GELU of x + bias in its tanh approximation, and its gradients.

Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016), section 2: x / 2 (1 + tanh(√(2/π) (x + 0.044715 x³))).
Bytes per element with 2-byte activations: forward 4, backward 6, which is the floor: x is all that is kept. The
gradient of the bias comes out of the same pass, as partial sums.

Legend: T = rows (tokens), F = features, G = programs that share the rows of a block of columns out among themselves.
Prefixes: i_ index, o_ offsets, p_ pointer, b_ values of a block, m_ mask.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagrow_kernels.launch import column_programs, pick

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def bias_gelu_ref(x_TF: Tensor, bias_F: Tensor | None) -> Tensor:
    """The definition, in the precision of its inputs, with (1 + tanh z) / 2 = sigmoid(2 z), which does not cancel."""
    u_TF = x_TF if bias_F is None else x_TF + bias_F
    return u_TF * torch.sigmoid((8 / torch.pi) ** 0.5 * (u_TF + 0.044715 * u_TF**3))


@triton.jit
def sigmoid(b_x):
    """1 / (1 + exp(-x)) and its derivative, by an exponential that cannot overflow and without a difference."""
    b_exp = tl.exp(-tl.abs(b_x))
    b_rest = 1.0 / (1.0 + b_exp)
    return tl.where(b_x >= 0, b_rest, b_exp * b_rest), b_exp * b_rest * b_rest


@triton.jit
def gelu_sigmoid(b_x):
    """The factor of x in GELU and its derivative: (1 + tanh z) / 2 = sigmoid(2 z), and √(8/π) = 1.5957691."""
    # From 12 on it is 0 or 1 exactly, and its argument would overflow at last.
    b_near = tl.minimum(tl.maximum(b_x, -12.0), 12.0)
    b_square = b_near * b_near
    b_sigmoid, b_slope = sigmoid(1.5957691216057308 * b_near * (1.0 + 0.044715 * b_square))
    return b_sigmoid, b_slope * 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * b_square)


@triton.jit
def bias_gelu_fwd_kernel(p_x, p_bias, p_y, F: tl.constexpr, BLOCK_F: tl.constexpr, HAS_BIAS: tl.constexpr):
    i_t = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = o_f < F
    b_x = tl.load(p_x + i_t * F + o_f, mask=m_f, other=0.0).to(tl.float32)
    if HAS_BIAS:
        b_x += tl.load(p_bias + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_sigmoid, _ = gelu_sigmoid(b_x)
    tl.store(p_y + i_t * F + o_f, (b_x * b_sigmoid).to(p_y.dtype.element_ty), mask=m_f)


@triton.jit(do_not_specialize=["T"])
def bias_gelu_bwd_kernel(
    p_x,
    p_bias,
    p_dy,
    p_dx,
    p_dbias,
    T,
    F: tl.constexpr,
    BLOCK_F: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Grid (G, column blocks): program (i_g, i_f) does rows i_g, i_g + G, ... of its block.

    With a bias the programs are few, and load two rows ahead; else each has one row.
    """
    i_g = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = o_f < F
    b_bias = tl.zeros([BLOCK_F], dtype=tl.float32)
    if HAS_BIAS:
        b_bias = tl.load(p_bias + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_dbias = tl.zeros([BLOCK_F], dtype=tl.float32)
    for i_t in tl.range(i_g, T, tl.num_programs(0), num_stages=3 if HAS_BIAS else 1):
        b_x = tl.load(p_x + i_t * F + o_f, mask=m_f, other=0.0).to(tl.float32) + b_bias
        b_dy = tl.load(p_dy + i_t * F + o_f, mask=m_f, other=0.0).to(tl.float32)
        b_sigmoid, b_slope = gelu_sigmoid(b_x)
        b_dx = b_dy * (b_sigmoid + b_x * b_slope)
        tl.store(p_dx + i_t * F + o_f, b_dx.to(p_dx.dtype.element_ty), mask=m_f)
        b_dbias += b_dx
    if HAS_BIAS:
        tl.store(p_dbias + i_g * F + o_f, b_dbias, mask=m_f)


def _check(x: Tensor, bias: Tensor | None) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"bias_gelu: x is {x.dtype}, the kernel takes float16, bfloat16 or float32")
    if x.dim() == 0:
        raise ValueError("bias_gelu: x has no dimension, needs [..., F]")
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"bias_gelu: bias has shape {tuple(bias.shape)}, x needs ({x.shape[-1]},)")


@torch.library.custom_op("megagrow_kernels::bias_gelu", mutates_args=())
def _bias_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    F = x.shape[-1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch = pick("bias_gelu", F, x.device)
    if x.numel() > 0:
        bias_gelu_fwd_kernel[(x.numel() // F, triton.cdiv(F, launch.block))](
            x.contiguous(),
            None if bias is None else bias.contiguous(),
            y,
            F=F,
            BLOCK_F=launch.block,
            HAS_BIAS=bias is not None,
            num_warps=launch.num_warps,
        )
    return y


@torch.library.custom_op("megagrow_kernels::bias_gelu_backward", mutates_args=())
def _bias_gelu_backward(x: Tensor, bias: Tensor | None, dy: Tensor) -> tuple[Tensor, Tensor]:
    """dx, and dbias in the bias's dtype; without a bias the latter has no elements."""
    F = x.shape[-1]
    T = x.numel() // max(F, 1)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch = pick("bias_gelu", F, x.device)
    num_blocks = triton.cdiv(F, launch.block)
    G = T if bias is None else column_programs(T, num_blocks, x.device, launch.num_warps)
    dbias_GF = x.new_empty(0) if bias is None else torch.empty(G, F, dtype=torch.float32, device=x.device)
    if x.numel() > 0:
        bias_gelu_bwd_kernel[(G, num_blocks)](
            x.contiguous(),
            None if bias is None else bias.contiguous(),
            dy.contiguous(),
            dx,
            dbias_GF,
            T,
            F=F,
            BLOCK_F=launch.block,
            HAS_BIAS=bias is not None,
            num_warps=launch.num_warps,
        )
    return dx, dbias_GF if bias is None else dbias_GF.sum(0).to(bias.dtype)


@_bias_gelu.register_fake
def _(x: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_bias_gelu_backward.register_fake
def _(x: Tensor, bias: Tensor | None, dy: Tensor) -> tuple[Tensor, Tensor]:
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return torch.empty_like(x, memory_format=torch.contiguous_format), dbias


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
    x, bias = ctx.saved_tensors
    dx, dbias = _bias_gelu_backward(x, bias, dy)
    return dx, None if bias is None else dbias


_bias_gelu.register_autograd(_gradients, setup_context=_keep_inputs)


def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU of x + bias, in its tanh approximation.

    Args:
        x: [..., F] float16, bfloat16 or float32; the output has its dtype. All that the backward pass keeps.
        bias: [F], any floating dtype.

    Raises:
        ValueError: a shape or dtype does not fit, in one line.
    """
    _check(x, bias)
    return _bias_gelu(x, bias)
