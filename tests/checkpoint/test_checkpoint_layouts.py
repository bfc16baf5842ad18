"""Any layout loads what any other saved, and what fails on one rank fails alike on all."""

import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from megagrow import checkpoint
from megagrow.errors import CheckpointError
from tests.checkpoint.samples import empty_tensors, save_step, tensors_at
from tests.ranks import run_ranks

# Not divisible by tp 2, dp 2 or dp 3. On dp 3 x tp 2 torch's own DCP fails on the rows of `up`.
SHAPES = {"embedding": (101, 6), "up": (13, 6), "down": (6, 13), "few": (2, 4), "norm": (7,)}
TP_DIMS = {"embedding": 0, "up": 0, "down": 1, "few": 0, "norm": None}
LAYOUTS = [(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (3, 2)]


def whole_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def sharded_model(dp: int, tp: int, tensors: dict[str, Tensor]) -> nn.Module:
    """Parameters as megagrow stores them: DTensors on `tp`, then FSDP2 over `dp`."""
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    model = nn.Module()
    for name, tensor in tensors.items():
        tp_dim = TP_DIMS[name]
        placement = Replicate() if tp_dim is None else Shard(tp_dim)
        sharded = distribute_tensor(tensor, mesh["tp"], [placement]) if tp > 1 else tensor
        model.register_parameter(name, nn.Parameter(sharded))
    return fully_shard(model, mesh=mesh["dp"]) if dp > 1 else model


def with_optimizer_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, moments that are twice the parameters, and a step count."""
    tensors: dict[str, Tensor] = {"steps": torch.tensor(17.0)}
    for name, parameter in model.named_parameters():
        tensors[name] = parameter
        tensors[f"{name}.exp_avg"] = torch.zeros_like(parameter).copy_(parameter.detach() * 2)
    return tensors


def save_in_layout(root: Path, dp: int, tp: int) -> dict[str, Any]:
    tensors = with_optimizer_state(sharded_model(dp, tp, whole_tensors()))
    group = dist.new_group(backend="gloo")
    path = checkpoint.save(root, 1, tensors, {"step": 1}, config={}, provenance={}, group=group)
    return checkpoint.read_manifest(path).layout


def load_in_layout(root: Path, dp: int, tp: int) -> None:
    """Loads what every layout saved into one model, zeroed in between."""
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    tensors = with_optimizer_state(sharded_model(dp, tp, zeros))
    group = dist.new_group(backend="gloo")
    for source_dp, source_tp in LAYOUTS:
        for tensor in tensors.values():
            tensor.detach().zero_()
        path = root / f"{source_dp}x{source_tp}" / "step-1"
        assert checkpoint.load(path, tensors, group=group) == {"step": 1}
        assert_whole({name: gathered(tensor.detach()) for name, tensor in tensors.items()})


def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor, put together by what tensor and data parallelism mean, not by DTensor."""
    if not isinstance(tensor, DTensor):
        return tensor
    mesh, names = tensor.device_mesh, tensor.device_mesh.mesh_dim_names or ()
    local = tensor.to_local()
    if "dp" in names:
        local = concatenated(local, 0, mesh["dp"])
    placement = tensor.placements[-1]
    if "tp" in names and isinstance(placement, Shard):
        local = concatenated(local, placement.dim, mesh["tp"])
    return local


def concatenated(local: Tensor, dim: int, mesh: DeviceMesh) -> Tensor:
    parts: list[Any] = [None] * mesh.size()
    dist.all_gather_object(parts, local, group=mesh.get_group())
    return torch.cat([part for part in parts if part.numel()], dim)


def assert_whole(tensors: dict[str, Tensor]) -> None:
    assert tensors["steps"].item() == 17
    for name, expected in whole_tensors().items():
        assert torch.equal(tensors[name], expected), name
        assert torch.equal(tensors[f"{name}.exp_avg"], 2 * expected), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same values, saved in every layout under `DPxTP`."""
    root = tmp_path_factory.mktemp("layouts")
    for dp, tp in LAYOUTS:
        layouts = run_ranks(save_in_layout, dp * tp, root / f"{dp}x{tp}", dp, tp)
        axes = {name: size for name, size in (("dp", dp), ("tp", tp)) if size > 1}
        assert layouts[0] == {"world_size": dp * tp, "axes": axes}
    return root


def test_the_ways_to_put_shards_together_agree() -> None:
    for tensors in run_ranks(gathered_without_checkpoint, 6, 3, 2):
        assert_whole(tensors)


def gathered_without_checkpoint(dp: int, tp: int) -> dict[str, Tensor]:
    tensors = with_optimizer_state(sharded_model(dp, tp, whole_tensors()))
    return {name: gathered(tensor.detach()) for name, tensor in tensors.items()}


@pytest.mark.parametrize(("dp", "tp"), LAYOUTS)
def test_one_process_loads_every_layout(saved: Path, dp: int, tp: int) -> None:
    path = saved / f"{dp}x{tp}" / "step-1"
    manifest = checkpoint.verify(path)
    assert_whole(checkpoint.read_full(path, manifest.tensors))
    num_elements = sum(torch.Size(item.sizes).numel() for item in manifest.items)
    assert num_elements == 1 + 2 * sum(torch.Size(shape).numel() for shape in SHAPES.values())


@pytest.mark.parametrize(("dp", "tp"), LAYOUTS[1:])
def test_every_layout_loads_every_layout(saved: Path, dp: int, tp: int) -> None:
    run_ranks(load_in_layout, dp * tp, saved, dp, tp)


def save_in_stages(root: Path) -> Path:
    """Two pipeline stages of two tensor ranks; the embedding is tied, so both stages hold it."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
    stage = mesh["pp"].get_local_rank()
    whole = whole_tensors()
    embedding = distribute_tensor(whole["embedding"], mesh["tp"], [Shard(0)])
    own = {"up": whole["up"]} if stage == 0 else {"down": whole["down"]}
    tensors = {"embedding": embedding, **own}
    return checkpoint.save(root, 1, tensors, {}, config={}, provenance={})


def test_stages_with_other_names_share_a_checkpoint(tmp_path: Path) -> None:
    path = run_ranks(save_in_stages, 4, tmp_path)[3]
    manifest = checkpoint.read_manifest(path)
    sizes = sorted(item.sizes for item in manifest.items if item.tensor == "embedding")
    assert sizes == [(50, 6), (51, 6)], "a tied tensor is written once"
    tensors = checkpoint.read_full(path, ["embedding", "up", "down"])
    assert all(torch.equal(tensor, whole_tensors()[name]) for name, tensor in tensors.items())


def error_of(path: Path, tensors: dict[str, Tensor], strict: bool = True) -> str:
    try:
        checkpoint.load(path, tensors, strict=strict)
    except CheckpointError as error:
        return str(error)
    return ""


def load_names(path: Path, names_of_rank: list[list[str]]) -> str:
    names = names_of_rank[dist.get_rank()]
    return error_of(path, {name: tensor for name, tensor in tensors_with_head().items() if name in names})


def tensors_with_head() -> dict[str, Tensor]:
    return empty_tensors() | {"head": torch.zeros(3)}


def test_names_are_strict_over_all_ranks_together(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1)
    assert run_ranks(load_names, 2, path, [["embedding", "count"], ["norm", "count"]]) == ["", ""]
    for errors in run_ranks(load_names, 2, path, [["embedding"], ["count"]]):
        assert "rank 0, 1: its tensors do not fit the model: 1 unexpected (norm)" in errors
    everything = ["embedding", "norm", "count"]
    errors = run_ranks(load_names, 2, path, [everything, [*everything, "head"]])
    assert errors[0] == errors[1]
    assert "rank 1: its tensors do not fit the model: 1 missing (head)" in errors[0]


def load_half(path: Path) -> str:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    return error_of(path, {"w": distribute_tensor(torch.zeros(8, 2), mesh, [Shard(0)])})


def save_half(root: Path) -> Path:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    tensors = {"w": distribute_tensor(torch.ones(8, 2), mesh, [Shard(0)])}
    return checkpoint.save(root, 1, tensors, {}, config={}, provenance={})


def test_damage_that_one_rank_reads_is_an_error_on_all(tmp_path: Path) -> None:
    path = run_ranks(save_half, 2, tmp_path)[0]
    assert run_ranks(load_half, 2, path) == ["", ""]
    raw = bytearray((path / "__1_0.distcp").read_bytes())
    raw[len(raw) // 2] ^= 4
    (path / "__1_0.distcp").write_bytes(raw)
    errors = run_ranks(load_half, 2, path)
    assert errors[0] == errors[1]
    assert f"rank 1: {path}/__1_0.distcp: bytes 0 to {len(raw)} (tensor 'w')" in errors[0]
    (path / "__1_0.distcp").unlink()
    errors = run_ranks(load_half, 2, path)
    assert errors[0] == errors[1]
    assert "__1_0.distcp: No such file or directory" in errors[0]


def load_own_path(root: Path) -> str:
    return error_of(root / str(dist.get_rank()) / "step-1", empty_tensors())


def test_ranks_that_see_other_directories_are_told(tmp_path: Path) -> None:
    save_step(tmp_path / "0", 1)
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    assert run_ranks(load_own_path, 2, tmp_path) == ["", ""]
    shutil.rmtree(tmp_path / "1")
    checkpoint.save(tmp_path / "1", 1, tensors_at(2), {}, config={}, provenance={})
    for error in run_ranks(load_own_path, 2, tmp_path):
        assert "different manifests" in error
    shutil.rmtree(tmp_path / "1")
    for error in run_ranks(load_own_path, 2, tmp_path):
        assert "rank 1: " in error
        assert "no complete checkpoint" in error


def save_with_a_full_rank(root: Path, full_rank: int) -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    tensors = {"w": distribute_tensor(torch.ones(2, 1 << 17), mesh, [Shard(0)])}
    if dist.get_rank() == full_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        checkpoint.save(root, 2, tensors, {}, config={}, provenance={})
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return ""


@pytest.mark.parametrize("full_rank", [0, 1])
def test_a_rank_that_cannot_write_fails_the_save_on_all(tmp_path: Path, full_rank: int) -> None:
    save_step(tmp_path, 1)
    errors = run_ranks(save_with_a_full_rank, 2, tmp_path, full_rank)
    assert errors[0] == errors[1]
    assert f"rank {full_rank}: {tmp_path}/step-2.tmp-" in errors[0]
    assert f"__{full_rank}_0.distcp: File too large" in errors[0]
    assert "\n" not in errors[0]
    assert {path.name for path in tmp_path.iterdir()} == {"step-1", "latest"}


def save_other_shapes(root: Path, num_rows: list[int]) -> str:
    tensors = {"w": torch.zeros(num_rows[dist.get_rank()], 2)}
    try:
        checkpoint.save(root, 1, tensors, {}, config={}, provenance={})
    except CheckpointError as error:
        return str(error)
    return ""


def test_one_name_is_one_tensor(tmp_path: Path) -> None:
    for error in run_ranks(save_other_shapes, 2, tmp_path, [3, 4]):
        assert "tensor 'w' is torch.float32[3, 2] on rank 0 and torch.float32[4, 2] on rank 1" in error
    assert not list(tmp_path.iterdir())


def save_bad_state_on(root: Path, rank: int) -> str:
    state = {"rng": torch.zeros(1)} if dist.get_rank() == rank else {}
    try:
        checkpoint.save(root, 1, {"w": torch.zeros(1)}, state, config={}, provenance={})
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_value_that_one_rank_cannot_store_fails_on_all(tmp_path: Path) -> None:
    for rank in range(2):
        errors = run_ranks(save_bad_state_on, 2, tmp_path, rank)
        assert errors[0] == errors[1]
        assert f"rank {rank}: state.rng is a Tensor" in errors[0]
    assert not list(tmp_path.iterdir())
