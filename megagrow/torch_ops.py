"""The kernels' PyTorch twins: same names and parameters, on any device, in any dtype. `ops` is the door to both.

Legend: H = hidden size, B = batch, S = sequence, N = heads, D = head dimension, F = FFN size.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

FIELDS = 1 << 16  # values of the random number that decides whether an element is dropped
GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed number
INVERSE = -0xE217C1E66C88CC3  # of GOLDEN, modulo 2^64
MIX_1 = -0x40A7B892E31B1A47  # the multipliers of SplitMix64, signed
MIX_2 = -0x6B2FB644ECCEEE15


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """x / √(mean x² + eps) · weight, of x + residual where there is one."""
    total = x if residual is None else x + residual
    dtype = torch.promote_types(x.dtype, weight.dtype)
    y = F.rms_norm(total.to(dtype), weight.shape, weight.to(dtype), eps).to(x.dtype)
    return y if residual is None else (y, total)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """(x - mean x) / √(var x + eps) · weight + bias, of x + residual where there is one."""
    total = x if residual is None else x + residual
    dtype = torch.promote_types(x.dtype, weight.dtype)
    y = F.layer_norm(total.to(dtype), weight.shape, weight.to(dtype), None if bias is None else bias.to(dtype), eps)
    return y.to(x.dtype) if residual is None else (y.to(x.dtype), total)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, of columns that alternate if `alternates` says so."""
    return glu(gate_up, "silu", alternates(gate_up))


def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up, likewise, with GELU in its tanh approximation."""
    return glu(gate_up, "gelu", alternates(gate_up))


def glu(gate_up: Tensor, activation: Literal["silu", "gelu"], alternating: bool) -> Tensor:
    """activation(gate) * up [..., F], of columns [..., 2 F] that alternate or hold all of gate before all of up."""
    if torch.compiler.is_compiling():  # which chooses by itself what to keep
        gate, up = gate_and_up(gate_up, alternating)
        return _activate(gate, activation) * up
    return _GLU.apply(gate_up, activation, alternating)


def _activate(x: Tensor, activation: str) -> Tensor:
    return F.silu(x) if activation == "silu" else gelu(x)


class _GLU(torch.autograd.Function):
    """Keeps its input only."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: str, alternating: bool) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.activation, ctx.alternating = activation, alternating
        gate, up = gate_and_up(gate_up, alternating)
        return _activate(gate, activation) * up

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_and_up(gate_up, ctx.alternating)
        if ctx.activation == "silu":
            dgate = torch.ops.aten.silu_backward(dy * up, gate)
        else:
            dgate = torch.ops.aten.gelu_backward(dy * up, gate, approximate="tanh")
        dup = dy * _activate(gate, ctx.activation)
        if ctx.alternating:
            return torch.stack((dgate, dup), dim=-1).flatten(-2), None, None
        return torch.cat((dgate, dup), dim=-1), None, None


def gate_and_up(gate_up: Tensor, alternating: bool) -> tuple[Tensor, Tensor]:
    """The two halves [..., F] of the fused columns [..., 2 F]."""
    halves = gate_up.unflatten(-1, (-1, 2)).unbind(-1) if alternating else gate_up.chunk(2, dim=-1)
    return halves[0], halves[1]


def alternates(x: Tensor) -> bool:
    """Whether gate and up alternate column by column, as they are stored; a CPU has all of gate before all of up."""
    return x.device.type != "cpu"


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh approximation, as in GPT-2."""
    return F.gelu(x, approximate="tanh")


def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU of x + bias."""
    return gelu(x if bias is None else x + bias).to(x.dtype)


