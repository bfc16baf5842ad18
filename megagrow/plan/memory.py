"""The fullest moment of a training step on each pipeline rank, in bytes of live tensors.

A step is followed as its schedule runs it: how many microbatches of each stage wait for their backward passes, and,
for the one that runs, from the loss back to its first block. What counts are tensors that live at the same time, as
`torch.cuda.max_memory_allocated` counts them; what a CUDA context, NCCL and fragmentation take comes on top.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from megagrow.config import ModelConfig
from megagrow.parallel.stages import Stage
from megagrow.plan import activations
from megagrow.plan.activations import BlockCost, Cached, DeviceType, Loss
from megagrow.plan.layout import Layout
from megagrow.plan.schedule import GATHERED_STAGES, Held, peaks
from megagrow.plan.weights import Unit, block_unit, learning_unit, other_unit, rank_unit, trained_elements

Parts = Counter[str]  # bytes by what they are for

PARAMETER, MOMENTS = 4, 8  # bytes per stored element: float32, and two moments of AdamW
GRADIENT = 4
BATCH = 28  # bytes per token of a step's batch: ids and labels as int64, weights as float32, and the samples themselves


@dataclass(frozen=True)
class Extra:
    """What a phase of a run changes about plain training.

    Attributes:
        static: bytes that are there all the time, by what they are for, for each pipeline rank.
        has_moments: whether the optimizer keeps moments of this model.
        teacher: the model that teaches, whose logits the loss computes too.
        frozen_layers: of the model, from the first one on, that have a forward pass only, as what is below them has.
        cached: what one that is not there has left behind.
    """

    static: dict[int, Parts] = field(default_factory=dict)
    has_moments: bool = True
    teacher: ModelConfig | None = None
    frozen_layers: int = 0
    cached: Cached | None = None


@dataclass(frozen=True)
class RankMemory:
    """Memory of the ranks at one place of the pipeline, at the fullest moment of a step.

    Attributes:
        rank: the place.
        stages: what it holds of the model.
        parameters: elements of the parameters that a rank stores.
        parts: bytes by what they are for.
        moment: when that is.
        in_flight: microbatches that wait for their backward pass then, for each of the stages.
        host: bytes in host memory, by what they are for.
    """

    rank: int
    stages: list[Stage]
    parameters: int
    parts: Parts
    moment: str
    in_flight: tuple[int, ...]
    host: Parts

    @property
    def total(self) -> int:
        """Bytes of device memory."""
        return self.parts.total()


@dataclass(frozen=True)
class _StageCost:
    """What a microbatch costs one stage, in bytes; worked out once per layout.

    Attributes:
        block, other: parameters of a block, and those outside of blocks.
        learning_layers, learning_other: what of the stage's layers, and of `other`, has a backward pass.
        cost: of a block.
        before_loss: what the blocks and the final norm keep.
        loss: of the last stage.
        embedding: the embedding's dense gradient, on the first stage.
    """

    stage: Stage
    block: Unit
    other: Unit
    learning_layers: list[int]
    learning_other: Unit
    cost: BlockCost
    before_loss: int
    loss: Loss | None
    embedding: int

    @property
    def all(self) -> Unit:
        """All parameters of the stage."""
        return self.block * len(self.stage.layers) + self.other

    @property
    def learning(self) -> Unit:
        """All parameters of the stage that get gradients."""
        return self.block * len(self.learning_layers) + self.learning_other

    @property
    def kept(self) -> int:
        """From the forward to the backward pass."""
        return self.before_loss + (self.loss.kept if self.loss else 0)

    @property
    def deferred(self) -> int:
        """Between the halves of a backward pass; torch leaves the first stage's whole to the second half."""
        return 0 if self.stage.is_first else len(self.stage.layers) * self.cost.deferred


