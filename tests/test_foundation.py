"""What megagrow rests on, checked on the installed torch alone: nothing of megagrow is imported.

Parameters are DTensors on the tp axis, compute runs on their local shards with explicit
collectives, FSDP2 shards them over dp, and torch's pipeline schedules drive the stages. Loss and
every gradient are compared with one process, in fp64. With torch 2.13 the largest relative error
is 1e-15; a gradient that misses a collective, or meets one twice, is off by a factor.

B: batch    D: hidden size    F: ffn size    Q: this rank's part of F
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional

from tests.ranks import run_ranks

HIDDEN_SIZE, FFN_SIZE, NUM_LAYERS, NUM_MICROBATCHES, BATCH_SIZE = 32, 64, 4, 4, 16
PP = DP = TP = 2


class CopyIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x_BD.view_as(x_BD)

    @staticmethod
    def backward(ctx: Any, grad_BD: Tensor) -> tuple[Tensor, None]:
        grad_BD = grad_BD.clone()
        dist.all_reduce(grad_BD, group=ctx.group)
        return grad_BD, None


class ReduceOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, group: dist.ProcessGroup) -> Tensor:
        x_BD = x_BD.clone()
        dist.all_reduce(x_BD, group=group)
        return x_BD

    @staticmethod
    def backward(ctx: Any, grad_BD: Tensor) -> tuple[Tensor, None]:
        return grad_BD, None


class Block(nn.Module):
    """A residual MLP; the same weights for the same seed, whole or on shards."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.w_in_FD = nn.Parameter(random(seed, FFN_SIZE, HIDDEN_SIZE) / 6)
        self.w_out_DF = nn.Parameter(random(seed + 100, HIDDEN_SIZE, FFN_SIZE) / 8)
        self.group: dist.ProcessGroup | None = None

    def shard(self, tp: DeviceMesh) -> "Block":
        self.w_in_FD = nn.Parameter(distribute_tensor(self.w_in_FD.data, tp, [Shard(0)]))
        self.w_out_DF = nn.Parameter(distribute_tensor(self.w_out_DF.data, tp, [Shard(1)]))
        self.group = tp.get_group()
        return self

    def forward(self, x_BD: Tensor) -> Tensor:
        if self.group is None:
            return x_BD + self.mlp(x_BD, self.w_in_FD, self.w_out_DF)
        partial_BD = self.mlp(CopyIn.apply(x_BD, self.group), self.w_in_FD.to_local(), self.w_out_DF.to_local())
        return x_BD + ReduceOut.apply(partial_BD, self.group)

    def mlp(self, x_BD: Tensor, w_in_QD: Tensor, w_out_DQ: Tensor) -> Tensor:
        h_BQ = functional.silu(functional.linear(x_BD, w_in_QD))
        return functional.linear(h_BQ, w_out_DQ)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch() -> tuple[Tensor, Tensor]:
    return random(200, BATCH_SIZE, HIDDEN_SIZE), random(201, BATCH_SIZE, HIDDEN_SIZE)


def squared_error(output_BD: Tensor, target_BD: Tensor) -> Tensor:
    return (output_BD - target_BD).square().mean()


def layers_of_stages(num_stages: int) -> list[range]:
    per_stage = NUM_LAYERS // num_stages
    return [range(first, first + per_stage) for first in range(0, NUM_LAYERS, per_stage)]


def build_stage(layers: range, tp: DeviceMesh, dp: DeviceMesh) -> nn.Sequential:
    stage = nn.Sequential(*[Block(layer).shard(tp) for layer in layers])
    for module in (*stage, stage):
        fully_shard(module, mesh=dp, reshard_after_forward=False)
    return stage


def run_schedule(name: str, modules: dict[int, nn.Module], num_stages: int, mesh: DeviceMesh) -> list[Tensor]:
    """One step on this data rank's rows; returns the microbatches' losses on the last stage."""
    group, cpu = mesh["pp"].get_group(), torch.device("cpu")
    stages = [PipelineStage(module, stage, num_stages, cpu, group=group) for stage, module in modules.items()]
    stage_or_stages = stages[0] if len(stages) == 1 else stages
    schedule = getattr(schedules, name)(stage_or_stages, NUM_MICROBATCHES, loss_fn=squared_error)
    x_BD, target_BD = (whole.chunk(DP)[mesh["dp"].get_local_rank()] for whole in batch())
    losses: list[Tensor] = []
    inputs = (x_BD,) if 0 in modules else ()
    ends = {"target": target_BD, "losses": losses} if num_stages - 1 in modules else {}
    schedule.step(*inputs, **ends)
    return losses


def largest_error(schedule_name: str, stage_ids: list[list[int]]) -> float:
    """Of this rank's gradients and, on the last stage, its loss: max |x - y| / max |y|."""
    torch.set_default_dtype(torch.float64)
    mesh = init_device_mesh("cpu", (PP, DP, TP), mesh_dim_names=("pp", "dp", "tp"))
    num_stages = sum(map(len, stage_ids))
    layers = layers_of_stages(num_stages)
    own = stage_ids[mesh["pp"].get_local_rank()]
    modules = {stage: build_stage(layers[stage], mesh["tp"], mesh["dp"]) for stage in own}
    losses = run_schedule(schedule_name, modules, num_stages, mesh)

    plain = nn.Sequential(*[Block(layer) for layer in range(NUM_LAYERS)])
    x_BD, target_BD = batch()
    output_BD = plain(x_BD)
    squared_error(output_BD, target_BD).backward()
    errors = [
        relative_error(parameter.grad, plain[layer].get_parameter(name).grad)
        for stage, module in modules.items()
        for layer, block in zip(layers[stage], module, strict=True)
        for name, parameter in block.named_parameters()
    ]
    if losses:
        dp_rank = mesh["dp"].get_local_rank()
        expected = squared_error(output_BD.chunk(DP)[dp_rank], target_BD.chunk(DP)[dp_rank])
        errors.append(relative_error(torch.stack(losses).mean(), expected))
    return max(errors)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    full = actual.full_tensor() if isinstance(actual, DTensor) else actual
    return ((full - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    ("schedule_name", "stage_ids"),
    [
        ("Schedule1F1B", [[0], [1]]),
        ("ScheduleInterleaved1F1B", [[0, 2], [1, 3]]),
        ("ScheduleInterleavedZeroBubble", [[0, 2], [1, 3]]),
        ("ScheduleZBVZeroBubble", [[0, 3], [1, 2]]),
        ("ScheduleDualPipeV", [[0, 3], [1, 2]]),
    ],
)
def test_shards_and_schedules_equal_one_process(schedule_name: str, stage_ids: list[list[int]]) -> None:
    errors = run_ranks(largest_error, PP * DP * TP, schedule_name, stage_ids)
    assert max(errors) < 1e-12
