"""A small model and batch that the mesh cuts just as it cuts the user's: the same axes, ratios and remainders."""

import math
from dataclasses import replace

from megagrow.checks import check
from megagrow.config import Config, ModelConfig, ParallelConfig, min_microbatches
from megagrow.plan.layout import Layout

HIDDEN, FFN, VOCAB, TOKENS, HEAD_DIM = 64, 128, 128, 16, 16  # about what is left of each size
WIDEST = 512  # a hidden size that every shard rank has a row of, up to here
MOST_SAMPLES = 2048
MOST_LAYERS = 2  # per stage


def reduce(config: Config, world_size: int) -> Config:
    """The configuration with everything smaller but the layout; exact arithmetic, and nothing random.

    Args:
        config: has passed `checks.check` for these ranks.
        world_size: all ranks.
    """
    layout = Layout(config, world_size)
    counts = reduced_split(config.parallel, config.model.num_layers)
    parallel = replace(config.parallel, layers_per_stage=counts if config.parallel.layers_per_stage else ())
    length = reduced_length(layout)
    microbatch, count = reduced_batch(layout)
    train = replace(
        config.train,
        global_batch_size=layout.data * microbatch * count,
        microbatch_size=microbatch,
        precision="fp32",
        compile=False,
        attention="sdpa",
        dropout=0.0,
    )
    small = Config(
        model=reduced_model(layout, sum(counts), length),
        data=replace(config.data, seq_length=length, mask_documents=False),
        parallel=parallel,
        train=train,
    )
    check(small, world_size)
    return small


def reduced_model(layout: Layout, num_layers: int, length: int) -> ModelConfig:
    """The same kind of model; heads per rank and per key/value head stay one or more than one."""
    model, tensor = layout.model, layout.tensor
    if model.num_kv_heads < tensor:
        kv_heads, heads = model.num_kv_heads, tensor * min(model.num_heads // tensor, 2)
    else:
        kv_heads = tensor * min(model.num_kv_heads // tensor, 2)
        heads = kv_heads * min(model.queries_per_kv, 2)
    widest = layout.shard if layout.shard <= WIDEST else 1
    head_dim, fraction = model.head_dim, model.rope_fraction
    if head_dim > HEAD_DIM:  # the same share of it is rotated, in pairs
        head_dim, fraction = HEAD_DIM, max(2, int(HEAD_DIM * fraction) // 2 * 2) / HEAD_DIM
    return replace(
        model,
        vocab_size=shrink(model.vocab_size, VOCAB, tensor),
        hidden_size=shrink(model.hidden_size, HIDDEN, widest),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_fraction=fraction,
        ffn_size=shrink(model.ffn_size, FFN, tensor),
        max_seq_length=length,
    )


def shrink(size: int, least: int, parts: int) -> int:
    """A size of about `least` that leaves the remainder that `size` leaves when it is cut into `parts`."""
    return min(size, math.ceil(least / parts) * parts + size % parts)


def reduced_split(parallel: ParallelConfig, num_layers: int) -> tuple[int, ...]:
    """Few layers per stage; stages without any keep none, and longer stages stay longer."""
    split, stages = parallel.layers_per_stage, parallel.num_stages
    if split:
        least = min((count for count in split if count), default=1)
        return tuple(min(count - least + 1, MOST_LAYERS) if count else 0 for count in split)
    if stages == 1:
        return (min(num_layers, MOST_LAYERS),)
    # An even split follows from the sum alone: embedding and head weigh as a layer each.
    each, extra = divmod(num_layers + 2, stages)
    return (stages * min(each, MOST_LAYERS) + extra - 2,)


def reduced_length(layout: Layout) -> int:
    """Tokens of a sample: context ranks take two pieces each, tensor ranks cut what a rank has."""
    pieces = 2 * layout.context if layout.context > 1 else 1
    cuts = layout.context * layout.tensor if layout.sequence_parallel else 1
    unit = math.lcm(pieces, cuts)
    return min(math.ceil(TOKENS / unit) * unit, layout.config.data.seq_length)


def reduced_batch(layout: Layout) -> tuple[int, int]:
    """(samples of a microbatch, microbatches): accumulation, and a pipeline that is full for a while, if possible."""
    least = min_microbatches(layout.config.parallel)
    for samples, count in ((2, 2 * least), (1, 2 * least), (1, least + 1)):
        found = min(samples, layout.microbatch), min(count, layout.num_microbatches)
        if layout.data * math.prod(found) <= MOST_SAMPLES:
            break
    return found
