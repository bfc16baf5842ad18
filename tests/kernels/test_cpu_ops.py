"""The CPU's own operations against their definitions, in every direction, and as a compiler sees them."""

import os
import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from megagrow import attention_ops, cpu_ops, ops, product_ops
from megagrow.model import recompute

F64 = torch.float64


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=F64).to(dtype)


def heads(B: int, N: int, S: int, D: int, dtype: torch.dtype = F64) -> Tensor:
    """As a projection leaves them: [B, S, N, D] in memory."""
    return normal(B, S, N, D, dtype=dtype).transpose(1, 2).detach().requires_grad_()


def difference(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm())


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    S, T = q.shape[2], k.shape[2]
    mask = torch.ones(S, T, dtype=torch.bool).tril(T - S)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@pytest.fixture(autouse=True)
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiplies, whatever processor the tests have."""
    monkeypatch.setattr(cpu_ops, "TAKES_FLOAT32", True)


@pytest.mark.parametrize("bias", [False, True])
def test_linear_and_its_gradients(bias: bool) -> None:
    x, weight = normal(2, 3, 8).requires_grad_(), normal(5, 8).requires_grad_()
    bias_O = normal(5).requires_grad_() if bias else None
    leaves = [t for t in (x, weight, bias_O) if t is not None]
    y, exact = ops.linear(x, weight, bias_O), F.linear(*(t.double() for t in leaves))
    dy = normal(2, 3, 5)
    torch.testing.assert_close(y, exact.float())
    gradients = torch.autograd.grad(y, leaves, dy), torch.autograd.grad(exact, leaves, dy.double())
    for gradient, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_product_of_strided_factors(dtype: torch.dtype) -> None:
    a_MK, b_NK = normal(6, 4, dtype=dtype).T[1:], normal(5, 12, dtype=dtype)[:, ::2]
    exact = a_MK.double() @ b_NK.double().T
    torch.testing.assert_close(ops.product(a_MK, b_NK), exact.to(dtype))


def test_float32_goes_to_onednn_and_empty_factors_do_not() -> None:
    assert cpu_ops.HAS_ONEDNN
    assert cpu_ops.serves_product(normal(2, 3), normal(4, 3))
    for a_MK, b_NK in (
        (normal(0, 3), normal(4, 3)),
        (normal(2, 3), normal(0, 3)),
        (normal(2, 3, dtype=F64), normal(4, 3, dtype=F64)),
        (normal(2, 3, dtype=torch.bfloat16), normal(4, 3, dtype=torch.bfloat16)),
        (normal(2, 3).to("meta"), normal(4, 3).to("meta")),
    ):
        assert not cpu_ops.serves_product(a_MK, b_NK)
        assert ops.product(a_MK, b_NK).shape == ops.linear(a_MK, b_NK).shape == (len(a_MK), len(b_NK))


def test_without_avx_512_float32_stays_with_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_ops, "TAKES_FLOAT32", False)
    assert not cpu_ops.serves_product(normal(2, 3), normal(4, 3))
    test_linear_and_its_gradients(bias=True)
    test_product_of_strided_factors(torch.float32)
    out_MN = torch.empty(7, 5)[:, :4].fill_(torch.nan)
    assert ops.product(normal(7, 3), normal(4, 3), out_MN) is out_MN
    torch.testing.assert_close(out_MN, normal(7, 3) @ normal(4, 3).T)


@pytest.mark.parametrize(("capability", "takes"), [("avx2", False), ("default", True)])
def test_who_multiplies_follows_from_the_processor(capability: str, takes: bool) -> None:
    code = "from megagrow import cpu_ops; print(cpu_ops.TAKES_FLOAT32)"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == str(takes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_a_product_is_written_where_it_is_wanted(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_ops, "PIECE_ROWS", 7)
    a_MK, b_NK, whole_MN = normal(3, 4, dtype=dtype), normal(40, 4, dtype=dtype), torch.full((5, 40), 9.0, dtype=dtype)
    y_MN = ops.product(a_MK, b_NK, whole_MN[:3])
    assert y_MN.data_ptr() == whole_MN.data_ptr()
    torch.testing.assert_close(y_MN, (a_MK.double() @ b_NK.double().T).to(dtype))
    assert torch.equal(whole_MN[3:], torch.full((2, 40), 9.0, dtype=dtype))


@pytest.mark.parametrize(("M", "N", "K"), [(3, 40, 5), (3, 5, 40), (3, 40, 35)])
def test_a_vocabulary_is_multiplied_piece_by_piece(M: int, N: int, K: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_ops, "LONG", 16)
    monkeypatch.setattr(cpu_ops, "PIECE_ROWS", 7)
    multiply, sizes = cpu_ops._linear, list[int]()

    def noted(a_MK: Tensor, b_NK: Tensor) -> Tensor:
        sizes.append(b_NK.numel())
        return multiply(a_MK, b_NK)

    monkeypatch.setattr(cpu_ops, "_linear", noted)
    a_MK, b_NK = normal(M, K), normal(K, N).T
    torch.testing.assert_close(ops.product(a_MK, b_NK), (a_MK.double() @ b_NK.double().T).float())
    assert max(sizes) == 7 * min(N, K) and sum(sizes) == N * K


def test_a_product_asks_only_for_the_gradients_that_are_wanted() -> None:
    x, weight = normal(2, 3), normal(4, 3).requires_grad_()
    ops.linear(x, weight).sum().backward()
    assert weight.grad is not None and x.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_products_are_added_in_pieces(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_ops, "PIECE_ROWS", 4)
    a_MK, b_NK = normal(10, 3, dtype=dtype), normal(5, 3, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    total_MN = torch.ones(10, 5, dtype=wide)
    ops.add_product_(total_MN, a_MK, b_NK)
    expected = (a_MK.double() @ b_NK.double().T).to(dtype).to(wide)
    torch.testing.assert_close(total_MN, 1 + expected)
    ops.add_product_(total_MN, a_MK, b_NK, is_first=True)
    torch.testing.assert_close(total_MN, expected)


def test_pieces_of_a_product_are_bounded_on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU to 64 MiB, however large the matrix is; a piece has a row at least."""
    assert ops.piece_rows("cuda", 4096, 2) * 4096 * 2 == 2**26
    assert ops.piece_rows("cuda", 2**27, 4) == 1
    assert ops.piece_rows("cpu", 4096, 4) == cpu_ops.PIECE_ROWS
    sizes = []
    monkeypatch.setattr(product_ops, "product", lambda a, b: sizes.append(len(a)) or a @ b.T)
    total_MN = torch.zeros(10, 2**23, device="meta")
    ops.add_product_(total_MN, torch.empty(10, 3, device="meta"), torch.empty(2**23, 3, device="meta"))
    assert sizes == [2] * 5


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("num_keys", [10, 13])
@pytest.mark.parametrize("block", [3, 64])
def test_causal_attention(num_kv_heads: int, num_keys: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_ops, "QUERY_BLOCK", block)
    q = heads(2, 4, 10, 6)
    k, v = heads(2, num_kv_heads, num_keys, 6), heads(2, num_kv_heads, num_keys, 6).detach().flip(0).requires_grad_()
    y = ops.attention(q, k, v)
    torch.testing.assert_close(y, exact_attention(q, k, v))
    assert y.transpose(1, 2).is_contiguous()
    assert gradcheck(cpu_ops.causal_attention, (q, k, v))


