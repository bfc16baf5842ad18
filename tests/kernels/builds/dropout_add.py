"""Dropout before a residual addition: the widest block, and the others in bfloat16."""

from collections.abc import Iterator

from megagrow_kernels.dropout_add import dropout_add_bwd_kernel, dropout_add_fwd_kernel
from megagrow_kernels.launch import ANY, pick
from tests.kernels.build import DTYPES, Build, pointers


def pinned(target: str) -> Iterator[Build]:
    for dtype in DTYPES:
        yield from dropout_add(dtype, 4096, target)
    yield from dropout_add("bf16", 5120, target)
    for entry in ANY["dropout_add"][:-1]:
        yield from dropout_add("bf16", entry.block, target)


def dropout_add(dtype: str, hidden_size: int, target: str) -> Iterator[Build]:
    chosen = pick("dropout_add", hidden_size)
    common = {"p_keys": "*i64", "place": "i32", "threshold": "i32", "scale": "fp32"}
    backward = pointers(dtype, "p_dsum", "p_dy") | {"p_dbias": "*fp32", "T": "i32"}
    for kernel, own in (
        (dropout_add_fwd_kernel, pointers(dtype, "p_x", "p_y", "p_bias", "p_sum")),
        (dropout_add_bwd_kernel, backward),
    ):
        name = f"{kernel.__name__.removesuffix('_kernel')}-{dtype}-{hidden_size}"
        constants = {"H": hidden_size, "BLOCK_H": chosen.block, "HAS_BIAS": True}
        yield Build(name, kernel, common | own, constants, chosen.num_warps, target)
