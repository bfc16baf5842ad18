"""Tests megagrow/cluster and tools/check_cluster.py: a fit cluster passes; what is wrong is found, and named."""

import dataclasses
import json
import math
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from megagrow.checks import KIND_FIELDS
from megagrow.cluster import Row, check, check_cluster, compute, exit_code, first_error, links, problems, table
from megagrow.cluster.environment import compare, own_facts
from megagrow.cluster.reduced import reduce
from megagrow.cluster.report import place
from megagrow.cluster.watch import Watch
from megagrow.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
from megagrow.config_file import dump
from megagrow.errors import HangError
from megagrow.parallel.collectives import any_over
from megagrow.parallel.mesh import make_mesh
from megagrow.parallel.pipeline import Engine
from megagrow.parallel.stages import pipeline_stages
from megagrow.plan.layout import Layout
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "check_cluster.py"
LIMIT = 400.0  # seconds; the machine may have other work
NUM_DEVIATIONS = 8  # four for each precision
DEAD_SECONDS = 2.0  # until a step counts as hanging; healthy ranks take milliseconds

MODEL = ModelConfig(
    vocab_size=50_257, hidden_size=256, num_layers=9, num_heads=8, num_kv_heads=4, ffn_size=688, tied_embeddings=True
)
TP_PP_DP = Config(
    model=MODEL,
    data=DataConfig(seq_length=32),
    parallel=ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True),
    train=TrainConfig(global_batch_size=16, microbatch_size=2),
)
CP_HSDP = dataclasses.replace(TP_PP_DP, parallel=ParallelConfig(context=2, replicate=2))
TP_DP = dataclasses.replace(TP_PP_DP, parallel=ParallelConfig(tensor=2))

Defect = Callable[[], AbstractContextManager[object]]


def wrong_gradient() -> AbstractContextManager[object]:
    """One gradient of the sharded step is 1 % off; what the rank computes alone is right."""
    return _spoiled(lambda world: world > 1, 1.01)


def missing_number() -> AbstractContextManager[object]:
    return _spoiled(lambda world: world > 1, math.nan)


def wrong_arithmetic() -> AbstractContextManager[object]:
    """What the rank computes alone is off."""
    return _spoiled(lambda world: world == 1, 1.01)


def slow_product() -> AbstractContextManager[object]:
    return mock.patch.object(compute, "product_seconds", lambda *_: 1.3)


def slow_link() -> AbstractContextManager[object]:
    return mock.patch.object(links, "seconds_of", lambda *_: 1.3)


def other_torch() -> AbstractContextManager[object]:
    return _other_fact(torch="2.11.0")


def other_driver() -> AbstractContextManager[object]:
    return _other_fact(driver="550.54")


def _spoiled(applies: Callable[[int], bool], factor: float) -> AbstractContextManager[object]:
    right = Engine._complete_gradients

    def complete(engine: Engine) -> None:
        right(engine)
        if applies(engine.mesh.world.size):
            next(p for n, p in engine.parameters.items() if n.endswith("mlp.down.weight")).grad.mul_(factor)

    return mock.patch.object(Engine, "_complete_gradients", complete)


def _other_fact(**facts: str) -> AbstractContextManager[object]:
    right = check.own_facts
    return mock.patch.object(check, "own_facts", lambda config: right(config) | facts)


def checked(config: Config, defect: Defect = nullcontext, defective: tuple[int, ...] = ()) -> list[Row]:
    """The rows of a check on hosts of two ranks each, some of which have a defect; every product takes a second.

    Links are timed really where a defect does not say otherwise.
    """
    rank = int(os.environ["RANK"])
    with (
        mock.patch.object(socket, "gethostname", lambda: f"node{rank // 2}"),
        mock.patch.object(compute, "product_seconds", lambda *_: 1.0),
        mock.patch.object(links, "SECONDS_OF_REPEATS", 0.0),
        mock.patch.object(links, "seconds_of", lambda *_: 1.0) if defect is slow_link else nullcontext(),
        defect() if rank in defective else nullcontext(),
    ):
        return check_cluster(config, LIMIT)


def failing(rows: list[Row]) -> list[Row]:
    """Without the links, whose times are those of a busy machine."""
    return [row for row in rows if row.holds is False and row.check != "links"]


def deviations(rows: list[Row]) -> dict[str, float]:
    return {row.what: row.figures["deviation"] for row in rows if row.check == "gradients"}


