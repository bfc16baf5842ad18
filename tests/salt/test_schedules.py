"""Stage 1 under every pipeline schedule: the sums and every gradient of the student, against one process.

Its teacher is there, or has left targets behind; what both know is less than the student's vocabulary.
"""

# Shape suffix legend: B = samples of the batch, S = positions, K = entries of a position.

from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megagrow.checks import check
from megagrow.config import Config, ModelConfig, SaltConfig
from megagrow.model.transformer import Teacher as StageTeacher
from megagrow.parallel.mesh import Mesh, make_mesh
from megagrow.parallel.pipeline import Batch
from megagrow.parallel.shards import box, local
from megagrow.salt.teacher import Teacher, loss_options
from megagrow.train.part import Part, build_part, initialize_part
from tests.parallel.layouts import BATCH, LLAMA, SCHEDULES, SEQ, TIED, Layout, make_layout
from tests.parallel.parity import Piece, Trace, gradient_errors, local_batch
from tests.ranks import run_ranks
from tests.salt.samples import SMALL, make_source

SALT = SaltConfig(teacher="small", steps=3, weight=1 / 3, temperature=0.5, divergence="reverse_kl")
TEACHER = replace(SMALL, vocab_size=101)  # padded, the student's 96 are not: shards end at other tokens
ADDITIONS = {"label_smoothing": 0.1, "z_loss": 0.01}


CACHED = replace(SALT, teacher="", cache="a folder", divergence="forward_kl", temperature_on="both")
NUM_COMMON = 93
KINDS = [pytest.param(SALT, id="teacher"), pytest.param(CACHED, id="cache")]


def layout(schedule: str, salt: SaltConfig = SALT, model: ModelConfig = LLAMA, **parallel: int) -> Layout:
    made = make_layout(4, model=model, train=ADDITIONS, pipeline=2, schedule=schedule, **parallel)
    return replace(made, config=replace(made.config, salt=salt))


def with_teacher(batch: Batch, part: Part, config: Config) -> Batch:
    """What the teacher says of this rank's samples, on the rank that computes the loss."""
    if config.salt.cache:
        return with_targets(batch, part, config)
    teacher = Teacher(make_source(TEACHER), part.mesh, config.salt, config.model, torch.float64)
    teacher.attach(part.last_stage)
    return replace(batch, teacher_hidden=teacher.hidden(batch.ids, part.engine.num_microbatches))


def with_targets(batch: Batch, part: Part, config: Config) -> Batch:
    """Five tokens of each position, and the mass of the others."""
    if part.last_stage is None:
        return batch
    part.last_stage.teacher = StageTeacher(None, loss_options(config.salt), NUM_COMMON)
    generator = torch.Generator().manual_seed(6)
    p_BSV = torch.randn(BATCH, SEQ, NUM_COMMON, generator=generator, dtype=torch.float64).softmax(-1)
    masses_BSK, ids_BSK = p_BSV.topk(5)
    rest_BS1 = 1 - masses_BSK.sum(-1, keepdim=True)
    mine = [x.chunk(part.mesh.dp.size)[part.mesh.dp.rank] for x in (ids_BSK, torch.cat((masses_BSK, rest_BS1), -1))]
    return replace(batch, target_ids=mine[0], target_masses=mine[1])


def taught(config: Config, mesh: Mesh) -> Trace:
    """One step's sums and gradients on this rank, in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        part = build_part(config.model, config, mesh)
        torch.set_default_dtype(torch.float32)  # of initial values
        initialize_part(part, seed=3)
        torch.set_default_dtype(torch.float64)
        batch = with_teacher(local_batch(config, mesh, torch.float64, 0), part, config)
        sums = part.engine.train_step(batch)
        found = {name: p.grad for name, p in part.parameters.items() if p.grad is not None}
        gradients = {name: Piece(box(grad), local(grad).clone()) for name, grad in found.items()}
        return Trace(gradients, {}, sums[None], torch.ones(1), torch.ones(1))
    finally:
        torch.set_default_dtype(torch.float32)


def taught_here(config: Config) -> Trace:
    check(config, dist.get_world_size())
    return taught(config, make_mesh(config.parallel))


@cache
def one_process(config: Config) -> Trace:
    return taught(config, Mesh.single())


def assert_sums(sums_4: Tensor, config: Config) -> None:
    loss, ce, kd, entropy = sums_4.tolist()
    assert min(ce, kd, entropy) > 0
    rest = loss - ((1 - config.salt.weight) * ce + config.salt.weight * kd)
    assert rest > 0  # smoothing and z-loss


@pytest.mark.parametrize("salt", KINDS)
@pytest.mark.parametrize("schedule", ["1F1B", *SCHEDULES])
def test_a_taught_step_under_every_schedule(schedule: str, salt: SaltConfig) -> None:
    given = layout(schedule, salt, tensor=2)
    expected = one_process(given.one_process)
    assert_sums(expected.losses[0], given.config)
    errors = gradient_errors(run_ranks(taught_here, given.ranks, given.config), expected)
    assert max(errors.values()) <= 1e-10, errors


@pytest.mark.parametrize("salt", KINDS)
@pytest.mark.parametrize("schedule", ["1F1B", "DualPipeV"])
def test_a_taught_step_with_sharded_data_and_tied_embeddings(schedule: str, salt: SaltConfig) -> None:
    given = layout(schedule, salt, model=TIED)
    errors = gradient_errors(run_ranks(taught_here, given.ranks, given.config), one_process(given.one_process))
    assert max(errors.values()) <= 1e-10, errors
