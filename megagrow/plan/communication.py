"""What each rank sends per optimizer step, by mesh axis.

A collective over k ranks is counted as rings send it: of n bytes, an all-gather or a reduce-scatter sends
(k − 1)/k · n, an all-reduce twice that. Scalars (loss, gradient norm) are left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megagrow.parallel.stages import Stage
from megagrow.plan.layout import AxisName, Layout
from megagrow.plan.schedule import gatherings
from megagrow.plan.weights import block_unit, other_unit, partial_elements, rank_unit, stored_elements
from megagrow.roles import TIED_EMBEDDING

REDUCED = 4  # bytes of an element in which gradients are summed


@dataclass(frozen=True)
class Traffic:
    """What one rank sends for one purpose.

    Attributes:
        axis: along which mesh axis.
        what: the purpose.
        sent: bytes per optimizer step.
    """

    axis: AxisName
    what: str
    sent: float


def traffic(layout: Layout, rank: int) -> list[Traffic]:
    """All that a rank of pipeline place `rank` sends in a step of plain training, tensor and data places being 0."""
    found = [*_tensor(layout, rank), *_context(layout, rank), *_pipeline(layout, rank), *data_traffic(layout, rank)]
    return [entry for entry in found if entry.sent > 0]


def all_reduce(num_bytes: float, ranks: int) -> float:
    """Bytes that each rank sends."""
    return 2 * all_gather(num_bytes, ranks)


def all_gather(num_bytes: float, ranks: int) -> float:
    """Bytes that each rank sends to give all ranks the `num_bytes` that they hold together, or to reduce-scatter so."""
    return num_bytes * (ranks - 1) / ranks


def _tensor(layout: Layout, rank: int) -> Iterator[Traffic]:
    stages, ranks, count = layout.rank_stages(rank), layout.tensor, layout.num_microbatches
    whole = layout.tokens * layout.model.hidden_size  # elements of a microbatch's residual stream
    layers = sum(len(stage.layers) for stage in stages)
    exchanges = sum(layer_exchanges(layout)) * layers  # in units of an all-gather or a reduce-scatter
    yield Traffic("tensor", "activations", count * exchanges * all_gather(whole * layout.width, ranks))
    if stages[0].is_first:
        rows = whole * _embedding_width(layout)
        yield Traffic("tensor", "embedding", count * all_reduce(rows, ranks))  # or a scatter, and a gather backward
    if stages[-1].is_last:
        yield Traffic("tensor", "hidden states of the loss", count * all_reduce(whole * layout.width, ranks))
        yield Traffic("tensor", "statistics of the loss", count * all_gather(3 * layout.tokens * 4 * ranks, ranks))
    shared = sum(partial_elements(layout, stage) for stage in stages)
    yield Traffic("tensor", "gradients of parameters that all tensor ranks hold", all_reduce(shared * REDUCED, ranks))


def layer_exchanges(layout: Layout) -> tuple[int, int]:
    """Gathers or scatters of whole activations over the tensor axis, in one layer's forward and backward pass.

    Attention and MLP each enter and leave a sharded region. Without sequence parallelism one all-reduce (two exchanges)
    leaves it in the forward and enters it in the backward pass; with it, a gather and a scatter take its place, and the
    backward pass gathers the input again. Recomputing repeats the forward pass up to the last product.
    """
    train, sequence = layout.config.train, layout.sequence_parallel
    forward = backward = 4
    if sequence and not layout.config.parallel.splits_backward:
        backward += 2
    if train.recompute == "full":
        last = 1 if sequence else 2
        backward += forward - (last if train.dropout == 0 else 0)
    elif train.recompute == "selective" and sequence:
        backward += 2  # results of sums are kept, gathered inputs are not
    return forward, backward


def _context(layout: Layout, rank: int) -> Iterator[Traffic]:
    layers = sum(len(stage.layers) for stage in layout.rank_stages(rank))
    sent = layout.num_microbatches * layers * keys_and_values(layout)
    yield Traffic("context", "keys and values", sent * (1 if layout.config.train.recompute == "none" else 2))
    yield Traffic("context", "gradients of keys and values", sent)


def keys_and_values(layout: Layout) -> float:
    """What gathering a layer's keys and values of one microbatch sends, for the heads of one tensor rank."""
    heads = max(layout.model.num_kv_heads // layout.tensor, 1)
    per_token = 2 * heads * layout.model.head_dim * layout.width
    return all_gather(per_token * layout.tokens * layout.context, layout.context)


def _pipeline(layout: Layout, rank: int) -> Iterator[Traffic]:
    if layout.pipeline == 1:
        return
    own = {stage.index for stage in layout.rank_stages(rank)}
    last = len(layout.stages) - 1
    forward = sum(index < last and index + 1 not in own for index in own)
    backward = sum(index > 0 and index - 1 not in own for index in own)
    sent = layout.num_microbatches * layout.activation
    yield Traffic("pipeline", "activations", forward * sent)
    yield Traffic("pipeline", "gradients of activations", backward * sent)
    if layout.model.tied_embeddings and (0 in own) != (last in own):
        yield Traffic("pipeline", "gradient of the tied embedding", stored_elements(layout, TIED_EMBEDDING) * REDUCED)


def data_traffic(layout: Layout, rank: int) -> Iterator[Traffic]:
    """What a rank sends over the data axes: FSDP2 cuts parameters over `shard`, copies stand along `replicate`."""
    if not layout.uses_fsdp:
        return
    shard, unit = layout.shard, rank_unit(layout, rank)
    gathered = sum(_gathered_elements(layout, stage) for stage in layout.rank_stages(rank))
    yield Traffic("shard", "parameters", all_gather(gathered * shard * layout.gathered_width, shard))
    yield Traffic("shard", "gradients", all_gather(unit.stored * shard * REDUCED, shard))
    yield Traffic("replicate", "gradients", all_reduce(unit.stored * REDUCED, layout.replicate))


def _gathered_elements(layout: Layout, stage: Stage) -> int:
    """Stored elements of a stage that are given to the others in a step.

    Without a pipeline a block is gathered for each forward and each backward pass of a microbatch, what stands outside
    of blocks once for both; with one, a stage whenever the schedule makes it ready.
    """
    other, parallel = other_unit(layout, stage).stored, layout.config.parallel
    blocks = len(stage.layers) * block_unit(layout).stored
    if layout.pipeline == 1:
        return layout.num_microbatches * (2 * blocks + other)
    times = gatherings(parallel.schedule, layout.pipeline, parallel.local_stages, layout.num_microbatches)
    return times[stage.index] * (blocks + other)


def _embedding_width(layout: Layout) -> int:
    """Bytes of an element of looked-up rows: gathered weights have the dtype of compute, stored ones float32."""
    return layout.gathered_width if layout.uses_fsdp else 4
