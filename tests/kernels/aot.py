"""Compiles kernels for GPUs that need not be there, and reports what became of them, as JSON.

    python -m tests.kernels.aot

It wants a process of its own, in which Triton does not interpret.
"""

import json
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from io import StringIO

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megagrow_kernels import launch
from megagrow_kernels.launch import Launch, pick
from megagrow_kernels.rms_norm import (
    MAX_HIDDEN_SIZE,
    rms_norm_bwd_kernel,
    rms_norm_dot_kernel,
    rms_norm_fwd_kernel,
)
from megagrow_kernels.vocab_loss import vocab_grad_kernel, vocab_rank_kernel, vocab_stats_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90a": GPUTarget("cuda", 90, 32),
    "sm_100a": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
VECTOR_LOAD = {
    "cuda": r"ld\.global[.\w:]*\.v4\.b32",
    "hip": r"(?:global|buffer)_load_dwordx4",
}


@triton.jit
def narrow_kernel(p_x, p_y, H: tl.constexpr):
    """What no kernel may do: row offsets of 32 bits wrap in tensors of more than 2^31 elements."""
    o_h = tl.program_id(0) * H + tl.arange(0, H)
    tl.store(p_y + o_h, tl.load(p_x + o_h))


@triton.jit
def narrow_loop_kernel(p_x, p_y, T, H: tl.constexpr):
    for i_t in range(tl.program_id(0), T, tl.num_programs(0)):
        tl.store(p_y + i_t * H, tl.load(p_x + i_t * H))


@dataclass(frozen=True)
class Build:
    """One kernel in one configuration; `aligned` are the integers that 16 divides."""

    name: str
    kernel: triton.JITFunction
    signature: dict[str, str]
    constants: dict[str, int | bool | None]
    num_warps: int
    target: str
    aligned: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return f"{self.name}-{self.target}"


@dataclass(frozen=True)
class Report:
    """What one build came to; bytes of shared memory, 128-bit loads."""

    id: str
    registers: int
    spills: int
    shared: int
    vector_loads: int
    narrow_offsets: list[str] = field(default_factory=list)


def pinned() -> Iterator[Build]:
    """Every configuration on Hopper in bfloat16; the chosen and the widest everywhere, in float32 too."""
    for target in TARGETS:
        for dtype in ("bf16", "fp32"):
            for hidden_size in (4096, MAX_HIDDEN_SIZE):
                yield rms_norm_forward(dtype, hidden_size, target)
            for hidden_size in (4096, launch.RMS_NORM_BACKWARD[-1].block):
                yield rms_norm_backward(dtype, hidden_size, target)
            yield rms_norm_dot(dtype, MAX_HIDDEN_SIZE, target)
            yield from vocab(dtype, 128256, target)
    yield rms_norm_backward("bf16", MAX_HIDDEN_SIZE, "sm_90a")
    for entry in launch.RMS_NORM_FORWARD:
        if entry.block not in (4096, MAX_HIDDEN_SIZE):
            yield rms_norm_forward("bf16", entry.block, "sm_90a")
    for entry in launch.RMS_NORM_BACKWARD[:-1]:
        if entry.block != 4096:
            yield rms_norm_backward("bf16", entry.block, "sm_90a")
    for entry in launch.VOCAB[:-1]:
        yield from vocab("bf16", entry.block, "sm_90a")


def bad() -> Iterator[Build]:
    """What the gate must catch: a spill, scalar loads, 32-bit offsets."""
    yield rms_norm_backward("fp32", 32768, "sm_90a", Launch(32768, 8), "spills")
    yield rms_norm_forward("bf16", 4095, "sm_90a", "scalar_loads")
    pointers = {"p_x": "*bf16", "p_y": "*bf16"}
    yield Build("narrow", narrow_kernel, pointers, {"H": 4096}, 4, "sm_90a")
    yield Build("narrow_loop", narrow_loop_kernel, pointers | {"T": "i32"}, {"H": 4096}, 4, "sm_90a")


def rms_norm_forward(dtype: str, hidden_size: int, target: str, name: str = "") -> Build:
    chosen = pick(launch.RMS_NORM_FORWARD, hidden_size)
    activations = dict.fromkeys(("p_x", "p_residual", "p_weight", "p_y", "p_sum"), f"*{dtype}")
    return Build(
        name or f"rms_norm_fwd-{dtype}-{hidden_size}",
        rms_norm_fwd_kernel,
        activations | {"p_rstd": "*fp32", "eps": "fp32"},
        {"H": hidden_size, "BLOCK_H": chosen.block, "HAS_RESIDUAL": True},
        chosen.num_warps,
        target,
    )


