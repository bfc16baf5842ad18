"""Matrix products, which no kernel has yet: with four warps Hopper's own instructions serve, with one they cannot."""

from collections.abc import Iterator

import triton
import triton.language as tl

from tests.kernels.build import Build, pointers


@triton.jit
def product_kernel(p_a, p_b, p_c, SIDE: tl.constexpr):
    o_x = tl.arange(0, SIDE)
    o_xy = o_x[:, None] * SIDE + o_x[None, :]
    tl.store(p_c + o_xy, tl.dot(tl.load(p_a + o_xy), tl.load(p_b + o_xy)))


def examples() -> Iterator[Build]:
    for name, num_warps in (("product", 4), ("small_product", 1)):
        signature = pointers("bf16", "p_a", "p_b") | pointers("fp32", "p_c")
        yield Build(name, product_kernel, signature, {"SIDE": 64}, num_warps, "sm_90a")