@pytest.mark.parametrize("scale", [1, 4])
def test_attention_in_bfloat16_is_as_good_as_torchs(scale: int) -> None:
    """With scores rounded to 16 bits it would be 1.6 to 8 times as far off."""
    q, k, v = (heads(2, 4, 128, 64, torch.bfloat16).detach().mul(s).requires_grad_() for s in (scale, scale, 1))
    k, v = k.flip(2).detach().requires_grad_(), v.flip(3).detach().requires_grad_()
    dy = heads(2, 4, 128, 64, torch.bfloat16).detach().flip(1)
    exact = exact_attention(q.double(), k.double(), v.double())
    exact_gradients = torch.autograd.grad(exact, (q, k, v), dy.double())
    errors = []
    for attention in (cpu_ops.causal_attention, attention_ops._sdpa):
        y = attention(q, k, v) if attention is cpu_ops.causal_attention else attention(q, k, v, True)
        gradients = torch.autograd.grad(y, (q, k, v), dy)
        pairs = zip((y, *gradients), (exact, *exact_gradients), strict=True)
        errors.append(max(difference(x.detach(), e.detach()) for x, e in pairs))
    assert errors[0] < 1.2 * errors[1]


def test_scores_of_bfloat16_have_every_bit_and_leave_float32_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply, seen = torch.baddbmm, list[str]()
    mkldnn: Any = torch.backends.mkldnn

    def noted(*given: Tensor, **options: float) -> Tensor:
        seen.append(mkldnn.matmul.fp32_precision)
        return multiply(*given, **options)

    monkeypatch.setattr(torch, "baddbmm", noted)
    before = mkldnn.matmul.fp32_precision
    q, k, v = (heads(2, 4, 96, 64, torch.bfloat16).detach() for _ in range(3))
    y = cpu_ops.causal_attention(q, k, v)
    monkeypatch.setattr(cpu_ops, "_products_of", lambda dtype: nullcontext())
    torch.testing.assert_close(y, cpu_ops.causal_attention(q, k, v), rtol=0, atol=0)
    monkeypatch.undo()
    monkeypatch.setattr(torch, "baddbmm", noted)
    cpu_ops.causal_attention(*(x.float() for x in (q, k, v)))
    assert seen == ["bf16"] * 2 + [before] * 4
    with pytest.raises(RuntimeError, match="size"):
        cpu_ops._probabilities(q[0], k[0, :, :, :8], slice(0, 96))
    assert mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiler_is_told_the_truth(dtype: torch.dtype) -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        cpu_ops.product, (normal(4, 3).requires_grad_(), normal(5, 3).requires_grad_()), test_utils=checks
    )
    q, k, v = (heads(2, num, 8, 4, dtype) for num in (4, 2, 2))
    torch.library.opcheck(cpu_ops.causal_attention, (q, k, v), test_utils=checks)
    leaves = (x.detach() for x in (heads(2, 4, 8, 4, dtype), q, k, v))
    torch.library.opcheck(cpu_ops.causal_attention_backward, tuple(leaves), test_utils=checks[::2])


def test_selective_recompute_keeps_them() -> None:
    kept = {str(operation) for operation in recompute.KEPT_OPERATIONS}
    assert {"megagrow.product.default", "megagrow.causal_attention.default"} <= kept
