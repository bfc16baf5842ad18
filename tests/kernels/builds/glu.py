"""The gated activations: their one configuration. The number of elements is anything."""

from collections.abc import Iterator

from megagrow_kernels.glu import glu_bwd_kernel, glu_fwd_kernel
from megagrow_kernels.launch import ANY
from tests.kernels.build import DTYPES, Build, pointers


def pinned(target: str) -> Iterator[Build]:
    for dtype in DTYPES:
        for activation in ("silu", "gelu"):
            yield from glu(dtype, activation, target)


def glu(dtype: str, activation: str, target: str) -> Iterator[Build]:
    chosen = ANY["glu"][-1]
    constants = {"ACTIVATION": activation, "BLOCK": chosen.block}
    for kernel, tensors in (
        (glu_fwd_kernel, pointers(dtype, "p_gate_up", "p_y")),
        (glu_bwd_kernel, pointers(dtype, "p_gate_up", "p_dy", "p_dgate_up")),
    ):
        name = f"{kernel.__name__.removesuffix('_kernel')}-{activation}-{dtype}"
        yield Build(name, kernel, tensors | {"N": "i32"}, constants, chosen.num_warps, target)
