"""Whole runs with optional parts: host memory for the optimizer, traces; and refusals before anything is built."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megagrow.checkpoint.source import open_source
from megagrow.config import Config, GrowthConfig, OptimConfig, RunConfig, TrainConfig
from megagrow.roles import parameter_names
from megagrow.train import run
from tests.ranks import run_ranks
from tests.train.runs import LARGE, SMALL, make_config, metrics, run_on_ranks


def config_of(corpus: Path, directory: Path, offload: bool) -> Config:
    """A run that grows before its fourth step; checkpoints after the second, the fourth and the last."""
    growth = GrowthConfig(method="clone", source=SMALL, at_step=3)
    optim = OptimConfig(lr=1e-2, warmup_steps=2, offload=offload)
    return make_config(corpus, directory, optim=optim, model=LARGE, growth=growth)


def assert_same_run(found: Path, expected: Path) -> None:
    assert metrics(found) == metrics(expected)
    ours, theirs = open_source(found), open_source(expected)
    assert all(torch.equal(ours.fetch(name), theirs.fetch(name)) for name in parameter_names(LARGE))


@pytest.mark.parametrize(("ranks", "tensor"), [(1, 1), (4, 2)])
def test_offload_changes_nothing(ranks: int, tensor: int, corpus: Path, tmp_path: Path) -> None:
    for offload, name in ((False, "device"), (True, "host")):
        config = config_of(corpus, tmp_path / name, offload)
        assert run_ranks(run_on_ranks, ranks, config, tensor) == [0] * ranks
    assert_same_run(tmp_path / "host", tmp_path / "device")


@pytest.mark.parametrize("offload", [False, True])
def test_a_run_resumes_with_the_optimizer_elsewhere(offload: bool, corpus: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run_ranks(run_on_ranks, 2, config_of(corpus, whole, offload)) == [0, 0]
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints" / "step-6")
    shutil.rmtree(broken / "checkpoints" / "step-4")  # so that what is loaded grows
    (broken / "checkpoints" / "latest").unlink()
    assert run_ranks(run_on_ranks, 2, config_of(corpus, broken, not offload)) == [0, 0]
    assert_same_run(broken, whole)


def test_every_rank_traces_its_steps(corpus: Path, tmp_path: Path) -> None:
    config = make_config(corpus, tmp_path, run=RunConfig(dir=str(tmp_path), profile_at=2))
    assert run_ranks(run_on_ranks, 2, config) == [0, 0]
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {"rank-0.json", "rank-1.json", "summary.txt"}
    for rank in range(2):
        events = json.loads((tmp_path / "profile" / f"rank-{rank}.json").read_text())["traceEvents"]
        assert {"step 2", "step 3", "step 4"} <= {event["name"] for event in events}
        assert sum(event["name"] == "Optimizer.step#AdamW.step" for event in events) == 3
    assert "Self CPU time total" in (tmp_path / "profile" / "summary.txt").read_text()


REFUSED = [
    ({"train": TrainConfig(attention="flash_attn", precision="bf16")}, "train.attention=flash_attn runs on GPUs"),
    ({"optim": OptimConfig(backend="apex")}, "optim.backend=apex runs on GPUs"),
    ({"run": RunConfig(memory_snapshot_at=2)}, "run.memory_snapshot_at=2 records the memory of a GPU"),
]


@pytest.mark.parametrize(("sections", "message"), REFUSED)
def test_what_this_machine_lacks_is_said_first(sections: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = make_config(tmp_path / "no corpus", tmp_path, **sections)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(tmp_path)))
    assert run(config) == 2
    assert message in json.loads((tmp_path / "exit.json").read_text())["reason"]
