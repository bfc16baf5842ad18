"""Every layout trains the same model: each gradient, and the weights after updates, against one process.

A part of the table that `make parity` makes, after fewer updates; layouts.py lists all of it.
"""

import itertools
from dataclasses import dataclass, replace
from typing import get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megagrow.config import Config, ModelConfig, ParallelConfig, Schedule
from megagrow.parallel.mesh import Mesh, make_mesh
from megagrow.parallel.shards import local
from megagrow.train.part import build_part, initialize_part
from tests.parallel.layouts import BERT, BY_NAME, GPT2, LAYOUTS, LLAMA, QWEN, Layout, make_layout
from tests.parallel.parity import (
    GRADIENT_BOUND,
    WEIGHT_BOUND,
    compare,
    gradient_errors,
    local_batch,
    make_counts,
    one_process,
    parity,
    token_counts,
    train,
    train_rank,
)
from tests.ranks import run_ranks

NUM_UPDATES = 3  # an optimizer that treats a shard differently shows at once; `make parity` makes 20
SEQUENCE = "tensor 2 (sequence parallel)"
CHOSEN = [
    "tensor 2 x replicate 2",
    "tensor 2 x pipeline 2 (InterleavedZeroBubble)",
    "context 2 x replicate 2",
    "pipeline 2 (1F1B) x replicate 2",
    "replicate 2 x shard 2",
    "pipeline 2 (Interleaved1F1B) x shard 2",
    "pipeline 2 (DualPipeV) x shard 2",
    f"{SEQUENCE} x pipeline 2 (ZBVZeroBubble) x shard 2, tied embeddings",
    "tensor 2 x pipeline 2 (1F1B) x shard 2, odd vocabulary",
    "tensor 2 x pipeline 2 (1F1B) x shard 2, full recompute",
    f"{SEQUENCE} x pipeline 2 (1F1B) x shard 2, dropout",
    "pipeline 3 (1F1B) x shard 2, uneven stages, tied embeddings",
    f"{SEQUENCE} x context 2 x shard 2, documents",
    "context 2 x pipeline 2 (ZBVZeroBubble) x shard 2, documents",
    "tensor 2 x pipeline 2 (1F1B) x shard 2, label smoothing, z-loss",
    "tensor 4 (sequence parallel) x replicate 2, replicated key/value heads with norms",
    "tensor 4, ranks without vocabulary, tied",
    "context 2 x pipeline 2 (1F1B) x shard 2, biases (GPT-2)",
    f"{SEQUENCE} x pipeline 2 (1F1B) x shard 2, GPT-NeoX",
    f"{SEQUENCE} x pipeline 2 (ZBVZeroBubble) x shard 2, BERT",
]
# The same arithmetic but for reductions: of each axis, and of each family.
CHOSEN_IN_FLOAT32 = [
    "context 2 x replicate 2",
    "replicate 2 x shard 2",
    "pipeline 3 (1F1B) x shard 2, uneven stages, tied embeddings",
    f"{SEQUENCE} x context 2 x shard 2, documents",
    "tensor 4, ranks without vocabulary, tied",
    "tensor 2 (sequence parallel) x pipeline 2 (Interleaved1F1B), GPT-NeoX",
    "tensor 2 (sequence parallel), BERT",
]


@pytest.mark.parametrize("name", CHOSEN)
def test_layout_equals_one_process(name: str) -> None:
    errors = parity(BY_NAME[name], torch.float64, NUM_UPDATES)
    assert errors.gradient.value <= GRADIENT_BOUND[torch.float64], errors.gradient
    assert errors.weight.value <= WEIGHT_BOUND, errors.weight


@pytest.mark.parametrize("name", CHOSEN_IN_FLOAT32)
def test_layout_equals_one_process_in_float32(name: str) -> None:
    """One update; float32 takes another path through FSDP's reduction than float64."""
    errors = parity(BY_NAME[name], torch.float32, num_updates=1)
    assert errors.gradient.value <= GRADIENT_BOUND[torch.float32], errors.gradient


def test_layouts_are_many_and_different() -> None:
    assert len({(layout.ranks, layout.config) for layout in LAYOUTS}) == len(BY_NAME) == len(LAYOUTS) >= 30
    assert max(layout.ranks for layout in LAYOUTS) == 8
    assert len(set(CHOSEN)) >= 10


