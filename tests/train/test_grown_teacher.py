"""Runs whose own small model teaches what it has grown into."""

import dataclasses
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megagrow.config import CheckpointConfig, Config, SaltConfig
from megagrow.earlier_growth import EarlierGrowth
from megagrow.parallel.shards import local
from megagrow.salt.teacher import Teacher
from megagrow.train import growing, grown_teacher, run
from megagrow.train.part import Part
from tests.ranks import run_ranks
from tests.train.runs import SMALL, make_config, metrics, run_on_ranks
from tests.train.test_background_saves import writers
from tests.train.test_run import assert_same_run, cut_back, grown, ledger, poison, weights

SALT = SaltConfig(teacher="grown", steps=2, weight=0.5)


def self_taught(corpus: Path, directory: Path, method: str = "clone") -> Config:
    """Three steps of the small model, two with it as the teacher, one without."""
    return dataclasses.replace(grown(make_config(corpus, directory), method), salt=SALT)


def test_the_small_model_teaches_as_it_was_when_it_grew(corpus: Path, tmp_path: Path) -> None:
    """Its weights are those of a run that never grows, after as many steps; nothing is inherited for it."""
    assert run(self_taught(corpus, tmp_path / "run")) == 0
    lines = metrics(tmp_path / "run")
    assert [line["phase"] for line in lines] == ["small"] * 3 + ["salt"] * 2 + ["train"]
    assert [line["kd"] is not None and line["kd"] > 0 for line in lines] == [False] * 3 + [True] * 2 + [False]
    assert run(make_config(corpus, tmp_path / "small", checkpoint=CheckpointConfig(interval=1, keep_last=0))) == 0
    kept, expected = weights(tmp_path / "run/checkpoints/teacher"), weights(tmp_path / "small/checkpoints/step-3")
    assert kept.keys() == expected.keys() and all(torch.equal(kept[name], expected[name]) for name in kept)
    totals = ledger(tmp_path / "run")["totals"]
    phases = {phase["phase"]: phase["flops"] for phase in ledger(tmp_path / "run")["phases"]}
    assert totals["all_in"]["flops"] == pytest.approx(totals["papers_convention"]["flops"] + phases["small"])


@pytest.mark.parametrize(("method", "step"), [("clone", 2), ("clone", 4), ("ligo", 4)])
def test_resuming_before_and_after_growing(corpus: Path, tmp_path: Path, method: str, step: int) -> None:
    assert run(self_taught(corpus, tmp_path / "whole", method)) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    cut_back(tmp_path / "broken", step)
    assert run(self_taught(corpus, tmp_path / "broken", method)) == 0
    assert_same_run(tmp_path / "broken", tmp_path / "whole")


def test_shards_equal_one_process(corpus: Path, tmp_path: Path) -> None:
    assert run(self_taught(corpus, tmp_path / "one")) == 0
    assert run_ranks(run_on_ranks, 4, self_taught(corpus, tmp_path / "many"), 2, 2) == [0] * 4
    for ours, theirs in zip(metrics(tmp_path / "many"), metrics(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-4)


@pytest.mark.parametrize("method", ["clone", "ligo"])
def test_the_small_model_is_held_once(
    corpus: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the teacher is read, the weights that were trained have given their memory back."""
    small: list[Part] = []
    held: list[int] = []
    begin, make = growing.begin, Teacher.__init__

    def watched_begin(learner: Any, *args: Any) -> Any:
        small.append(learner.part)
        return begin(learner, *args)

    def watched_make(self: Teacher, *args: Any) -> None:
        held.append(sum(local(p.detach()).untyped_storage().nbytes() for p in small[0].parameters.values()))
        make(self, *args)

    monkeypatch.setattr(growing, "begin", watched_begin)
    monkeypatch.setattr(Teacher, "__init__", watched_make)
    assert run(self_taught(corpus, tmp_path, method)) == 0
    assert held == [0]


def test_the_teacher_is_not_written_beside_a_save(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both speak through one group: a save in the background must be over before the small model is kept."""
    keep, under_way = grown_teacher.keep, []

    def watched(*args: Any) -> None:
        under_way.append([thread.name for thread in threading.enumerate() if thread.name.startswith("checkpoint-")])
        keep(*args)

    monkeypatch.setattr(grown_teacher, "keep", watched)
    config = dataclasses.replace(self_taught(corpus, tmp_path), checkpoint=CheckpointConfig(interval=3))
    with writers(lambda: time.sleep(1.0)):
        assert run(config) == 0
    assert under_way == [[]]


def test_a_run_that_grows_again_is_taught_by_what_it_grows_then(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It went back to before it grew, and goes on at another rate; what it kept at first is of another model."""
    keep, grew = grown_teacher.keep, []

    def watched(part: Part, *args: Any) -> None:
        grew.append({name: local(p.detach()).clone() for name, p in part.parameters.items()})
        keep(part, *args)

    monkeypatch.setattr(grown_teacher, "keep", watched)
    config = self_taught(corpus, tmp_path)
    assert run(config) == 0
    cut_back(tmp_path, 2)
    assert run(dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=2e-2))) == 0
    first, second = grew
    kept = weights(tmp_path / "checkpoints/teacher")
    assert any(not torch.equal(first[name], second[name]) for name in kept)
    assert all(torch.equal(kept[name], second[name]) for name in kept)


def test_of_several_growths_the_model_before_the_last_teaches(corpus: Path, tmp_path: Path) -> None:
    config = self_taught(corpus, tmp_path)
    growth = dataclasses.replace(
        config.growth, method="clone+stack", earlier=(EarlierGrowth(num_layers=4, at_step=1, optimizer="reset"),)
    )
    assert run(dataclasses.replace(config, growth=growth)) == 0
    assert grown_teacher.teacher_folder(config) == tmp_path / "checkpoints" / "teacher"
    kept = weights(tmp_path / "checkpoints" / "teacher")
    assert "layers.3.mlp.down.weight" in kept and kept["embedding.tokens"].shape[1] == SMALL.hidden_size


def test_another_vocabulary_is_refused_before_training(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = self_taught(corpus, tmp_path)
    growth = dataclasses.replace(config.growth, optimizer="reset")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=300), growth=growth)
    assert run(config) == 2
    assert "the teacher has vocab_size=256, the model vocab_size=300" in capfd.readouterr().err
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_roll_back_across_the_growth_is_taught_by_what_it_grows_then(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step after growing is bad, and the small model that grows next has trained on other samples."""
    poison(monkeypatch, {3})
    teachers: list[dict[str, torch.Tensor]] = []
    make = Teacher.__init__

    def noted(self: Teacher, *args: Any) -> None:
        make(self, *args)
        teachers.append({name: parameter.clone() for name, parameter in self.model.named_parameters()})

    monkeypatch.setattr(Teacher, "__init__", noted)
    config = self_taught(corpus, tmp_path)
    assert run(dataclasses.replace(config, optim=dataclasses.replace(config.optim, max_bad_steps=1))) == 0
    assert [line["phase"] for line in metrics(tmp_path)] == ["small"] * 3 + ["salt"] * 2 + ["train"]
    first, second = teachers
    kept = weights(tmp_path / "checkpoints/teacher")
    assert any(not torch.equal(first[name], second[name]) for name in second)
    assert all(torch.equal(kept[name], second[name]) for name in second)
