"""Copies with and without moments; those of parameters are float32, in a folder they may be bfloat16."""

from collections.abc import Iterator

from megagrow_kernels.launch import ANY
from megagrow_kernels.sparse_map import ROWS, sparse_map_kernel
from tests.kernels.build import DTYPES, Build, pointers

TENSORS = ("p_source", "p_source_m", "p_source_s", "p_target", "p_target_m", "p_target_s")
STRIDES = ("stride_source", "stride_target", "stride_target_m", "stride_target_s")


def pinned(target: str) -> Iterator[Build]:
    for entry in ANY["sparse_map"]:
        yield build("fp32", entry.block, entry.num_warps, True, target)
    for dtype in DTYPES:
        yield build(dtype, entry.block, entry.num_warps, False, target)


def build(dtype: str, block: int, num_warps: int, has_moments: bool, target: str) -> Build:
    absent = () if has_moments else [name for name in TENSORS if name[-2:] in ("_m", "_s")]
    tensors = [name for name in TENSORS if name not in absent]
    indices, scales = pointers("i32", "p_rows", "p_columns"), pointers("fp32", "p_row_scales", "p_column_scales")
    sizes = dict.fromkeys(("R", "C", *STRIDES), "i32")
    constants = {"BLOCK_C": block, "ROWS": ROWS, "HAS_MOMENTS": has_moments} | dict.fromkeys(absent)
    name = f"sparse_map-{dtype}-{'moments-' * has_moments}{block}"
    signature = pointers(dtype, *tensors) | indices | scales | sizes
    return Build(name, sparse_map_kernel, signature, constants, num_warps, target, aligned=("C", *STRIDES))
