"""Compiles kernels for GPUs that need not be there, and reports what became of them, as JSON.

    python -m tests.kernels.aot sm_90a …      # all targets, if none is named

It wants a process of its own, in which Triton does not interpret.
"""

import json
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict
from functools import partial
from io import StringIO

import triton
from triton.compiler import ASTSource

from tests.kernels.build import TARGETS, Build
from tests.kernels.builds import bad, pinned
from tests.kernels.report import Report

VECTOR_LOAD = {
    "cuda": r"ld\.global[.\w:]*\.v4\.b32|cp\.async\.cg\.shared\.global \[.*?\], \[.*?\], 0x10\b",
    "hip": r"(?:global|buffer)_load_dwordx4",
}


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
    num_dots, num_wgmma = result.asm["ttir"].count("tt.dot "), code.count("wgmma.mma_async")
    offsets = narrow_offsets(result.asm["ttir"], build.row_axes)
    return Report(build.id, registers, spills, result.metadata.shared, vector_loads, num_dots, num_wgmma, offsets)


def _numbers(text: str, *patterns: str) -> list[int]:
    return [int(re.search(pattern, text)[1]) for pattern in patterns]


def narrow_offsets(ttir: str, row_axes: str) -> list[str]:
    """Lines that compute with the row index, the program's ids along `row_axes`, in less than 64 bits.

    So is a multiple of an integer argument, a number of elements or a stride. Column offsets may be 32 bits wide: a row
    is shorter than 2^31.
    """
    rows, narrow = set(), []
    scalars = set(re.findall(r"(%\w+): i32", ttir))
    for line in ttir.splitlines():
        line = line.split(" loc(")[0].strip()
        result, _, operation = line.rpartition(" = ") if "scf.for" not in line else ("", "", line)
        operands = set(re.findall(r"%\w+", operation))
        if re.search(rf"tt\.get_program_id [{row_axes}]", operation):
            rows.add(result)
        elif operation.startswith("arith.muli") and operation.endswith(" i32") and operands & scalars:
            narrow.append(line)
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
    targets = tuple(sys.argv[1:]) or tuple(TARGETS)
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(2, initializer=_prepare, initargs=(folder,)) as pool,
    ):
        num_builds = len(_all_builds(targets))
        reports = pool.map(partial(_report, targets), range(num_builds), chunksize=8)
        json.dump([asdict(report) for report in reports], sys.stdout)


def _prepare(folder: str) -> None:
    triton.knobs.cache.dir = folder  # what is cached is not compiled, and has no log
    triton.knobs.nvidia.dump_ptxas_log = True  # printed: registers and spills


def _all_builds(targets: tuple[str, ...]) -> list[Build]:
    return [*pinned(targets), *bad()]


def _report(targets: tuple[str, ...], index: int) -> Report:
    """By number: a kernel cannot be sent to another process."""
    return compiled(_all_builds(targets)[index])


if __name__ == "__main__":
    main()
