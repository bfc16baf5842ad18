"""AdamW: every block, with and without a copy."""

from collections.abc import Iterator
from dataclasses import replace

import triton.language as tl

from megagrow_kernels.adamw import adamw_kernel
from megagrow_kernels.launch import ANY, Launch
from tests.kernels.build import Build, pointers

GRADIENTS = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}


def pinned(target: str) -> Iterator[Build]:
    widest = ANY["adamw"][-1]
    for grad in ("bf16", "fp32"):
        yield adamw(grad, tl.bfloat16, widest, target)
    for entry in ANY["adamw"][:-1]:
        yield adamw("bf16", tl.bfloat16, entry, target)
    yield adamw("fp16", tl.float16, widest, target, {"p_scale": "*fp32", "p_skip": "*i1"})
    yield adamw("fp32", None, widest, target, {})
    step = adamw("fp32", None, widest, target, {"p_scale": "*fp32", "p_skip": "*i1"})  # as a training step calls it
    yield replace(step, name=f"{step.name}-step")


def adamw(
    grad: str, copy: tl.dtype | None, chosen: Launch, target: str, scalars: dict[str, str] | None = None
) -> Build:
    if scalars is None:
        scalars = {"p_scale": "*fp32", "p_skip": "*i32"}
    integers = pointers("i64", "p_blocks", "p_table", "p_grads")
    floats = {"p_rates": "*fp32"} | dict.fromkeys(("weight1", "weight2", "correction"), "fp32")
    absent = dict.fromkeys({"p_scale", "p_skip"} - scalars.keys())
    return Build(
        f"adamw-{grad}-{'alone' if copy is None else 'copy'}-{chosen.block}",
        adamw_kernel,
        integers | floats | scalars,
        {"BLOCK": chosen.block, "GRAD": GRADIENTS[grad], "COPY": copy} | absent,
        chosen.num_warps,
        target,
    )
