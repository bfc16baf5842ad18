"""What no kernel may do: row offsets of 32 bits wrap in tensors of more than 2^31 elements."""

from collections.abc import Iterator

import triton
import triton.language as tl

from tests.kernels.build import Build, pointers


@triton.jit
def narrow_kernel(p_x, p_y, H: tl.constexpr):
    o_h = tl.program_id(0) * H + tl.arange(0, H)
    tl.store(p_y + o_h, tl.load(p_x + o_h))


@triton.jit
def narrow_loop_kernel(p_x, p_y, T, H: tl.constexpr):
    for i_t in range(tl.program_id(0), T, tl.num_programs(0)):
        tl.store(p_y + i_t * H, tl.load(p_x + i_t * H))


@triton.jit
def narrow_batch_kernel(p_x, p_y, stride_b, H: tl.constexpr):
    o_h = tl.program_id(1) * stride_b + tl.arange(0, H)
    tl.store(p_y + o_h, tl.load(p_x + o_h))


@triton.jit
def narrow_size_kernel(p_x, p_y, N, H: tl.constexpr):
    o_h = tl.program_id(0).to(tl.int64) * H + tl.arange(0, H)
    tl.store(p_y + o_h, tl.load(p_x + o_h), mask=o_h < 2 * N)


def bad() -> Iterator[Build]:
    both = pointers("bf16", "p_x", "p_y")
    yield Build("narrow", narrow_kernel, both, {"H": 4096}, 4, "sm_90a")
    yield Build(
        "narrow_batch", narrow_batch_kernel, both | {"stride_b": "i32"}, {"H": 4096}, 4, "sm_90a", row_axes="xy"
    )
    yield Build("narrow_size", narrow_size_kernel, both | {"N": "i32"}, {"H": 4096}, 4, "sm_90a")
    yield Build("narrow_loop", narrow_loop_kernel, both | {"T": "i32"}, {"H": 4096}, 4, "sm_90a")
