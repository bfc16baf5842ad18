"""The device mesh: which rank stands where on the pipeline, data and tensor axes.

With one process every axis has size 1 and no group, and every collective is the identity.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megagrow.config import ParallelConfig, require
from megagrow.parallel.launcher import end_with_launcher

AXES = ("pp", "dp", "tp")


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh as this rank sees it; `group` is None when the axis has size 1."""

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1


@dataclass(frozen=True)
class Mesh:
    """All axes, `world` for all ranks at once, and a gloo group of its own for checkpoints.

    Checkpoints have their own group because a save that shares the default group hangs beside training's collectives.
    """

    pp: Axis
    dp: Axis
    tp: Axis
    world: Axis
    device: torch.device
    device_mesh: DeviceMesh | None = None
    checkpoint_group: dist.ProcessGroup | None = None

    @staticmethod
    def single(device: str | torch.device = "cpu") -> "Mesh":
        """The mesh of one process."""
        return Mesh(Axis(), Axis(), Axis(), Axis(), torch.device(device))

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.world.rank == 0

    def sub_mesh(self, axis: str) -> DeviceMesh:
        """The torch DeviceMesh of one axis."""
        assert self.device_mesh is not None, "one process has no device mesh"
        return self.device_mesh[axis]


def init_distributed(timeout: float = 600.0) -> int:
    """Joins the process group that torchrun prepared, if there is one.

    Args:
        timeout: seconds that a collective may take before it fails.

    Returns:
        The world size; 1 without torchrun.
    """
    end_with_launcher()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1 and not dist.is_initialized():
        backend = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    return world_size


def leave_distributed() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def make_mesh(parallel: ParallelConfig) -> Mesh:
    """Lays the initialised process group out as (pipeline, data, tensor), tensor varying fastest.

    The configuration must have passed `config.check` for this world size.
    """
    device = _device()
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Mesh.single(device)
    world = dist.get_world_size()
    sizes = (parallel.pipeline, world // (parallel.pipeline * parallel.tensor), parallel.tensor)
    device_mesh = init_device_mesh(device.type, sizes, mesh_dim_names=AXES)
    pp, dp, tp = (_axis(device_mesh, name) for name in AXES)
    return Mesh(
        pp,
        dp,
        tp,
        Axis(dist.group.WORLD, dist.get_rank(), world),
        device,
        device_mesh,
        dist.new_group(backend="gloo"),
    )


def _axis(device_mesh: DeviceMesh, name: str) -> Axis:
    size = device_mesh[name].size()
    if size == 1:
        return Axis()
    return Axis(device_mesh.get_group(name), device_mesh.get_local_rank(name), size)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, num_devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    require(
        local_rank < num_devices,
        f"local rank {local_rank} has no GPU, this host shows {num_devices}; start at most {num_devices} ranks on it, "
        "or set CUDA_VISIBLE_DEVICES= to train on CPUs",
    )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", torch.cuda.current_device())
