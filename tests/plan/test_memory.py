"""Tests ../../megagrow/plan/memory.py and phases.py against the live memory of real steps, within ten per cent.

Small versions of benchmarks/plan_memory.py; sizes are such that the terms which a case is about dominate.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import record_function

from megagrow.checkpoint.hf_writer import write_hf_folder
from megagrow.checkpoint.host_copy import HostCopy
from megagrow.checkpoint.shards import local_shards
from megagrow.checkpoint.source import open_source
from megagrow.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    GrowthConfig,
    InitConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    SaltConfig,
    TrainConfig,
)
from megagrow.data.dataset import PackedDataset
from megagrow.data.loader import Stream, shuffled
from megagrow.evaluate import make_batch
from megagrow.growth.ligo_maps import Variant
from megagrow.optim import Optimizer, StepGuard
from megagrow.parallel.mesh import Mesh, make_mesh
from megagrow.plan.dry_run import fake_ranks
from megagrow.plan.layout import Layout
from megagrow.plan.measure import peak_memory
from megagrow.plan.memory import RankMemory, step_memory
from megagrow.plan.phases import phases
from megagrow.roles import num_parameters, parameter_shapes
from megagrow.salt import CacheSettings, cache_teacher, score_candidates
from megagrow.salt.cached_teacher import CachedTeacher
from megagrow.salt.teacher import Teacher
from megagrow.train import growing
from megagrow.train.growing import map_learner, new_learner
from megagrow.train.learner import Learner, ModelLearner
from megagrow.train.part import build_part, compute_dtype, initialize_part
from megagrow.train.state import RunState
from tests.models import as_bert
from tests.ranks import run_ranks
from tests.salt.samples import write_corpus

STEP = "a step"
MODEL = ModelConfig(hidden_size=128, num_layers=6, num_heads=4, num_kv_heads=2, ffn_size=352, vocab_size=1024)
LONG = Config(model=MODEL, data=DataConfig(seq_length=256), train=TrainConfig(global_batch_size=8))


def changed(config: Config = LONG, parallel: dict[str, Any] | None = None, **train: Any) -> Config:
    return replace(config, parallel=ParallelConfig(**parallel or {}), train=replace(config.train, **train))


CASES = {
    "long sequences": (LONG, 1),
    "parameters, accumulation": (
        changed(
            replace(LONG, model=replace(MODEL, hidden_size=256, head_dim=32), data=DataConfig(seq_length=16)),
            microbatch_size=4,
        ),
        1,
    ),
    "vocabulary, bf16, full recompute": (
        changed(
            replace(LONG, model=replace(MODEL, vocab_size=20_001)), precision="bf16", recompute="full", loss_chunk=256
        ),
        1,
    ),
    "selective recompute": (changed(recompute="selective"), 1),
    "tied embeddings": (replace(LONG, model=replace(MODEL, tied_embeddings=True, vocab_size=8000)), 1),
    "encoder": (replace(LONG, model=as_bert(MODEL, vocab_size=8000)), 1),
    "data": (changed(), 2),
    "data, accumulation in bf16": (changed(precision="bf16", microbatch_size=2), 2),
    "copies": (changed(parallel={"replicate": 2}), 4),
    "tensor": (changed(parallel={"tensor": 2}), 2),
    "sequence, full recompute": (changed(parallel={"tensor": 2, "sequence_parallel": True}, recompute="full"), 2),
    "context": (changed(parallel={"context": 2}), 2),
}


def train(learner: Learner, config: Config, mesh: Mesh) -> None:
    size = config.train.global_batch_size
    tokens = torch.randint(config.model.vocab_size, (size // mesh.dp.size, config.data.seq_length + 1))
    for _ in range(2):
        with record_function(STEP):
            learner.step(make_batch(tokens, size, mesh), 1e-3, StepGuard())


def model_learner(config: Config, mesh: Mesh) -> ModelLearner:
    part = build_part(config.model, config, mesh)
    initialize_part(part, seed=0)
    return ModelLearner(part, Optimizer(part.parameters, config.optim), config)


def measured(config: Config, make: Callable[[Config, Mesh], Learner] = model_learner) -> tuple[int, int]:
    """This rank's place in the pipeline, and the peak of its steps."""
    mesh = make_mesh(config.parallel)
    return mesh.pp.rank, peak_memory(lambda: train(make(config, mesh), config, mesh), since=STEP)


def off(held: RankMemory, peak: int) -> float:
    return abs(held.total / peak - 1)


