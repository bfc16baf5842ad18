"""x + dropout(y + bias), and its gradients, with a mask that is computed where it is needed and never stored.

Random bits by counter: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011). The hash is SplitMix64
(Steele et al., "Fast Splittable Pseudorandom Number Generators", 2014): features 4 i ... 4 i + 3 have the four 16-bit
fields, lowest first, of output i of the generator whose state is the hash of token key + place. An element is dropped
where its field < round(65536 rate); the others are scaled by exactly 65536 / (65536 - round(65536 rate)).
Bytes per element with 2-byte activations: forward 6, backward 4, which is the floor: nothing is kept but the keys. The
gradient of x is that of the sum, which is handed on; that of the bias comes out of the backward pass as partial sums.

Legend: T = rows (tokens), H = hidden size, G = programs that share the rows of a block of columns out among themselves.
Prefixes: i_ index, o_ offsets, p_ pointer, b_ values of a block, m_ mask.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagrow_kernels.launch import column_programs, pick

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

FIELDS = 1 << 16  # values of a field
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)  # 2^64 / golden ratio
MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
MIX_2 = tl.constexpr(0x94D049BB133111EB)


def dropout_add_ref(x_TH: Tensor, y_TH: Tensor, bias_H: Tensor | None, rate: float, kept_TH: Tensor) -> Tensor:
    """The definition, in the precision of its inputs, given the mask (which `torch_ops.kept` defines)."""
    sum_TH = y_TH if bias_H is None else y_TH + bias_H
    return x_TH + sum_TH * kept_TH * _threshold_and_scale(rate)[1]


@triton.jit
def mix(b_x):
    """SplitMix64's step and output, of uint64, whose arithmetic wraps."""
    b_x += GOLDEN
    b_x = (b_x ^ (b_x >> 30)) * MIX_1
    b_x = (b_x ^ (b_x >> 27)) * MIX_2
    return b_x ^ (b_x >> 31)


@triton.jit
def _factors(p_key, place, threshold, scale, BLOCK_H: tl.constexpr):
    """0 or the scale for the columns of this program's block, from one hash for four columns."""
    QUADS: tl.constexpr = BLOCK_H // 4
    b_state = mix(tl.load(p_key).to(tl.uint64, bitcast=True) + place)
    o_quad = tl.program_id(1) * QUADS + tl.arange(0, QUADS)
    b_hash = mix(b_state + o_quad.to(tl.uint64) * GOLDEN)
    b_low, b_high = b_hash.to(tl.uint32), (b_hash >> 32).to(tl.uint32)
    b_fields = tl.join(tl.join(b_low & 0xFFFF, b_high & 0xFFFF), tl.join(b_low >> 16, b_high >> 16))
    return tl.where(tl.reshape(b_fields, [BLOCK_H]) >= threshold, scale, 0.0)


