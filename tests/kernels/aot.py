"""Compiles kernels for GPUs that need not be there, and reports what became of them, as JSON.

    python -m tests.kernels.aot

It wants a process of its own, in which Triton does not interpret.
"""

import json
import re
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from io import StringIO

import triton
from triton.compiler import ASTSource

from tests.kernels.build import TARGETS, Build
from tests.kernels.builds import bad, pinned

VECTOR_LOAD = {
    "cuda": r"ld\.global[.\w:]*\.v4\.b32|cp\.async\.cg\.shared\.global \[.*?\], \[.*?\], 0x10\b",
    "hip": r"(?:global|buffer)_load_dwordx4",
}


@dataclass(frozen=True)
class Report:
    """What one build came to; bytes of shared memory, 128-bit loads."""

    id: str
    registers: int
    spills: int
    shared: int
    vector_loads: int
    narrow_offsets: list[str] = field(default_factory=list)


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