def bias_gelu_erf(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU of x + bias by the error function, as in BERT and GPT-NeoX."""
    return F.gelu(x if bias is None else x + bias).to(x.dtype)


def dropout_add(x: Tensor, y: Tensor, bias: Tensor | None, rate: float, keys: Tensor, place: int) -> Tensor:
    """x + dropout(y + bias)."""
    return (x + dropout(y if bias is None else y + bias, rate, keys, place)).to(x.dtype)


def dropout(x: Tensor, rate: float, keys: Tensor, place: int) -> Tensor:
    """Zeroes the elements that `kept` leaves out, and scales the others so that the mean stays as it was."""
    if torch.compiler.is_compiling():  # which chooses by itself what to keep
        return _drop(x, rate, keys, place)
    return _Dropout.apply(x, rate, keys, place)


class _Dropout(torch.autograd.Function):
    """Keeps the tokens' keys only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: float, keys: Tensor, place: int) -> Tensor:
        ctx.save_for_backward(keys)
        ctx.rate, ctx.place = rate, place
        return _drop(x, rate, keys, place)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (keys,) = ctx.saved_tensors
        return _drop(dy, ctx.rate, keys, ctx.place), None, None, None


def _drop(x: Tensor, rate: float, keys: Tensor, place: int) -> Tensor:
    num_dropped = round(rate * FIELDS)
    scale = FIELDS / (FIELDS - num_dropped) if num_dropped < FIELDS else 0.0
    return x * kept(keys, place, rate, x.shape[-1]) * scale


def kept(keys: Tensor, place: int, rate: float, num_features: int) -> Tensor:
    """Which elements [..., num_features] dropout keeps, by the tokens' keys [...]: True for a share of 1 - rate.

    Four features share a hash: 4 i ... 4 i + 3 have the 16-bit fields, lowest first, of output i of SplitMix64 (Steele
    et al., 2014) from the state mix(key + place). An element is dropped if its field is below round(rate 2^16).
    """
    quads_Q = torch.arange(-(-num_features // 4), device=keys.device)
    # state + quad GOLDEN, multiplied out of what is read: a compiler would take the product with an index for an index
    # too, whose overflow it does not expect, and draw other bits (torch 2.13 did).
    hashes = mix(((mix(keys + place) * INVERSE)[..., None] + quads_Q) * GOLDEN)
    fields = hashes[..., None] >> torch.arange(0, 64, 16, device=keys.device) & FIELDS - 1
    return fields.flatten(-2)[..., :num_features] >= round(rate * FIELDS)


def mix(x: Tensor) -> Tensor:
    """`mix_` of a copy."""
    return mix_(x.clone())


def mix_(x: Tensor) -> Tensor:
    """SplitMix64's step and output, in place; int64 arithmetic wraps, and shifts are made logical by masking.

    Source: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators" (OOPSLA 2014).
    """
    shifted = torch.empty_like(x)
    x += GOLDEN
    for shift, factor in ((30, MIX_1), (27, MIX_2), (31, 1)):
        torch.bitwise_right_shift(x, shift, out=shifted)
        x ^= shifted.bitwise_and_((1 << 64 - shift) - 1)
        x *= factor
    return x


def rope_(
    q_BSND: Tensor,
    kv_BSKPD: Tensor,
    cos_SR: Tensor,
    sin_SR: Tensor,
    interleaved: bool = False,
    in_place: bool = True,
) -> tuple[Tensor, ...]:
    """(q, k) or (q, k, v). It may overwrite q and kv, hence its name, as the kernel does; the twin never does."""
    k_BSKD, *v_BSKD = kv_BSKPD.unbind(-2)
    turned = (rope(x_BSND, cos_SR, sin_SR, interleaved) for x_BSND in (q_BSND, k_BSKD))
    return *turned, *v_BSKD


def rope(x_BSND: Tensor, cos_SR: Tensor, sin_SR: Tensor, interleaved: bool = False) -> Tensor:
    """Columns from R on stay as they are; in x's dtype, cos and sin give Hugging Face's bits."""
    R = cos_SR.shape[-1]
    num_rest = x_BSND.shape[-1] - R
    if num_rest > 0:
        turned_BSNR, rest_BSNE = x_BSND.split((R, num_rest), dim=-1)
        return torch.cat((rope(turned_BSNR, cos_SR, sin_SR, interleaved), rest_BSNE), dim=-1)
    cos_S1R, sin_S1R = cos_SR[:, None], sin_SR[:, None]
    if interleaved:
        cos_S1R, sin_S1R = (x[..., : R // 2].repeat_interleave(2, dim=-1) for x in (cos_S1R, sin_S1R))
        first, second = x_BSND.unflatten(-1, (-1, 2)).unbind(-1)
        rotated_BSNR = torch.stack((-second, first), dim=-1).flatten(-2)
    else:
        first, second = x_BSND.chunk(2, dim=-1)
        rotated_BSNR = torch.cat((-second, first), dim=-1)
    return (x_BSND * cos_S1R + rotated_BSNR * sin_S1R).to(x_BSND.dtype)


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor] | None,
    lrs: Sequence[float],
    eps: Sequence[float],
    weight_decays: Sequence[float],
    beta1: float,
    beta2: float,
    step: int,
    scale: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """By torch's fused kernels, a call for all tensors of the same rates; arithmetic in the dtype of params."""
    scale, skip = (None if x is None else x.reshape(()) for x in (scale, skip))
    grouped: dict[tuple[float, float, float], list[int]] = {}
    for i, rates in enumerate(zip(lrs, eps, weight_decays, strict=True)):
        if params[i].numel() > 0:
            grouped.setdefault(rates, []).append(i)
    for (lr, epsilon, weight_decay), chosen in grouped.items():
        wide = [grads[i].to(params[i].dtype) for i in chosen]
        torch._fused_adamw_(
            [params[i] for i in chosen],
            # Beforehand: the fused kernels would overwrite the gradients with the scaled ones.
            wide if scale is None else [grad * scale for grad in wide],
            [exp_avgs[i] for i in chosen],
            [exp_avg_sqs[i] for i in chosen],
            [],
            [torch.full((), float(step), device=wide[0].device)] * len(chosen),
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=epsilon,
            amsgrad=False,
            maximize=False,
            found_inf=None if skip is None else (skip != 0).to(torch.float32),
        )
    for copy, param in zip(copies or (), params, strict=copies is not None):
        rounded = param.to(copy.dtype)
        copy.copy_(rounded if skip is None else torch.where(skip != 0, copy, rounded))
