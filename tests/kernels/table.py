"""The table of docs/kernels.md: what the compilers make of the chosen configurations, and what the kernels move.

python -m tests.kernels.table      # writes it anew
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.kernels import interpreter
from tests.kernels.build import TARGETS
from tests.kernels.report import Report

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- table: python -m tests.kernels.table -->\n", "<!-- end of the table -->\n"
HEAD = ("operation", "pass", "bytes moved", "floor", *TARGETS)


Bytes = Mapping[str, tuple[float, float]]  # per element, of an operation's forward and backward pass


@dataclass(frozen=True)
class Row:
    """One pass of an operation: of `floor.FLOOR`, and the kernel that it is, as `builds` names it in bfloat16."""

    operation: str
    is_backward: bool
    build: str

    @property
    def key(self) -> tuple[str, str]:
        return self.operation, "backward" if self.is_backward else "forward"


def both(operation: str, forward: str, backward: str) -> list[Row]:
    return [Row(operation, False, forward), Row(operation, True, backward)]


ROWS = [
    *both("rms_norm", "rms_norm_fwd-bf16-4096", "rms_norm_bwd-bf16-4096"),
    *both("rms_norm with residual", "rms_norm_fwd-bf16-4096", "rms_norm_bwd-bf16-4096"),
    *both("layer_norm", "layer_norm_fwd-bf16-4096", "layer_norm_bwd-bf16-4096"),
    *both("layer_norm with residual", "layer_norm_fwd-bf16-4096", "layer_norm_bwd-bf16-4096"),
    *both("swiglu", "glu_fwd-silu-bf16", "glu_bwd-silu-bf16"),
    *both("geglu", "glu_fwd-gelu-bf16", "glu_bwd-gelu-bf16"),
    *both("bias_gelu", "bias_gelu_fwd-bf16-16384", "bias_gelu_bwd-bf16-16384"),
    *both("dropout_add", "dropout_add_fwd-bf16-4096", "dropout_add_bwd-bf16-4096"),
    *both("rope_", "rope_fwd-bf16-32x128-128", "rope_new-bf16-32x128-128"),
    Row("vocab_stats with rank", False, "vocab_stats_rank-bf16-128256"),
    Row("vocab_grad_", False, "vocab_grad-bf16-128256"),
    Row("vocab_scores", False, "vocab_scores-bf16-128256"),
    Row("distill_stats with rank", False, "distill_stats-bf16-128256"),
    Row("distill_grad_", False, "distill_grad-bf16-128256"),
    Row("adamw_", False, "adamw-bf16-copy-2048"),
    *both("layer_mix", "layer_mix_fwd-bf16-12-8192", "layer_mix_bwd-bf16-12"),
    Row("sparse_map_ of one tensor", False, "sparse_map-fp32-1024"),
    Row("sparse_map_ of three", False, "sparse_map-fp32-moments-1024"),
]


def compile_all(*targets: str) -> dict[str, Report]:
    """What became of every build for these targets (none named: all), compiled in a process of its own, by id."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", "tests.kernels.aot", *targets]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {report["id"]: Report(**report) for report in json.loads(done.stdout)}


def usage(row: Row, reports: Mapping[str, Report]) -> list[str]:
    """Registers per thread and bytes of shared memory, by target."""
    found = [reports[f"{row.build}-{target}"] for target in TARGETS]
    return [f"{report.registers} / {report.shared}" for report in found]


def read() -> dict[tuple[str, str], list[str]]:
    """The page's cells, by operation and pass."""
    lines = PAGE.read_text().split(BEGIN)[1].split(END)[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {(row[0], row[1]): row[2:] for row in rows}


def write(reports: Mapping[str, Report], counted: Bytes, floor: Bytes) -> None:
    """Puts the table into the page."""
    lines = [HEAD, ["---"] * len(HEAD)]
    for row in ROWS:
        moved, least = counted[row.operation][row.is_backward], floor[row.operation][row.is_backward]
        lines.append([*row.key, f"{moved:.2f}", f"{least:g}", *usage(row, reports)])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + text + END + rest.split(END)[1])


def main() -> None:
    from tests.kernels.floor import FLOOR

    os.environ["TRITON_INTERPRET"] = "1"  # the process imports this file before it prepares itself
    with interpreter.start() as process:
        counted = {name: process.submit(_counted, name).result() for name in FLOOR}
    write(compile_all(), counted, {name: (least.forward, least.backward) for name, least in FLOOR.items()})


def _counted(name: str) -> tuple[float, float]:
    from tests.kernels.traffic import measured  # where Triton interprets

    return measured(name).moved


if __name__ == "__main__":
    main()
