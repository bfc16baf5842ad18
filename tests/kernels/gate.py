"""What every pinned configuration must satisfy, whatever it is compiled for."""

from tests.kernels.report import Report

# Bytes of shared memory that one block may have: the compiler does not check it.
SHARED_LIMIT = {"sm_80": 166912, "sm_90a": 232448, "sm_100a": 232448, "gfx942": 65536}


def check(report: Report) -> None:
    assert report.spills == 0
    assert report.shared <= SHARED_LIMIT[report.id.split("-")[-1]]
    assert report.vector_loads > 0
    assert report.narrow_offsets == []
    assert report.id.endswith("sm_90a") <= (report.num_wgmma > 0 or report.num_dots == 0)
