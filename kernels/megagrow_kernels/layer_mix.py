"""Target layers as weighted sums of source layers, Σ_j w_kj Θ_j, and the gradients.

Wang et al., "Learning to Grow Pretrained Models" (2023, arXiv 2303.00980), section 3.1. All layers' elements at one
place are read once and kept in registers while the target layers are written one after another: bytes per element of a
leaf with float32 weights 4 (J + K), which is the floor. The weights' gradient reads both sides once.

Legend: J, K = source and target layers, N = elements of one leaf, G = programs that share its blocks out among
themselves. Prefixes: i_ index, o_ offsets, p_ pointer, b_ values of a block, m_ mask.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagrow_kernels.launch import DOT_PRECISION, column_programs, pick, power_of_two

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LAYERS_AT_ONCE = 64  # target layers of one product of the backward pass, as many as Hopper's instructions want
MOST_LAYERS = 128  # source layers that registers hold


def layer_mix_ref(sources_JN: Tensor, weights_KJ: Tensor) -> Tensor:
    """The definition, in the precision of its inputs."""
    return torch.einsum("kj,jn->kn", weights_KJ, sources_JN)


@triton.jit(do_not_specialize=["K"])
def layer_mix_fwd_kernel(p_x, p_w, p_y, K, N, J: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_j = tl.arange(0, BLOCK_J)
    m_n, m_j = o_n < N, o_j < J
    p_block = p_x + o_j.to(tl.int64)[:, None] * N + o_n[None, :]
    b_x = tl.load(p_block, mask=m_j[:, None] & m_n[None, :], other=0.0).to(tl.float32)
    p_row = p_y + o_n
    for i_k in range(K):
        b_w = tl.load(p_w + i_k * J + o_j, mask=m_j, other=0.0).to(tl.float32)
        b_y = tl.sum(b_w[:, None] * b_x, axis=0)
        tl.store(p_row, b_y.to(p_y.dtype.element_ty), mask=m_n)
        p_row += N


@triton.jit(do_not_specialize=["K"])
def layer_mix_bwd_kernel(
    p_x,
    p_dy,
    p_dw,
    K,
    N,
    J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (G, blocks of K): program (i_g, ·) sums dy·xᵀ over blocks i_g, i_g + G, ... of N into its own dw."""
    i_g = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_j = tl.arange(0, BLOCK_J)
    m_k, m_j = o_k < K, o_j < J
    b_dw = tl.zeros([BLOCK_K, BLOCK_J], dtype=tl.float32)
    for i_n in range(i_g * BLOCK_N, N, tl.num_programs(0) * BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = (o_n < N)[None, :]
        b_dy = tl.load(p_dy + o_k.to(tl.int64)[:, None] * N + o_n[None, :], mask=m_k[:, None] & m_n, other=0.0)
        b_x = tl.load(p_x + o_j.to(tl.int64)[:, None] * N + o_n[None, :], mask=m_j[:, None] & m_n, other=0.0)
        b_dw = tl.dot(b_dy.to(tl.float32), tl.trans(b_x.to(tl.float32)), b_dw, input_precision=PRECISION)
    p_out = p_dw + (i_g * K + o_k)[:, None] * J + o_j[None, :]
    tl.store(p_out, b_dw, mask=m_k[:, None] & m_j[None, :])


def _check(sources_JN: Tensor, weights_KJ: Tensor) -> None:
    for name, x in (("sources", sources_JN), ("weights", weights_KJ)):
        if x.dtype not in DTYPES:
            raise ValueError(f"layer_mix: {name} are {x.dtype}, the kernel takes float16, bfloat16 or float32")
    if sources_JN.dim() != 2 or weights_KJ.dim() != 2 or weights_KJ.shape[1] != len(sources_JN):
        raise ValueError(
            f"layer_mix: weights are {tuple(weights_KJ.shape)} for sources of {tuple(sources_JN.shape)}, "
            "must be [K, J] for [J, N]"
        )
    if len(sources_JN) > MOST_LAYERS:
        raise ValueError(f"layer_mix: {len(sources_JN)} source layers, the kernel takes at most {MOST_LAYERS}")


@torch.library.custom_op("megagrow_kernels::layer_mix", mutates_args=())
def _layer_mix(sources_JN: Tensor, weights_KJ: Tensor) -> Tensor:
    (J, N), K = sources_JN.shape, len(weights_KJ)
    mixed_KN = weights_KJ.new_empty(K, N)
    if mixed_KN.numel() == 0:
        return mixed_KN
    launch = pick("layer_mix", J * N, sources_JN.device)
    BLOCK_J = power_of_two(J)
    BLOCK_N = max(launch.block // BLOCK_J, 1)
    layer_mix_fwd_kernel[(triton.cdiv(N, BLOCK_N),)](
        sources_JN.contiguous(),
        weights_KJ.contiguous(),
        mixed_KN,
        K,
        N,
        J=J,
        BLOCK_J=BLOCK_J,
        BLOCK_N=BLOCK_N,
        num_warps=launch.num_warps,
    )
    return mixed_KN


@torch.library.custom_op("megagrow_kernels::layer_mix_backward", mutates_args=())
def _weights_gradient(sources_JN: Tensor, dmixed_KN: Tensor) -> Tensor:
    """dw [K, J], in float32."""
    (J, N), K, device = sources_JN.shape, len(dmixed_KN), sources_JN.device
    launch = pick("layer_mix_bwd", N, device)
    num_blocks = triton.cdiv(K, LAYERS_AT_ONCE)
    G = column_programs(triton.cdiv(N, launch.block), num_blocks, device, launch.num_warps)
    parts_GKJ = torch.empty(G, K, J, dtype=torch.float32, device=device)
    if N > 0 and K > 0:
        layer_mix_bwd_kernel[(G, num_blocks)](
            sources_JN.contiguous(),
            dmixed_KN.contiguous(),
            parts_GKJ,
            K,
            N,
            J=J,
            BLOCK_K=LAYERS_AT_ONCE,
            BLOCK_J=max(power_of_two(J), 16),
            BLOCK_N=max(launch.block, 16),
            PRECISION=DOT_PRECISION,
            num_warps=launch.num_warps,
        )
    return parts_GKJ.sum(0)


@_layer_mix.register_fake
def _(sources_JN: Tensor, weights_KJ: Tensor) -> Tensor:
    return weights_KJ.new_empty(weights_KJ.shape[0], sources_JN.shape[1])


@_weights_gradient.register_fake
def _(sources_JN: Tensor, dmixed_KN: Tensor) -> Tensor:
    return sources_JN.new_empty(dmixed_KN.shape[0], sources_JN.shape[0], dtype=torch.float32)


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dmixed_KN: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The sources' is a mix itself, with the weights transposed."""
    sources_JN, weights_KJ = ctx.saved_tensors
    wants_sources, wants_weights = ctx.needs_input_grad
    dsources_JN = _layer_mix(dmixed_KN, weights_KJ.T.contiguous()).to(sources_JN.dtype) if wants_sources else None
    return dsources_JN, _weights_gradient(sources_JN, dmixed_KN).to(weights_KJ.dtype) if wants_weights else None


_layer_mix.register_autograd(_gradients, setup_context=_keep_inputs)


def layer_mix(sources_JN: Tensor, weights_KJ: Tensor) -> Tensor:
    """Σ_j weights[k, j] · sources[j].

    Args:
        sources_JN: float16, bfloat16 or float32, at most 128 layers.
        weights_KJ: likewise; the result has their dtype.

    Raises:
        ValueError: a shape or dtype does not fit, in one line.
    """
    _check(sources_JN, weights_KJ)
    return _layer_mix(sources_JN, weights_KJ)
