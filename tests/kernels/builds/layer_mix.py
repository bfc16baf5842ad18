"""Mixing 12 layers to 24, as GPT-2's growth does, and the most layers that there may be."""

from collections.abc import Iterator

from megagrow_kernels.launch import ANY, Launch, power_of_two
from megagrow_kernels.layer_mix import LAYERS_AT_ONCE, MOST_LAYERS, layer_mix_bwd_kernel, layer_mix_fwd_kernel
from tests.kernels.build import DTYPES, TARGETS, Build, pointers


def pinned(target: str) -> Iterator[Build]:
    for entry in ANY["layer_mix"]:
        yield forward("fp32", 12, entry, target)
    yield forward("bf16", 12, ANY["layer_mix"][-1], target)
    yield forward("fp32", MOST_LAYERS, ANY["layer_mix"][-1], target)
    for dtype, J in ((DTYPES[0], 12), (DTYPES[1], 12), (DTYPES[1], MOST_LAYERS)):
        yield backward(dtype, J, target)


def forward(dtype: str, J: int, entry: Launch, target: str) -> Build:
    signature = pointers(dtype, "p_x") | pointers("fp32", "p_w", "p_y") | {"K": "i32", "N": "i32"}
    BLOCK_J = power_of_two(J)
    constants = {"J": J, "BLOCK_J": BLOCK_J, "BLOCK_N": entry.block // BLOCK_J}
    name = f"layer_mix_fwd-{dtype}-{J}-{entry.block}"
    return Build(name, layer_mix_fwd_kernel, signature, constants, entry.num_warps, target, aligned=("N",))


def backward(dtype: str, J: int, target: str) -> Build:
    signature = pointers(dtype, "p_x") | pointers("fp32", "p_dy", "p_dw") | {"K": "i32", "N": "i32"}
    (entry,) = ANY["layer_mix_bwd"]
    blocks = {"BLOCK_K": LAYERS_AT_ONCE, "BLOCK_J": power_of_two(J), "BLOCK_N": entry.block}
    constants = {"J": J, **blocks, "PRECISION": "tf32x3" if TARGETS[target].backend == "cuda" else "ieee"}
    name = f"layer_mix_bwd-{dtype}-{J}"
    return Build(name, layer_mix_bwd_kernel, signature, constants, entry.num_warps, target, aligned=("N",))
