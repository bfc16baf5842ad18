"""The twins against their definitions and by numerical differentiation, and which one serves."""

import functools
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

import megagrow_kernels
from megagrow import growth_ops, ops, torch_growth_ops, torch_ops, torch_vocab_ops
from megagrow.errors import ConfigError

F64 = torch.float64
GROWTH_DOORS = {
    "layer_mix": "layer_mix",
    "sparse_map_": "sparse_map",
    "dense_map": "dense_map",
    "dense_map_": "dense_map",
    "dense_blocks_": "dense_map",
}
DOORS = {
    "rms_norm": "norm",
    "vocab_stats": "vocab_loss",
    "vocab_grad_": "vocab_loss",
    "vocab_scores": "vocab_loss",
    "distill_stats": "distill_loss",
    "distill_grad_": "distill_loss",
    "layer_norm": "norm",
    "swiglu": "glu",
    "geglu": "glu",
    "bias_gelu": "gelu",
    "dropout_add": "dropout_add",
    "rope_": "rope",
}


def normal(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=F64).to(dtype)


def leaf(*shape: int) -> Tensor:
    return normal(*shape).requires_grad_()


def test_rms_norm_is_its_definition() -> None:
    x, weight, residual = normal(2, 3, 10), normal(10), normal(2, 3, 10)
    total = x + residual
    expected = total / (total.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    y, returned = ops.rms_norm(x, weight, 1e-3, residual)
    torch.testing.assert_close(y, expected)
    assert torch.equal(returned, total)
    torch.testing.assert_close(ops.rms_norm(total, weight, 1e-3), expected)


def test_rms_norm_gradients() -> None:
    assert gradcheck(lambda x, w: ops.rms_norm(x, w, 1e-5), (leaf(3, 8), leaf(8)))
    arguments = (leaf(3, 8), leaf(8), normal(4, 8)[:3].requires_grad_())
    assert gradcheck(lambda x, w, residual: ops.rms_norm(x, w, 1e-5, residual), arguments)


def test_rms_norm_keeps_the_dtype_of_x_under_float32_weights() -> None:
    x, weight = normal(4, 64, dtype=torch.bfloat16), 1 + normal(64, dtype=torch.float32) / 300
    y = ops.rms_norm(x, weight, 1e-5)
    exact = ops.rms_norm(x.double(), weight.double(), 1e-5)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, exact.bfloat16())  # rounding the weights first would differ


def test_layer_norm() -> None:
    x, weight, bias = normal(3, 8), normal(8), normal(9)[:8]
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    torch.testing.assert_close(ops.layer_norm(x, weight, bias, 1e-3), expected + bias)
    torch.testing.assert_close(ops.layer_norm(x, weight, None, 1e-3), expected)


@pytest.fixture(params=[8, 2**18], ids=["row by row", "whole"])
def chunk_logits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_vocab_ops, "CHUNK_LOGITS_CPU", request.param)


@pytest.mark.usefixtures("chunk_logits")
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
def test_vocab_loss_is_cross_entropy(dtype: torch.dtype) -> None:
    logits_TV, labels_T = 3 * normal(5, 11, dtype=dtype), torch.tensor([0, 8, -100, 3, 2])
    num_valid, scale_T = 9, torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0], dtype=F64)
    leaf_TV = logits_TV.double().requires_grad_()
    loss_T = F.cross_entropy(leaf_TV[:, :num_valid], labels_T, reduction="none")
    (loss_T * scale_T).sum().backward()

    wide = torch.promote_types(dtype, torch.float32)
    stats_T3 = ops.vocab_stats(logits_TV, labels_T, num_valid)
    logsumexp_T = stats_T3[:, 0] + stats_T3[:, 1].log()
    found_T = torch.where(labels_T < 0, 0, logsumexp_T - stats_T3[:, 2])
    assert stats_T3.dtype == wide
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == F64 else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(found_T.double(), loss_T.detach(), **tolerance)

    rank_T = ops.vocab_stats(logits_TV, labels_T, num_valid, stats_T3[:, 2])[:, 3]
    for t in (0, 1, 3, 4):
        row_V = logits_TV[t, :num_valid]
        assert rank_T[t] == (row_V > row_V[labels_T[t]]).sum()

    address = logits_TV.data_ptr()
    returned = ops.vocab_grad_(logits_TV, labels_T, logsumexp_T, scale_T.to(wide), num_valid)
    assert returned is logits_TV
    assert logits_TV.data_ptr() == address
    tolerance = {"rtol": 2**-8, "atol": 0} if dtype == torch.bfloat16 else tolerance
    torch.testing.assert_close(logits_TV.double(), leaf_TV.grad, **tolerance)