def rms_norm_backward(dtype: str, hidden_size: int, target: str, chosen: Launch | None = None, name: str = "") -> Build:
    chosen = chosen or pick(launch.RMS_NORM_BACKWARD, hidden_size)
    activations = dict.fromkeys(("p_x", "p_weight", "p_dy", "p_dsum", "p_dx"), f"*{dtype}")
    statistics = dict.fromkeys(("p_rstd", "p_dot", "p_dweight"), "*fp32")
    return Build(
        name or f"rms_norm_bwd-{dtype}-{hidden_size}",
        rms_norm_bwd_kernel,
        activations | statistics | {"T": "i32"},
        {"H": hidden_size, "BLOCK_H": chosen.block, "HAS_DSUM": True},
        chosen.num_warps,
        target,
    )


def rms_norm_dot(dtype: str, hidden_size: int, target: str) -> Build:
    chosen = pick(launch.RMS_NORM_BACKWARD, hidden_size)
    activations = dict.fromkeys(("p_x", "p_weight", "p_dy"), f"*{dtype}")
    return Build(
        f"rms_norm_dot-{dtype}-{hidden_size}",
        rms_norm_dot_kernel,
        activations | {"p_rstd": "*fp32", "p_dot": "*fp32"},
        {"H": hidden_size, "BLOCK_H": chosen.block},
        chosen.num_warps,
        target,
    )


def vocab(dtype: str, vocab_size: int, target: str) -> Iterator[Build]:
    """The rows are aligned, the number of valid columns is not: both are ordinary."""
    chosen = pick(launch.VOCAB, vocab_size)
    common = {"p_logits": f"*{dtype}", "p_labels": "*i64", "stride_t": "i32", "num_valid": "i32"}
    for kernel, own in (
        (vocab_stats_kernel, {"p_stats": "*fp32"}),
        (vocab_rank_kernel, {"p_label_logits": "*fp32", "p_rank": "*i32"}),
        (vocab_grad_kernel, {"p_logsumexp": "*fp32", "p_scale": "*fp32", "V": "i32"}),
    ):
        yield Build(
            f"{kernel.__name__.removesuffix('_kernel')}-{dtype}-{vocab_size}",
            kernel,
            common | own,
            {"BLOCK_V": chosen.block},
            chosen.num_warps,
            target,
            aligned=("stride_t",),
        )


def compiled(build: Build) -> Report:
    position = {name: i for i, name in enumerate(build.kernel.arg_names)}
    divisible = [n for n, t in build.signature.items() if t[0] == "*" or n in build.aligned]
    source = ASTSource(
        build.kernel,
        {name: build.signature.get(name, "constexpr") for name in position},
        {(position[name],): value for name, value in build.constants.items()},
        {(position[name],): [["tt.divisibility", 16]] for name in divisible},
    )
    target = TARGETS[build.target]
    with redirect_stdout(StringIO()) as log:
        result = triton.compile(source, target=target, options={"num_warps": build.num_warps})
    if target.backend == "cuda":
        code, usage = result.asm["ptx"], log.getvalue()
        registers, spills = _numbers(usage, r"Used (\d+) registers", r"(\d+) bytes spill stores")
    else:
        code = result.asm["amdgcn"]
        registers, *spilled = _numbers(
            code, r"\.vgpr_count:\s+(\d+)", r"\.vgpr_spill_count:\s+(\d+)", r"\.sgpr_spill_count:\s+(\d+)"
        )
        spills = sum(spilled)
    vector_loads = len(re.findall(VECTOR_LOAD[target.backend], code))
    offsets = narrow_offsets(result.asm["ttir"])
    return Report(build.id, registers, spills, result.metadata.shared, vector_loads, offsets)


def _numbers(text: str, *patterns: str) -> list[int]:
    return [int(re.search(pattern, text)[1]) for pattern in patterns]


def narrow_offsets(ttir: str) -> list[str]:
    """Lines that compute with the row index, the program's first id, in less than 64 bits.

    Column offsets may be 32 bits wide: a row is shorter than 2^31.
    """
    rows, narrow = set(), []
    for line in ttir.splitlines():
        line = line.split(" loc(")[0].strip()
        result, _, operation = line.rpartition(" = ") if "scf.for" not in line else ("", "", line)
        operands = set(re.findall(r"%\w+", operation))
        if "tt.get_program_id x" in operation:
            rows.add(result)
        elif not operands & rows:
            continue
        elif loop := re.search(r"scf\.for (%\w+) = (%\w+) to .* : (i\d+) \{", operation):
            if loop[2] in rows:
                rows.add(loop[1])
                narrow += [line] if loop[3] != "i64" else []
        elif re.match(r"(arith\.(?!cmp)|tt\.splat|tt\.expand_dims|tt\.broadcast)", operation):
            rows.add(result)
            narrow += [line] if re.search(r"\bi32>?$|xi32>$", operation) else []
    return narrow


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder  # what is cached is not compiled, and has no log
        triton.knobs.nvidia.dump_ptxas_log = True  # printed: registers and spills
        json.dump([asdict(compiled(build)) for build in (*pinned(), *bad())], sys.stdout)


if __name__ == "__main__":
    main()
