"""The gate for every target, and the documented figures; a part of `make kernels`."""

import pytest

from tests.kernels import gate, table
from tests.kernels.builds import pinned
from tests.kernels.report import Report

PINNED = [build.id for build in pinned()]


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    return table.compile_all()


@pytest.mark.parametrize("build", PINNED)
def test_pinned_configuration(reports: dict[str, Report], build: str) -> None:
    gate.check(reports[build])


@pytest.mark.parametrize("row", table.ROWS, ids=lambda row: "-".join(row.key))
def test_the_documented_registers_and_shared_memory(reports: dict[str, Report], row: table.Row) -> None:
    assert table.read()[row.key][2:] == table.usage(row, reports), "write it anew: python -m tests.kernels.table"
