"""Walks through a pipeline schedule without running it: how long ranks idle, and how much each holds at most.

The order of actions is that of the tables of the installed torch, so the walk follows what it would run. An action
starts when its rank is free and what it reads has been computed; sending takes no time.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, cast

import torch
from torch.distributed.pipelining.schedules import _add_unshard_reshard, get_schedule_class

from megagrow.config import V_SCHEDULES

Kind = Literal["F", "B", "I", "W"]  # forward, full backward, its gradients of inputs alone, those of weights alone

GATHERED_STAGES = 3  # of a rank that torch's schedules keep gathered at a time


class Action(NamedTuple):
    """One microbatch through one stage, in one direction."""

    kind: Kind
    stage: int
    microbatch: int


@dataclass(frozen=True)
class StageTimes:
    """How long one microbatch takes a stage, in any unit; a full backward pass takes `inputs + weights`."""

    forward: float
    inputs: float
    weights: float


class Held(NamedTuple):
    """What a rank keeps of one of its stages at some moment.

    Attributes:
        whole: microbatches that have gone forward, not yet backward.
        halved: microbatches whose gradients of inputs are done and those of weights are not.
        has_gradients: whether any gradient of the stage's weights exists yet.
    """

    whole: int
    halved: int
    has_gradients: bool


@dataclass(frozen=True)
class Walk:
    """How long a step takes.

    Attributes:
        seconds: from the first action of any rank to the last, in the unit of the stage times.
        busy: time that each rank spends on actions.
    """

    seconds: float
    busy: tuple[float, ...]

    @property
    def bubble(self) -> float:
        """Share of the step that the busiest rank idles."""
        return 1 - max(self.busy) / self.seconds

    @property
    def idle(self) -> float:
        """Share of the step that ranks idle in the mean: the bubble, and waiting for ranks that have more to do."""
        return 1 - sum(self.busy) / len(self.busy) / self.seconds


def rank_stages(schedule: str, pipeline: int, stages_per_rank: int) -> tuple[tuple[int, ...], ...]:
    """The stages of each pipeline rank: round and round, or there and back for V-shaped schedules."""
    if schedule in V_SCHEDULES:
        return tuple((rank, 2 * pipeline - 1 - rank) for rank in range(pipeline))
    return tuple(tuple(range(rank, pipeline * stages_per_rank, pipeline)) for rank in range(pipeline))


@lru_cache(maxsize=256)
def actions(
    schedule: str, pipeline: int, stages_per_rank: int, num_microbatches: int
) -> tuple[tuple[Action, ...], ...]:
    """What each pipeline rank does in one step, in order."""
    if pipeline == 1:
        return (tuple(Action(kind, 0, i) for i in range(num_microbatches) for kind in ("F", "B")),)
    if schedule == "1F1B":
        return tuple(_one_forward_one_backward(rank, pipeline, num_microbatches) for rank in range(pipeline))
    table = _torch_table(schedule, pipeline, stages_per_rank, num_microbatches)
    return tuple(tuple(a for entry in table[rank] for a in _parts(entry)) for rank in range(pipeline))


@lru_cache(maxsize=256)
def gatherings(schedule: str, pipeline: int, stages_per_rank: int, num_microbatches: int) -> tuple[int, ...]:
    """How often torch gathers each stage's parameters in one step: it keeps three stages of a rank gathered at most."""
    if stages_per_rank <= GATHERED_STAGES:
        return (1,) * (pipeline * stages_per_rank)
    table = _torch_table(schedule, pipeline, stages_per_rank, num_microbatches)
    counts = Counter(
        action.stage_index
        for own in table.values()
        for action in _add_unshard_reshard(own, GATHERED_STAGES)
        if action.computation_type.value == "UNSHARD"
    )
    return tuple(counts[stage] for stage in range(pipeline * stages_per_rank))


def walk(
    schedule: str, pipeline: int, stages_per_rank: int, num_microbatches: int, times: Sequence[StageTimes]
) -> Walk:
    """Times one step.

    Args:
        schedule: a name of `config.Schedule`; ignored with one pipeline rank.
        pipeline, stages_per_rank, num_microbatches: as configured; they must have passed `checks`.
        times: of each stage.
    """
    return _walk(schedule, pipeline, stages_per_rank, num_microbatches, tuple(times))


@lru_cache(maxsize=1024)
def _walk(
    schedule: str, pipeline: int, stages_per_rank: int, num_microbatches: int, times: tuple[StageTimes, ...]
) -> Walk:
    order = actions(schedule, pipeline, stages_per_rank, num_microbatches)
    busy = tuple(sum(_duration(action, times) for action in own) for own in order)
    return Walk(max(_end_times(order, times)), busy)


@lru_cache(maxsize=256)
def peaks(
    schedule: str, pipeline: int, stages_per_rank: int, num_microbatches: int
) -> tuple[tuple[tuple[Held, ...], ...], ...]:
    """For each rank the moments at which it holds most: one `Held` per stage, in the order of `rank_stages`.

    No moment of the step exceeds all of them in any number.
    """
    order = actions(schedule, pipeline, stages_per_rank, num_microbatches)
    stages = rank_stages(schedule, pipeline, stages_per_rank)
    return tuple(_peaks(own, held) for own, held in zip(order, stages, strict=True))


