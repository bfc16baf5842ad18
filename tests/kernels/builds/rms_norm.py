"""RMSNorm: every configuration on Hopper in bfloat16; the chosen and the widest everywhere, in float32 too."""

from collections.abc import Iterator

from megagrow_kernels.launch import ANY, Launch, pick
from megagrow_kernels.rms_norm import (
    MAX_HIDDEN_SIZE,
    rms_norm_bwd_kernel,
    rms_norm_dot_kernel,
    rms_norm_fwd_kernel,
)
from tests.kernels.build import DTYPES, TARGETS, Build, pointers


def pinned() -> Iterator[Build]:
    for target in TARGETS:
        for dtype in DTYPES:
            for hidden_size in (4096, MAX_HIDDEN_SIZE):
                yield forward(dtype, hidden_size, target)
            for hidden_size in (4096, ANY["rms_norm_bwd"][-1].block):
                yield backward(dtype, hidden_size, target)
            yield dot(dtype, MAX_HIDDEN_SIZE, target)
    yield backward("bf16", MAX_HIDDEN_SIZE, "sm_90a")
    for entry in ANY["rms_norm_fwd"]:
        if entry.block not in (4096, MAX_HIDDEN_SIZE):
            yield forward("bf16", entry.block, "sm_90a")
    for entry in ANY["rms_norm_bwd"][:-1]:
        if entry.block != 4096:
            yield backward("bf16", entry.block, "sm_90a")


def bad() -> Iterator[Build]:
    yield backward("fp32", 32768, "sm_90a", Launch(32768, 8), "spills")
    yield forward("bf16", 4095, "sm_90a", "scalar_loads")


def forward(dtype: str, hidden_size: int, target: str, name: str = "") -> Build:
    chosen = pick("rms_norm_fwd", hidden_size)
    return Build(
        name or f"rms_norm_fwd-{dtype}-{hidden_size}",
        rms_norm_fwd_kernel,
        pointers(dtype, "p_x", "p_residual", "p_weight", "p_y", "p_sum") | {"p_rstd": "*fp32", "eps": "fp32"},
        {"H": hidden_size, "BLOCK_H": chosen.block, "HAS_RESIDUAL": True},
        chosen.num_warps,
        target,
    )


def backward(dtype: str, hidden_size: int, target: str, chosen: Launch | None = None, name: str = "") -> Build:
    chosen = chosen or pick("rms_norm_bwd", hidden_size)
    activations = pointers(dtype, "p_x", "p_weight", "p_dy", "p_dsum", "p_dx")
    return Build(
        name or f"rms_norm_bwd-{dtype}-{hidden_size}",
        rms_norm_bwd_kernel,
        activations | pointers("fp32", "p_rstd", "p_dot", "p_dweight") | {"T": "i32"},
        {"H": hidden_size, "BLOCK_H": chosen.block, "HAS_DSUM": True},
        chosen.num_warps,
        target,
    )


def dot(dtype: str, hidden_size: int, target: str) -> Build:
    chosen = pick("rms_norm_bwd", hidden_size)
    return Build(
        f"rms_norm_dot-{dtype}-{hidden_size}",
        rms_norm_dot_kernel,
        pointers(dtype, "p_x", "p_weight", "p_dy") | pointers("fp32", "p_rstd", "p_dot"),
        {"H": hidden_size, "BLOCK_H": chosen.block},
        chosen.num_warps,
        target,
    )
