"""Whole runs on ranks: growth and SALT on shards, and runs that go on in another layout."""

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch.distributed as dist

from megagrow.checkpoint import store
from megagrow.config import CheckpointConfig, Config, ParallelConfig, RunConfig
from megagrow.parallel.mesh import make_mesh
from megagrow.train import run, saving
from tests.checkpoint.samples import save_step
from tests.ranks import run_ranks
from tests.train.runs import final_loss, make_config, metrics, run_on_ranks
from tests.train.test_run import cut_back, grown, salted, with_a_new_part

JOBS = [
    # ranks, tensor, pipeline, method, precision, tolerance of the losses, and what else of the layout
    (8, 2, 2, "ligo", "fp32", 2e-4, {}),
    (8, 2, 2, "clone", "fp32", 2e-4, {}),  # with the optimizer's moments
    (8, 2, 2, "ligo", "bf16", 2e-2, {}),
    (4, 2, 2, "ligo", "fp32", 2e-4, {"schedule": "DualPipeV", "sequence_parallel": True}),
    (4, 1, 2, "clone", "fp32", 2e-4, {"schedule": "Interleaved1F1B", "replicate": 2}),
    (8, 2, 1, "ligo", "fp32", 2e-4, {"context": 2, "sequence_parallel": True}),
]


def whole_job(corpus: Path, trained: Path, directory: Path, method: str) -> Config:
    """The small model, growth with its learning, and a teacher, in six steps."""
    config = grown(make_config(corpus, directory, checkpoint=CheckpointConfig(interval=0)), method)
    return salted(config, trained, steps=2)


@pytest.fixture(scope="module")
def one(corpus: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run directory of the whole job in one process in float32, by the method that it grows by."""

    @cache
    def run_directory(method: str) -> Path:
        directory = tmp_path_factory.mktemp(method)
        assert run(whole_job(corpus, trained, directory, method)) == 0
        return directory

    return run_directory


@pytest.mark.parametrize("job", JOBS, ids=lambda job: "-".join(map(str, [*job[:5], *job[6]])))
def test_growth_and_salt_on_shards_equal_one_process(
    corpus: Path,
    trained: Path,
    tmp_path: Path,
    one: Callable[[str], Path],
    job: tuple[int, int, int, str, Literal["fp32", "bf16"], float, dict[str, Any]],
) -> None:
    ranks, tensor, pipeline, method, precision, tolerance, layout = job
    config = whole_job(corpus, trained, tmp_path, method)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, precision=precision))
    assert run_ranks(run_on_ranks, ranks, config, tensor, pipeline, **layout) == [0] * ranks
    for ours, theirs in zip(metrics(tmp_path), metrics(one(method)), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=tolerance), ours["step"]
        assert ours["phase"] == theirs["phase"]
    assert final_loss(tmp_path) == pytest.approx(final_loss(one(method)), abs=tolerance)


def test_another_layout_resumes_the_run(corpus: Path, whole: Path, tmp_path: Path) -> None:
    config = make_config(corpus, tmp_path / "moved")
    assert run_ranks(run_on_ranks, 4, config, 2, 1) == [0] * 4
    cut_back(tmp_path / "moved", 2)
    assert run_ranks(run_on_ranks, 2, config, 1, 2) == [0] * 2
    cut_back(tmp_path / "moved", 4)
    assert run(config) == 0
    assert final_loss(tmp_path / "moved") == pytest.approx(final_loss(whole), abs=1e-5)


def test_the_new_part_goes_on_in_another_layout(corpus: Path, tmp_path: Path) -> None:
    assert run(with_a_new_part(make_config(corpus, tmp_path / "one"))) == 0
    config = with_a_new_part(make_config(corpus, tmp_path / "moved"))
    assert run_ranks(run_on_ranks, 4, config, 2, 1) == [0] * 4
    cut_back(tmp_path / "moved", 4)
    assert run_ranks(run_on_ranks, 2, config, 1, 2) == [0] * 2
    for ours, theirs in zip(metrics(tmp_path / "moved"), metrics(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-5), ours["step"]
    assert final_loss(tmp_path / "moved") == pytest.approx(final_loss(tmp_path / "one"), abs=2e-5)


def first_rank_sees(root: str) -> str:
    """The name that a rank resumes from, where the others see nothing."""
    mesh = make_mesh(ParallelConfig())
    with pytest.MonkeyPatch.context() as monkeypatch:
        if dist.get_rank() > 0:
            monkeypatch.setattr(store, "newest", lambda root, passed_over: None)
        path = saving.newest(Config(run=RunConfig(dir=root)), mesh)
        return "" if path is None else path.name


def test_all_ranks_resume_from_what_the_first_one_sees(tmp_path: Path) -> None:
    save_step(tmp_path / "checkpoints", 1)
    save_step(tmp_path / "checkpoints", 2)
    assert run_ranks(first_rank_sees, 2, str(tmp_path)) == ["step-2"] * 2
