"""The mended interpreter against torch's own bfloat16, and what it refuses."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.kernels import interpreter_fix

pytestmark = pytest.mark.interpreted


@triton.jit
def cast_kernel(p_x, p_y, N: tl.constexpr):
    o_n = tl.arange(0, N)
    tl.store(p_y + o_n, tl.load(p_x + o_n).to(p_y.dtype.element_ty))


@triton.jit
def truncating_kernel(p_x, p_y, N: tl.constexpr):
    o_n = tl.arange(0, N)
    tl.store(p_y + o_n, tl.load(p_x + o_n).to(tl.bfloat16, fp_downcast_rounding="rtz"))


@triton.jit
def dot_kernel(p_a, p_b, p_c, N: tl.constexpr):
    o_nn = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(p_c + o_nn, tl.dot(tl.load(p_a + o_nn), tl.load(p_b + o_nn)))


@triton.jit
def add_kernel(p_x, p_y, N: tl.constexpr):
    o_n = tl.arange(0, N)
    b_x = tl.load(p_x + o_n)
    tl.store(p_y + o_n, b_x + b_x)


@triton.jit
def compare_kernel(p_x, p_y, N: tl.constexpr):
    o_n = tl.arange(0, N)
    b_x = tl.load(p_x + o_n)
    tl.store(p_y + o_n, tl.where(b_x > b_x, b_x, b_x))


@triton.jit
def max_kernel(p_x, p_y, N: tl.constexpr):
    tl.store(p_y, tl.reduce(tl.load(p_x + tl.arange(0, N)), 0, tl.standard._elementwise_max))


def awkward_floats(num: int) -> torch.Tensor:
    """Random float32 bit patterns and, above all, exact halves between neighbours in bfloat16."""
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**32, num, dtype=np.uint32)
    bits[: num // 2] = (bits[: num // 2] & 0xFFFF0000) | 0x8000
    # The largest number, infinity, the smallest number, and two NaNs that carrying would lose.
    bits[:5] = 0x7F7FFFFF, 0x7F800000, 0x00000001, 0x7F800001, 0xFFFFFFFF
    return torch.from_numpy(bits.view(np.float32))


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    assert torch.equal(actual[~nan].view(torch.int16), expected[~nan].view(torch.int16))


def test_cast_rounds_to_nearest_even() -> None:
    x = awkward_floats(4096)
    y = torch.zeros(4096, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, y, N=4096)
    assert_same_bits(y, x.bfloat16())


def test_truncation_still_truncates() -> None:
    x = awkward_floats(4096)
    y = torch.zeros(4096, dtype=torch.bfloat16)
    truncating_kernel[(1,)](x, y, N=4096)
    kept = (x.view(torch.int32) & -0x10000).view(torch.float32)
    assert_same_bits(y, torch.where(x.isnan(), x, kept).bfloat16())


@pytest.mark.parametrize("other", [torch.float32, torch.float16, torch.int32], ids=str)
def test_casts_to_and_from_other_types(other: torch.dtype) -> None:
    x = torch.linspace(-300, 300, 256).bfloat16()
    there, back = torch.zeros(256, dtype=other), torch.zeros(256, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, there, N=256)
    cast_kernel[(1,)](there, back, N=256)
    assert torch.equal(there, x.to(other))
    assert torch.equal(back, x.to(other).bfloat16())


def test_dot_multiplies_values() -> None:
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    c = torch.zeros(16, 16)
    dot_kernel[(1,)](a, b, c, N=16)
    torch.testing.assert_close(c, a.float() @ b.float())


@pytest.mark.parametrize("operation", ["add", "compare", "max"])
def test_arithmetic_on_bfloat16_is_refused(operation: str) -> None:
    kernel = {"add": add_kernel, "compare": compare_kernel, "max": max_kernel}[operation]
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(InterpreterError, match="upcast on load"):
        kernel[(1,)](x, torch.zeros_like(x), N=16)


def test_only_bfloat16_is_refused() -> None:
    x = torch.linspace(-1, 1, 16)
    y = torch.zeros(16)
    add_kernel[(1,)](x, y, N=16)
    assert torch.equal(y, 2 * x)


def test_widened_undoes_rounded_for_every_pattern() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    bits = bits[~np.isnan(interpreter_fix.widened(bits))]
    assert np.array_equal(interpreter_fix.rounded(interpreter_fix.widened(bits)), bits)


def test_new_memory_is_nan() -> None:
    assert torch.empty(4).isnan().all()
    assert torch.empty_like(torch.ones(4, dtype=torch.bfloat16)).isnan().all()
    assert (torch.empty(4, dtype=torch.int32) < 0).all()
