"""Products of float32 maps with sources of either dtype, whichever of their strides is 1."""

from collections.abc import Iterator

from megagrow_kernels.dense_map import BLOCK_K, BLOCK_M, product_kernel
from megagrow_kernels.launch import ANY
from tests.kernels.build import TARGETS, Build, pointers

# Which strides are 1, and what such a product is: maps are rows x source, sources rows x columns.
KINDS = {
    "source-columns": ("stride_ak", "stride_bk"),
    "rows-source": ("stride_ak", "stride_bn"),
    "rows-gradient": ("stride_am", "stride_bn"),
}


def pinned(target: str) -> Iterator[Build]:
    for kind, unit_strides in KINDS.items():
        for entry in ANY["dense_map"]:
            yield build(kind, unit_strides, "fp32", entry.block, entry.num_warps, target)
    yield build("rows-source", KINDS["rows-source"], "bf16", entry.block, entry.num_warps, target)


def build(kind: str, unit_strides: tuple[str, str], dtype: str, block: int, num_warps: int, target: str) -> Build:
    a, b = ("fp32", dtype) if kind != "source-columns" else (dtype, "fp32")
    strides = ["stride_am", "stride_ak", "stride_bn", "stride_bk", "stride_c"]
    others = [name for name in strides if name not in unit_strides]
    signature = pointers(a, "p_a") | pointers(b, "p_b") | pointers("fp32", "p_c") | {"scale": "fp32"}
    signature |= dict.fromkeys(("M", "N", "K", *others), "i32")
    precision = "tf32x3" if TARGETS[target].backend == "cuda" else "ieee"
    blocks = {"BLOCK_M": BLOCK_M, "BLOCK_N": block, "BLOCK_K": BLOCK_K}
    constants = dict.fromkeys(unit_strides, 1) | blocks | {"PRECISION": precision}
    name = f"product-{kind}-{dtype}-{block}"
    return Build(name, product_kernel, signature, constants, num_warps, target, aligned=("M", "N", "K", *others))