def test_vocab_functions_are_outside_autograd() -> None:
    logits_TV, labels_T = leaf(2, 6), torch.tensor([1, 2])
    stats_T3 = ops.vocab_stats(logits_TV, labels_T)
    assert not stats_T3.requires_grad
    before = logits_TV.detach().clone()
    ops.vocab_grad_(logits_TV, labels_T, stats_T3[:, 0], torch.ones(2, dtype=F64))
    assert not torch.equal(logits_TV.detach(), before)


def test_swiglu_of_a_weight_with_alternating_rows() -> None:
    x, weight, bias = leaf(2, 3, 4), leaf(10, 4), leaf(10)

    def gated(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.swiglu(ops.linear(x, ops.gate_up_rows(weight, F64), ops.gate_up_rows(bias, F64)))

    gate, up = (F.linear(x, weight[first::2], bias[first::2]) for first in (0, 1))
    torch.testing.assert_close(gated(x, weight, bias), gate * torch.sigmoid(gate) * up)
    assert gradcheck(gated, (x, weight, bias))
    assert gradcheck(lambda x: ops.swiglu(x.transpose(0, 1)), (leaf(2, 3, 8),))


def test_elsewhere_than_on_a_cpu_gate_and_up_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.empty(10, 4, device="meta")
    assert ops.gate_up_rows(weight, torch.float32) is weight
    gate_up = leaf(2, 3, 8)
    monkeypatch.setattr(torch_ops, "alternates", lambda x: True)
    gate, up = gate_up[..., 0::2], gate_up[..., 1::2]
    torch.testing.assert_close(ops.swiglu(gate_up), gate * torch.sigmoid(gate) * up)
    assert gradcheck(ops.swiglu, (gate_up,))


def test_gelu_is_the_tanh_approximation() -> None:
    x = torch.linspace(-4, 4, 33, dtype=F64)
    inner = (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    torch.testing.assert_close(ops.bias_gelu(x), 0.5 * x * (1 + torch.tanh(inner)))


def test_exact_gelu_is_the_normal_distribution_function_times_x() -> None:
    x, bias = torch.linspace(-4, 4, 33, dtype=F64)[:, None], normal(3)
    shifted = x + bias
    torch.testing.assert_close(ops.bias_gelu_erf(x, bias), shifted * torch.special.ndtr(shifted))
    torch.testing.assert_close(ops.bias_gelu_erf(x), x * torch.special.ndtr(x))


def angles(S: int, D: int) -> Tensor:
    return torch.outer(torch.arange(S, dtype=F64), 10.0 ** -torch.arange(0, D, 2, dtype=F64))


def test_rope_rotates_columns_half_the_width_apart() -> None:
    q_BSND, kv_BSK2D, angles_SE = leaf(2, 5, 3, 8), leaf(2, 5, 1, 2, 8), angles(5, 8)
    cos_SD, sin_SD = angles_SE.cos().repeat(1, 2), angles_SE.sin().repeat(1, 2)
    turns_S1E = torch.polar(torch.ones_like(angles_SE), angles_SE).unsqueeze(1)
    *turned, v_BSKD = ops.rope_(q_BSND, kv_BSK2D, cos_SD, sin_SD)
    for x_BSND, y_BSND in zip((q_BSND, kv_BSK2D[..., 0, :]), turned, strict=True):
        expected = torch.complex(x_BSND[..., :4], x_BSND[..., 4:]) * turns_S1E
        torch.testing.assert_close(y_BSND, torch.cat((expected.real, expected.imag), dim=-1))
    assert torch.equal(v_BSKD, kv_BSK2D[..., 1, :])
    assert gradcheck(lambda q, kv: ops.rope_(q, kv, cos_SD, sin_SD), (q_BSND, kv_BSK2D))


def test_rope_keeps_the_dtype_of_x() -> None:
    angles_SE = angles(4, 8)
    cos_SD, sin_SD = (t.repeat(1, 2).float() for t in (angles_SE.cos(), angles_SE.sin()))
    q_BSND, k_BSK1D = normal(1, 4, 2, 8, dtype=torch.bfloat16), normal(1, 4, 2, 1, 8, dtype=torch.bfloat16)
    exact = ops.rope_(q_BSND.double(), k_BSK1D.double(), cos_SD.double(), sin_SD.double())
    for y_BSND, exact_BSND in zip(ops.rope_(q_BSND, k_BSK1D, cos_SD, sin_SD), exact, strict=True):
        assert y_BSND.dtype == torch.bfloat16
        torch.testing.assert_close(y_BSND.double(), exact_BSND, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_attention(causal: bool, num_kv_heads: int) -> None:
    B, N, S, D = 2, 4, 6, 8
    q_BNSD, k_BKSD, v_BKSD = (
        leaf(B, N, S, D),
        leaf(B, num_kv_heads, S, D),
        leaf(B, num_kv_heads, S, D),
    )
    k_BNSD, v_BNSD = (t.repeat_interleave(N // num_kv_heads, dim=1) for t in (k_BKSD, v_BKSD))
    scores_BNSS = q_BNSD @ k_BNSD.transpose(-1, -2) / D**0.5
    if causal:
        future_SS = torch.ones(S, S, dtype=torch.bool).triu(1)
        scores_BNSS = scores_BNSS.masked_fill(future_SS, -torch.inf)
    expected = scores_BNSS.softmax(-1) @ v_BNSD
    actual = ops.attention(q_BNSD, k_BKSD, v_BKSD, causal)
    torch.testing.assert_close(actual, expected)
    leaves = (q_BNSD, k_BKSD, v_BKSD)
    seed = normal(B, N, S, D)
    torch.testing.assert_close(torch.autograd.grad(actual, leaves, seed), torch.autograd.grad(expected, leaves, seed))


@pytest.mark.parametrize("name", [*DOORS, *GROWTH_DOORS])
def test_door_twin_and_kernel_have_the_same_parameters(name: str) -> None:
    twins = next(each for each in (torch_ops, torch_vocab_ops, torch_growth_ops) if hasattr(each, name))
    door, twin, kernel = (
        [(p.name, p.default) for p in inspect.signature(function).parameters.values() if p.name != "fused"]
        for function in (getattr(ops, name), getattr(twins, name), getattr(megagrow_kernels, name))
    )
    assert door == twin == kernel


def fake(device: str, dtype: torch.dtype) -> SimpleNamespace:
    return SimpleNamespace(is_cuda=device == "cuda", dtype=dtype)


@pytest.fixture
def all_serve() -> Iterator[None]:
    ops.let_kernels_serve("all")
    yield
    ops.let_kernels_serve("measured")


@pytest.mark.usefixtures("all_serve")
@pytest.mark.parametrize("name", sorted(ops.KERNELS))
def test_kernels_serve_what_they_can_on_a_gpu(name: str) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert ops.kernels_for(name, fake("cuda", dtype)) is megagrow_kernels
        assert ops.kernels_for(name, fake("cpu", dtype)) is None
    assert ops.kernels_for(name, fake("cuda", F64)) is None


def test_only_what_is_measured_serves_by_default() -> None:
    x = fake("cuda", torch.float32)
    ops.let_kernels_serve("measured")
    assert ops.MEASURED <= ops.KERNELS
    assert {name for name in ops.KERNELS if ops.kernels_for(name, x)} == ops.MEASURED
    ops.let_kernels_serve("none")
    assert not any(ops.kernels_for(name, x) for name in ops.KERNELS)
    ops.let_kernels_serve("measured")


def test_kernels_that_are_not_there_are_refused() -> None:
    ops.check_kernels("measured", torch.device("cpu"))
    ops.check_kernels("all", torch.device("cuda"))
    with pytest.raises(ConfigError, match="train.kernels=all runs on GPUs, not on the cpu"):
        ops.check_kernels("all", torch.device("cpu"))


@pytest.mark.parametrize("name", [*DOORS, *GROWTH_DOORS])
def test_door_hands_everything_to_the_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = inspect.signature(getattr(ops, name)).parameters.values()
    arguments = [[object()] if p.name == "targets" else object() for p in parameters if p.kind != p.KEYWORD_ONLY]
    calls: list[tuple[object, ...]] = []
    kernels = SimpleNamespace(**{name: lambda *given, **named: calls.append(given) or "result"})
    first = arguments[0][0] if isinstance(arguments[0], list) else arguments[0]
    serves = (DOORS | GROWTH_DOORS)[name], first
    module = growth_ops if name in GROWTH_DOORS else ops
    monkeypatch.setattr(module, "kernels_for", lambda *asked: kernels if asked == serves else None)
    assert getattr(ops, name)(*arguments) == (None if name in GROWTH_DOORS and name.endswith("_") else "result")
    assert calls == [tuple(arguments)]


@pytest.fixture
def fresh_ops(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`megagrow.ops` as imported where `megagrow_kernels` has not been."""
    for name in [name for name in sys.modules if name.split(".")[0] == "megagrow_kernels"]:
        monkeypatch.delitem(sys.modules, name)
    return monkeypatch


def load_ops(fresh_ops: pytest.MonkeyPatch) -> ModuleType:
    for name in ("serving", "growth_ops"):
        fresh_ops.delitem(sys.modules, f"megagrow.{name}")
    spec = importlib.util.spec_from_file_location("ops_again", ops.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_triton_the_twins_serve(fresh_ops: pytest.MonkeyPatch) -> None:
    fresh_ops.setitem(sys.modules, "triton", None)  # `import triton` fails
    fresh_ops.setitem(sys.modules, "megagrow_kernels", None)
    module = load_ops(fresh_ops)
    module.let_kernels_serve("all")
    assert module.kernels_for("norm", fake("cuda", torch.float32)) is None
    with pytest.raises(ConfigError, match="train.kernels=all needs Triton"):
        module.check_kernels("all", torch.device("cuda"))
    assert module.rms_norm(torch.ones(2, 4), torch.ones(4), 0.0).tolist() == [[1.0] * 4] * 2


def test_a_broken_triton_is_named_once(fresh_ops: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "megagrow_kernels":
                raise RuntimeError("no such driver")

    fresh_ops.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    module = load_ops(fresh_ops)
    with pytest.warns(UserWarning, match="no such driver") as caught:
        module.let_kernels_serve("all")
        module.let_kernels_serve("all")
    assert module.kernels_for("norm", fake("cuda", torch.float32)) is None
    assert len(caught) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_fused_vocabulary_functions_give_what_the_twins_give(dtype: torch.dtype) -> None:
    logits_TV, labels_T = normal(5, 70, dtype=dtype) * 9, torch.tensor([0, 69, -1, 33, 70])
    logits_TV[0, 3], logits_TV[4] = -torch.inf, -torch.inf
    stats_T3 = torch_vocab_ops.vocab_stats(logits_TV, labels_T)
    torch.testing.assert_close(ops.vocab_stats(logits_TV, labels_T, fused=True), stats_T3)
    logsumexp_T = stats_T3[:, 0] + stats_T3[:, 1].log()
    scale_T = normal(5, dtype=stats_T3.dtype)
    rest = logits_TV[:4].clone(), labels_T[:4], logsumexp_T[:4], scale_T[:4]
    expected = torch_vocab_ops.vocab_grad_(rest[0].clone(), *rest[1:])
    given = ops.vocab_grad_(*rest, fused=True)
    assert given is rest[0]
    torch.testing.assert_close(given, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_fused_distillation_functions_give_what_the_twins_give(dtype: torch.dtype) -> None:
    logits_TV, teacher_TV = normal(4, 70, dtype=dtype) * 9, normal(5, 70, dtype=dtype)[:4] * 9
    labels_T, temperatures = torch.tensor([0, 69, -1, 33]), (2.0, 3.0)
    stats_TK = torch_vocab_ops.distill_stats(logits_TV, teacher_TV, labels_T, *temperatures)
    fused_TK = ops.distill_stats(logits_TV, teacher_TV, labels_T, *temperatures, fused=True)
    torch.testing.assert_close(fused_TK, stats_TK)
    logsumexps_T3 = torch.stack((stats_TK[:, 0], stats_TK[:, 0] / 3, stats_TK[:, 4] / 2), -1) + 4
    scales = normal(4, dtype=stats_TK.dtype), normal(5, dtype=stats_TK.dtype)[:4]
    rest = teacher_TV, labels_T, logsumexps_T3, *scales, *temperatures
    expected = torch_vocab_ops.distill_grad_(logits_TV.clone(), *rest)
    given = ops.distill_grad_(logits_TV, *rest, fused=True)
    assert given is logits_TV
    torch.testing.assert_close(given, expected)


def test_what_is_fused_has_every_option() -> None:
    """Smoothed labels and the reverse divergence; the functions run as they are, which a compiler takes as well."""
    logits_TV, teacher_TV, labels_T = normal(4, 70), normal(5, 70)[:4], torch.tensor([0, 69, -1, 33])
    scale_T, smooth_T2, lse_T3 = normal(4), normal(4, 2), normal(4, 3) + 5
    with mock.patch.object(ops, "compiled", lambda function: function):
        for door, given in (
            (ops.vocab_grad_, (logits_TV, labels_T, lse_T3[:, 0], scale_T, None, smooth_T2)),
            (ops.distill_stats, (logits_TV, teacher_TV, labels_T, 2.0, 3.0, None, None, True)),
            (
                ops.distill_grad_,
                (logits_TV, teacher_TV, labels_T, lse_T3, scale_T, -scale_T, 2.0, 3.0, None, smooth_T2, True),
            ),
        ):
            first, *rest = given
            found, expected = door(first.clone(), *rest, fused=True), door(first.clone(), *rest)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_fused_functions_take_empty_shards() -> None:
    empty, labels_T = torch.empty(3, 0), torch.tensor([-1, -1, -1])
    for stats_TK in (
        ops.vocab_stats(empty, labels_T, fused=True),
        ops.distill_stats(empty, empty, labels_T, 2.0, 1.0, fused=True)[:, [0, 1, 2, 3, 5, 6, 7]],
    ):
        assert stats_TK[:, 0].eq(-torch.inf).all() and stats_TK[:, 1:].eq(0).all()
    zeros_T = torch.zeros(3)
    assert ops.vocab_grad_(empty, labels_T, zeros_T, zeros_T, fused=True) is empty
    zeros_T3 = torch.zeros(3, 3)
    assert ops.distill_grad_(empty, empty, labels_T, zeros_T3, zeros_T, zeros_T, 2.0, 1.0, fused=True) is empty


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (2.0, 0.5)])
def test_tokens_that_both_models_exclude_leave_no_trace(temperatures: tuple[float, float], reverse: bool) -> None:
    generator, labels_T = torch.Generator().manual_seed(0), torch.tensor([0, 3, 5])
    s_TV, t_TV = (torch.randn(3, 6, generator=generator) for _ in range(2))
    excluded = torch.full((3, 2), -torch.inf)
    wide_s_TV, wide_t_TV = (torch.cat((x_TV, excluded), dim=1) for x_TV in (s_TV, t_TV))
    found_TK = torch_vocab_ops.distill_stats(wide_s_TV, wide_t_TV, labels_T, *temperatures, reverse=reverse)
    torch.testing.assert_close(
        found_TK, torch_vocab_ops.distill_stats(s_TV, t_TV, labels_T, *temperatures, reverse=reverse)
    )


def test_a_function_of_many_models_stays_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that grows in width several times has more versions of a block than torch allows at first."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    ops.compiled.cache_clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
        for width in range(1, 12):
            assert ops.compiled(scaled)(torch.nn.Linear(width, width)).shape == (width, width)
    ops.compiled.cache_clear()


def scaled(layer: torch.nn.Linear) -> Tensor:
    return 2 * layer.weight