AXES = ("tensor", "context", "pipeline", "replicate", "shard")


def test_chosen_layouts_have_each_pair_of_axes_each_schedule_and_each_option() -> None:
    chosen = [BY_NAME[name] for name in CHOSEN]
    for pair in itertools.combinations(AXES, 2):
        assert any(set(pair) <= set(layout.axes) for layout in chosen), pair
    assert {layout.config.parallel.schedule for layout in chosen} == set(get_args(Schedule))
    assert {layout.config.model.family for layout in chosen} >= {"llama", "gpt2", "qwen3", "gpt_neox", "bert"}
    trains = [layout.config.train for layout in chosen]
    assert any(train.dropout for train in trains) and any(train.recompute == "full" for train in trains)
    assert any(layout.config.data.mask_documents for layout in chosen)
    assert {axis for name in CHOSEN_IN_FLOAT32 for axis in BY_NAME[name].axes} == set(AXES)


def test_layouts_have_each_axis_alone_each_pair_and_each_schedule() -> None:
    combined = {frozenset(layout.axes) for layout in LAYOUTS}
    with_sequence_parallel = {frozenset(layout.axes) for layout in LAYOUTS if layout.config.parallel.sequence_parallel}
    for axis, other in itertools.combinations(AXES, 2):
        assert {frozenset({axis}), frozenset({other}), frozenset({axis, other})} <= combined
        assert axis != "tensor" or {frozenset({axis}), frozenset({axis, other})} <= with_sequence_parallel
    for axis in ("tensor", "shard"):
        with_axis = {layout.config.parallel.schedule for layout in LAYOUTS if set(layout.axes) == {axis, "pipeline"}}
        assert with_axis == set(get_args(Schedule))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_no_two_ranks_or_microbatches_have_equally_many_tokens_that_count(layout: Layout) -> None:
    counts = token_counts(layout)
    totals = [sum(of_rank) for of_rank in counts]
    assert len(set(totals)) == len(totals), totals
    assert len(counts[0]) > 1
    assert all(len(set(of_rank)) == len(of_rank) for of_rank in counts), counts


def test_encoders_are_to_predict_the_tokens_that_count() -> None:
    """So that their number, which the loss is divided by, differs between ranks and microbatches too."""
    batch = local_batch(make_layout(1, model=BERT).config, Mesh.single(), torch.float64, 0)
    assert torch.equal(batch.weights > 0, make_counts() > 0)
    assert float(batch.weights.sum()) == pytest.approx(1, abs=1e-5)
    assert 0.5 < float((batch.ids != batch.labels)[batch.weights > 0].double().mean()) < 1


@dataclass(frozen=True)
class Facts:
    """What a rank really does in one step of a layout.

    Attributes:
        schedule: class of the pipeline's schedule; "" without a pipeline.
        layers: of each stage of the rank.
        lengths: tokens of a sample that a norm of a block sees.
        block_runs: forward passes of a block in one step.
        stored: share of `layers.1.mlp.down.weight` that the rank keeps; 0 where another stage has it.
    """

    schedule: str
    layers: list[list[int]]
    lengths: set[int]
    block_runs: float
    stored: float


def facts(config: Config) -> Facts:
    mesh = make_mesh(config.parallel)
    part = build_part(config.model, config, mesh)
    initialize_part(part, seed=3)
    seen: list[int] = []
    blocks = [block for stage in part.stages for block in stage.layers.values()]
    for block in blocks:
        block.attention_norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    part.engine.train_step(local_batch(config, mesh, torch.float32, 0))
    weight = part.parameters.get("layers.1.mlp.down.weight")
    return Facts(
        schedule=type(part.engine.schedule).__name__ if part.engine.schedule else "",
        layers=[[int(name) for name in stage.layers] for stage in part.stages],
        lengths=set(seen),
        block_runs=len(seen) / max(len(blocks), 1),
        stored=0.0 if weight is None else local(weight).numel() / weight.numel(),
    )


def facts_of(name: str) -> list[Facts]:
    return run_ranks(facts, BY_NAME[name].ranks, BY_NAME[name].config)