@triton.jit(do_not_specialize=["place", "threshold"])
def dropout_add_fwd_kernel(
    p_x,
    p_y,
    p_bias,
    p_keys,
    p_sum,
    place,
    threshold,
    scale,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_h = o_h < H
    b_x = tl.load(p_x + i_t * H + o_h, mask=m_h, other=0.0).to(tl.float32)
    b_y = tl.load(p_y + i_t * H + o_h, mask=m_h, other=0.0).to(tl.float32)
    if HAS_BIAS:
        b_y += tl.load(p_bias + o_h, mask=m_h, other=0.0).to(tl.float32)
    # A product, not a choice: what is dropped but no number shows.
    b_sum = b_x + b_y * _factors(p_keys + i_t, place, threshold, scale, BLOCK_H)
    tl.store(p_sum + i_t * H + o_h, b_sum.to(p_sum.dtype.element_ty), mask=m_h)


@triton.jit(do_not_specialize=["T", "place", "threshold"])
def dropout_add_bwd_kernel(
    p_dsum,
    p_keys,
    p_dy,
    p_dbias,
    T,
    place,
    threshold,
    scale,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Grid (G, column blocks): program (i_g, i_h) does rows i_g, i_g + G, ... of its block.

    With a bias the programs are few, and load two rows ahead; else each has one row.
    """
    i_g = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_h = o_h < H
    b_dbias = tl.zeros([BLOCK_H], dtype=tl.float32)
    for i_t in tl.range(i_g, T, tl.num_programs(0), num_stages=3 if HAS_BIAS else 1):
        b_dsum = tl.load(p_dsum + i_t * H + o_h, mask=m_h, other=0.0).to(tl.float32)
        b_dy = b_dsum * _factors(p_keys + i_t, place, threshold, scale, BLOCK_H)
        tl.store(p_dy + i_t * H + o_h, b_dy.to(p_dy.dtype.element_ty), mask=m_h)
        b_dbias += b_dy
    if HAS_BIAS:
        tl.store(p_dbias + i_g * H + o_h, b_dbias, mask=m_h)


def _threshold_and_scale(rate: float) -> tuple[int, float]:
    """How many of a field's values are dropped, and what makes up for it in the mean; 0 where nothing is left."""
    threshold = round(rate * FIELDS)
    return threshold, FIELDS / (FIELDS - threshold) if threshold < FIELDS else 0.0


def _check(x: Tensor, y: Tensor, bias: Tensor | None, rate: float, keys: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"dropout_add: x is {x.dtype}, the kernel takes float16, bfloat16 or float32")
    if y.shape != x.shape or y.dtype != x.dtype:
        raise ValueError(
            f"dropout_add: y is {y.dtype} {tuple(y.shape)}, x is {x.dtype} {tuple(x.shape)}; both must agree"
        )
    if x.dim() == 0:
        raise ValueError("dropout_add: x has no dimension, needs [..., H]")
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"dropout_add: bias has shape {tuple(bias.shape)}, x needs ({x.shape[-1]},)")
    if keys.shape != x.shape[:-1] or keys.dtype != torch.int64:
        raise ValueError(f"dropout_add: keys are {keys.dtype} {tuple(keys.shape)}, x needs int64 {tuple(x.shape[:-1])}")
    if not 0 <= rate <= 1:
        raise ValueError(f"dropout_add: rate={rate} must lie between 0 and 1")


def _launch(H: int, device: torch.device) -> tuple[int, int, int]:
    """Columns of a block, blocks, warps; a hash is for four columns, so no block is narrower."""
    launch = pick("dropout_add", H, device)
    block = max(launch.block, 4)
    return block, triton.cdiv(H, block), launch.num_warps


@torch.library.custom_op("megagrow_kernels::dropout_add", mutates_args=())
def _dropout_add(x: Tensor, y: Tensor, bias: Tensor | None, rate: float, keys: Tensor, place: int) -> Tensor:
    H = x.shape[-1]
    threshold, scale = _threshold_and_scale(rate)
    block, num_blocks, num_warps = _launch(H, x.device)
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() > 0:
        dropout_add_fwd_kernel[(keys.numel(), num_blocks)](
            x.contiguous(),
            y.contiguous(),
            None if bias is None else bias.contiguous(),
            keys.contiguous(),
            total,
            place,
            threshold,
            scale,
            H=H,
            BLOCK_H=block,
            HAS_BIAS=bias is not None,
            num_warps=num_warps,
        )
    return total


@torch.library.custom_op("megagrow_kernels::dropout_add_backward", mutates_args=())
def _dropout_add_backward(
    dsum: Tensor, keys: Tensor, rate: float, place: int, wants_dbias: bool
) -> tuple[Tensor, Tensor]:
    """dy, and dbias in float32, which has no elements if it is not wanted."""
    T, H = keys.numel(), dsum.shape[-1]
    threshold, scale = _threshold_and_scale(rate)
    block, num_blocks, num_warps = _launch(H, dsum.device)
    dy = torch.empty_like(dsum, memory_format=torch.contiguous_format)
    G = column_programs(T, num_blocks, dsum.device, num_warps) if wants_dbias else T
    dbias_GH = torch.empty(G, H if wants_dbias else 0, dtype=torch.float32, device=dsum.device)
    if dsum.numel() > 0:
        dropout_add_bwd_kernel[(G, num_blocks)](
            dsum.contiguous(),
            keys.contiguous(),
            dy,
            dbias_GH,
            T,
            place,
            threshold,
            scale,
            H=H,
            BLOCK_H=block,
            HAS_BIAS=wants_dbias,
            num_warps=num_warps,
        )
    return dy, dbias_GH.sum(0)


@_dropout_add.register_fake
def _(x: Tensor, y: Tensor, bias: Tensor | None, rate: float, keys: Tensor, place: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_dropout_add_backward.register_fake
def _(dsum: Tensor, keys: Tensor, rate: float, place: int, wants_dbias: bool) -> tuple[Tensor, Tensor]:
    dbias = dsum.new_empty(dsum.shape[-1] if wants_dbias else 0, dtype=torch.float32)
    return torch.empty_like(dsum, memory_format=torch.contiguous_format), dbias


def _keep_keys(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, float, Tensor, int], output: Tensor) -> None:
    _, _, bias, ctx.rate, keys, ctx.place = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(keys)


def _gradients(ctx: Any, dsum: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None, None]:
    (keys,) = ctx.saved_tensors
    wants_dbias = ctx.needs_input_grad[2]
    dy, dbias = _dropout_add_backward(dsum, keys, ctx.rate, ctx.place, wants_dbias)
    return dsum, dy, dbias.to(ctx.bias_dtype) if wants_dbias else None, None, None, None


_dropout_add.register_autograd(_gradients, setup_context=_keep_keys)


def dropout_add(x: Tensor, y: Tensor, bias: Tensor | None, rate: float, keys: Tensor, place: int) -> Tensor:
    """x + dropout(y + bias), with a mask that depends on (token key, place, feature) only.

    Args:
        x: [..., H] float16, bfloat16 or float32; the result has its dtype.
        y: like x in shape and dtype.
        bias: [H], any floating dtype, or None.
        rate: the share that is dropped, from 0 to 1; in effect its nearest multiple of 2^-16.
        keys: [...] int64, one for each token. All that the backward pass keeps.
        place: a number of its own for each place in the model that drops.

    Raises:
        ValueError: a shape, dtype or rate does not fit, in one line.
    """
    _check(x, y, bias, rate, keys)
    return _dropout_add(x, y, bias, rate, keys, place)
