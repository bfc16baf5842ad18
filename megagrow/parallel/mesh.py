"""The device mesh: which rank stands where on the pipeline, data, context and tensor axes.

Ranks are laid out as (pipeline, data, context, tensor), tensor varying fastest, because it talks most. Two views of the
same ranks exist:

    samples and sequences    pp x dp x cp x tp              who reads which tokens
    storage of parameters    pp x replicate x shard x tp    who holds which piece; replicate x shard = dp x cp

With one process every axis has size 1 and no group, and every collective is the identity.
"""

import os
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megagrow.config import V_SCHEDULES, ParallelConfig, require
from megagrow.parallel.launcher import end_with_launcher

SAMPLE_AXES = ("pp", "dp", "cp", "tp")
STORAGE_AXES = ("pp", "replicate", "shard", "tp")


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
    """All axes of this rank.

    Attributes:
        pp: pipeline stages.
        dp: ranks with different samples.
        cp: ranks that share each sequence.
        tp: ranks that share each matrix.
        tokens: ranks with different tokens, dp x cp; losses and gradients are summed over them.
        world: all ranks at once.
        device: where this rank's tensors are.
        parallel: how the axes are used.
        device_mesh: torch's mesh over `STORAGE_AXES`; None for one process.
        checkpoint_group: a gloo group of its own; a save that shares training's group hangs beside its collectives.
    """

    pp: Axis
    dp: Axis
    cp: Axis
    tp: Axis
    tokens: Axis
    world: Axis
    device: torch.device
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    device_mesh: DeviceMesh | None = None
    checkpoint_group: dist.ProcessGroup | None = None

    @staticmethod
    def single(device: str | torch.device = "cpu") -> "Mesh":
        """The mesh of one process."""
        return Mesh(Axis(), Axis(), Axis(), Axis(), Axis(), Axis(), torch.device(device))

    def without_pipeline(self) -> "Mesh":
        """The mesh of a model without optimizer that each pipeline and data rank holds for itself."""
        parallel = replace(self.parallel, pipeline=1, layers_per_stage=(), stages_per_rank=0, replicate=1)
        return replace(self, pp=Axis(), dp=Axis(), tokens=self.cp, parallel=parallel)

    def tensor_only(self) -> "Mesh":
        """The same of a model that sees whole sequences, uncut."""
        parallel = ParallelConfig(tensor=self.tp.size)
        return replace(self.without_pipeline(), cp=Axis(), tokens=Axis(), parallel=parallel)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.world.rank == 0

    @property
    def loss_rank(self) -> int:
        """The pipeline rank that computes the loss: in V-shaped schedules the first, since their stages come back."""
        return 0 if self.parallel.schedule in V_SCHEDULES else self.pp.size - 1

    @property
    def sequence_parallel(self) -> bool:
        """Whether activations are cut along the sequence over the tensor axis."""
        return self.parallel.sequence_parallel and self.tp.size > 1

    def sub_mesh(self, *axes: str) -> DeviceMesh:
        """The torch DeviceMesh of one or more of `STORAGE_AXES`."""
        assert self.device_mesh is not None, "one process has no device mesh"
        return self.device_mesh[axes]


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
    """Lays out the initialised process group.

    The configuration must have passed `checks.check` for this world size.
    """
    device = _device()
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Mesh.single(device)
    world = dist.get_world_size()
    pipeline, context, tensor, replicate = parallel.pipeline, parallel.context, parallel.tensor, parallel.replicate
    num_data = world // parallel.model_ranks
    samples = init_device_mesh(device.type, (pipeline, num_data, context, tensor), mesh_dim_names=SAMPLE_AXES)
    shard = num_data * context // replicate
    storage = init_device_mesh(device.type, (pipeline, replicate, shard, tensor), mesh_dim_names=STORAGE_AXES)
    pp, dp, cp, tp = (_axis(samples, name) for name in SAMPLE_AXES)
    if pp.size > 1:
        # NCCL wants all ranks of a group in its first operation, which would be an exchange between the two ends.
        dist.all_reduce(torch.zeros(1, device=device), group=pp.group)
    return Mesh(
        pp=pp,
        dp=dp,
        cp=cp,
        tp=tp,
        tokens=_token_axis(samples, dp, cp, tensor),
        world=Axis(dist.group.WORLD, dist.get_rank(), world),
        device=device,
        parallel=parallel,
        device_mesh=storage,
        checkpoint_group=dist.new_group(backend="gloo" if dist.get_backend() != "fake" else "fake"),
    )


def make_inference_mesh(tensor: int, timeout: float = 600.0) -> Mesh:
    """The mesh of the launched ranks for a model without training: a tensor axis, all else shares the samples.

    Args:
        tensor: ranks that share the model.
        timeout: see `init_distributed`.

    Raises:
        ConfigError: `tensor` does not divide the number of ranks.
    """
    parallel = ParallelConfig(tensor=tensor)
    world = init_distributed(timeout)
    require(
        world % tensor == 0,
        f"--tensor {tensor} does not divide the {world} launched ranks; start a multiple of it",
    )
    return make_mesh(parallel)


def _axis(device_mesh: DeviceMesh, name: str) -> Axis:
    size = device_mesh[name].size()
    if size == 1:
        return Axis()
    return Axis(device_mesh.get_group(name), device_mesh.get_local_rank(name), size)


def _token_axis(samples: DeviceMesh, dp: Axis, cp: Axis, tensor: int) -> Axis:
    """The axis dp x cp, the context rank varying fastest."""
    if dp.size == 1 or cp.size == 1:
        return cp if dp.size == 1 else dp
    merged = init_device_mesh(
        samples.device_type, (samples.size(0), dp.size * cp.size, tensor), mesh_dim_names=("pp", "tokens", "tp")
    )
    return _axis(merged, "tokens")


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