@pytest.mark.parametrize("case", CASES)
def test_a_real_step_needs_what_the_plan_says(case: str) -> None:
    config, world_size = CASES[case]
    with fake_ranks(world_size, 0):
        _, peak = measured(config)
    (held,) = step_memory(Layout(config, world_size), "cpu")
    assert off(held, peak) < 0.1, (held.total, peak, held.parts, held.moment)


@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV"])
def test_a_pipeline_needs_what_the_plan_says(schedule: Any) -> None:
    config = changed(parallel={"pipeline": 2, "schedule": schedule}, microbatch_size=1)
    planned = step_memory(Layout(config, 2), "cpu")
    for rank, peak in run_ranks(measured, 2, config):
        assert off(planned[rank], peak) < 0.1, (schedule, rank, planned[rank].total, peak, planned[rank].parts)


def test_learning_maps_needs_what_the_plan_says() -> None:
    source = replace(MODEL, hidden_size=64, num_layers=3, num_kv_heads=2, head_dim=32, ffn_size=176)
    growth = GrowthConfig(method="ligo", source=source, at_step=1, optimizer="reset")
    config = replace(LONG, growth=growth)

    def make(config: Config, mesh: Mesh) -> Learner:
        small = build_part(source, config, mesh)
        initialize_part(small, seed=0)
        learner = map_learner(small, config)
        learner.generate()
        return learner

    _, peak = measured(config, make)
    found = {phase.name: phase for phase in phases(Layout(config, 1), "cpu")[0]}
    assert list(found) == ["small", "ligo", "train"]
    assert off(found["ligo"].memory[0], peak) < 0.1, (found["ligo"].memory[0].total, peak)
    assert found["ligo"].memory[0].parts["moments"] == 0


def test_offloading_takes_moments_to_the_host() -> None:
    here, there = (step_memory(Layout(replace(LONG, optim=OptimConfig(offload=o)), 1))[0] for o in (False, True))
    assert here.total - there.total == here.parts["moments"] == 8 * here.parameters
    assert there.host == {
        "moments": 8 * here.parameters,
        "weights": 4 * here.parameters,
        "gradients": 4 * here.parameters,
        "copy for the checkpoint": 12 * here.parameters,
    }


def test_saving_beside_training_takes_a_copy_on_the_host() -> None:
    def make(config: Config, mesh: Mesh) -> Learner:
        part = build_part(config.model, config, mesh)
        initialize_part(part, seed=0)
        return new_learner(part, config)

    learner = make(LONG, Mesh.single())
    copies = HostCopy().of(local_shards(learner.tensors()))
    planned = step_memory(Layout(LONG, 1))[0].host
    assert planned == {"copy for the checkpoint": sum(shard.data.nbytes for shard in copies.values())}
    at_once = replace(LONG, checkpoint=CheckpointConfig(asynchronous=False))
    assert not step_memory(Layout(at_once, 1))[0].host


def test_evaluation_brings_buffers_of_its_own() -> None:
    config = changed(parallel={"pipeline": 2}, microbatch_size=1)
    with_data = replace(config, data=replace(config.data, validation="held/out"))
    plain, evaluating = (step_memory(Layout(c, 2))[0].parts["pipeline buffers"] for c in (config, with_data))
    assert evaluating == 2 * plain


