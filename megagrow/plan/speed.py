"""How long a step takes, by a simple model that says what it assumes.

    computing   FLOPs (attention over all pairs) at `efficiency` of the peak; recomputing counts
    tensor      sums of activations stand in the way of computing: no overlap
    context     so do gathered keys and values
    pipeline    the schedule's own walk, with the times above; sending an activation stands in the way too
    data        without a pipeline, gathering and reducing hide behind computing; with one they come before and after

Left out: latencies, the optimizer's update, loading of data, checkpoints, and what slow hosts cost.
"""

import math
from dataclasses import dataclass

from megagrow import flops
from megagrow.plan.communication import all_gather, data_traffic, keys_and_values, layer_exchanges
from megagrow.plan.layout import AxisName, Layout
from megagrow.plan.schedule import StageTimes, Walk, walk

BACKWARD_SHARE = 2  # a backward pass has twice the products of a forward pass


@dataclass(frozen=True)
class Machine:
    """What the model of time assumes about the cluster.

    Attributes:
        peak_flops: dense FLOP/s of one GPU in the dtype of compute.
        efficiency: share of the peak that computing alone reaches.
        ranks_per_node: GPUs that share a fast network.
        inside: bytes per second that a rank sends inside a node.
        between: the same between nodes, per rank.
        memory: bytes of one GPU.
        usable: share of `memory` that tensors can have; the rest is CUDA's, NCCL's and fragmentation.
    """

    peak_flops: float = 989e12
    efficiency: float = 0.5
    ranks_per_node: int = 8
    inside: float = 300e9
    between: float = 40e9
    memory: float = 80 * 2**30
    usable: float = 0.9

    def bandwidth(self, layout: Layout, axis: AxisName) -> float:
        """Of a mesh axis: that between nodes unless all its ranks stand in one."""
        inner = {
            "tensor": 1,
            "context": layout.tensor,
            "shard": layout.tensor,
            "replicate": layout.tensor * layout.shard,
            "pipeline": layout.tensor * layout.context * layout.data,
        }[axis]
        return self.inside if inner * layout.axes[axis] <= self.ranks_per_node else self.between


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step.

    Attributes:
        step: all of it.
        computing: products on the busiest rank.
        exposed: communication that nothing hides, on the busiest rank.
        bubble: the busiest rank's wait for the others.
        mfu: FLOPs of the model, attention over all pairs, without recomputing, over the peak of all ranks.
    """

    step: float
    computing: float
    exposed: float
    bubble: float
    mfu: float


def step_time(layout: Layout, machine: Machine) -> StepTime:
    """Times one step of plain training."""
    walked = _walk(layout, machine)
    computing = max(_computing(layout, machine, rank) for rank in range(layout.pipeline))
    busiest = max(range(layout.pipeline), key=lambda rank: walked.busy[rank])
    data = max(_data(layout, machine, rank) for rank in range(layout.pipeline))
    if layout.pipeline == 1:
        data = max(0.0, data - computing)
    step = walked.seconds + data
    exposed = max(walked.busy) - _computing(layout, machine, busiest) + data
    useful = flops.training_flops(layout.model, layout.step_tokens, layout.config.data.seq_length)
    mfu = useful / (step * machine.peak_flops * layout.world_size)
    return StepTime(step, computing, exposed, walked.seconds - max(walked.busy), mfu)


def schedule_of(layout: Layout) -> Walk:
    """The walk through the layout's schedule, by FLOPs alone; in FLOPs of a token."""
    alone = Machine(peak_flops=1.0, efficiency=1.0, inside=math.inf, between=math.inf)
    return _walk(layout, alone)


def _walk(layout: Layout, machine: Machine) -> Walk:
    parallel = layout.config.parallel
    layer, head = _layer(layout, machine), _head(layout, machine)
    again = layer if layout.config.train.recompute == "full" else 0.0
    ahead, back = _tensor(layout, machine)
    keys = keys_and_values(layout) / machine.bandwidth(layout, "context")
    keys_back = keys if layout.config.train.recompute == "none" else 2 * keys
    send = layout.activation / machine.bandwidth(layout, "pipeline") if layout.pipeline > 1 else 0.0
    times = [
        StageTimes(
            forward=len(stage.layers) * (layer + ahead + keys) + head * stage.is_last + send,
            inputs=len(stage.layers) * (layer + again + back + keys_back) + head * stage.is_last + send,
            weights=len(stage.layers) * layer + head * stage.is_last,
        )
        for stage in layout.stages
    ]
    return walk(parallel.schedule, layout.pipeline, parallel.local_stages, layout.num_microbatches, times)


def _layer(layout: Layout, machine: Machine) -> float:
    """Seconds of one microbatch's forward pass through a layer, computing alone."""
    per_token = flops.layer_flops_per_token(layout.model, layout.config.data.seq_length)
    return per_token * layout.tokens / layout.tensor / (machine.peak_flops * machine.efficiency)


def _head(layout: Layout, machine: Machine) -> float:
    """Seconds of one microbatch's logits."""
    per_token = flops.head_flops_per_token(layout.model)
    return per_token * layout.tokens / layout.tensor / (machine.peak_flops * machine.efficiency)


def _computing(layout: Layout, machine: Machine, rank: int) -> float:
    """Seconds that a rank computes in a step."""
    stages, layer = layout.rank_stages(rank), _layer(layout, machine)
    forward = sum(len(stage.layers) for stage in stages) * layer
    again = forward if layout.config.train.recompute == "full" else 0.0
    head = _head(layout, machine) * stages[-1].is_last
    return layout.num_microbatches * ((1 + BACKWARD_SHARE) * (forward + head) + again)


def _tensor(layout: Layout, machine: Machine) -> tuple[float, float]:
    """Seconds that a layer's forward and its backward pass send activations over the tensor axis."""
    whole = layout.tokens * layout.model.hidden_size * layout.width
    once = all_gather(whole, layout.tensor) / machine.bandwidth(layout, "tensor")
    forward, backward = layer_exchanges(layout)
    return forward * once, backward * once


def _data(layout: Layout, machine: Machine, rank: int) -> float:
    """Seconds that parameters and gradients travel over the data axes."""
    return sum(entry.sent / machine.bandwidth(layout, entry.axis) for entry in data_traffic(layout, rank))
