"""Gated activations, norms, bias + GELU, dropout + residual and rotary embedding against megatron-core's fusions.

They are PyTorch code under torch.compile, and are compiled here, too. Compared, forward and every gradient: swiglu and
geglu, whose columns are all of gate before all of up there and alternate here; bias_gelu; bias_dropout_add without
dropout, and with it where both masks agree, since each draws its own; apply_rotary_pos_emb over halves and interleaved;
and WrappedTorchNorm, which stands in for FusedLayerNorm where there is no Apex: torch's LayerNorm and RMSNorm.
Less exact there: angles in bfloat16, whatever they are computed in; 1 - tanh² cancels; in bfloat16, gradients of biases
summed up from rounded ones, and all of LayerNorm's backward pass on a CPU.
Could not run: FusedLayerNorm ("Apex must be installed"), fused RoPE (needs Transformer Engine),
apply_rotary_pos_emb_with_cos_sin (without flash-attn it takes the cosine of the cosine), fused softmax (attention is
torch's here). swiglu and geglu add a bias if there is one; ours have none. megatron-core has no distillation.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megagrow.torch_ops import kept
from megagrow_kernels import bias_gelu, dropout_add, geglu, layer_norm, rms_norm, swiglu
from megagrow_kernels.rope import rope_, rope_ref
from tests.peers.kernels import theirs
from tests.peers.kernels.agreement import (
    DTYPES,
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
T, H = 13, 320
PLACE = 3


def inputs(dtype: torch.dtype, **tensors: Tensor) -> Tensors:
    return {name: x.to(dtype) for name, x in tensors.items()}


@each_dtype
@pytest.mark.parametrize("name", ["swiglu", "geglu"])
def test_gated_activations(name: str, dtype: torch.dtype) -> None:
    given, upstream = inputs(dtype, gate=2 * normal(0, T, H), up=normal(1, T, H)), inputs(dtype, y=normal(2, T, H))
    own, fusion, activation = {
        "swiglu": (swiglu, theirs.bias_swiglu_impl, F.silu),
        "geglu": (geglu, theirs.bias_geglu_impl, tanh_gelu),
    }[name]
    ours = outputs_and_gradients(lambda gate, up: own(torch.stack((gate, up), dim=-1).flatten(-2)), given, upstream)
    peer = outputs_and_gradients(lambda gate, up: fusion(torch.cat((gate, up), dim=-1), None), given, upstream)
    truth = outputs_and_gradients(lambda gate, up: activation(gate) * up, double(given), double(upstream))
    assert_agree(f"megatron {name}", dtype, ours, peer, truth, their_bounds=Bound(row=6))


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


@each_dtype
@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_norms(normalization: str, dtype: torch.dtype) -> None:
    options = "layernorm_zero_centered_gamma", "persist_layer_norm", "sequence_parallel", "memory_efficient_layer_norm"
    config = SimpleNamespace(normalization=normalization, **dict.fromkeys(options, False))
    norm, centred = theirs.WrappedTorchNorm(config, H, eps=1e-5), normalization == "LayerNorm"
    given = inputs(dtype, x=2 * normal(0, T, H) + 0.5, weight=1 + 0.3 * normal(1, H))
    given |= inputs(dtype, bias=normal(2, H)) if centred else {}
    upstream = inputs(dtype, y=normal(3, T, H))

    def megatron(x: Tensor, **parameters: Tensor) -> Tensor:
        return torch.func.functional_call(norm, parameters, x)

    def own(x: Tensor, **parameters: Tensor) -> Tensor:
        return layer_norm(x, **parameters, eps=1e-5) if centred else rms_norm(x, **parameters, eps=1e-5)

    ours, peer = (outputs_and_gradients(function, given, upstream) for function in (own, megatron))
    truth = outputs_and_gradients(megatron, double(given), double(upstream))
    # torch's LayerNorm keeps means and deviations in bfloat16 if all its inputs have it, on a CPU.
    rows = {"dx": 0.4, "dweight": 1.2, "dbias": 0.6} if centred else {}
    bounds = dict.fromkeys(truth, ONCE) | {name: coarse(dtype, row) for name, row in rows.items()}
    assert_agree(f"megatron {normalization} by torch", dtype, ours, peer, truth, their_bounds=bounds)


@each_dtype
def test_bias_gelu(dtype: torch.dtype) -> None:
    given, upstream = inputs(dtype, x=2 * normal(0, T, H), bias=normal(1, H)), inputs(dtype, y=normal(2, T, H))
    ours = outputs_and_gradients(bias_gelu, given, upstream)
    peer = outputs_and_gradients(lambda x, bias: theirs.bias_gelu_impl(x, bias), given, upstream)
    truth = outputs_and_gradients(lambda x, bias: tanh_gelu(x + bias), double(given), double(upstream))
    bounds = {"y": ONCE, "dx": Bound(row=8), "dbias": coarse(dtype, 0.25)}
    assert_agree("megatron bias_gelu", dtype, ours, peer, truth, their_bounds=bounds)


@each_dtype
@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_bias_dropout_add(rate: float, dtype: torch.dtype) -> None:
    """Elements that one of the two drops and the other keeps are taken out, upstream too."""
    given = inputs(dtype, residual=normal(0, T, H), x=normal(1, T, H), bias=normal(2, H))
    upstream, keys = inputs(dtype, y=normal(3, T, H)), torch.arange(T) * 977

    def own(residual: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        return dropout_add(residual, x, bias, rate, keys, PLACE)

    def megatron(residual: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        torch.manual_seed(0)
        return theirs.bias_dropout_add_fused_train((x, bias), residual, rate)

    def exact(residual: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        return residual + (x + bias) * kept_TH / (1 - rate)

    kept_TH = kept(keys, PLACE, rate, H)
    their_kept_TH = outputs_and_gradients(megatron, given, upstream)["dx"] != 0
    assert (their_kept_TH.double().mean() - (1 - rate)).abs() < 0.05
    alike_TH = kept_TH == their_kept_TH
    upstream = {"y": upstream["y"] * alike_TH}
    ours, peer = (outputs_and_gradients(function, given, upstream) for function in (own, megatron))
    truth = outputs_and_gradients(exact, double(given), double(upstream))
    ours, peer, truth = (found | {"y": found["y"] * alike_TH} for found in (ours, peer, truth))
    bounds = dict.fromkeys(truth, ONCE) | {"dbias": coarse(dtype, 0.25)}
    assert_agree(f"megatron bias_dropout_add at {rate}", dtype, ours, peer, truth, their_bounds=bounds)


@each_dtype
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [32, 24])
def test_rope(rotary_dim: int, interleaved: bool, dtype: torch.dtype) -> None:
    given = inputs(dtype, q=normal(0, 2, 5, 4, 32), k=normal(1, 2, 5, 2, 32))
    upstream = inputs(dtype, q=normal(2, 2, 5, 4, 32), k=normal(3, 2, 5, 2, 32))
    angles_SC = torch.arange(5.0)[:, None] * 10.0 ** -torch.linspace(0, 3, rotary_dim // 2)
    freqs_SR = angles_SC.repeat_interleave(2, dim=1) if interleaved else angles_SC.repeat(1, 2)
    cos_SR, sin_SR = (x.repeat(1, 2).to(dtype) for x in (angles_SC.cos(), angles_SC.sin()))
    config = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=interleaved, multi_latent_attention=False)

    def megatron(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        group = SimpleNamespace()  # it is asked for, and not used
        freqs = freqs_SR[:, None, None]
        return tuple(
            theirs.apply_rotary_pos_emb(x.transpose(0, 1), freqs, config, cp_group=group).transpose(0, 1)
            for x in (q, k)
        )

    def exact(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return tuple(rope_ref(x, cos_SR.double(), sin_SR.double(), interleaved) for x in (q, k))

    ours = outputs_and_gradients(lambda q, k: rope_(q, k[..., None, :], cos_SR, sin_SR, interleaved), given, upstream)
    peer = outputs_and_gradients(megatron, given, upstream)
    truth = outputs_and_gradients(exact, double(given), double(upstream))
    name = f"megatron rope of {rotary_dim} columns, {'interleaved' if interleaved else 'halves'}"
    assert_agree(name, dtype, ours, peer, truth, their_bounds=coarse(dtype, 0.5))