def test_growing_copies_needs_what_the_plan_says() -> None:
    source = replace(MODEL, num_layers=3, vocab_size=256)
    target = replace(source, num_layers=6)
    growth = GrowthConfig(method="stack", source=source, at_step=1)
    config = replace(LONG, model=target, growth=growth)

    def grow() -> Learner:
        mesh = Mesh.single()
        part = build_part(source, config, mesh)
        initialize_part(part, seed=0)
        learner = ModelLearner(part, Optimizer(part.parameters, config.optim), config)
        with record_function(STEP):
            return growing.begin(learner, RunState(source, "small"), config, mesh)

    peak = peak_memory(grow, since=STEP)
    found = {phase.name: phase for phase in phases(Layout(config, 1), "cpu")[0]}
    assert list(found) == ["small", "growing", "train"]
    assert off(found["growing"].memory[0], peak) < 0.1, (found["growing"].memory[0].parts, peak)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_teacher_needs_what_the_plan_says(precision: Any, tmp_path: Path) -> None:
    teacher = replace(MODEL, hidden_size=64, head_dim=16, num_layers=3, ffn_size=176)
    weights = {name: torch.randn(shape) / 10 for name, shape in parameter_shapes(teacher).items()}
    write_hf_folder(tmp_path / "teacher", teacher, weights.__getitem__)
    salt = SaltConfig(teacher=str(tmp_path / "teacher"), steps=4)
    config = replace(changed(precision=precision), salt=salt)
    mesh, size = Mesh.single(), config.train.global_batch_size

    def teach() -> None:
        learner = model_learner(config, mesh)
        source = open_source(salt.teacher)
        small = Teacher(source, mesh, salt, config.model, compute_dtype(config))
        small.attach(learner.part.last_stage)
        tokens = torch.randint(config.model.vocab_size, (size, config.data.seq_length + 1))
        for _ in range(2):
            with record_function(STEP):
                hidden = small.hidden(tokens[:, :-1], learner.part.engine.num_microbatches)
                batch = replace(make_batch(tokens, size, mesh), teacher_hidden=hidden)
                learner.step(batch, 1e-3, StepGuard())

    peak = peak_memory(teach, since=STEP)
    found = {phase.name: phase for phase in phases(Layout(config, 1), "cpu")[0]}
    assert list(found) == ["salt", "train"]
    assert off(found["salt"].memory[0], peak) < 0.1, (
        found["salt"].memory[0].parts,
        found["salt"].memory[0].total,
        peak,
    )
    assert found["salt"].memory[0].parts["teacher"] == num_parameters(teacher) * (4 if precision == "fp32" else 2)


@pytest.mark.parametrize("temperature_on", ["teacher", "both"])
def test_cached_targets_need_what_the_plan_says(temperature_on: Any, tmp_path: Path) -> None:
    """64 tokens of every position; with the student at a temperature its logits are copied."""
    config = changed(replace(LONG, model=replace(MODEL, vocab_size=8000)), loss_chunk=1024)
    salt = SaltConfig(cache=str(tmp_path / "cache"), steps=4, temperature=2.0, temperature_on=temperature_on)
    size, length = config.train.global_batch_size, config.data.seq_length
    tokens = torch.randint(config.model.vocab_size, (size * length + 1,), generator=torch.Generator().manual_seed(1))
    teacher = replace(MODEL, hidden_size=32, head_dim=8, num_layers=1, ffn_size=32, vocab_size=8000)
    weights = {name: torch.randn(shape) / 10 for name, shape in parameter_shapes(teacher).items()}
    write_hf_folder(tmp_path / "teacher", teacher, weights.__getitem__)
    dataset = PackedDataset(write_corpus(tmp_path / "corpus", tokens.tolist()), length)
    settings = CacheSettings(top_k=64, temperature=2.0, skip_source_check=True)
    cache_teacher(open_source(tmp_path / "teacher"), dataset, salt.cache, Mesh.single(), settings)
    config, mesh = replace(config, salt=salt), Mesh.single()
    cached, ids = CachedTeacher(config, [dataset]), np.arange(size)

    def teach() -> None:
        learner = model_learner(config, mesh)
        cached.attach(learner.part.last_stage)
        for _ in range(2):
            with record_function(STEP):
                batch = make_batch(torch.from_numpy(dataset.batch(ids)), size, mesh)
                learner.step(replace(batch, **cached.targets(ids * 0, ids, mesh)), 1e-3, StepGuard())

    peak = peak_memory(teach, since=STEP)
    phase = phases(Layout(config, 1), "cpu")[0][0]
    assert phase.name == "salt" and phase.memory[0].parts["targets"] == size * length * (4 * 64 + 4 * 65)
    assert off(phase.memory[0], peak) < 0.1, (phase.memory[0].parts, phase.memory[0].moment, peak)
    assert phase.flops == phases(Layout(replace(config, salt=SaltConfig()), 1), "cpu")[0][0].flops