def step_memory(layout: Layout, device: DeviceType = "cuda", extra: Extra | None = None) -> list[RankMemory]:
    """The fullest moment of a training step, for each pipeline rank."""
    extra, parallel = extra or Extra(), layout.config.parallel
    states = peaks(parallel.schedule, layout.pipeline, parallel.local_stages, layout.num_microbatches)
    block = activations.block_cost(layout, device)
    costs: dict[int, list[_StageCost]] = {}
    for stage in layout.stages:
        costs.setdefault(stage.rank, []).append(_stage_cost(layout, stage, block, device, extra))
    return [_rank_memory(layout, rank, costs[rank], extra, states[rank]) for rank in range(layout.pipeline)]


def _stage_cost(layout: Layout, stage: Stage, block: BlockCost, device: DeviceType, extra: Extra) -> _StageCost:
    frozen = extra.frozen_layers
    head_learns = not (frozen and layout.model.tied_embeddings)
    return _StageCost(
        stage=stage,
        block=block_unit(layout),
        other=other_unit(layout, stage),
        learning_layers=[layer for layer in stage.layers if layer >= frozen],
        learning_other=learning_unit(layout, stage, frozen),
        cost=block,
        before_loss=activations.kept_by_stage(layout, stage, block, device, frozen),
        loss=activations.loss(layout, device, extra.teacher, head_learns, extra.cached) if stage.is_last else None,
        embedding=activations.embedding_gradient(layout) if stage.is_first and not frozen else 0,
    )


def _rank_memory(
    layout: Layout, rank: int, costs: list[_StageCost], extra: Extra, states: tuple[tuple[Held, ...], ...]
) -> RankMemory:
    stages = [cost.stage for cost in costs]
    stored, trained = rank_unit(layout, rank).stored, trained_elements(layout, rank)
    static, host = Parts(parameters=PARAMETER * stored), Parts()
    if extra.has_moments and layout.config.optim.offload:
        host = Parts({"moments": MOMENTS * trained, "weights": PARAMETER * trained, "gradients": GRADIENT * trained})
    elif extra.has_moments:
        static["moments"] = MOMENTS * trained
    if extra.has_moments and layout.config.checkpoint.asynchronous:
        host["copy for the checkpoint"] = PARAMETER * stored + MOMENTS * trained
    static["batch"] = BATCH * layout.tokens * layout.num_microbatches + activations.tables(layout)
    static += _buffers(layout, stages) + _gathered(layout, costs) + extra.static.get(rank, Parts())
    parts, name, in_flight = _fullest(layout, costs, states)
    return RankMemory(rank, stages, stored, static + parts, name, in_flight, host)


def _fullest(
    layout: Layout, costs: list[_StageCost], states: tuple[tuple[Held, ...], ...]
) -> tuple[Parts, str, tuple[int, ...]]:
    """The fullest moment of a microbatch of any stage, beside all that the rank's other microbatches hold."""
    fullest = {
        (i, accumulates): max(_passes(layout, cost, accumulates), key=lambda moment: moment[1].total())
        for i, cost in enumerate(costs)
        for accumulates in (False, True)
    }
    sizes = {key: parts.total() for key, (_, parts) in fullest.items()}
    kept, deferred = [cost.kept for cost in costs], [cost.deferred for cost in costs]
    all_gradients = [_gradients(layout, cost.learning) for cost in costs]
    most, best = -1, (0, states[0], 0, 0)
    for state in states:
        held = sum((h.whole + h.halved) * k + h.halved * d for h, k, d in zip(state, kept, deferred, strict=True))
        gradients = sum(g for h, g in zip(state, all_gradients, strict=True) if h.has_gradients)
        for i, (whole, _, accumulates) in enumerate(state):
            others = (held - kept[i], gradients - all_gradients[i] * accumulates)
            total = sum(others) + sizes[i, accumulates]
            if whole and total > most:
                most, best = total, (i, state, *others)
    i, state, held, gradients = best
    name, parts = fullest[i, state[i].has_gradients]
    place = f", stage {costs[i].stage.index}" if layout.pipeline > 1 else ""
    in_flight = tuple(h.whole + h.halved for h in state)
    return parts + Parts(activations=held, gradients=gradients), name + place, in_flight


