"""The gate that needs no GPU: what the compiler makes of every pinned configuration for Hopper."""

import pytest

from tests.kernels import gate, table
from tests.kernels.builds import bad, pinned
from tests.kernels.report import Report

TARGET = "sm_90a"
PINNED = [build.id for build in pinned((TARGET,))]


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    return table.compile_all(TARGET)


@pytest.mark.parametrize("build", PINNED)
def test_pinned_configuration(reports: dict[str, Report], build: str) -> None:
    gate.check(reports[build])


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
