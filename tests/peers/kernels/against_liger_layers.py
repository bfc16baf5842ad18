"""Norms, gated activations and rotary embedding against liger-kernel's Triton kernels, forward and every gradient.

Compared: RMSNorm in casting mode llama, alone and with the residual addition before it; LayerNorm; SwiGLU and GeGLU,
whose gate and up are two tensors there and alternating columns here; RoPE over halves, whole and partial, and
interleaved, which Liger has for Llama 4.
Less exact there, in bfloat16: mode llama rounds the normed row before the weight is multiplied, and what is summed up
for the weight's gradient; gates are rounded before `up` is multiplied; angles in bfloat16 turn in bfloat16.
Could not run: LayerNorm with a residual, and partial interleaved RoPE. Liger has none.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megagrow_kernels import geglu, layer_norm, rms_norm, swiglu
from megagrow_kernels.rope import rope_, rope_ref
from tests.peers.kernels import theirs
from tests.peers.kernels.agreement import (
    BF16,
    DTYPES,
    F32,
    ONCE,
    Bound,
    Tensors,
    assert_agree,
    coarse,
    double,
    normal,
    outputs_and_gradients,
)

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EPS = 1e-5
T, H = 13, 320


def norm_inputs(dtype: torch.dtype, *names: str) -> Tensors:
    given = {"x": 2 * normal(0, T, H) + 0.5, "weight": 1 + 0.3 * normal(1, H)}
    given |= {"bias": normal(2, H), "residual": normal(3, T, H)}
    return {name: given[name].to(dtype) for name in ("x", "weight", *names)}


@each_dtype
def test_rms_norm(dtype: torch.dtype) -> None:
    given, upstream = norm_inputs(dtype), {"y": normal(4, T, H, dtype=dtype)}

    def liger(x: Tensor, weight: Tensor) -> Tensor:
        return theirs.LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama")

    ours = outputs_and_gradients(lambda x, weight: rms_norm(x, weight, EPS), given, upstream)
    peer = outputs_and_gradients(liger, given, upstream)
    truth = outputs_and_gradients(lambda x, weight: F.rms_norm(x, (H,), weight, EPS), double(given), double(upstream))
    bounds = {"y": Bound(roundings=2), "dx": ONCE, "dweight": coarse(dtype, 0.4)}
    assert_agree("liger rms_norm", dtype, ours, peer, truth, their_bounds=bounds)


@each_dtype
def test_rms_norm_after_the_residual(dtype: torch.dtype) -> None:
    given = norm_inputs(dtype, "residual")
    upstream = {"y": normal(4, T, H, dtype=dtype), "sum": normal(5, T, H, dtype=dtype)}

    def own(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        return rms_norm(x, weight, EPS, residual)

    def liger(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        return theirs.LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS, 0.0, "llama")

    def exact(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        total = x + residual
        rounded = total + (total.to(dtype).double() - total).detach()  # as both norm it
        return F.rms_norm(rounded, (H,), weight, EPS), total

    ours, peer = (outputs_and_gradients(function, given, upstream) for function in (own, liger))
    truth = outputs_and_gradients(exact, double(given), double(upstream))
    bounds = dict.fromkeys(truth, ONCE) | {"y": Bound(roundings=2), "dweight": coarse(dtype, 0.4)}
    assert_agree("liger rms_norm after the residual", dtype, ours, peer, truth, their_bounds=bounds)


@each_dtype
def test_layer_norm(dtype: torch.dtype) -> None:
    given, upstream = norm_inputs(dtype, "bias"), {"y": normal(4, T, H, dtype=dtype)}

    def liger(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return theirs.LigerLayerNormFunction.apply(x, weight, bias, EPS)

    def exact(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (H,), weight, bias, EPS)

    ours = outputs_and_gradients(lambda x, weight, bias: layer_norm(x, weight, bias, EPS), given, upstream)
    peer = outputs_and_gradients(liger, given, upstream)
    truth = outputs_and_gradients(exact, double(given), double(upstream))
    assert_agree("liger layer_norm", dtype, ours, peer, truth)


def alternating(gate: Tensor, up: Tensor) -> Tensor:
    return torch.stack((gate, up), dim=-1).flatten(-2)


@each_dtype
@pytest.mark.parametrize("name", ["swiglu", "geglu"])
def test_gated_activations(name: str, dtype: torch.dtype) -> None:
    given = {"gate": 2 * normal(0, T, H, dtype=dtype), "up": normal(1, T, H, dtype=dtype)}
    upstream = {"y": normal(2, T, H, dtype=dtype)}
    own, liger, activation, bounds = {
        "swiglu": (swiglu, theirs.LigerSiLUMulFunction, F.silu, {"dgate": ONCE, "dup": ONCE}),
        # 1 - tanh² cancels.
        "geglu": (geglu, theirs.LigerGELUMulFunction, tanh_gelu, {"dgate": Bound(2, row=8), "dup": Bound(2)}),
    }[name]
    ours = outputs_and_gradients(lambda gate, up: own(alternating(gate, up)), given, upstream)
    peer = outputs_and_gradients(lambda gate, up: liger.apply(gate, up), given, upstream)
    truth = outputs_and_gradients(lambda gate, up: activation(gate) * up, double(given), double(upstream))
    assert_agree(f"liger {name}", dtype, ours, peer, truth, their_bounds={"y": Bound(roundings=2)} | bounds)


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def angles(num_pairs: int) -> Tensor:
    """[S, C] of five positions."""
    return torch.arange(5.0)[:, None] * 10.0 ** -torch.linspace(0, 3, num_pairs)


def heads(seed: int, dtype: torch.dtype) -> Tensors:
    return {"q": normal(seed, 2, 5, 4, 32, dtype=dtype), "k": normal(seed + 1, 2, 5, 2, 32, dtype=dtype)}


@pytest.mark.parametrize("dtype, angle_dtype", [(F32, F32), (BF16, F32), (BF16, BF16)], ids=str)
@pytest.mark.parametrize("rotary_dim", [32, 24])
def test_rope(rotary_dim: int, dtype: torch.dtype, angle_dtype: torch.dtype) -> None:
    angles_SC = angles(rotary_dim // 2)
    cos_SR, sin_SR = (x.repeat(1, 2).to(angle_dtype) for x in (angles_SC.cos(), angles_SC.sin()))

    def liger(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        turned = theirs.LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), cos_SR, sin_SR)
        return tuple(x.transpose(1, 2) for x in turned)

    name = f"liger rope of {rotary_dim} columns, angles {str(angle_dtype).removeprefix('torch.')}"
    assert_agree_on_rope(name, dtype, liger, cos_SR, sin_SR, False, coarse(angle_dtype, 0.5))


@each_dtype
def test_interleaved_rope(dtype: torch.dtype) -> None:
    angles_SC = angles(16)
    cos_SR, sin_SR = (x.repeat(1, 2) for x in (angles_SC.cos(), angles_SC.sin()))

    def liger(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return theirs.LigerLlama4RopeFunction.apply(q, k, torch.polar(torch.ones(5, 16), angles_SC))

    assert_agree_on_rope("liger interleaved rope", dtype, liger, cos_SR, sin_SR, True, ONCE)


def assert_agree_on_rope(
    name: str, dtype: torch.dtype, liger, cos_SR: Tensor, sin_SR: Tensor, interleaved: bool, bound: Bound
) -> None:
    given, upstream = heads(0, dtype), heads(2, dtype)

    def exact(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return tuple(rope_ref(x, cos_SR.double(), sin_SR.double(), interleaved) for x in (q, k))

    ours = outputs_and_gradients(lambda q, k: rope_(q, k[..., None, :], cos_SR, sin_SR, interleaved), given, upstream)
    peer = outputs_and_gradients(liger, given, upstream)
    truth = outputs_and_gradients(exact, double(given), double(upstream))
    assert_agree(name, dtype, ours, peer, truth, their_bounds=bound)