def _buffers(layout: Layout, stages: list[Stage]) -> Parts:
    """What torch's stages receive into: a buffer for each microbatch, all of them there from the first step on.

    Schedules of several stages also hold on to all that they have sent until the step is over. Evaluation has stages of
    its own, with buffers that stay.
    """
    if layout.pipeline == 1:
        return Parts()
    own = {stage.index for stage in stages}
    received = sum((not stage.is_first) + (not stage.is_last) for stage in stages)
    sent = sum(
        (not stage.is_last and stage.index + 1 not in own) + (not stage.is_first and stage.index - 1 not in own)
        for stage in stages
    )
    evaluates = bool(layout.config.data.validation or layout.config.data.split)
    kept = received + (sent if layout.config.parallel.local_stages > 1 else 0) + (received if evaluates else 0)
    return Parts({"pipeline buffers": kept * layout.num_microbatches * layout.activation})


def _gathered(layout: Layout, costs: list[_StageCost]) -> Parts:
    """Parameters that FSDP2 keeps gathered all through a step of a pipeline."""
    if layout.pipeline == 1 or not layout.uses_fsdp:
        return Parts()
    sizes = sorted((cost.all.gathered for cost in costs), reverse=True)
    return Parts({"gathered parameters": layout.gathered_width * sum(sizes[:GATHERED_STAGES])})


def _passes(layout: Layout, cost: _StageCost, accumulates: bool) -> Iterator[tuple[str, Parts]]:
    """One microbatch of a stage from its loss back to its embedding, everything that is its own counted.

    Where layers are frozen, back to the first that learns; their forward pass matters where a stage has no others.
    """
    num_blocks, kept = len(cost.learning_layers), cost.before_loss
    before = _gradients(layout, cost.learning) if accumulates else 0
    after_loss = _gradients(layout, cost.learning_other) if cost.loss else 0
    if num_blocks < len(cost.stage.layers):
        yield f"forward pass of block {cost.stage.layers[0]}", Parts(working=cost.cost.forward, gradients=before)
    if cost.loss:
        root = _root(layout, cost.other)
        yield "loss", Parts(activations=kept, loss=cost.loss.forward, gradients=before) + root
        yield "backward pass of the loss", Parts(activations=kept, loss=cost.loss.backward, gradients=before) + root
    for place in sorted({num_blocks - 1, num_blocks - 2, 0}):
        if not 0 <= place < num_blocks:
            continue
        later = num_blocks - 1 - place
        gradients = before or after_loss + later * _gradients(layout, cost.block)
        parts = Parts(activations=kept - later * cost.cost.kept, working=cost.cost.working, gradients=gradients)
        name = f"backward pass of block {cost.learning_layers[place]}"
        yield name, parts + _around_block(layout, cost, has_later=later > 0)
    added = accumulates or (layout.model.tied_embeddings and cost.stage.is_last)
    parts = Parts(gradients=_gradients(layout, cost.learning), working=cost.embedding * added)
    yield "end of the backward pass", parts + _root(layout, cost.other)


def _gradients(layout: Layout, unit: Unit) -> int:
    """Of parameters whose backward pass is over: their pieces, or the whole while microbatches are still summed up."""
    accumulates = layout.pipeline > 1 or layout.num_microbatches > 1
    return GRADIENT * (unit.gathered if layout.uses_fsdp and accumulates else unit.stored)


def _root(layout: Layout, other: Unit) -> Parts:
    """What FSDP2 has gathered while nothing but the parameters outside of the blocks is in use, without a pipeline."""
    if layout.pipeline > 1 or not layout.uses_fsdp:
        return Parts()
    return Parts({"gathered parameters": layout.gathered_width * other.gathered})


def _around_block(layout: Layout, cost: _StageCost, has_later: bool) -> Parts:
    """What FSDP2 has gathered during the backward pass of a block, without a pipeline.

    That is the block, the next one, which is fetched early, and the gradients of the one before on their way out.
    """
    if layout.pipeline > 1 or not layout.uses_fsdp:
        return Parts()
    gathered = layout.gathered_width * (cost.other.gathered + 2 * cost.block.gathered)
    return Parts({"gathered parameters": gathered, "gathered gradients": GRADIENT * cost.block.gathered * has_later})