@pytest.mark.parametrize(
    ("config", "operations"),
    [
        (TP_PP_DP, {"tensor": 2, "pipeline": 1, "shard": 2}),
        (CP_HSDP, {"context": 2, "shard": 2, "replicate": 1}),
    ],
    ids=["tensor-pipeline-data", "context-replicate"],
)
def test_a_fit_cluster_passes(config: Config, operations: dict[str, int]) -> None:
    results = run_ranks(checked, 8, config, timeout=250)
    rows = results[0]
    assert all(other == rows for other in results)
    assert not failing(rows) and exit_code(rows) == 0 and first_error(rows) is None
    found = deviations(rows)
    assert len(found) == NUM_DEVIATIONS and 0 < found["gradients, float64"] < 1e-12 < found["gradients, float32"] < 1e-5
    timed = [row.what.split()[0] for row in rows if row.check == "links"]
    assert timed == [axis for axis, count in operations.items() for _ in range(2 * count)]
    assert len(table(rows).splitlines()) == len(rows) + 1


@pytest.mark.parametrize(
    ("defect", "names"),
    [
        (wrong_gradient, {"gradients"}),
        (missing_number, {"gradients"}),
        (wrong_arithmetic, {"gradients", "each rank alone"}),
    ],
)
def test_a_rank_with_wrong_numbers_is_named(defect: Defect, names: set[str]) -> None:
    rows = run_ranks(checked, 4, TP_DP, defect, (2,))[0]
    found = failing(rows)
    own = [row for row in found if row.what.startswith(("gradients", "each rank alone"))]
    assert {row.what.rpartition(",")[0] for row in own} == names and len(own) == 2 * len(names)
    assert all("beyond the bound on rank 2 (node1)" in row.where for row in own), own
    assert all("mlp.down.weight" in row.found for row in own if row.what.startswith("gradients"))
    assert exit_code(rows) == 5
    assert all(line.startswith("error: ") and "\n" not in line for line in problems(found))


def test_a_gradient_that_is_not_summed_is_found() -> None:
    """As if a reduction over the tensor axis had been forgotten, on every rank."""
    rows = run_ranks(checked, 4, dataclasses.replace(TP_DP, parallel=TP_PP_DP.parallel), unsummed, (0, 1, 2, 3))[0]
    assert {"gradients, float64", "gradients, float32", "gradient norm, float64"} <= {r.what for r in failing(rows)}


def unsummed() -> AbstractContextManager[object]:
    return mock.patch("megagrow.parallel.pipeline.sum_partial_gradients", lambda *_: None)


def test_a_slow_host_is_named_and_only_warned_of() -> None:
    rows = run_ranks(checked, 4, TP_DP, slow_product, (3,))[0]
    (row,) = failing(rows)
    assert row.where == "slowest (1.30 x the median rank): rank 3 (node1)"
    assert exit_code(rows) == 0 and any(line.startswith("warning: product of") for line in problems(rows))


def test_a_slow_group_is_named() -> None:
    rows = run_ranks(checked, 4, TP_DP, slow_link, (2, 3))[0]
    tensor = [row for row in rows if row.what.startswith("tensor axis")]
    assert all(row.where == "slowest (1.30 x the median group): ranks 2-3 (node1)" for row in tensor)
    assert [row.holds for row in tensor] == [None, False]  # small, large
    assert exit_code(rows) == 0


def test_bandwidths_follow_from_bytes_and_seconds() -> None:
    row = run_ranks(checked, 2, TP_DP, slow_link, (0,))[0]
    large = next(r for r in row if r.what == "tensor axis, all-reduce of 64 KiB")
    assert large.figures["bytes"] == 2 * 32 * 256 * 4  # microbatch x sequence x hidden x float32
    assert large.figures["seconds"] == 1.3  # a group is as slow as its slowest rank
    assert large.figures["algorithm_gb_per_second"] == pytest.approx(65_536 / 1.3 / 1e9)
    assert large.figures["bus_gb_per_second"] == large.figures["algorithm_gb_per_second"]  # 2 (n - 1) / n, n = 2


def test_hosts_that_differ_end_the_check() -> None:
    rows = run_ranks(checked, 4, TP_DP, other_torch, (1,))[0]
    (row,) = failing(rows)
    assert {row.check for row in rows} == {"environment"} and exit_code(rows) == 2
    assert row.what == "torch" and row.where == "rank 1 (node0)" and "2.11.0" in row.found


def test_a_difference_that_may_be_is_a_warning() -> None:
    rows = run_ranks(checked, 4, TP_DP, other_driver, (3,))[0]
    (row,) = failing(rows)
    assert (row.what, row.where) == ("driver", "rank 3 (node1)")
    assert exit_code(rows) == 0 and {row.check for row in rows} > {"environment", "gradients"}


