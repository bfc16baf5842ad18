"""Tests ../../megagrow/plan/weights.py against the real model, built without memory in worlds of any size."""

from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

from megagrow.checks import problems
from megagrow.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
from megagrow.parallel.mesh import make_mesh
from megagrow.plan.dry_run import build_on_meta, built_stages, fake_ranks, first_ranks
from megagrow.plan.layout import Layout
from megagrow.plan.weights import rank_unit, stage_unit, tensor_elements, trained_elements
from megagrow.roles import num_parameters
from tests.models import as_bert, as_gpt2, as_roberta

LLAMA = ModelConfig(vocab_size=101, hidden_size=48, num_layers=7, num_heads=8, num_kv_heads=4, head_dim=8, ffn_size=72)
GPT2 = as_gpt2(LLAMA, max_seq_length=64)
BERT = as_bert(LLAMA, max_seq_length=64)
ROBERTA = as_roberta(LLAMA, max_seq_length=64)
QWEN = replace(LLAMA, family="qwen3", qk_norm=True, tied_embeddings=True)


def layout(world_size: int, model: ModelConfig = LLAMA, batch: int = 48, **parallel: Any) -> Layout:
    train = TrainConfig(global_batch_size=batch, microbatch_size=1)
    config = Config(model=model, data=DataConfig(seq_length=32), parallel=ParallelConfig(**parallel), train=train)
    assert not problems(config, world_size)
    return Layout(config, world_size)


LAYOUTS = {
    "one process": layout(1),
    "tensor, odd vocabulary": layout(4, tensor=4),
    "shared key/value heads": layout(8, tensor=8),
    "data, rows that do not divide": layout(5, batch=50),
    "copies of shards": layout(6, replicate=2),
    "context": layout(4, context=4),
    "uneven stages": layout(3, pipeline=3, layers_per_stage=(1, 4, 2)),
    "interleaved x tensor x data": layout(24, pipeline=2, tensor=4, schedule="Interleaved1F1B", stages_per_rank=3),
    "tied, both ends on one rank": layout(12, GPT2, pipeline=2, tensor=2, schedule="ZBVZeroBubble"),
    "tied, both ends apart": layout(12, QWEN, pipeline=3, tensor=2),
    "BERT, tied, both ends on one rank": layout(12, BERT, pipeline=2, tensor=2, schedule="DualPipeV"),
    "RoBERTa, tied, both ends apart": layout(12, ROBERTA, pipeline=3, tensor=2),
    "all axes": layout(96, QWEN, pipeline=2, context=2, tensor=4, replicate=3, batch=48),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_the_plan_counts_what_the_real_model_stores(case: str) -> None:
    planned = LAYOUTS[case]
    for place, first in enumerate(first_ranks(planned)):
        # The first, one in the middle, and the last of the ranks that share this place of the pipeline.
        count = planned.world_size // planned.pipeline
        for rank in {first, first + count // 2, first + count - 1}:
            tensor, shard = rank % planned.tensor, rank // planned.tensor % planned.shard
            built = built_stages(planned, rank)
            stages = planned.rank_stages(place)
            assert [stage.layers for stage in built] == [list(stage.layers) for stage in stages]
            assert [stage.parameters for stage in built] == [
                stage_unit(planned, stage, tensor, shard).stored for stage in stages
            ]
            assert all(stage.num_bytes == 4 * stage.parameters for stage in built)


@pytest.mark.parametrize("case", ["tied, both ends on one rank", "tied, both ends apart"])
def test_the_optimizer_sees_a_tied_embedding_once(case: str) -> None:
    planned = LAYOUTS[case]
    with fake_ranks(planned.world_size, 0):
        parameters = build_on_meta(planned).parameters
        assert sum(p.to_local().numel() for p in parameters.values()) == trained_elements(planned, 0)


def test_shards_of_all_ranks_make_up_the_model() -> None:
    planned = LAYOUTS["data, rows that do not divide"]
    stored = [rank_unit(planned, 0, 0, shard).stored for shard in range(5)]
    assert sum(stored) == num_parameters(LLAMA)
    assert rank_unit(planned, 0).gathered == num_parameters(LLAMA)


def test_a_teacher_is_cut_over_the_tensor_axis_alone() -> None:
    whole, cut = (tensor_elements(layout(n, tensor=n)) for n in (1, 2))
    replicated = LLAMA.hidden_size * (2 * LLAMA.num_layers + 1)
    assert whole == num_parameters(LLAMA)
    assert cut == (whole - replicated - LLAMA.hidden_size * 2 * LLAMA.vocab_size) // 2 + replicated + 51 * 2 * 48


def test_building_without_memory_leaves_no_process_group() -> None:
    built_stages(LAYOUTS["context"], 3)
    assert not dist.is_initialized()
    assert make_mesh(ParallelConfig()).world.size == 1
