"""RMSNorm and LayerNorm, with all that is optional: the chosen and the widest block, in float32 too.

In bfloat16 also every other configuration, rows so narrow that a program holds several, and float32 weights.
"""

from collections.abc import Iterator

from megagrow_kernels.launch import ANY, Launch, pick, rows_at_once
from megagrow_kernels.norm import (
    MAX_HIDDEN_SIZE,
    norm_bwd_kernel,
    norm_fwd_kernel,
    norm_means_kernel,
    num_stages,
)
from tests.kernels.build import DTYPES, Build, pointers

CHOSEN, NARROW = 4096, 128
WIDEST_BLOCK = ANY["norm_bwd"][-1].block
BYTES = {"bf16": 2, "fp32": 4}


def pinned(target: str) -> Iterator[Build]:
    for centred in (False, True):
        for dtype in DTYPES:
            for hidden_size in (CHOSEN, MAX_HIDDEN_SIZE):
                yield forward(dtype, hidden_size, centred, target)
            for hidden_size in (CHOSEN, WIDEST_BLOCK):
                yield backward(dtype, hidden_size, centred, target)
            yield means(dtype, centred, target)
        for hidden_size in (NARROW, *(entry.block for entry in ANY["norm_fwd"][1:-1])):
            yield forward("bf16", hidden_size, centred, target)
        for hidden_size in (NARROW, *(entry.block for entry in ANY["norm_bwd"][:-2]), MAX_HIDDEN_SIZE):
            yield backward("bf16", hidden_size, centred, target)
        yield forward("bf16", CHOSEN, centred, target, params="fp32")
        yield backward("bf16", CHOSEN, centred, target, params="fp32")


def bad() -> Iterator[Build]:
    yield backward("fp32", 32768, True, "sm_90a", chosen=Launch(32768, 8), name="spills")
    yield forward("bf16", 4095, False, "sm_90a", name="scalar_loads")


def forward(
    dtype: str, hidden_size: int, centred: bool, target: str, params: str | None = None, name: str = ""
) -> Build:
    chosen = pick("norm_fwd", hidden_size)
    activations = pointers(dtype, "p_x", "p_residual", "p_y", "p_sum")
    return Build(
        name or _name("fwd", dtype, hidden_size, centred, params),
        norm_fwd_kernel,
        activations | _parameters(centred, params or dtype) | {"p_stats": "*fp32", "eps": "fp32", "T": "i32"},
        {
            "H": hidden_size,
            "BLOCK_T": rows_at_once(chosen),
            "BLOCK_H": chosen.block,
            "CENTRED": centred,
            "HAS_BIAS": centred,
            "HAS_RESIDUAL": True,
        },
        chosen.num_warps,
        target,
    )


def backward(
    dtype: str,
    hidden_size: int,
    centred: bool,
    target: str,
    params: str | None = None,
    chosen: Launch | None = None,
    name: str = "",
) -> Build:
    chosen = chosen or pick("norm_bwd", hidden_size)
    block_t = rows_at_once(chosen)
    activations = pointers(dtype, "p_x", "p_dy", "p_dsum", "p_dx")
    float32 = pointers("fp32", "p_stats", "p_means", "p_dparams")
    return Build(
        name or _name("bwd", dtype, hidden_size, centred, params),
        norm_bwd_kernel,
        activations | float32 | {"p_weight": f"*{params or dtype}", "T": "i32"},
        {
            "H": hidden_size,
            "BLOCK_T": block_t,
            "BLOCK_H": chosen.block,
            "CENTRED": centred,
            "HAS_BIAS": centred,
            "HAS_DSUM": True,
            "NUM_STAGES": num_stages(block_t, chosen.block, BYTES[dtype]),
        },
        chosen.num_warps,
        target,
    )


def means(dtype: str, centred: bool, target: str) -> Build:
    chosen = pick("norm_bwd", MAX_HIDDEN_SIZE)
    return Build(
        _name("means", dtype, MAX_HIDDEN_SIZE, centred, None),
        norm_means_kernel,
        pointers(dtype, "p_x", "p_weight", "p_dy") | pointers("fp32", "p_stats", "p_means"),
        {"H": MAX_HIDDEN_SIZE, "BLOCK_H": chosen.block, "CENTRED": centred},
        chosen.num_warps,
        target,
    )


def _parameters(centred: bool, dtype: str) -> dict[str, str]:
    return pointers(dtype, "p_weight", "p_bias") if centred else pointers(dtype, "p_weight")


def _name(part: str, dtype: str, hidden_size: int, centred: bool, params: str | None) -> str:
    kind = "layer_norm" if centred else "rms_norm"
    return f"{kind}_{part}-{dtype}-{hidden_size}" + (f"-{params}_params" if params else "")
