"""All that can be said about a run before it starts, from its configuration alone."""

from dataclasses import dataclass
from typing import Any

from megagrow.checks import problems
from megagrow.config import Config
from megagrow.errors import ConfigError
from megagrow.growth.bootstrap import bootstrapped
from megagrow.plan.activations import DeviceType
from megagrow.plan.communication import Traffic, traffic
from megagrow.plan.layout import Layout
from megagrow.plan.memory import RankMemory
from megagrow.plan.phases import Phase, phases
from megagrow.plan.schedule import Walk
from megagrow.plan.speed import Machine, StepTime, schedule_of, step_time
from megagrow.plan.weights import stage_unit


@dataclass(frozen=True)
class Plan:
    """A valid layout, worked out.

    Attributes:
        layout: the configuration on its ranks.
        phases: what the run goes through, in order.
        notes: what could not be planned.
        walk: one step of the schedule, stages weighing what their FLOPs are.
        traffic: what the ranks at each place of the pipeline send in a step of plain training.
        time: of such a step, by the model of speed.py.
        machine: what that model assumes.
    """

    layout: Layout
    phases: list[Phase]
    notes: list[str]
    walk: Walk
    traffic: list[list[Traffic]]
    time: StepTime
    machine: Machine

    @property
    def fullest(self) -> RankMemory:
        """The ranks that need most memory, in the phase in which they do."""
        return max((held for phase in self.phases for held in phase.memory), key=lambda held: held.total)


def make_plan(
    config: Config, world_size: int, machine: Machine | None = None, device: DeviceType = "cuda"
) -> Plan | list[str]:
    """The plan of a run on `world_size` ranks, or all rules that its layout breaks, each with its remedy.

    Raises:
        CheckpointError: a source or teacher that is there cannot be read.
        ConfigError: it does not go with the model.
    """
    try:
        config = bootstrapped(config)
    except ConfigError as error:
        return [str(error)]
    broken = problems(config, world_size)
    if broken:
        return broken
    layout, machine = Layout(config, world_size), machine or Machine()
    found, notes = phases(layout, device)
    if config.train.compile:
        notes.append(
            "train.compile lets the compiler choose what blocks keep: the memory here is that of uncompiled ones"
        )
    sent = [traffic(layout, rank) for rank in range(layout.pipeline)]
    return Plan(layout, found, notes, schedule_of(layout), sent, step_time(layout, machine), machine)


def to_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain data: bytes, FLOPs, seconds."""
    return {
        "world_size": plan.layout.world_size,
        "mesh": mesh_sizes(plan.layout),
        "microbatch": {"samples": plan.layout.microbatch, "per_step": plan.layout.num_microbatches},
        "bubble": plan.walk.bubble,
        "idle": plan.walk.idle,
        "phases": [_phase(phase) for phase in plan.phases],
        "stages": [
            {
                "stage": stage.index,
                "pipeline_rank": stage.rank,
                "layers": list(stage.layers),
                "parameters": stage_unit(plan.layout, stage).stored,
            }
            for stage in plan.layout.stages
        ],
        "communication": [[vars(entry) for entry in entries] for entries in plan.traffic],
        "time": vars(plan.time),
        "machine": vars(plan.machine),
        "notes": plan.notes,
    }


def mesh_sizes(layout: Layout) -> dict[str, int]:
    """Ranks along each axis; data = replicate · shard / context."""
    return {name: getattr(layout, name) for name in ("pipeline", "data", "context", "tensor", "replicate", "shard")}


def _phase(phase: Phase) -> dict[str, Any]:
    return {
        "name": phase.name,
        "frozen_layers": phase.frozen_layers,
        "steps": phase.steps,
        "flops_per_step": phase.flops,
        "flops": phase.total_flops,
        "ranks": [_rank(held) for held in phase.memory],
    }


def _rank(held: RankMemory) -> dict[str, Any]:
    return {
        "pipeline_rank": held.rank,
        "stages": [stage.index for stage in held.stages],
        "parameters": held.parameters,
        "bytes": dict(held.parts),
        "total_bytes": held.total,
        "fullest_moment": held.moment,
        "microbatches_in_flight": list(held.in_flight),
        "host_bytes": dict(held.host),
    }
