"""Rotary embedding: heads of 128 columns; the other blocks and partial rotation in bfloat16."""

from collections.abc import Iterator
from dataclasses import replace

import triton

from megagrow_kernels.launch import ANY
from megagrow_kernels.rope import _blocks, rope_fwd_kernel, rope_new_kernel
from tests.kernels.build import DTYPES, Build, pointers

STRIDES = ("stride_qb", "stride_qs", "stride_qn", "stride_kb", "stride_ks", "stride_kn")
VALUE_STRIDES = ("stride_vb", "stride_vs", "stride_vn")


def pinned(target: str) -> Iterator[Build]:
    for dtype in DTYPES:
        yield from rope(dtype, 32, 128, 128, target)
        yield from rope(dtype, 32, 128, 128, target, interleaved=True)
    for entry in ANY["rope"]:
        yield from rope("bf16", entry.block // 64, 64, 64, target)
    yield from rope("bf16", 32, 128, 96, target)
    yield from rope("bf16", 32, 128, 32, target)
    yield from rope("bf16", 32, 128, 32, target, interleaved=True)
    yield from rope("fp32", 16, 256, 64, target)
    *_, whole = rope("bf16", 32, 128, 128, target)
    yield without(whole, "values", "p_v")
    yield without(whole, "queries-keys", "p_q", "p_qy", "p_k")


def without(build: Build, what: str, *absent: str) -> Build:
    """As where some gradients are not there."""
    signature = {name: kind for name, kind in build.signature.items() if name not in absent}
    constants = build.constants | dict.fromkeys(absent)
    return replace(build, name=f"{build.name}-no-{what}", signature=signature, constants=constants)


def rope(dtype: str, num_heads: int, D: int, R: int, target: str, interleaved: bool = False) -> Iterator[Build]:
    blocks = _blocks(num_heads, D, R // 2)
    num_warps = blocks.pop("num_warps")
    constants = {"N": num_heads, "K": max(num_heads // 4, 1), "C": R // 2, "INTERLEAVED": interleaved} | blocks
    angles = pointers("fp32", "p_cos", "p_sin")
    name = f"{dtype}-{num_heads}x{D}-{R}{'-interleaved' if interleaved else ''}"
    yield Build(
        f"rope_fwd-{name}",
        rope_fwd_kernel,
        pointers(dtype, "p_q", "p_k") | angles | dict.fromkeys(STRIDES, "i32"),
        constants,
        num_warps,
        target,
        STRIDES,
        row_axes="xy",
    )
    rest = triton.next_power_of_2(max(D - R, 1))
    yield Build(
        f"rope_new-{name}",
        rope_new_kernel,
        pointers(dtype, "p_q", "p_k", "p_v", "p_qy", "p_kvy") | angles | dict.fromkeys(STRIDES + VALUE_STRIDES, "i32"),
        constants | {"P": 2, "D": D, "BLOCK_D": triton.next_power_of_2(D), "BLOCK_REST": rest, "INVERSE": True},
        num_warps,
        target,
        STRIDES + VALUE_STRIDES,
        row_axes="xy",
    )
