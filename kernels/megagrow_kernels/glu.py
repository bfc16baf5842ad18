"""Gated activations: silu(gate) * up and gelu(gate) * up, of the fused columns as the product before them writes them.

Shazeer, "GLU Variants Improve Transformer" (2020), equation 5; GELU in its tanh approximation.
Gate and up alternate column by column, so that a tensor shard of the fused weight holds whole neurons. Both are read
in place and told apart in registers. Bytes per output element with 2-byte activations: forward 6, backward 10, which is
the floor: gate_up is all that is kept.

Legend: N = elements of the output, which are one row to the kernels: twice an output's place is that of its gate.
Prefixes: i_ index, o_ offsets, p_ pointer, b_ values of a block, m_ mask.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagrow_kernels.gelu import bias_gelu_ref, gelu_sigmoid, sigmoid
from megagrow_kernels.launch import pick

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def glu_ref(gate_up: Tensor, activation: str) -> Tensor:
    """The definition, in the precision of its input; `activation` is silu or gelu."""
    gate, up = gate_up[..., 0::2], gate_up[..., 1::2]
    return (gate * torch.sigmoid(gate) if activation == "silu" else bias_gelu_ref(gate, None)) * up


@triton.jit
def _activate(b_gate, ACTIVATION: tl.constexpr):
    """The activation and its derivative: both are the gate times a sigmoid of it, or of a function of it."""
    if ACTIVATION == "silu":
        b_sigmoid, b_slope = sigmoid(b_gate)
    else:
        b_sigmoid, b_slope = gelu_sigmoid(b_gate)
    return b_gate * b_sigmoid, b_sigmoid + b_gate * b_slope


@triton.jit
def _gate_and_up(b_gate_up, BLOCK: tl.constexpr):
    b_gate, b_up = tl.split(tl.reshape(b_gate_up, [BLOCK, 2]))
    return b_gate.to(tl.float32), b_up.to(tl.float32)


@triton.jit
def _forward_block(p_gate_up, p_y, m_pairs, m_y, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    b_gate, b_up = _gate_and_up(tl.load(p_gate_up + tl.arange(0, 2 * BLOCK), mask=m_pairs), BLOCK)
    b_activated, _ = _activate(b_gate, ACTIVATION)
    tl.store(p_y + tl.arange(0, BLOCK), (b_activated * b_up).to(p_y.dtype.element_ty), mask=m_y)


@triton.jit
def _backward_block(p_gate_up, p_dy, p_dgate_up, m_pairs, m_y, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    o_pairs = tl.arange(0, 2 * BLOCK)
    b_gate, b_up = _gate_and_up(tl.load(p_gate_up + o_pairs, mask=m_pairs), BLOCK)
    b_dy = tl.load(p_dy + tl.arange(0, BLOCK), mask=m_y).to(tl.float32)
    b_activated, b_derivative = _activate(b_gate, ACTIVATION)
    b_dgate = (b_dy * b_up * b_derivative).to(p_dgate_up.dtype.element_ty)
    b_dup = (b_dy * b_activated).to(p_dgate_up.dtype.element_ty)
    tl.store(p_dgate_up + o_pairs, tl.reshape(tl.join(b_dgate, b_dup), [2 * BLOCK]), mask=m_pairs)


@triton.jit(do_not_specialize=["N"])
def glu_fwd_kernel(p_gate_up, p_y, N, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    i_n = tl.program_id(0).to(tl.int64) * BLOCK
    # Full blocks go without a mask: one at an N that 16 does not divide would cost the 128-bit loads.
    if i_n + BLOCK <= N:
        _forward_block(p_gate_up + 2 * i_n, p_y + i_n, None, None, ACTIVATION, BLOCK)
    else:
        m_pairs = tl.arange(0, 2 * BLOCK) < 2 * (N - i_n)  # in 64 bits: there are twice as many columns as N
        m_y = i_n + tl.arange(0, BLOCK) < N
        _forward_block(p_gate_up + 2 * i_n, p_y + i_n, m_pairs, m_y, ACTIVATION, BLOCK)


@triton.jit(do_not_specialize=["N"])
def glu_bwd_kernel(p_gate_up, p_dy, p_dgate_up, N, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    i_n = tl.program_id(0).to(tl.int64) * BLOCK
    if i_n + BLOCK <= N:
        _backward_block(p_gate_up + 2 * i_n, p_dy + i_n, p_dgate_up + 2 * i_n, None, None, ACTIVATION, BLOCK)
    else:
        m_pairs = tl.arange(0, 2 * BLOCK) < 2 * (N - i_n)  # in 64 bits: there are twice as many columns as N
        m_y = i_n + tl.arange(0, BLOCK) < N
        _backward_block(p_gate_up + 2 * i_n, p_dy + i_n, p_dgate_up + 2 * i_n, m_pairs, m_y, ACTIVATION, BLOCK)


def _check(name: str, gate_up: Tensor) -> None:
    if gate_up.dtype not in DTYPES:
        raise ValueError(f"{name}: gate_up is {gate_up.dtype}, the kernel takes float16, bfloat16 or float32")
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"{name}: gate_up has shape {tuple(gate_up.shape)}, needs an even number of columns")


def _half(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.custom_op("megagrow_kernels::glu", mutates_args=())
def _glu(gate_up: Tensor, activation: str) -> Tensor:
    y = _half(gate_up)
    N = y.numel()
    launch = pick("glu", N, y.device)
    if N > 0:
        glu_fwd_kernel[(triton.cdiv(N, launch.block),)](
            gate_up.contiguous(),
            y,
            N,
            ACTIVATION=activation,
            BLOCK=launch.block,
            num_warps=launch.num_warps,
        )
    return y


@torch.library.custom_op("megagrow_kernels::glu_backward", mutates_args=())
def _glu_backward(gate_up: Tensor, dy: Tensor, activation: str) -> Tensor:
    dgate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    N = dy.numel()
    launch = pick("glu", N, dy.device)
    if N > 0:
        glu_bwd_kernel[(triton.cdiv(N, launch.block),)](
            gate_up.contiguous(),
            dy.contiguous(),
            dgate_up,
            N,
            ACTIVATION=activation,
            BLOCK=launch.block,
            num_warps=launch.num_warps,
        )
    return dgate_up


@_glu.register_fake
def _(gate_up: Tensor, activation: str) -> Tensor:
    return _half(gate_up)


@_glu_backward.register_fake
def _(gate_up: Tensor, dy: Tensor, activation: str) -> Tensor:
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format)


def _keep_input(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    gate_up, ctx.activation = inputs
    ctx.save_for_backward(gate_up)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    (gate_up,) = ctx.saved_tensors
    return _glu_backward(gate_up, dy, ctx.activation), None


_glu.register_autograd(_gradient, setup_context=_keep_input)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up.

    Args:
        gate_up: [..., 2 F] float16, bfloat16 or float32, gate in even columns, up in odd ones. All that the backward
            pass keeps.

    Returns:
        [..., F]

    Raises:
        ValueError: a shape or dtype does not fit, in one line.
    """
    _check("swiglu", gate_up)
    return _glu(gate_up, "silu")


def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up, with GELU in its tanh approximation; otherwise as `swiglu`."""
    _check("geglu", gate_up)
    return _glu(gate_up, "gelu")
