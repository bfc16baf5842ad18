"""A kernel in one configuration, as it is to be compiled for a GPU that need not be there."""

from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90a": GPUTarget("cuda", 90, 32),
    "sm_100a": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = ("bf16", "fp32")


@dataclass(frozen=True)
class Build:
    """One kernel in one configuration; `aligned` are the integers that 16 divides.

    The program's ids along `row_axes` number rows, which may start beyond 2^31 elements; others number columns.
    """

    name: str
    kernel: triton.JITFunction
    signature: dict[str, str]
    constants: dict[str, int | bool | float | None]
    num_warps: int
    target: str
    aligned: tuple[str, ...] = ()
    row_axes: str = "x"

    @property
    def id(self) -> str:
        return f"{self.name}-{self.target}"


def pointers(dtype: str, *names: str) -> dict[str, str]:
    """The signature of pointer arguments."""
    return dict.fromkeys(names, f"*{dtype}")