@pytest.mark.parametrize("case", ["blocks", "vocabulary"])
def test_scoring_a_buffer_needs_what_the_plan_says(case: str, tmp_path: Path) -> None:
    """Eight samples at a time, of which a step has one."""
    teacher = replace(MODEL, vocab_size=20_000 if case == "vocabulary" else 512)
    weights = {name: torch.randn(shape) / 10 for name, shape in parameter_shapes(teacher).items()}
    write_hf_folder(tmp_path / "teacher", teacher, weights.__getitem__)
    student = replace(teacher, hidden_size=32, head_dim=8, num_layers=1, ffn_size=32)
    config = changed(replace(LONG, model=student), global_batch_size=1, loss_chunk=64)
    salt = SaltConfig(teacher=str(tmp_path / "teacher"), steps=4, online_buffer=8, keep_fraction=0.25)
    config, mesh = replace(config, salt=salt), Mesh.single()
    length = config.data.seq_length
    prefix = write_corpus(tmp_path / "corpus", torch.randint(512, (8 * length + 1,)).tolist())
    stream = Stream([shuffled(PackedDataset(prefix, length), seed=1)])

    def score() -> None:
        learner = model_learner(config, mesh)
        small = Teacher(open_source(salt.teacher), mesh, salt, config.model, compute_dtype(config))
        small.attach(learner.part.last_stage)
        with record_function(STEP):
            score_candidates(small.model, stream, *stream.samples(0, 8), config, mesh)

    peak = peak_memory(score, since=STEP)
    (held,) = phases(Layout(config, 1), "cpu")[0][0].memory
    assert held.moment == "scoring a buffer"
    assert off(held, peak) < 0.1, (held.parts, held.total, peak)


def test_a_cache_that_is_not_there_yet_is_noted() -> None:
    config = replace(LONG, salt=SaltConfig(cache="nowhere", steps=4))
    found, notes = phases(Layout(config, 1), "cpu")
    assert found[0].memory == step_memory(Layout(config, 1), "cpu")
    assert notes == ["salt.cache=nowhere: no such folder yet; the memory of its targets is left out"]


def test_only_an_embedding_of_more_tokens_is_gathered_whole() -> None:
    source, target = (replace(MODEL, vocab_size=1 << 16, hidden_size=size) for size in (64, 128))
    growth = GrowthConfig(method="ligo", source=source, at_step=1, optimizer="reset", ligo_init="rms_random")

    def rows(target: ModelConfig, variant: Variant) -> int:
        chosen = replace(growth, ligo_variant=variant)
        config = replace(LONG, model=target, parallel=ParallelConfig(pipeline=2), growth=chosen)
        found = {phase.name: phase for phase in phases(Layout(config, 2), "cpu")[0]}
        return found["ligo"].memory[0].parts.get("rows of an embedding", 0)

    gathered = 4 * source.vocab_size * source.hidden_size
    assert max(rows(target, "tied"), rows(target, "full_rank")) < gathered
    assert rows(replace(target, vocab_size=target.vocab_size + 64), "full_rank") > gathered


def test_a_teacher_of_maps_holds_what_it_says_of_a_step() -> None:
    source = replace(MODEL, hidden_size=64, num_layers=3, num_kv_heads=2, head_dim=32, ffn_size=176)
    growth = GrowthConfig(method="ligo", source=source, at_step=1, optimizer="reset")
    salt = SaltConfig(teacher="grown", steps=1, map_weight=0.5)
    layouts = [Layout(replace(LONG, growth=growth, **more), 1) for more in ({}, {"salt": salt})]
    plain, taught = ({p.name: p for p in phases(layout, "cpu")[0]}["ligo"].memory[0] for layout in layouts)
    hidden = layouts[0].tokens * layouts[0].num_microbatches * source.hidden_size * layouts[0].width
    assert taught.parts["teacher's hidden states"] == hidden > 0
    assert taught.total >= plain.total + hidden + taught.parts["teacher"]


def test_growing_with_moments_in_host_memory_needs_none_for_them() -> None:
    source = replace(MODEL, num_layers=2)
    growth = GrowthConfig(method="stack", source=source, at_step=1)
    found = []
    for offload in (False, True):
        config = replace(LONG, growth=growth, optim=replace(LONG.optim, offload=offload))
        (held,) = {phase.name: phase for phase in phases(Layout(config, 1), "cpu")[0]}["growing"].memory
        found.append(held)
    there, on_host = found
    assert there.parts["moments"] == on_host.host["moments"] > 0 == on_host.parts["moments"]
    assert on_host.host["weights"] == on_host.host["moments"] / 2


def test_a_source_by_its_url_is_read_as_by_its_path(tmp_path: Path) -> None:
    source = replace(MODEL, num_layers=2)
    shapes = parameter_shapes(source)
    write_hf_folder(tmp_path / "small", source, lambda name: torch.zeros(shapes[name]))
    for place in (str(tmp_path / "small"), f"file://{tmp_path / 'small'}"):
        config = replace(LONG, growth=GrowthConfig("stack"), init=InitConfig(place))
        found, notes = phases(Layout(config, 1), "cpu")
        assert [phase.name for phase in found] == ["growing", "train"] and not notes
