"""Tests ../../megagrow/plan/communication.py: by hand, and against every collective that a real step issues."""

from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

from megagrow.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
from megagrow.evaluate import make_batch
from megagrow.parallel.mesh import make_mesh
from megagrow.plan.communication import all_gather, all_reduce, traffic
from megagrow.plan.dry_run import fake_ranks
from megagrow.plan.layout import Layout
from megagrow.train.part import build_part, initialize_part
from tests.models import as_gpt2
from tests.ranks import run_ranks

LLAMA = ModelConfig(vocab_size=96, hidden_size=48, num_layers=3, num_heads=8, num_kv_heads=4, head_dim=8, ffn_size=64)
GPT2 = as_gpt2(LLAMA, num_layers=2, num_kv_heads=8, head_dim=6, max_seq_length=64)
SCALARS = 64  # bytes up to which a collective carries no more than sums of the loss


class SentBytes(TorchDispatchMode):
    """Adds up what rings send for every collective, by the size of its group."""

    def __init__(self) -> None:
        super().__init__()
        self.by_size: dict[int, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in COUNTED:
            self._count(COUNTED[name], result if name.startswith("_c10d_functional") else args, args)
        return result

    def _count(self, kind: str, tensors: Any, args: Any) -> None:
        names = [a for a in args if isinstance(a, str)]
        groups = [dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject) and "Group" in str(a)]
        size = (groups or [_resolve_process_group(names[-1])])[0].size()
        num_bytes = max(t.nbytes for t in _tensors([tensors, args]))
        if num_bytes > SCALARS:
            self.by_size[size] += RING[kind](num_bytes, size)


RING = {"reduce": all_reduce, "gather": all_gather, "send": lambda num_bytes, ranks: num_bytes}
COUNTED = {
    "c10d::send": "send",
    "c10d::allreduce_": "reduce",
    "c10d::_allgather_base_": "gather",
    "c10d::_reduce_scatter_base_": "gather",
    "_c10d_functional::all_reduce": "reduce",
    "_c10d_functional::all_gather_into_tensor": "gather",
    "_c10d_functional::reduce_scatter_tensor": "gather",
}


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, list | tuple) else []


def sent_in_a_step(config: Config) -> tuple[int, dict[int, float]]:
    """This rank's place in the pipeline, and what it sends in its second step, by the size of the group."""
    mesh = make_mesh(config.parallel)
    part = build_part(config.model, config, mesh)
    initialize_part(part, seed=0)
    samples = config.train.global_batch_size
    tokens = torch.randint(config.model.vocab_size, (samples // mesh.dp.size, config.data.seq_length + 1))
    part.engine.train_step(make_batch(tokens, samples, mesh))  # the first one also tells stages what to expect
    with SentBytes() as sent:
        part.engine.train_step(make_batch(tokens, samples, mesh))
    return mesh.pp.rank, dict(sent.by_size)


def planned(layout: Layout, rank: int) -> dict[int, float]:
    """What the plan says, by the size of the axis; axes of equal size are added up."""
    sizes = {**vars(layout.config.parallel), "shard": layout.shard}
    found: dict[int, float] = defaultdict(float)
    for entry in traffic(layout, rank):
        found[sizes[entry.axis]] += entry.sent
    return dict(found)


def config(model: ModelConfig = LLAMA, train: TrainConfig | None = None, **parallel: Any) -> Config:
    train = train or TrainConfig()
    return Config(
        model=model,
        data=DataConfig(seq_length=32),
        parallel=ParallelConfig(**parallel),
        train=replace(train, global_batch_size=12, loss_chunk=32),
    )


SELECTIVE, FULL, BF16 = (
    TrainConfig(recompute="selective"),
    TrainConfig(recompute="full"),
    TrainConfig(precision="bf16"),
)
ONE_STAGE = {
    "tensor": (config(tensor=2), 2),
    "tensor, full recompute": (config(train=FULL, tensor=2), 2),
    "sequence": (config(tensor=2, sequence_parallel=True), 2),
    "sequence, selective recompute": (config(train=SELECTIVE, tensor=2, sequence_parallel=True), 2),
    "sequence, full recompute": (config(train=FULL, tensor=2, sequence_parallel=True), 2),
    "sequence, tied, biases": (config(GPT2, tensor=2, sequence_parallel=True), 2),
    "shared key/value heads": (config(tensor=8, sequence_parallel=True), 8),
    "context, full recompute": (config(train=FULL, context=2), 2),
    "data, microbatches of one": (config(train=replace(BF16, microbatch_size=1)), 3),
    "data x tensor, bf16": (config(train=BF16, tensor=2), 6),
    "copies": (config(replicate=2), 6),
    "all but the pipeline": (config(context=2, tensor=8), 48),
}


@pytest.mark.parametrize("case", ONE_STAGE)
def test_a_real_step_sends_what_the_plan_says(case: str) -> None:
    given, world_size = ONE_STAGE[case]
    with fake_ranks(world_size, 0):
        _, sent = sent_in_a_step(given)
    assert sent == planned(Layout(given, world_size), 0)


@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B"])
def test_a_real_step_of_a_pipeline_sends_what_the_plan_says(schedule: str) -> None:
    given = config(replace(LLAMA, tied_embeddings=schedule == "1F1B"), pipeline=2, schedule=schedule)
    for rank, sent in run_ranks(sent_in_a_step, 6, given):
        assert sent == planned(Layout(given, 6), rank)


def test_rings_send_twice_as_much_for_a_sum_as_for_a_gather() -> None:
    assert (all_gather(100, 4), all_reduce(100, 4), all_reduce(100, 1)) == (75, 150, 0)


def test_a_layer_sums_four_activations_over_the_tensor_axis() -> None:
    layout = Layout(config(tensor=4), 4)
    sent = {entry.what: entry.sent for entry in traffic(layout, 0)}["activations"]
    activation = 12 * 32 * LLAMA.hidden_size * 4
    assert sent == LLAMA.num_layers * 4 * 2 * 3 / 4 * activation


def test_a_stage_sends_one_activation_per_border_and_microbatch() -> None:
    deep, single = replace(LLAMA, num_layers=6), TrainConfig(microbatch_size=1)
    layout = Layout(config(deep, pipeline=3, schedule="Interleaved1F1B", train=single), 3)
    activation = 32 * LLAMA.hidden_size * 4
    sent = [{entry.what: entry.sent / 12 / activation for entry in traffic(layout, rank)} for rank in range(3)]
    assert [each["activations"] for each in sent] == [2, 2, 1]
    assert [each["gradients of activations"] for each in sent] == [1, 2, 2]


def test_neighbouring_stages_of_one_rank_send_nothing_to_each_other() -> None:
    layout = Layout(config(pipeline=2, schedule="ZBVZeroBubble", train=TrainConfig(microbatch_size=1)), 2)
    sent = {entry.what: entry.sent for entry in traffic(layout, 1)}
    assert sent["activations"] == sent["gradients of activations"] == 12 * layout.activation
