"""What the launchers choose."""

import pytest
import torch

from megagrow_kernels.launch import ANY, PINNED, Launch, pick

CPU = torch.device("cpu")


@pytest.mark.parametrize("kernel", ANY)
def test_a_block_is_the_smallest_that_holds_the_columns(kernel: str) -> None:
    table = ANY[kernel]
    for num_columns in (1, 2, 3, 511, 512, 513, 1000, 4096, 8000, 8193, 50257, 128256):
        block = pick(kernel, num_columns).block
        assert block & (block - 1) == 0
        if num_columns <= table[-1].block:
            assert block / 2 < num_columns <= block
        else:
            assert block == table[-1].block


@pytest.mark.parametrize("kernel", ANY)
def test_wider_blocks_never_have_fewer_warps(kernel: str) -> None:
    table = ANY[kernel]
    assert list(table) == sorted(table, key=lambda entry: entry.block)
    assert [entry.num_warps for entry in table] == sorted(entry.num_warps for entry in table)


def test_no_columns() -> None:
    assert pick("vocab", 0).block == 1


def test_a_gpu_has_its_own_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PINNED, "cpu", {"vocab": (Launch(64, 2),)})
    assert pick("vocab", 1000, CPU) == Launch(64, 2)
    assert pick("vocab", 1000) == pick("vocab", 1000, torch.device("meta")) == Launch(1024, 2)
    assert pick("norm_fwd", 1000, CPU) == pick("norm_fwd", 1000)
