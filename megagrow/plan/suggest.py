"""Valid layouts of a model on a number of ranks, the fastest that fit first."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from megagrow.checks import problems
from megagrow.config import Config, ParallelConfig, Schedule
from megagrow.errors import ConfigError
from megagrow.plan.layout import Layout
from megagrow.plan.memory import MOMENTS, PARAMETER, RankMemory, step_memory
from megagrow.plan.phases import phases
from megagrow.plan.speed import Machine, StepTime, step_time
from megagrow.plan.weights import rank_unit

MOST_PASSES = 2**13  # of all microbatches through all stages; where there are more, microbatches are larger
LEAST_TOKENS = 2048  # of a sequence on one context rank; shorter pieces leave the kernels idle
RECOMPUTE: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
# Schedule and stages per rank.
SCHEDULES: tuple[tuple[Schedule, int], ...] = (
    ("1F1B", 1),
    ("Interleaved1F1B", 2),
    ("Interleaved1F1B", 4),
    ("InterleavedZeroBubble", 2),
    ("ZBVZeroBubble", 2),
    ("DualPipeV", 2),
)


@dataclass(frozen=True)
class Suggestion:
    """A layout with what it needs and how fast it is thought to be.

    Attributes:
        config: the configuration with this layout.
        memory: bytes at the fullest moment of the fullest rank.
        time: seconds of a step.
    """

    config: Config
    memory: int
    time: StepTime


def suggest(config: Config, world_size: int, machine: Machine) -> list[Suggestion]:
    """The fastest variant (schedule, microbatch, recompute, copies) of each mesh that fits, the fastest mesh first."""
    best: dict[tuple[int, ...], Suggestion] = {}
    for mesh in _meshes(config, world_size, machine):
        for variants in _growing_variants(config, mesh, world_size, machine):
            is_full = False
            for variant in variants:
                # What follows needs more, unless it takes one microbatch, for which gradients are not kept whole.
                if is_full and Layout(variant, world_size).num_microbatches > 1:
                    continue
                found = _judge(variant, world_size, machine)
                if found is None:
                    is_full = True
                    continue
                key = (mesh.tensor, mesh.context, mesh.pipeline)
                if key not in best or found.time.step < best[key].time.step:
                    best[key] = found
    return sorted(best.values(), key=lambda found: found.time.step)


def _judge(config: Config, world_size: int, machine: Machine) -> Suggestion | None:
    """The suggestion, or None when it does not fit."""
    layout, limit = Layout(config, world_size), machine.memory * machine.usable
    if (PARAMETER + MOMENTS) * rank_unit(layout, 0).stored > limit and not config.optim.offload:
        return None
    try:
        memory = max(held.total for held in _all_memory(layout))
    except ConfigError:  # a source or a teacher that cannot be laid out so
        return None
    return Suggestion(config, memory, step_time(layout, machine)) if memory <= limit else None


def _all_memory(layout: Layout) -> list[RankMemory]:
    """Of all phases."""
    if layout.config.growth.method == "none" and not layout.config.salt.has_stage_one:
        return step_memory(layout)
    return [held for phase in phases(layout)[0] for held in phase.memory]


def _meshes(config: Config, world_size: int, machine: Machine) -> Iterator[ParallelConfig]:
    """Meshes whose tensor ranks share a node, and whose pipelines split the layers evenly, or are powers of two.

    Even is a split of the layers alone, or with embedding and head as one layer each.
    """
    layers, longest = config.model.num_layers, max(config.data.seq_length // LEAST_TOKENS, 1)
    for tensor in _divisors(math.gcd(min(machine.ranks_per_node, world_size), world_size)):
        for context in _divisors(world_size // tensor, longest):
            for pipeline in _divisors(world_size // (tensor * context), layers):
                if _is_power(pipeline) or layers % pipeline == 0 or (layers + 2) % pipeline == 0:
                    mesh = tensor, pipeline, context
                    yield ParallelConfig(*mesh, sequence_parallel=tensor > 1)


def _growing_variants(
    config: Config, mesh: ParallelConfig, world_size: int, machine: Machine
) -> Iterator[Iterator[Config]]:
    """All valid variants of a mesh, in rows along which memory grows: larger microbatches, then more copies."""
    num_data = world_size // mesh.model_ranks
    share = config.train.global_batch_size // num_data
    for schedule, stages in SCHEDULES if mesh.pipeline > 1 else SCHEDULES[:1]:
        for recompute in RECOMPUTE:
            for replicate in _copies(mesh, num_data, machine):
                parallel = replace(mesh, schedule=schedule, stages_per_rank=stages, replicate=replicate)
                trains = [
                    replace(config.train, microbatch_size=m, recompute=recompute)
                    for m in filter(_is_power, _divisors(share))
                ]
                variants = (replace(config, parallel=parallel, train=train) for train in trains)
                yield (v for v in variants if _is_candidate(v, world_size))


def _copies(mesh: ParallelConfig, num_data: int, machine: Machine) -> list[int]:
    """Whole sharding, sharding inside a node, none at all."""
    inside = max(machine.ranks_per_node // (mesh.tensor * mesh.context), 1)
    counts = {1, num_data // min(inside, num_data), num_data}
    return sorted(count for count in counts if num_data % count == 0)


def _is_candidate(config: Config, world_size: int) -> bool:
    if problems(config, world_size):
        return False
    layout = Layout(config, world_size)
    return layout.pipeline == 1 or layout.num_microbatches * len(layout.stages) <= MOST_PASSES


def _divisors(n: int, limit: int | None = None) -> list[int]:
    """The divisors of n, up to the limit."""
    return [d for d in range(1, min(n, limit or n) + 1) if n % d == 0]


def _is_power(n: int) -> bool:
    """Whether it is 1, 2, 4, …"""
    return n & (n - 1) == 0


def to_dict(found: Suggestion) -> dict[str, Any]:
    """A suggestion as plain data: its layout, bytes and seconds."""
    train = found.config.train
    return {
        "parallel": vars(found.config.parallel),
        "train": {"microbatch_size": train.microbatch_size, "recompute": train.recompute},
        "bytes": found.memory,
        "time": vars(found.time),
    }