def _end_times(order: tuple[tuple[Action, ...], ...], times: tuple[StageTimes, ...]) -> list[float]:
    """When each rank has finished its last action."""
    done: dict[tuple[bool, int, int], float] = {}  # (forward?, stage, microbatch) -> time
    free, position, last = [0.0] * len(order), [0] * len(order), len(times) - 1
    moved = True
    while moved:
        moved = False
        for rank, own in enumerate(order):
            while position[rank] < len(own):
                action = own[position[rank]]
                needed = _needed(action, last)
                if needed is not None and needed not in done:
                    break
                start = max(free[rank], done[needed]) if needed else free[rank]
                free[rank] = start + _duration(action, times)
                if action.kind != "W":
                    done[action.kind == "F", action.stage, action.microbatch] = free[rank]
                position[rank] += 1
                moved = True
    assert all(at == len(own) for at, own in zip(position, order, strict=True)), "the schedule's table deadlocks"
    return free


def _needed(action: Action, last: int) -> tuple[bool, int, int] | None:
    """What another stage must have computed before: the input of a forward pass, the gradient for a backward one."""
    kind, stage, microbatch = action
    if kind == "F":
        return (True, stage - 1, microbatch) if stage > 0 else None
    return (False, stage + 1, microbatch) if kind != "W" and stage < last else None


def _duration(action: Action, times: tuple[StageTimes, ...]) -> float:
    stage = times[action.stage]
    if action.kind == "F":
        return stage.forward
    if action.kind == "B":
        return stage.inputs + stage.weights
    if action.stage == 0:  # it passes no gradient on; torch leaves its whole backward pass to W
        return stage.inputs + stage.weights if action.kind == "W" else 0.0
    return stage.inputs if action.kind == "I" else stage.weights


def _peaks(own: tuple[Action, ...], stages: tuple[int, ...]) -> tuple[tuple[Held, ...], ...]:
    """The states that no other state of the rank exceeds in every number."""
    index, now = {stage: i for i, stage in enumerate(stages)}, [Held(0, 0, False)] * len(stages)
    found, seen = list[tuple[Held, ...]](), set[tuple[Held, ...]]()
    for kind, stage, _ in own:
        i = index[stage]
        whole, halved, has_gradients = now[i]
        if kind == "F":
            now[i] = Held(whole + 1, halved, has_gradients)
        elif kind == "I":
            now[i] = Held(whole - 1, halved + 1, has_gradients)
        else:
            now[i] = Held(whole - (kind == "B"), halved - (kind == "W"), True)
        state = tuple(now)
        if kind in "BW" or state in seen:
            continue
        seen.add(state)
        if not any(_covers(other, state) for other in found):
            found = [other for other in found if not _covers(state, other)] + [state]
    return tuple(found)


def _covers(one: tuple[Held, ...], other: tuple[Held, ...]) -> bool:
    """Whether no number of `other` is larger."""
    return all(a >= b for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def _one_forward_one_backward(rank: int, pipeline: int, num_microbatches: int) -> tuple[Action, ...]:
    """As `Schedule1F1B` runs it; the table that torch 2.13 has for it misnumbers the last rank's forward passes."""
    ahead = min(pipeline - rank, num_microbatches)
    order = [Action("F", rank, i) for i in range(ahead)]
    for i in range(num_microbatches):
        order.append(Action("B", rank, i))
        if ahead + i < num_microbatches:
            order.append(Action("F", rank, ahead + i))
    return tuple(order)


def _torch_table(schedule: str, pipeline: int, stages_per_rank: int, num_microbatches: int) -> dict[int, list[Any]]:
    """Rank -> torch's actions (None: a slot that it leaves idle), built for stages that compute nothing."""
    kind = get_schedule_class(schedule)
    # Planning needs the order of computing alone; the sends and receives that torch puts in between take long to place.
    planned = type(kind.__name__, (kind,), {"_prepare_schedule_with_comms": lambda *_: None})
    num_stages, nothing = pipeline * stages_per_rank, torch.nn.Module()
    stages = [
        SimpleNamespace(group_size=pipeline, group_rank=0, num_stages=num_stages, stage_index=index, submod=nothing)
        for index in rank_stages(schedule, pipeline, stages_per_rank)[0]
    ]
    table: dict[int, list[Any]] = planned(stages, num_microbatches).pipeline_order
    return table


def _parts(entry: Any) -> list[Action]:
    """The actions of one entry; a forward and a backward pass that torch puts side by side run one after the other."""
    if entry is None:
        return []
    if entry.sub_actions is not None:
        return [part for sub in entry.sub_actions for part in _parts(sub)]
    return [Action(cast(Kind, entry.computation_type.value), entry.stage_index, entry.microbatch_index)]
