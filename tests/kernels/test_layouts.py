"""Layouts that train with every kernel, interpreted on two ranks, against one process with the twins."""

from dataclasses import replace

import pytest
import torch

from megagrow.config import Config, DataConfig, OptimConfig, ParallelConfig, TrainConfig
from tests.kernels.interpreter import on_ranks
from tests.kernels.test_training_step import serving
from tests.parallel import parity
from tests.parallel.layouts import BATCH, GPT2, LLAMA, QWEN, SEQ

pytestmark = pytest.mark.interpreted

GEGLU = replace(LLAMA, activation="geglu", attention_bias="all", mlp_bias=True, num_layers=2)
UPDATES = 1
OPTIM = OptimConfig(eps=1e-3)  # else AdamW would make of a gradient that is zero but for rounding what its sign says
GRADIENT, WEIGHT = 1e-5, 1e-4

LAYOUTS = {
    "shards, selective recompute": Config(
        model=replace(LLAMA, num_layers=2), train=TrainConfig(recompute="selective", microbatch_size=4)
    ),
    "sequence parallel, dropout": Config(
        model=GEGLU,
        parallel=ParallelConfig(tensor=2, sequence_parallel=True),
        train=TrainConfig(dropout=0.2, recompute="full", loss_chunk=24),
    ),
    "pipeline, tied, head norms": Config(
        model=replace(QWEN, num_layers=2, tied_embeddings=True),
        parallel=ParallelConfig(pipeline=2),
        train=TrainConfig(microbatch_size=8),
    ),
    "pipeline in halves, layer norms": Config(
        model=replace(GPT2, num_layers=4),
        parallel=ParallelConfig(pipeline=2, schedule="ZBVZeroBubble"),
        train=TrainConfig(microbatch_size=4, dropout=0.2),
    ),
}


def train_with_kernels(config: Config) -> parity.Trace:
    """One rank's training; its process has been told to interpret by the one that started it."""
    calls: set[str] = set()
    with serving(calls):
        trace = parity.train_rank(config, torch.float32, UPDATES)
    assert {"vocab_stats", "AdamWTable"} <= calls or not any("final_norm" in name for name in trace.gradients)
    return trace


@pytest.mark.parametrize("name", LAYOUTS)
def test_kernels_in_a_layout(name: str) -> None:
    config = LAYOUTS[name]
    train = replace(config.train, global_batch_size=BATCH)
    config = replace(config, data=DataConfig(seq_length=SEQ), train=train, optim=OPTIM)
    alone = replace(config, parallel=ParallelConfig(), train=replace(train, microbatch_size=0, recompute="none"))
    found = on_ranks(2, train_with_kernels, config)
    errors = parity.compare(found, parity.train(alone, parity.Mesh.single(), torch.float32, UPDATES))
    assert errors.gradient.value <= GRADIENT, errors
    assert errors.weight.value <= WEIGHT, errors
