"""What the launchers choose."""

import pytest

from megagrow_kernels import launch
from megagrow_kernels.launch import Launch, pick

TABLES = [launch.RMS_NORM_FORWARD, launch.RMS_NORM_BACKWARD, launch.VOCAB]


@pytest.mark.parametrize("table", TABLES, ids=["forward", "backward", "vocab"])
def test_a_block_is_the_smallest_that_holds_the_columns(table: tuple[Launch, ...]) -> None:
    for num_columns in (1, 2, 3, 511, 512, 513, 1000, 4096, 8000, 8193, 50257, 128256):
        block = pick(table, num_columns).block
        assert block & (block - 1) == 0
        if num_columns <= table[-1].block:
            assert block / 2 < num_columns <= block
        else:
            assert block == table[-1].block


@pytest.mark.parametrize("table", TABLES, ids=["forward", "backward", "vocab"])
def test_wider_blocks_never_have_fewer_warps(table: tuple[Launch, ...]) -> None:
    assert list(table) == sorted(table, key=lambda entry: entry.block)
    assert [entry.num_warps for entry in table] == sorted(entry.num_warps for entry in table)


def test_no_columns() -> None:
    assert pick(launch.VOCAB, 0).block == 1
