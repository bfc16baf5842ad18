"""Gradients of microbatches are summed in float32, whatever the dtype of compute: small ones are not lost."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megagrow.config import Config, DataConfig, ParallelConfig, TrainConfig
from megagrow.evaluate import make_batch
from megagrow.parallel.mesh import make_mesh
from megagrow.parallel.shards import local
from megagrow.train.part import build_part, initialize_part
from tests.parallel.layouts import BATCH, DEEP, SEQ
from tests.parallel.parity import make_tokens
from tests.ranks import run_ranks

SMALL = 2.0**-11  # of the first microbatch's weight: below half a unit in the last place of bfloat16's sum
SCHEDULES = ["1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"]


def gradients(config: Config) -> list[dict[str, Tensor]]:
    """This rank's gradients with every microbatch but the first at weight 0, SMALL, and with the first at 0."""
    mesh = make_mesh(config.parallel)
    found = []
    for first, others in ((1.0, 0.0), (1.0, SMALL), (0.0, 1.0)):
        part = build_part(config.model, config, mesh)
        initialize_part(part, seed=3)
        mine = torch.arange(BATCH).chunk(mesh.dp.size)[mesh.dp.rank]
        batch = make_batch(make_tokens(config.model.vocab_size)[mine], BATCH, mesh)
        weights_BS = torch.full((len(mine), SEQ), others)
        weights_BS[0] = first
        part.engine.train_step(replace(batch, weights=weights_BS))
        found.append({name: local(p.grad).clone() for name, p in part.parameters.items() if p.grad is not None})
    return found


def lost(found: list[dict[str, Tensor]]) -> float:
    """Over the matrices of all layers: how much of the small microbatches' share is missing, relative to it."""
    alone, together, others = found
    names = [name for name in alone if name.startswith("layers.") and alone[name].dim() == 2]
    missing = sum(float((together[n] - alone[n] - SMALL * others[n]).double().square().sum()) for n in names)
    return (missing / sum(float((SMALL * others[n]).double().square().sum()) for n in names)) ** 0.5


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_small_microbatches_are_not_lost(schedule: Any) -> None:
    config = Config(
        model=DEEP,
        data=DataConfig(seq_length=SEQ),
        parallel=ParallelConfig(pipeline=2, schedule=schedule),
        train=TrainConfig(global_batch_size=BATCH, microbatch_size=1, precision="bf16"),
    )
    assert max(lost(found) for found in run_ranks(gradients, 4, config)) < 0.02
