"""The gate that needs no GPU: what the compilers make of every pinned configuration."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.aot import Report
from tests.kernels.builds import bad, pinned

ROOT = Path(__file__).resolve().parents[2]

# Bytes of shared memory that one block may have: the compiler does not check it.
SHARED_LIMIT = {"sm_80": 166912, "sm_90a": 232448, "sm_100a": 232448, "gfx942": 65536}

PINNED = [build.id for build in pinned()]


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.aot"],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {report["id"]: Report(**report) for report in json.loads(done.stdout)}


@pytest.mark.parametrize("build", PINNED)
def test_pinned_configuration(reports: dict[str, Report], build: str) -> None:
    report = reports[build]
    assert report.spills == 0
    assert report.shared <= SHARED_LIMIT[build.split("-")[-1]]
    assert report.vector_loads > 0
    assert report.narrow_offsets == []


def test_the_gate_sees_what_it_is_for(reports: dict[str, Report]) -> None:
    assert {build.id for build in bad()} <= reports.keys()
    assert reports["spills-sm_90a"].spills > 0
    assert reports["scalar_loads-sm_90a"].vector_loads == 0
    assert reports["narrow-sm_90a"].narrow_offsets != []
    assert reports["narrow_loop-sm_90a"].narrow_offsets != []