def test_a_pipeline_runs_its_schedule_on_its_stages() -> None:
    """A layout that fell back to a simpler one would be exact too."""
    found = facts_of("pipeline 4 (DualPipeV)")
    assert [f.layers for f in found] == [[[], []], [[0], [5]], [[1], [4]], [[2], [3]]]
    assert {f.schedule for f in found} == {"ScheduleDualPipeV"}
    assert {f.block_runs for f in found[1:]} == {8}
    found = facts_of("pipeline 3 (1F1B) x shard 2, uneven stages, tied embeddings")
    assert [f.layers for f in found[::2]] == [[[0]], [[1, 2]], [[3]]]


def test_sequences_and_parameters_are_cut_over_their_axes() -> None:
    found = facts_of(f"{SEQUENCE} x context 2 x shard 2, documents")
    assert all(f.lengths == {16 // 2 // 2} and f.stored == 1 / 2 / 4 for f in found)
    found = facts_of("tensor 2 x replicate 2 x shard 2")
    assert all(f.lengths == {16} and f.stored == 1 / 2 / 2 for f in found)
    assert all(f.stored == 1 for f in facts_of("replicate 2"))


def test_full_recompute_runs_every_block_twice() -> None:
    assert {f.block_runs for f in facts_of("tensor 2 x pipeline 2 (1F1B) x shard 2")} == {4}
    assert {f.block_runs for f in facts_of("tensor 2 x pipeline 2 (1F1B) x shard 2, full recompute")} == {8}


@pytest.mark.parametrize("option", ["dropout", "documents"])
def test_options_change_the_training(option: str) -> None:
    """Else a layout that ignores them would equal one process that ignores them."""
    plain = one_process(make_layout(1).one_process, torch.float64, NUM_UPDATES)
    changed = next(layout for layout in LAYOUTS if layout.name.endswith(f" x pipeline 2 (1F1B) x shard 2, {option}"))
    other = one_process(changed.one_process, torch.float64, NUM_UPDATES)
    assert (plain.losses - other.losses).abs().min() > 1e-6


def test_both_dtypes_train_the_same() -> None:
    """Each layout is compared with one process of its own dtype; those two differ by float32's rounding alone."""
    config = BY_NAME["shard 2"].one_process
    wide, narrow = one_process(config, torch.float64, NUM_UPDATES), one_process(config, torch.float32, 1)
    assert 1e-8 < max(gradient_errors([narrow], wide).values()) < GRADIENT_BOUND[torch.float32]


def bf16_sums(config: Config) -> Tensor:
    mesh = make_mesh(config.parallel) if dist.is_initialized() else Mesh.single()
    part = build_part(config.model, config, mesh)
    initialize_part(part, seed=3)
    return part.engine.evaluate(local_batch(config, mesh, torch.float32, 0))


def test_bf16_rounds_activations_but_not_the_weights_of_tokens() -> None:
    """1 / 129 in bfloat16 is 6e-5 off, and so would be the loss."""
    layout = make_layout(2, train={"precision": "bf16"})
    expected = bf16_sums(layout.one_process)
    for found in run_ranks(bf16_sums, 2, layout.config):
        assert torch.allclose(found, expected, rtol=1e-5), (found - expected) / expected


def test_microbatches_do_not_change_the_step() -> None:
    config = make_layout(1, microbatches=16).config
    whole = replace(config, train=replace(config.train, microbatch_size=0))
    errors = compare([train(config, Mesh.single(), torch.float64, 2)], one_process(whole, torch.float64, 2))
    assert max(errors.gradient, errors.weight).value < 1e-10, errors


@pytest.mark.parametrize("model", [LLAMA, GPT2, QWEN], ids=lambda model: model.family)
def test_initial_weights_depend_on_the_name_alone(model: ModelConfig) -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        config = Config(model=model, parallel=ParallelConfig())
        part = build_part(model, config, Mesh.single())
        initialize_part(part, seed)
        return part.tensors()

    first, again, other = weights(5), weights(5), weights(6)
    down = "model.layers.{}.mlp.down.weight"
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first[down.format(0)], first[down.format(1)])
    assert not torch.equal(first[down.format(0)], other[down.format(0)])


def test_the_comparison_sees_another_training() -> None:
    layout = make_layout(2, "dropout", train={"dropout": 0.2})
    plain = replace(layout.config, train=replace(layout.config.train, dropout=0.0))
    found = run_ranks(train_rank, 2, plain, torch.float64, 1)
    assert compare(found, one_process(layout.one_process, torch.float64, 1)).gradient.value > 1e-3
