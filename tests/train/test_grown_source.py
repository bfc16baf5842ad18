"""A run that trains what was grown from folder to folder goes on with the moments that grew, as if it had grown it."""

import dataclasses
from pathlib import Path

import pytest
import torch

from megagrow.checkpoint import store
from megagrow.checkpoint.source import Source, open_source
from megagrow.config import CheckpointConfig, Config, GrowthConfig, InitConfig, OptimConfig, ParallelConfig, Policy
from megagrow.evaluate import make_batch
from megagrow.growth.methods import make_recipe
from megagrow.growth.offline import grow_folder
from megagrow.optim import StepGuard
from megagrow.parallel.mesh import Mesh, make_mesh
from megagrow.train import growing, run
from megagrow.train.learner import ModelLearner
from megagrow.train.part import build_part, load_part
from megagrow.train.state import RunState
from tests.ranks import run_ranks
from tests.train.runs import LARGE, SMALL, make_config
from tests.train.test_growing import stored
from tests.train.test_run import assert_same_run, cut_back

GROWTHS: list[tuple[str, Policy]] = [("clone", "exact"), ("clone", "asymmetric"), ("rms_random", "zero_pad")]
STEPS = 40  # of the small model


def grow(trained: Path, folder: Path, method: str = "clone", policy: Policy = "exact") -> Path:
    grow_folder(open_source(trained), folder, make_recipe(method, SMALL, LARGE, seed=1234), Mesh.single(), policy)
    return folder


def learner_of(source: Source, config: Config, mesh: Mesh) -> ModelLearner:
    part = build_part(source.model, config, mesh)
    load_part(part, source.fetch)
    return growing.new_learner(part, config, source)


def both_take_a_step(trained: Path, grown: Path, config: Config, mesh: Mesh) -> None:
    """Growth in a run and a step, and the same step from the grown folder: equal weights and moments, bit for bit."""
    plain = dataclasses.replace(config, growth=GrowthConfig())
    small = learner_of(open_source(trained), config, mesh)
    in_run = growing.begin(small, RunState(SMALL, "small"), config, mesh)
    offline = learner_of(open_source(grown), plain, mesh)
    tokens = torch.randint(256, (4, 17), generator=torch.Generator().manual_seed(1)).chunk(mesh.dp.size)[mesh.dp.rank]
    for learner in (in_run, offline):
        assert learner.step(make_batch(tokens, 4, mesh), 1e-2, StepGuard()).accepted
    assert in_run.state() == offline.state()
    assert offline.state()["step"] == STEPS + 1
    found, expected = stored(offline), stored(in_run)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def both_take_a_step_here(trained: Path, grown: Path, config: Config) -> None:
    both_take_a_step(trained, grown, config, make_mesh(config.parallel))


def growing_config(corpus: Path, directory: Path, method: str, policy: Policy) -> Config:
    growth = GrowthConfig(method, optimizer=policy)
    return dataclasses.replace(make_config(corpus, directory), model=LARGE, growth=growth)


@pytest.mark.parametrize(("method", "policy"), GROWTHS)
@pytest.mark.parametrize("offload", [False, True])
def test_a_step_from_a_grown_folder_is_that_of_growth_in_a_run(
    corpus: Path, trained: Path, tmp_path: Path, method: str, policy: Policy, offload: bool
) -> None:
    config = growing_config(corpus, tmp_path, method, policy)
    config = dataclasses.replace(config, optim=OptimConfig(lr=1e-2, offload=offload))
    both_take_a_step(trained, grow(trained, tmp_path / "large", method, policy), config, Mesh.single())


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_same_on_shards(corpus: Path, trained: Path, tmp_path: Path, tensor: int) -> None:
    config = growing_config(corpus, tmp_path, "clone", "asymmetric")
    config = dataclasses.replace(config, parallel=ParallelConfig(tensor))
    large = grow(trained, tmp_path / "large", policy="asymmetric")
    run_ranks(both_take_a_step_here, 2, trained, large, config)


def from_folder(corpus: Path, directory: Path, source: Path) -> Config:
    plain = make_config(corpus, directory, steps=4, init=InitConfig(str(source)))
    return dataclasses.replace(plain, model=open_source(source).model, checkpoint=CheckpointConfig(2, 0))


def test_runs_say_what_becomes_of_the_moments(
    corpus: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """They go on where growth was the last thing that happened, and are left behind where training was."""
    large = grow(trained, tmp_path / "large", policy="asymmetric")
    assert run(from_folder(corpus, tmp_path / "run", large)) == 0
    assert f"its moments of Adam, {STEPS} updates old, go on in this run" in capfd.readouterr().err
    saved = store.read_manifest(tmp_path / "run/checkpoints/step-2").state["optimizer"]
    assert (saved["step"], saved["new_part"]["since"]) == (STEPS + 2, STEPS)
    cut_back(tmp_path / "run", 2)
    (tmp_path / "run").rename(tmp_path / "broken")
    assert run(from_folder(corpus, tmp_path / "run", large)) == 0
    assert run(from_folder(corpus, tmp_path / "broken", large)) == 0
    assert_same_run(tmp_path / "broken", tmp_path / "run")
    capfd.readouterr()
    for finished in (trained, tmp_path / "run"):
        again = tmp_path / f"{finished.name}-again"
        assert run(from_folder(corpus, again, finished)) == 0
        assert "its moments of Adam are left behind" in capfd.readouterr().err
        assert store.read_manifest(again / "checkpoints/step-4").state["optimizer"]["step"] == 4


def test_a_grown_model_goes_on_until_the_run_grows_it_without_its_moments(
    corpus: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its new entries have updates of their own all the while, which `reset` may lose."""
    large = grow(trained, tmp_path / "large", policy="asymmetric")
    deeper = dataclasses.replace(LARGE, num_layers=6)
    for at_step, said in ((2, "go on in this run"), (0, "are left behind")):
        config = from_folder(corpus, tmp_path / f"run-{at_step}", large)
        growth = GrowthConfig("stack", optimizer="reset", at_step=at_step)
        assert run(dataclasses.replace(config, model=deeper, growth=growth)) == 0
        assert said in capfd.readouterr().err
