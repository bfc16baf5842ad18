"""Tests ../../megagrow/plan/suggest.py and speed.py: what is suggested is valid, fits, and is ordered with sense."""

from dataclasses import replace
from typing import Any

import pytest

from megagrow import flops
from megagrow.checks import problems
from megagrow.config import Config, DataConfig, GrowthConfig, ModelConfig, ParallelConfig, TrainConfig
from megagrow.plan.layout import Layout
from megagrow.plan.memory import step_memory
from megagrow.plan.speed import Machine, schedule_of, step_time
from megagrow.plan.suggest import suggest

LLAMA_8B = ModelConfig(
    vocab_size=128_256, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, ffn_size=14_336
)
CONFIG = Config(
    model=LLAMA_8B,
    data=DataConfig(seq_length=2048),
    train=TrainConfig(global_batch_size=16, precision="bf16"),
)
WORLD = 16  # ranks


def changed(train: dict[str, Any] | None = None, **parallel: Any) -> Config:
    return replace(CONFIG, parallel=ParallelConfig(**parallel), train=replace(CONFIG.train, **(train or {})))


def seconds(config: Config, machine: Machine | None = None, world_size: int = WORLD) -> float:
    return step_time(Layout(config, world_size), machine or Machine()).step


def test_suggestions_are_valid_and_fit_and_come_fastest_first() -> None:
    machine = Machine(memory=80 * 2**30)
    found = suggest(CONFIG, WORLD, machine)
    assert len(found) > 3
    assert all(not problems(each.config, WORLD) for each in found)
    assert all(each.memory <= 0.9 * machine.memory for each in found)
    assert [each.time.step for each in found] == sorted(each.time.step for each in found)
    meshes = [(p.tensor, p.context, p.pipeline) for p in (each.config.parallel for each in found)]
    assert len(set(meshes)) == len(meshes)


def test_more_memory_takes_nothing_away() -> None:
    small, large = (suggest(CONFIG, WORLD, Machine(memory=gib * 2**30)) for gib in (40, 140))
    assert len(small) <= len(large)
    assert large[0].time.step <= small[0].time.step


def test_one_microbatch_is_tried_where_fewer_samples_at_once_do_not_fit() -> None:
    """Sharded gradients of several microbatches are kept whole until the last, those of one are not."""
    model = replace(LLAMA_8B, hidden_size=5120, num_layers=40, num_heads=40, num_kv_heads=40, ffn_size=13_824)
    config = replace(CONFIG, model=replace(model, vocab_size=32_000), data=DataConfig(seq_length=4096))
    config = replace(config, train=replace(config.train, global_batch_size=32))
    limit = 48 * 2**30
    plain = [each for each in suggest(config, 8, Machine(memory=limit)) if each.config.parallel.model_ranks == 1]
    (whole,) = plain
    assert Layout(whole.config, 8).num_microbatches == 1 and whole.memory <= 0.9 * limit
    halved = replace(whole.config, train=replace(whole.config.train, microbatch_size=2))
    assert max(held.total for held in step_memory(Layout(halved, 8))) > 0.9 * limit


def test_nothing_fits_into_nothing() -> None:
    assert suggest(CONFIG, WORLD, Machine(memory=2**30)) == []


def test_little_memory_asks_for_recompute() -> None:
    long = replace(CONFIG, data=DataConfig(seq_length=8192))
    tight, roomy = (suggest(long, WORLD, Machine(memory=gib * 2**30))[0] for gib in (16, 192))
    assert roomy.config.train.recompute != "full"
    assert tight.time.step > roomy.time.step
    assert tight.memory < roomy.memory


def test_slow_networks_keep_the_tensor_axis_small() -> None:
    fast, slow = (suggest(CONFIG, WORLD, Machine(inside=gb * 1e9))[0] for gb in (3000, 5))
    assert slow.config.parallel.tensor < fast.config.parallel.tensor or slow.config.parallel.tensor == 1


