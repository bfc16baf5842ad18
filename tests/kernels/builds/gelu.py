"""GELU with a bias: the widest block, and the others in bfloat16."""

from collections.abc import Iterator

from megagrow_kernels.gelu import bias_gelu_bwd_kernel, bias_gelu_fwd_kernel
from megagrow_kernels.launch import ANY, pick
from tests.kernels.build import DTYPES, Build, pointers


def pinned(target: str) -> Iterator[Build]:
    for dtype in DTYPES:
        yield from bias_gelu(dtype, 16384, target)
    yield from bias_gelu("bf16", 3072, target)
    for entry in ANY["bias_gelu"][:-1]:
        yield from bias_gelu("bf16", entry.block, target)


def bias_gelu(dtype: str, num_features: int, target: str) -> Iterator[Build]:
    chosen = pick("bias_gelu", num_features)
    backward = pointers(dtype, "p_x", "p_bias", "p_dy", "p_dx") | {"p_dbias": "*fp32", "T": "i32"}
    for kernel, signature in (
        (bias_gelu_fwd_kernel, pointers(dtype, "p_x", "p_bias", "p_y")),
        (bias_gelu_bwd_kernel, backward),
    ):
        name = f"{kernel.__name__.removesuffix('_kernel')}-{dtype}-{num_features}"
        constants = {"F": num_features, "BLOCK_F": chosen.block, "HAS_BIAS": True}
        yield Build(name, kernel, signature, constants, chosen.num_warps, target)