def dead_link(absent: bool) -> str:
    """What each rank is told when rank 3 does not reach a collective of its tensor group, or hangs inside the step."""
    rank, world, told = dist.get_rank(), dist.get_world_size(), list[str]()
    axis = make_mesh(ParallelConfig(tensor=2)).tp
    any_over(True, axis)  # builds the connections
    ours, theirs = (dist.distributed_c10d._get_default_store().clone() for _ in range(2))

    def end(line: str) -> None:
        told.append(line)
        theirs.set(f"told/{rank}", "")

    watch = Watch([f"node{i // 2}" for i in range(world)], 170.0, end)
    others = [f"told/{i}" for i in range(world - 1)]
    if rank == 3 and absent:
        ours.wait(others)
    with watch.step("tensor axis, all-reduce", DEAD_SECONDS, [[0, 1], [2, 3]]):
        if rank == 3 and not absent:
            ours.wait([*others, "told/3"])
        any_over(True, axis)
    return told[0] if told else ""


@pytest.mark.parametrize(
    ("absent", "where"),
    [(False, "it does not end on ranks 2-3 (node1)"), (True, "rank 3 (node1) did not get there")],
)
def test_a_dead_link_is_named(absent: bool, where: str) -> None:
    told = run_ranks(dead_link, 4, absent)
    expected = f"tensor axis, all-reduce: no answer within {DEAD_SECONDS:.0f} s; {where}; "
    assert all(line.startswith(expected) for line in told[: 3 + (not absent)]), told


def test_time_being_up_ends_the_process(tmp_path: Path) -> None:
    """With the code of a hang, whatever the main thread waits for."""
    code = f"""
import threading
from megagrow.cluster.watch import Watch
with Watch(["here"], 170.0).step("waiting", 0.1):
    threading.Event().wait({LIMIT})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=LIMIT
    )
    assert done.returncode == HangError.exit_code
    assert done.stderr.startswith("error: waiting: no answer within 0 s; it does not end on rank 0 (here); ")


def broken_link() -> AbstractContextManager[object]:
    def fail(*_: object) -> float:
        raise RuntimeError("Connection closed\nby peer")

    return mock.patch.object(links, "seconds_of", fail)


def test_a_link_that_fails_is_a_hang() -> None:
    with pytest.raises(
        HangError, match=r"^tensor axis, all-reduce of 1 KiB: failed on rank 1 \(node0\): Connection cl"
    ):
        run_ranks(checked, 2, TP_DP, broken_link, (1,))


LAYOUTS = [
    (8, ParallelConfig(tensor=8), {}),  # fewer key/value heads than tensor ranks
    (16, ParallelConfig(tensor=2, pipeline=4, schedule="Interleaved1F1B"), {}),
    (8, ParallelConfig(pipeline=4, schedule="DualPipeV"), {}),
    (4, ParallelConfig(pipeline=4, layers_per_stage=(0, 3, 4, 2)), {}),
    (4, ParallelConfig(tensor=2, context=2, sequence_parallel=True), {}),
    (1024, ParallelConfig(tensor=8, pipeline=4, replicate=4), {"num_kv_heads": 8, "num_layers": 32}),
    (12, ParallelConfig(tensor=2), {"vocab_size": 50_256, "hidden_size": 264, "head_dim": 32}),
    (2, ParallelConfig(), {"num_heads": 4, "num_kv_heads": 4, "head_dim": 80, "rope_fraction": 0.2}),
    (2, ParallelConfig(), {"num_heads": 4, "num_kv_heads": 4, "head_dim": 64, "rope_fraction": 0.1}),
    (1, ParallelConfig(), {"vocab_size": 7, "hidden_size": 8, "num_layers": 1, "num_kv_heads": 8, "head_dim": 1}),
]


@pytest.mark.parametrize(("ranks", "parallel", "changes"), LAYOUTS)
def test_the_reduced_model_is_cut_like_the_real_one(
    ranks: int, parallel: ParallelConfig, changes: dict[str, int]
) -> None:
    model = dataclasses.replace(MODEL, positions="learned" if ranks == 1 else "rope", **changes)
    train = TrainConfig(global_batch_size=16 * ranks, microbatch_size=2)
    config = Config(model=model, data=DataConfig(seq_length=256), parallel=parallel, train=train)
    small = reduce(config, ranks)
    real, layout, tensor = config.model, Layout(config, ranks), parallel.tensor
    for size in ("vocab_size", "ffn_size"):
        assert getattr(small.model, size) % tensor == getattr(real, size) % tensor
    assert small.model.hidden_size % layout.shard == real.hidden_size % layout.shard
    assert (small.model.num_kv_heads < tensor) == (real.num_kv_heads < tensor)
    assert (small.model.queries_per_kv > 1) == (real.queries_per_kv > 1)
    assert small.model.vocab_size <= 256 and small.model.hidden_size <= 264 and small.data.seq_length <= 64
    assert small.train.global_batch_size <= 2048
    assert small.train.global_batch_size // layout.data // small.train.microbatch_size > 1
    assert (small.model.rotary_dim < small.model.head_dim) == (real.rotary_dim < real.head_dim)
    for field in KIND_FIELDS:
        assert getattr(small.model, field) == getattr(real, field)


@pytest.mark.parametrize(
    ("parallel", "layers", "expected"),
    [
        (ParallelConfig(pipeline=4, layers_per_stage=(0, 3, 4, 2)), 9, [0, 2, 2, 1]),
        (ParallelConfig(pipeline=2), 9, [2, 1]),
        (ParallelConfig(pipeline=4), 32, [1, 3, 3, 1]),
        (ParallelConfig(pipeline=4), 2, [0, 1, 1, 0]),
        (ParallelConfig(), 40, [2]),
    ],
)
def test_short_stages_stay_short(parallel: ParallelConfig, layers: int, expected: list[int]) -> None:
    model = dataclasses.replace(MODEL, num_layers=layers)
    config = Config(model=model, data=DataConfig(seq_length=64), parallel=parallel)
    small = reduce(config, parallel.pipeline)
    assert [len(stage.layers) for stage in pipeline_stages(small.model.num_layers, small.parallel)] == expected


def group_of(parallel: ParallelConfig, config: Config) -> dict[str, list[int]]:
    """The ranks of this rank's groups as torch knows them."""
    layout, mesh = Layout(dataclasses.replace(config, parallel=parallel), dist.get_world_size()), make_mesh(parallel)
    axes = [name for name, size in layout.axes.items() if size > 1]
    return {name: dist.get_process_group_ranks(links.own_axis(name, mesh).group) for name in axes}