def test_the_fullest_phase_counts() -> None:
    """While a model grows, source and target stand side by side."""
    source = replace(LLAMA_8B, num_layers=31)
    growing = replace(CONFIG, growth=GrowthConfig(method="stack", source=source, at_step=5))
    machine = Machine(memory=20 * 2**30)
    plain, both = (suggest(replace(config, parallel=ParallelConfig()), 8, machine) for config in (CONFIG, growing))
    assert plain and not both


def test_without_communication_time_is_flops_over_efficiency() -> None:
    machine = Machine(inside=1e30, between=1e30)
    tokens = 16 * 2048
    spent = flops.training_flops(LLAMA_8B, tokens, 2048) / (machine.peak_flops * machine.efficiency * WORLD)
    assert seconds(CONFIG, machine) == pytest.approx(spent)
    assert step_time(Layout(CONFIG, WORLD), machine).mfu == pytest.approx(machine.efficiency)


def test_full_recompute_takes_a_third_more() -> None:
    machine = Machine(inside=1e30, between=1e30)
    layers = 1 - flops.head_flops_per_token(LLAMA_8B) / flops.forward_flops_per_token(LLAMA_8B, 2048)
    again = seconds(changed({"recompute": "full"}), machine) / seconds(CONFIG, machine) - 1
    assert again == pytest.approx(layers / 3)


def test_a_pipeline_pays_for_its_bubble() -> None:
    machine = Machine(inside=1e30, between=1e30)
    config = changed({"microbatch_size": 1}, pipeline=4)
    time, walk = step_time(Layout(config, WORLD), machine), schedule_of(Layout(config, WORLD))
    assert time.bubble == pytest.approx(walk.bubble * time.step)
    # Three parts of seven, and a little for the head, which makes the last stage slower than the others.
    assert 3 / 7 < walk.idle < 0.5


def test_tensor_parallelism_across_nodes_is_slow() -> None:
    inside, across = (seconds(changed(tensor=8), Machine(ranks_per_node=n)) for n in (8, 4))
    assert across > 2 * inside


def test_sharding_hides_behind_computing_without_a_pipeline() -> None:
    time = step_time(Layout(CONFIG, WORLD), Machine(ranks_per_node=16))
    assert time.exposed == 0
    assert step_time(Layout(CONFIG, WORLD), Machine(ranks_per_node=1, between=1e9)).exposed > 0


def test_seventy_billion_parameters_are_planned_at_once() -> None:
    model = replace(LLAMA_8B, hidden_size=8192, num_layers=80, num_heads=64, head_dim=128, ffn_size=28_672)
    config = replace(
        changed({"global_batch_size": 1024, "microbatch_size": 1}, tensor=8, sequence_parallel=True, pipeline=4),
        model=model,
    )
    held = step_memory(Layout(config, 1024))
    assert len(held) == 4
    # 1F1B: the first rank waits for four microbatches, the last one for one.
    assert [each.in_flight for each in held] == [(4,), (3,), (2,), (1,)]
    assert all(10 * 2**30 < each.total < 40 * 2**30 for each in held)


def test_ranks_that_are_no_power_of_two_get_all_their_layouts() -> None:
    """Nodes of six, 24 layers, 12 heads: three or six tensor ranks, twelve stages."""
    model = replace(LLAMA_8B, num_layers=24, num_heads=12, num_kv_heads=12, hidden_size=1536, ffn_size=6144)
    train, data = replace(CONFIG.train, global_batch_size=24), DataConfig(seq_length=3072)
    config = replace(CONFIG, model=model, train=train, data=data)
    found = suggest(config, 12, Machine(memory=80 * 2**30, ranks_per_node=6))
    meshes = {(f.config.parallel.tensor, f.config.parallel.pipeline) for f in found}
    assert {(1, 1), (3, 1), (6, 2), (3, 4), (1, 12)} <= meshes
    assert all(not problems(f.config, 12) for f in found)
