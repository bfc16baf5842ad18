"""The gate that needs no GPU: what the compilers make of every pinned configuration."""

import pytest

from tests.kernels import table
from tests.kernels.builds import bad, pinned
from tests.kernels.report import Report

# Bytes of shared memory that one block may have: the compiler does not check it.
SHARED_LIMIT = {"sm_80": 166912, "sm_90a": 232448, "sm_100a": 232448, "gfx942": 65536}

PINNED = [build.id for build in pinned()]


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    return table.compile_all()


@pytest.mark.parametrize("build", PINNED)
def test_pinned_configuration(reports: dict[str, Report], build: str) -> None:
    report = reports[build]
    assert report.spills == 0
    assert report.shared <= SHARED_LIMIT[build.split("-")[-1]]
    assert report.vector_loads > 0
    assert report.narrow_offsets == []
    assert build.endswith("sm_90a") <= (report.num_wgmma > 0 or report.num_dots == 0)


def test_the_gate_sees_what_it_is_for(reports: dict[str, Report]) -> None:
    assert {build.id for build in bad()} <= reports.keys()
    assert reports["spills-sm_90a"].spills > 0
    assert reports["scalar_loads-sm_90a"].vector_loads == 0
    assert reports["narrow-sm_90a"].narrow_offsets != []
    assert reports["narrow_loop-sm_90a"].narrow_offsets != []
    assert reports["narrow_batch-sm_90a"].narrow_offsets != []
    assert reports["narrow_size-sm_90a"].narrow_offsets != []
    assert reports["product-sm_90a"].num_wgmma > 0
    assert reports["small_product-sm_90a"].num_dots > 0
    assert reports["small_product-sm_90a"].num_wgmma == 0


@pytest.mark.parametrize("row", table.ROWS, ids=lambda row: "-".join(row.key))
def test_the_documented_registers_and_shared_memory(reports: dict[str, Report], row: table.Row) -> None:
    assert table.read()[row.key][2:] == table.usage(row, reports), "write it anew: python -m tests.kernels.table"