@pytest.mark.parametrize(
    "parallel", [ParallelConfig(tensor=2, pipeline=2), ParallelConfig(context=2, replicate=2)], ids=["tp-pp", "cp-hsdp"]
)
def test_groups_are_those_of_the_mesh(parallel: ParallelConfig) -> None:
    layout = Layout(dataclasses.replace(TP_DP, parallel=parallel), 8)
    for rank, own in enumerate(run_ranks(group_of, 8, parallel, TP_DP)):
        for axis, group in own.items():
            assert [found for found in links.groups(layout, axis) if rank in found] == [group]


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([3], "rank 3 (node1)"),
        ([0, 1, 2, 5, 7], "ranks 0-2, 5, 7 (node0, node1, node2, node3)"),
        (list(range(16)), "ranks 0-15 (node0, node1, node2, node3 and 4 more)"),
        (list(range(0, 20, 2)), "ranks 0, 2, 4, 6, 8, 10, 12, 14, ... (node0, node1, node2, node3 and 6 more)"),
    ],
)
def test_ranks_are_named_in_few_words(ranks: list[int], text: str) -> None:
    assert place(ranks, [f"node{i // 2}" for i in range(20)]) == text


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}


def test_the_tool_under_torchrun(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(dump(TP_DP))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(TOOL)]
    options = [tmp_path / "run.json", "--model.num-layers", "2", "--json", tmp_path / "found.json", "--limit", LIMIT]
    done = subprocess.run(
        [*command, *map(str, options)], capture_output=True, text=True, env=environment(), timeout=250, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["code"] == 0 and {row["check"] for row in found["rows"]} == {
        "environment",
        "links",
        "compute",
        "gradients",
        "time",
    }
    lines = done.stdout.splitlines()
    assert lines[0].startswith("check") and len(lines) == 1 + len(found["rows"])  # only rank 0 prints


def test_a_layout_that_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text(dump(TP_DP))
    monkeypatch.setattr(sys, "argv", [str(TOOL), str(tmp_path / "run.json")])
    monkeypatch.syspath_prepend(str(TOOL.parent))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert ended.value.code == 2
    assert "tensor=2 x pipeline=1 = 2 does not divide the 1 launched ranks" in capsys.readouterr().err


def test_network_variables_that_differ_are_named() -> None:
    right = own_facts(TP_DP) | {"network variables": "NCCL_A=1\nNCCL_B=1"}
    wrong = right | {"network variables": "NCCL_A=1\nNCCL_B=2\nGLOO_C=1"}
    (row,) = [row for row in compare([right, right, wrong], ["a", "a", "b"]) if row.what == "network variables"]
    assert not row.holds and row.found == "2 set; GLOO_C, NCCL_B not the same on others"
