"""The harness itself: what it returns, and that no failure outlives its call."""

import os
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from megagrow.errors import ConfigError
from tests import ranks
from tests.ranks import RankError, run_ranks


class TwoArguments(Exception):
    def __init__(self, value: int, rule: str) -> None:
        super().__init__(f"{value}: {rule}")


def own_rank(scale: int, offset: int = 0) -> int:
    return dist.get_rank() * scale + offset


def summed_ranks() -> torch.Tensor:
    total = torch.tensor([float(dist.get_rank())], dtype=torch.bfloat16)
    dist.all_reduce(total)
    return total


def process_id() -> int:
    return os.getpid()


def surroundings() -> dict[str, str | int]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "FROM_THE_TEST")
    seen: dict[str, str | int] = {name: os.environ[name] for name in names}
    return seen | {"cwd": os.getcwd(), "threads": torch.get_num_threads()}


def draw_then_disturb() -> tuple[torch.Tensor, torch.dtype, bool]:
    seen = torch.rand(2), torch.get_default_dtype(), torch.is_grad_enabled()
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    os.environ["LEFT_BEHIND"] = "1"
    return seen


def left_behind() -> bool:
    return "LEFT_BEHIND" in os.environ


def uninitialised() -> torch.Tensor:
    return torch.empty(1000)


def warns() -> None:
    warnings.warn("careless", UserWarning, stacklevel=1)


def fails_in(rank: int, others_wait: bool) -> None:
    if dist.get_rank() == rank:
        raise ConfigError("tensor=3 does not divide num_heads=8")
    if others_wait:
        time.sleep(60)
    dist.barrier()


def fails_everywhere() -> None:
    raise ConfigError("refused")


def raises_two_arguments() -> None:
    raise TwoArguments(3, "must be even")


def dies_in(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def waits_in(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(60)


def destroys_its_group() -> int:
    rank = dist.get_rank()
    dist.destroy_process_group()
    return rank


def reshards_on_a_mesh(extra_groups: int) -> torch.Tensor:
    for _ in range(extra_groups):
        dist.new_group([0])
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["tp"]
    rows = distribute_tensor(torch.arange(8.0).view(4, 2), mesh, [Shard(0)])
    return (rows @ rows.T).full_tensor()


def test_results_are_ordered_by_rank() -> None:
    assert run_ranks(own_rank, 4, 10, offset=1) == [1, 11, 21, 31]


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_collectives_span_exactly_the_world(world_size: int) -> None:
    for total in run_ranks(summed_ranks, world_size):
        expected = torch.tensor([sum(range(world_size))], dtype=torch.bfloat16)
        assert torch.equal(total, expected)


def test_ranks_are_kept_alive_and_shared_by_world_sizes() -> None:
    four = run_ranks(process_id, 4)
    assert run_ranks(process_id, 4) == four
    assert run_ranks(process_id, 2) == four[:2]


def test_ranks_see_what_torchrun_and_the_test_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FROM_THE_TEST", "yes")
    for rank, seen in enumerate(run_ranks(surroundings, 2)):
        assert seen == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "OMP_NUM_THREADS": "1",
            "FROM_THE_TEST": "yes",
            "cwd": str(tmp_path),
            "threads": 1,
        }


def test_every_call_starts_from_the_same_state() -> None:
    first, second = run_ranks(draw_then_disturb, 1)[0], run_ranks(draw_then_disturb, 1)[0]
    assert torch.equal(first[0], second[0])
    assert second[1:] == (torch.float32, True)
    assert run_ranks(left_behind, 1) == [False]


def test_uninitialised_memory_is_nan_here_and_in_ranks() -> None:
    assert uninitialised().isnan().all()
    assert run_ranks(uninitialised, 1)[0].isnan().all()


def test_a_warning_is_an_error_unless_the_test_allows_it() -> None:
    with pytest.raises(UserWarning, match="careless"):
        run_ranks(warns, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run_ranks(warns, 1) == [None]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_keeps_its_class_and_names_its_rank(rank: int) -> None:
    with pytest.raises(ConfigError, match="tensor=3 does not divide") as raised:
        run_ranks(fails_in, 2, rank, others_wait=False)
    note = raised.value.__notes__[0]
    assert f"in rank {rank} of 2" in note
    assert "fails_in" in note


def test_ranks_that_all_raise_stay_alive() -> None:
    before = run_ranks(process_id, 2)
    with pytest.raises(ConfigError, match="refused"):
        run_ranks(fails_everywhere, 2)
    assert run_ranks(process_id, 2) == before


def test_an_exception_that_cannot_travel_is_told_as_text() -> None:
    with pytest.raises(RankError, match="TwoArguments: 3: must be even"):
        run_ranks(raises_two_arguments, 1)


def test_a_failing_rank_does_not_wait_for_those_that_hang() -> None:
    before, start = run_ranks(process_id, 2), time.monotonic()
    with pytest.raises(ConfigError, match="does not divide"):
        run_ranks(fails_in, 2, 1, others_wait=True)
    assert time.monotonic() - start < 10
    after = run_ranks(process_id, 2)
    assert not set(before) & set(after)


def test_a_dead_rank_is_named_with_its_exit_code() -> None:
    with pytest.raises(RankError, match="ended with code -9") as raised:
        run_ranks(dies_in, 2, 1)
    assert "in rank 1 of 2" in raised.value.__notes__[0]
    assert run_ranks(own_rank, 2, 1) == [0, 1]


def test_ranks_that_hang_are_named_with_their_stacks() -> None:
    with pytest.raises(RankError, match=r"no answer from ranks \[0, 1\] within 2 s") as raised:
        run_ranks(waits_in, 2, 1, timeout=2)
    assert "in waits_in" in str(raised.value)
    assert run_ranks(own_rank, 2, 1) == [0, 1]


def test_a_function_may_destroy_its_process_group() -> None:
    assert run_ranks(destroys_its_group, 2) == [0, 1]
    assert run_ranks(own_rank, 2, 1) == [0, 1]


def test_equal_meshes_of_two_calls_do_not_share_groups() -> None:
    rows = torch.arange(8.0).view(4, 2)
    for extra_groups in (0, 3, 1):
        for result in run_ranks(reshards_on_a_mesh, 4, extra_groups):
            assert torch.equal(result, rows @ rows.T)


def test_shutdown_ends_the_processes() -> None:
    process_ids = run_ranks(process_id, 2)
    ranks.shutdown()
    for pid in process_ids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("world_size", [0, 9])
def test_the_number_of_ranks_is_bounded(world_size: int) -> None:
    with pytest.raises(ValueError, match="not between 1 and 8"):
        run_ranks(own_rank, world_size, 1)
