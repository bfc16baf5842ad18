"""Whole runs: resuming is exact, bad steps never reach the weights, stops are saved."""

import dataclasses
import errno
import json
import math
import os
import re
import shutil
import signal
import time
import weakref
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megagrow import flops, ops, serving
from megagrow.checkpoint import dcp_io, store
from megagrow.checkpoint.saver import Saver
from megagrow.checkpoint.source import open_source
from megagrow.config import CheckpointConfig, Config, GrowthConfig, InitConfig, OptimConfig, SaltConfig
from megagrow.errors import DataError
from megagrow.metrics import Metrics
from megagrow.optim import StepGuard
from megagrow.roles import parameter_names
from megagrow.salt.teacher import Teacher
from megagrow.train import growing, learner, run, trainer
from megagrow.train.learner import ModelLearner
from tests.ranks import run_ranks
from tests.train.runs import LARGE, SMALL, make_config, metrics

EVERY_STEP = CheckpointConfig(interval=1, keep_last=0)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    source = open_source(directory)
    return {name: source.fetch(name) for name in parameter_names(source.model)}


def assert_same_run(found: Path, expected: Path) -> None:
    """Same lines in metrics.jsonl, same weights, bit for bit; same ledger but for the seconds."""
    assert metrics(found) == metrics(expected)
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    steps = [[(p["phase"], p["steps"], p["flops"]) for p in ledger(d)["phases"]] for d in (found, expected)]
    assert steps[0] == steps[1]


def ledger(directory: Path) -> dict:
    return json.loads((directory / "ledger.json").read_text())


def cut_back(directory: Path, step: int) -> None:
    """Makes a finished run look as if it had been killed some steps after its checkpoint of `step`."""
    for path in (directory / "checkpoints").glob("step-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    (directory / "checkpoints" / "latest").unlink()
    (directory / "exit.json").unlink()


def resumed_at(step: int, whole: Path, config: Callable[[Path], Config], directory: Path) -> Path:
    """What comes of the run when it was killed after its checkpoint of `step`."""
    shutil.copytree(whole, directory)
    cut_back(directory, step)
    assert run(config(directory)) == 0
    return directory


def grown(config: Config, method: str, at_step: int = 3) -> Config:
    growth = GrowthConfig(
        method=method,
        source=SMALL,
        at_step=at_step,
        optimizer="reset" if method == "ligo" else "exact",
        ligo_steps=4,
        rewarmup_steps=2,
    )
    return dataclasses.replace(config, model=LARGE, growth=growth)


Whole = Callable[[str], Path]


@pytest.fixture(scope="module")
def whole_grown(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The run directory of six steps that grow by a method on the way."""

    @cache
    def whole(method: str) -> Path:
        directory = tmp_path_factory.mktemp(method)
        assert run(grown(make_config(corpus, directory), method)) == 0
        return directory

    return whole


def test_a_run_learns_and_leaves_what_the_interface_promises(trained: Path) -> None:
    lines = metrics(trained)
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert lines[-1]["loss"] < 0.75 * lines[0]["loss"]
    assert json.loads((trained / "exit.json").read_text())["code"] == 0
    assert json.loads((trained / "config.json").read_text())["train"]["steps"] == 40
    assert ledger(trained)["totals"]["papers_convention"]["tokens"] == 40 * 4 * 16


@pytest.mark.parametrize("step", [2, 4])
def test_resuming_gives_the_unbroken_run_bit_for_bit(corpus: Path, whole: Path, tmp_path: Path, step: int) -> None:
    assert_same_run(resumed_at(step, whole, partial(make_config, corpus), tmp_path / "broken"), whole)


@pytest.mark.parametrize(("method", "step"), [("clone", 2), ("clone", 4), *(("ligo", s) for s in (2, 4, 6, 8))])
def test_resuming_around_growth_gives_the_unbroken_run(
    corpus: Path, whole_grown: Whole, tmp_path: Path, method: str, step: int
) -> None:
    whole = whole_grown(method)
    found = resumed_at(step, whole, lambda folder: grown(make_config(corpus, folder), method), tmp_path / "broken")
    assert_same_run(found, whole)


def with_a_new_part(config: Config) -> Config:
    """Grows before step 4 of 6; new entries are still warming up at the end."""
    growth = dataclasses.replace(
        grown(config, "clone").growth, optimizer="asymmetric", rewarmup_part="new", rewarmup_steps=5
    )
    return dataclasses.replace(config, model=LARGE, growth=growth)


def test_resuming_while_the_new_part_warms_up_gives_the_unbroken_run(corpus: Path, tmp_path: Path) -> None:
    assert run(with_a_new_part(make_config(corpus, tmp_path / "whole"))) == 0
    state = store.read_manifest(tmp_path / "whole/checkpoints/step-4").state
    assert (state["optimizer"]["new_part"]["since"], state["optimizer"]["step"]) == (3, 4)
    found = resumed_at(
        4, tmp_path / "whole", lambda folder: with_a_new_part(make_config(corpus, folder)), tmp_path / "broken"
    )
    assert_same_run(found, tmp_path / "whole")
    assert [line["lr"] for line in metrics(tmp_path / "whole")[3:5]] == [1e-2] * 2  # of the old entries: as scheduled


def test_growing_counts_every_sample_once(whole_grown: Whole) -> None:
    whole = whole_grown("ligo")
    phases = [line["phase"] for line in metrics(whole)]
    assert phases == ["small"] * 3 + ["ligo"] * 4 + ["train"] * 3
    state = store.read_manifest(store.candidates(whole / "checkpoints")[0]).state
    assert state["cursors"]["all"] == 10 * 4
    (event,) = ledger(whole)["events"]
    assert event["loss_before"] > 0 and event["loss_after"] > 0
    (growth,) = [phase for phase in ledger(whole)["phases"] if phase["phase"] == "growth"]
    assert growth["steps"] == 2 and growth["flops"] > 0 and growth["seconds"] > 0  # before and after learning


def test_losses_of_the_small_model_do_not_make_those_of_the_large_one_spikes(corpus: Path, tmp_path: Path) -> None:
    optim = OptimConfig(lr=1e-2, warmup_steps=2, spike_sigma=1e-3, spike_window=8, max_bad_steps=1000)
    config = grown(make_config(corpus, tmp_path, optim=optim), "ligo")
    config = dataclasses.replace(config, growth=dataclasses.replace(config.growth, ligo_noise=3.0))
    assert run(config) == 0
    lines = metrics(tmp_path)
    assert lines[3]["phase"] == "ligo" and lines[3]["loss"] > lines[2]["loss"], "no jump: nothing is tested"
    assert not lines[3]["skipped"]


def test_clone_keeps_the_loss_at_the_step_where_it_grows(corpus: Path, tmp_path: Path) -> None:
    config = grown(make_config(corpus, tmp_path), "clone")
    config = dataclasses.replace(config, model=dataclasses.replace(LARGE, num_layers=SMALL.num_layers))
    assert run(config) == 0
    (event,) = ledger(tmp_path)["events"]
    assert event["loss_after"] == pytest.approx(event["loss_before"], abs=1e-5)


def test_recompute_changes_no_bit_and_dropout_survives_a_resume(corpus: Path, whole: Path, tmp_path: Path) -> None:
    def config(name: str, recompute: Literal["none", "selective", "full"]) -> Config:
        plain = make_config(corpus, tmp_path / name)
        data = dataclasses.replace(plain.data, mask_documents=True)
        train = dataclasses.replace(plain.train, dropout=0.2, recompute=recompute)
        return dataclasses.replace(plain, data=data, train=train)

    for how in ("none", "selective", "full"):
        assert run(config(how, how)) == 0
    assert_same_run(tmp_path / "selective", tmp_path / "none")
    assert_same_run(tmp_path / "full", tmp_path / "none")
    cut_back(tmp_path / "full", 4)
    assert run(config("full", "full")) == 0
    assert_same_run(tmp_path / "full", tmp_path / "none")
    assert metrics(whole)[0]["loss"] != metrics(tmp_path / "none")[0]["loss"]


def salted(config: Config, teacher: Path, steps: int = 3) -> Config:
    return dataclasses.replace(config, salt=SaltConfig(teacher=str(teacher), steps=steps, weight=0.5))


@pytest.fixture(scope="module")
def whole_salted(corpus: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of six steps, three of them taught, with the checkpoints of all."""
    directory = tmp_path_factory.mktemp("salted")
    assert run(salted(make_config(corpus, directory, checkpoint=EVERY_STEP), trained)) == 0
    return directory


@pytest.mark.parametrize("step", [2, 3, 4])
def test_resuming_around_the_stage_switch(
    corpus: Path, trained: Path, whole_salted: Path, tmp_path: Path, step: int
) -> None:
    def config(directory: Path) -> Config:
        return salted(make_config(corpus, directory, checkpoint=EVERY_STEP), trained)

    assert_same_run(resumed_at(step, whole_salted, config, tmp_path / "broken"), whole_salted)
    lines = metrics(whole_salted)
    assert [line["phase"] for line in lines] == ["salt"] * 3 + ["train"] * 3
    for name in ("kd", "teacher_entropy"):
        assert all(line[name] > 0 for line in lines[:3]) and all(line[name] is None for line in lines[3:])


def test_an_inheriting_run_weighs_its_teacher_less_with_every_step(corpus: Path, trained: Path, tmp_path: Path) -> None:
    """Also when it goes on from a checkpoint in the middle; the ledger counts the teacher."""

    def inheriting(directory: Path) -> Config:
        salt = SaltConfig(str(trained), 4, 1.0, "linear", 2.0, "both", scale_by_temperature_squared=True)
        return dataclasses.replace(make_config(corpus, directory), salt=salt)

    assert run(inheriting(tmp_path / "whole")) == 0
    assert_same_run(resumed_at(2, tmp_path / "whole", inheriting, tmp_path / "broken"), tmp_path / "whole")
    lines = metrics(tmp_path / "whole")
    for line, a in zip(lines[:4], (1.0, 0.75, 0.5, 0.25), strict=True):
        assert line["loss"] == pytest.approx((1 - a) * line["ce"] + a * line["kd"], rel=1e-6)
    assert all(line["loss"] == line["ce"] and line["kd"] is None for line in lines[4:])
    (teacher,) = [phase for phase in ledger(tmp_path / "whole")["phases"] if phase["phase"] == "teacher"]
    tokens = 4 * 4 * 16
    assert (teacher["steps"], teacher["tokens"]) == (4, tokens)
    assert teacher["flops"] == flops.forward_flops(SMALL, tokens, 16)


def test_a_changed_teacher_is_refused_on_resuming(
    corpus: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "teacher")
    config = salted(make_config(corpus, tmp_path / "run"), tmp_path / "teacher")
    assert run(config) == 0
    cut_back(tmp_path / "run", 2)
    shutil.rmtree(tmp_path / "teacher/checkpoints/step-40")
    (tmp_path / "teacher/checkpoints/latest").unlink()
    assert run(config) == 4
    assert "salt.teacher has changed" in capfd.readouterr().err


def test_a_bf16_run_is_taught_in_bf16(
    corpus: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, seen = Teacher.hidden, []

    def watched(self: Teacher, *args: object) -> torch.Tensor | None:
        states = hidden(self, *args)
        seen.append(states.dtype)
        return states

    monkeypatch.setattr(Teacher, "hidden", watched)
    config = salted(make_config(corpus, tmp_path), trained)
    assert run(dataclasses.replace(config, train=dataclasses.replace(config.train, precision="bf16"))) == 0
    assert seen == [torch.bfloat16] * 3
    assert all(line["kd"] > 0 for line in metrics(tmp_path)[:3])


def test_a_teacher_of_weight_zero_changes_nothing(corpus: Path, trained: Path, whole: Path, tmp_path: Path) -> None:
    salt = SaltConfig(teacher=str(trained), steps=3, weight=0.0)
    assert run(make_config(corpus, tmp_path, salt=salt)) == 0
    for ours, theirs in zip(metrics(tmp_path), metrics(whole), strict=True):
        assert all(ours[name] == theirs[name] for name in ("loss", "ce", "grad_norm", "validation_loss"))
    found, expected = weights(tmp_path), weights(whole)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_with_every_option_of_the_loss(corpus: Path, trained: Path, tmp_path: Path) -> None:
    """The terms are logged apart; what is validated is the plain cross-entropy."""

    def first(name: str, salt: SaltConfig, **more: float) -> dict[str, float]:
        config = make_config(corpus, tmp_path / name, steps=1, salt=salt)
        assert run(dataclasses.replace(config, train=dataclasses.replace(config.train, eval_interval=1, **more))) == 0
        (line,) = metrics(tmp_path / name)
        return line

    plain = first("plain", SaltConfig())
    salt = SaltConfig(teacher=str(trained), steps=1, weight=0.25)
    forward, cross, reverse = (
        first(divergence, dataclasses.replace(salt, divergence=divergence))
        for divergence in ("forward_kl", "cross_entropy", "reverse_kl")
    )
    assert cross["kd"] == pytest.approx(forward["kd"] + forward["teacher_entropy"], rel=1e-6)
    assert 0 < reverse["kd"] != forward["kd"]
    for line in (forward, cross, reverse):
        assert line["ce"] == plain["ce"] == plain["loss"]
        assert line["loss"] == pytest.approx(0.75 * line["ce"] + 0.25 * line["kd"], rel=1e-6)
    assert cross["validation_loss"] == forward["validation_loss"] != reverse["validation_loss"]
    smoothed, squared = first("smoothed", SaltConfig(), label_smoothing=0.1), first("squared", SaltConfig(), z_loss=0.1)
    for line in (smoothed, squared):
        assert line["ce"] == plain["ce"] and line["kd"] is line["teacher_entropy"] is None
        assert line["loss"] != line["ce"] and line["validation_loss"] != plain["validation_loss"]
    assert squared["loss"] > squared["ce"] + 0.1


def test_a_teacher_whose_vocabulary_is_padded_otherwise(
    corpus: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = dataclasses.replace(SMALL, vocab_size=272)
    assert run(salted(make_config(corpus, tmp_path, steps=2, model=model), trained, steps=1)) == 0
    assert "both vocabularies have, 256 of the teacher and 272 of the model" in capfd.readouterr().err
    taught, plain = metrics(tmp_path)
    assert taught["kd"] > 0 and taught["loss"] == pytest.approx((taught["ce"] + taught["kd"]) / 2, rel=1e-6)
    assert plain["kd"] is None and plain["loss"] == plain["ce"]


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(
    corpus: Path, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "damaged")
    cut_back(tmp_path / "damaged", 4)
    (file,) = (tmp_path / "damaged/checkpoints/step-4").glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    capfd.readouterr()
    assert run(make_config(corpus, tmp_path / "damaged")) == 0
    assert "step-4" in capfd.readouterr().err
    assert_same_run(tmp_path / "damaged", whole)


def test_a_damaged_checkpoint_is_no_reason_to_delete_the_good_one(corpus: Path, whole: Path, tmp_path: Path) -> None:
    """After a fall-back to step 2, with 4 damaged, the save of step 5 keeps two good ones."""
    directory, kept = tmp_path / "run", CheckpointConfig(interval=5, keep_last=2)
    shutil.copytree(whole, directory)
    cut_back(directory, 4)
    (file,) = (directory / "checkpoints/step-4").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert run(make_config(corpus, directory, steps=5, checkpoint=kept)) == 0
    assert {"step-2", "step-5"} <= {path.name for path in (directory / "checkpoints").iterdir()}


@pytest.mark.parametrize("problem", ["an error of the disk", "another model"])
def test_only_damage_is_a_reason_to_fall_back(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], problem: str
) -> None:
    """Else a run would train again, maybe with the small model that it grew from, and meet its own step at the end."""
    config = make_config(corpus, tmp_path / "run")
    assert run(config) == 0
    before = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    if problem == "another model":
        shapes = {"model.embedding.weight": torch.zeros(1)}
        monkeypatch.setattr(ModelLearner, "tensors", lambda self: shapes)
    else:
        stale = OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        monkeypatch.setattr(dcp_io.ItemReader, "_slice_file", mock.Mock(side_effect=stale))
    capfd.readouterr()
    assert run(config) == 4
    told = capfd.readouterr().err
    assert "step-6" in told and ("do not fit" in told or "Stale file handle" in told)
    assert "trying the one before" not in told
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == before


def test_falling_back_holds_one_learner_at_a_time(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Else a run that fills its GPUs could never come back from a damaged checkpoint."""
    config = make_config(corpus, tmp_path / "run")
    assert run(config) == 0
    (file,) = (tmp_path / "run/checkpoints/step-6").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-1])
    made: list[weakref.ref[learner.Learner]] = []
    alive: list[bool] = []

    def learner_for(*given: Any) -> learner.Learner:
        alive.extend(each() is not None for each in made)
        found = build(*given)
        made.append(weakref.ref(found))
        return found

    build = growing.learner_for
    monkeypatch.setattr(growing, "learner_for", learner_for)
    assert run(config) == 0
    assert "trying the one before it" in capfd.readouterr().err
    assert alive == [False]


def test_stage_one_keeps_its_length_when_the_run_is_extended(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Or a run in stage 2 would go back to its teacher."""
    assert run(make_config(corpus, tmp_path / "teacher")) == 0
    salt = SaltConfig(teacher=str(tmp_path / "teacher"), share=0.5)
    config = make_config(corpus, tmp_path / "run", 4, salt=salt)
    assert run(config) == 0
    assert "stage 1 keeps" not in capfd.readouterr().err
    assert run(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=8))) == 0
    assert (
        "salt.share=0.5: stage 1 keeps its 2 steps, as the run began; --salt.share 0 --salt.steps N"
        in capfd.readouterr().err
    )
    assert [line["phase"] for line in metrics(tmp_path / "run")] == ["salt"] * 2 + ["train"] * 6


def test_a_growth_whose_losses_are_not_finite_can_be_saved(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.Trainer, "_validate", lambda self, learner: math.nan)
    assert run(grown(make_config(corpus, tmp_path, checkpoint=CheckpointConfig(interval=1)), "ligo")) == 0
    (event,) = ledger(tmp_path)["events"]
    assert (event["loss_before"], event["loss_initial"], event["loss_after"]) == (None, None, None)


def test_a_signal_saves_and_exits_7(corpus: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(corpus, tmp_path / "stopped", checkpoint=CheckpointConfig(interval=0))
    step = ModelLearner.step

    def signalled(self: ModelLearner, *args: object) -> object:
        result = step(self, *args)
        if self.optimizer.step_count == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(ModelLearner, "step", signalled)
    assert run(config) == 7
    ended = json.loads((tmp_path / "stopped/exit.json").read_text())
    assert (ended["code"], ended["step"]) == (7, 3)
    monkeypatch.undo()
    assert run(config) == 0
    assert_same_run(tmp_path / "stopped", whole)


def test_an_interrupted_start_is_not_a_finished_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: object, *args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Trainer, "__init__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(make_config(corpus, tmp_path))
    assert json.loads((tmp_path / "exit.json").read_text())["code"] == 1


def fail_on_the_last_rank(config: Config) -> tuple[int, int]:
    """The last rank cannot read its data; the first one fails in the collective that it is missing from."""
    last = dist.get_rank() == dist.get_world_size() - 1
    learn = trainer.Trainer._learn

    def failing(self: trainer.Trainer, salt_on: bool) -> object:
        if last:
            raise DataError("a file of this rank is gone")
        deadline = time.monotonic() + 20
        while not (Path(config.run.dir) / "exit.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        raise RuntimeError("connection closed by peer")

    trainer.Trainer._learn = failing  # type: ignore[method-assign]
    try:
        code = run(config)
    finally:
        trainer.Trainer._learn = learn  # type: ignore[method-assign]
    return code, json.loads((Path(config.run.dir) / "exit.json").read_text())["code"]


def test_exit_json_names_the_first_cause_not_the_rank_that_was_left_waiting(corpus: Path, tmp_path: Path) -> None:
    run_ranks(run, 1, make_config(corpus, tmp_path / "of the first rank alone"))  # which its peers must not miss
    results = run_ranks(fail_on_the_last_rank, 2, make_config(corpus, tmp_path))
    assert [code for code, _ in results] == [
        3,
        3,
    ]  # the one left waiting ends with the cause too: its node's agent sees it
    assert json.loads((tmp_path / "exit.json").read_text())["code"] == 3


def poison(monkeypatch: pytest.MonkeyPatch, bad_calls: set[int]) -> None:
    """Turns the gradients of some calls into NaN on the way to the optimizer."""
    norm, calls = learner.gradient_norm, iter(range(1000))

    def poisoned(parameters: dict[str, torch.nn.Parameter], *args: object) -> torch.Tensor:
        if next(calls) in bad_calls:
            next(iter(parameters.values())).grad[0, 0] = float("nan")
        return norm(parameters, *args)

    monkeypatch.setattr(learner, "gradient_norm", poisoned)


def test_a_non_finite_gradient_never_reaches_the_weights(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {2})
    assert run(make_config(corpus, tmp_path)) == 0
    assert [line["skipped"] for line in metrics(tmp_path)] == [False, False, True, False, False, False]
    assert metrics(tmp_path)[2]["non_finite"] == ["grad_norm"]
    state = store.read_manifest(store.candidates(tmp_path / "checkpoints")[0]).state
    assert state["optimizer"]["step"] == 5
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


def test_bad_steps_roll_back_once_and_skip_the_data(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optim = OptimConfig(lr=1e-2, warmup_steps=2, max_bad_steps=2)
    poison(monkeypatch, {3, 4})
    assert run(make_config(corpus, tmp_path, optim=optim, checkpoint=CheckpointConfig(interval=3))) == 0
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    state = store.read_manifest(store.candidates(tmp_path / "checkpoints")[0]).state
    assert state["cursors"]["all"] == 8 * 4
    (train,) = [phase for phase in ledger(tmp_path)["phases"] if phase["phase"] == "train"]
    assert train["steps"] == 8, "what was thrown away was spent all the same"


@pytest.mark.parametrize(("interval", "target"), [(1, 5), (2, 4)])
def test_a_roll_back_leads_out_of_the_bad_stretch(
    interval: int,
    target: int,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Steps 6 to 8 are refused, and the first one after the roll-back, which begins a count of its own."""
    optim = OptimConfig(lr=1e-2, warmup_steps=2, max_bad_steps=3)
    poison(monkeypatch, {5, 6, 7, 8})
    checkpoint = CheckpointConfig(interval=interval, keep_last=0)
    assert run(make_config(corpus, tmp_path, 10, optim=optim, checkpoint=checkpoint)) == 0
    assert f"rolled back to step {target}," in capfd.readouterr().err
    paths = store.candidates(tmp_path / "checkpoints")
    assert all(store.read_manifest(path).state["guard"]["bad_steps"] == 0 for path in paths)


def test_a_save_that_a_bad_step_holds_up_follows_it(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {3, 4})
    assert run(make_config(corpus, tmp_path, 7, checkpoint=CheckpointConfig(interval=4, keep_last=0))) == 0
    assert {path.name for path in store.candidates(tmp_path / "checkpoints")} == {"step-6", "step-7"}


def test_a_stop_among_bad_steps_saves_all_the_same(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {3, 4, 5})
    note = Metrics.log

    def stopped(self: Metrics, **values: Any) -> None:
        note(self, **values)
        if values["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Metrics, "log", stopped)
    assert run(make_config(corpus, tmp_path, 8, checkpoint=CheckpointConfig(interval=2, keep_last=0))) == 7
    newest = store.candidates(tmp_path / "checkpoints")[0]
    assert newest.name == "step-5" and store.read_manifest(newest).state["guard"]["bad_steps"] == 2


def stop_at(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Asks the run to stop after each of these steps, once."""
    note, left = Metrics.log, set(steps)

    def log(self: Metrics, **values: Any) -> None:
        note(self, **values)
        if values["step"] in left:
            left.remove(values["step"])
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Metrics, "log", log)


def test_a_roll_back_leads_past_what_stops_among_bad_steps_have_saved(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The weights are to blame: from step 5 on all steps are bad, until the run is back at the checkpoint of step 4."""
    whole, calls = learner.gradient_norm, list[int]()

    def norm(parameters: dict[str, torch.nn.Parameter], *args: object) -> torch.Tensor:
        weight = next(iter(parameters.values()))
        calls.append(len(calls))
        if len(calls) == 5:
            weight.data[0, 0] = 1e9  # as if an update had led there
        if weight.data[0, 0] == 1e9:
            weight.grad[0, 0] = float("nan")
        return whole(parameters, *args)

    stop_at(monkeypatch, {6, 7})
    monkeypatch.setattr(learner, "gradient_norm", norm)
    optim = OptimConfig(lr=1e-2, warmup_steps=2, max_bad_steps=4)
    config = make_config(corpus, tmp_path, 9, optim=optim, checkpoint=CheckpointConfig(interval=4, keep_last=2))
    assert [run(config), run(config)] == [7, 7]
    assert {path.name for path in store.candidates(tmp_path / "checkpoints")} >= {"step-4", "step-6", "step-7"}
    assert run(config) == 0
    assert "saved among the bad steps, and set aside: step-7, step-6" in capfd.readouterr().err
    assert [line["skipped"] for line in metrics(tmp_path)] == [False] * 9
    found = store.candidates(tmp_path / "checkpoints")[0]
    assert found.name == "step-9" and store.read_manifest(found).state["rolled_back_at"] == 8


@pytest.mark.parametrize("is_older_damaged", [False, True])
def test_a_roll_back_leads_no_further_than_it_must(
    is_older_damaged: bool, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To what a stop after one bad step has saved: good steps have come since, or nothing else is whole."""
    stop_at(monkeypatch, {5})
    poison(monkeypatch, {4, 6, 7} if not is_older_damaged else {4, 5})
    optim = OptimConfig(lr=1e-2, warmup_steps=2, max_bad_steps=2)
    config = make_config(corpus, tmp_path, 9, optim=optim, checkpoint=CheckpointConfig(interval=4, keep_last=0))
    assert run(config) == 7
    if is_older_damaged:
        (tmp_path / "checkpoints/step-4/manifest.json").write_text("{}")
    assert run(config) == 0
    state = store.read_manifest(tmp_path / "checkpoints/step-9").state
    assert state["rolled_back_at"] == (6 if is_older_damaged else 8)
    assert [line["skipped"] for line in metrics(tmp_path)] == [False] * 4 + [True] + [False] * 4


@pytest.mark.parametrize(("bad", "code"), [({3, 4, 10, 11}, 0), ({3, 4, 9, 10}, 5)])
def test_a_run_rolls_back_again_once_it_has_come_further(
    bad: set[int], code: int, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rolled back from step 5 to step 3: call 5 is step 4, call 9 is step 8, up to which it has to come."""
    optim = OptimConfig(lr=1e-2, warmup_steps=2, max_bad_steps=2)
    poison(monkeypatch, bad)
    checkpoint = CheckpointConfig(interval=3, keep_last=0)
    assert run(make_config(corpus, tmp_path, 12, optim=optim, checkpoint=checkpoint)) == code


@pytest.mark.parametrize(("is_blend", "num_samples", "code"), [(True, 0, 5), (True, 8 * 4, 0), (False, 0, 0)])
def test_a_roll_back_in_megatrons_order_needs_spare_samples(
    is_blend: bool,
    num_samples: int,
    code: int,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Six steps of four samples, of which two are done again; that there are too few is told at once.

    A blend ends with its last draw, one dataset at the end of an epoch.
    """
    optim = OptimConfig(lr=1e-2, warmup_steps=2, max_bad_steps=2)
    poison(monkeypatch, {3, 4})
    config = make_config(corpus, tmp_path, optim=optim, checkpoint=CheckpointConfig(interval=3))
    names = ("1", corpus / "train", "1", corpus / "validation") if is_blend else (corpus / "train",)
    train = " ".join(map(str, names))
    data = dataclasses.replace(config.data, train=train, order="megatron", num_samples=num_samples)
    assert run(dataclasses.replace(config, data=data)) == code
    assert code == 0 or "takes 32 samples, data.order=megatron has 24" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("train", "num_samples", "told"),
    [
        ("{0}/train {0}/validation", 0, "a blend without weights ends with its datasets"),
        (
            "1 {0}/train 1 {0}/validation",
            4000,
            r"data\.num_samples=4000\), and this run takes 8000; set --data",
        ),
        ("{0}/train", 100, r"data\.num_samples=100\), and this run takes 8000; set --data\.num-samples 8000 or more"),
    ],
)
def test_a_run_for_which_megatrons_order_is_too_short_does_not_begin(
    train: str, num_samples: int, told: str, corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make_config(corpus, tmp_path, 2000)
    data = dataclasses.replace(config.data, train=train.format(corpus), order="megatron", num_samples=num_samples)
    assert run(dataclasses.replace(config, data=data)) == 2
    assert re.search(told, capfd.readouterr().err)


def test_megatrons_order_goes_on_at_another_length(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Shorter, and in larger batches, with the number that it was made for; longer where there are samples to spare."""

    def begun(num_samples: int, **train: int) -> int:
        config = make_config(corpus, tmp_path, 4)
        names = f"1 {corpus / 'train'} 1 {corpus / 'validation'}"
        data = dataclasses.replace(config.data, train=names, order="megatron", num_samples=num_samples)
        return run(dataclasses.replace(config, data=data, train=dataclasses.replace(config.train, **train)))

    assert begun(0) == 0
    cut_back(tmp_path, 2)
    assert begun(0, steps=3) == 4
    assert "set --data.num-samples 16" in capfd.readouterr().err
    assert begun(16, steps=3) == 0
    cut_back(tmp_path, 2)
    assert begun(16, steps=3, global_batch_size=8) == 0
    cut_back(tmp_path, 2)
    assert begun(16, steps=5) == 2
    assert "has 16 samples here (data.num_samples=16), and this run takes 20" in capfd.readouterr().err


def test_the_seed_stays_while_maps_learn(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Blocks of maps that are not learned are drawn from it."""

    def begun(seed: int) -> int:
        config = grown(make_config(corpus, tmp_path, checkpoint=CheckpointConfig(interval=1, keep_last=0)), "ligo")
        return run(dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed)))

    assert begun(0) == 0
    for step, code in ((5, 4), (8, 0), (2, 0)):  # as maps learn, when the model has grown, and before
        cut_back(tmp_path, step)
        assert begun(1) == code, step
        assert ("set --train.seed 0 until it has grown" in capfd.readouterr().err) == (code == 4)
        assert code == 0 or begun(0) == 0


def test_held_out_data_and_tokenizer_may_be_elsewhere(corpus: Path, tmp_path: Path) -> None:
    config = make_config(corpus, tmp_path / "run")
    assert run(config) == 0
    cut_back(tmp_path / "run", 2)
    for name in ("validation.bin", "validation.idx"):
        shutil.copy(corpus / name, tmp_path)
    data = dataclasses.replace(config.data, validation=str(tmp_path / "validation"), tokenizer="byte")
    assert run(dataclasses.replace(config, data=data)) == 0


def test_steps_that_stay_bad_stop_the_run_with_5(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    optim = OptimConfig(lr=1e-2, warmup_steps=2, max_bad_steps=2)
    poison(monkeypatch, set(range(2, 100)))
    assert run(make_config(corpus, tmp_path, optim=optim)) == 5
    assert "steps in a row were refused" in capfd.readouterr().err
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


@pytest.mark.parametrize(
    ("section", "fields", "kept"),
    [
        ("train", {"label_smoothing": 0.1}, 2),
        ("train", {"z_loss": 1e-4}, 2),
        ("train", {"dropout": 0.1}, 2),
        ("data", {"train": "validation", "change_blend": True}, 2),
        ("train", {"eval_interval": 5}, 6),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_is_minimised_changes_on_resume_and_the_watch_for_spikes_begins_anew(
    section: str, fields: dict[str, Any], kept: int, corpus: Path, tmp_path: Path
) -> None:
    config = make_config(corpus, tmp_path, 4, optim=OptimConfig(lr=1e-2, warmup_steps=2, spike_sigma=1e9))
    assert run(config) == 0
    fields = {name: str(corpus / value) if name == "train" else value for name, value in fields.items()}
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=6))
    changed = dataclasses.replace(getattr(longer, section), **fields)
    assert run(dataclasses.replace(longer, **{section: changed})) == 0
    state = store.read_manifest(store.candidates(tmp_path / "checkpoints")[0]).state
    assert len(state["guard"]["losses"]) == kept


def test_a_loss_spike_is_skipped_when_watched_for() -> None:
    config = OptimConfig(spike_sigma=6.0, spike_window=8)
    guard = StepGuard()
    losses = [3.0, 3.1, 2.9, 3.0, 3.05, 1e9, 3.0]
    assert [guard.accepts(loss, 1.0, config) for loss in losses] == [True] * 5 + [False, True]
    constant = StepGuard()
    assert all(constant.accepts(2.0, 1.0, config) for _ in range(20))


def test_starting_from_weights_of_the_same_size(corpus: Path, trained: Path, tmp_path: Path) -> None:
    assert run(make_config(corpus, tmp_path, init=InitConfig(from_=str(trained)))) == 0
    assert metrics(tmp_path)[0]["loss"] < 0.8 * metrics(trained)[0]["loss"]
    (inherited,) = ledger(tmp_path)["inherited"]
    assert inherited["label"] == "source" and inherited["ledger"]["phases"][0]["steps"] == 40


def test_a_run_can_be_prolonged_and_says_so(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(make_config(corpus, tmp_path, steps=3)) == 0
    capfd.readouterr()
    assert run(make_config(corpus, tmp_path, steps=5)) == 0
    assert "train.steps was 3 when step-3 was saved and is 5 now" in capfd.readouterr().err
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("which", "files"), [("none", frozenset()), ("measured", ops.MEASURED)])
def test_a_run_chooses_its_kernels(which: str, files: frozenset[str], corpus: Path, tmp_path: Path) -> None:
    ops.let_kernels_serve("all")
    config = make_config(corpus, tmp_path, steps=1)
    assert run(dataclasses.replace(config, train=dataclasses.replace(config.train, kernels=which))) == 0
    assert serving._serving == files


def test_kernels_that_cannot_serve_are_refused(corpus: Path, tmp_path: Path) -> None:
    config = make_config(corpus, tmp_path)
    assert run(dataclasses.replace(config, train=dataclasses.replace(config.train, kernels="all"))) == 2
    assert "train.kernels=all runs on GPUs, not on the cpu" in (tmp_path / "exit.json").read_text()


def test_the_ledger_has_all_seconds_from_the_first_step_on(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics, saves, agreeing on stops and rolling back are of the phase in which they come; slow ones show it."""
    times: list[float] = []
    step, train, save, log = trainer.Trainer._step, trainer.Trainer.run, Saver.save, Metrics.log
    roll_back = trainer.Trainer._roll_back

    def slowly(function: Any, seconds: float, note: bool = False) -> Any:
        def slow(*args: Any, **kwargs: Any) -> Any:
            times.extend([time.perf_counter()] if note and not times else [])
            time.sleep(seconds)
            return function(*args, **kwargs)

        return slow

    def timed(*args: Any) -> None:
        train(*args)
        times.append(time.perf_counter())

    monkeypatch.setattr(trainer.Trainer, "_step", slowly(step, 0.0, note=True))
    monkeypatch.setattr(trainer.Trainer, "_roll_back", slowly(roll_back, 0.6))
    monkeypatch.setattr(trainer.Trainer, "run", timed)
    monkeypatch.setattr(Saver, "save", slowly(save, 0.4))
    monkeypatch.setattr(Metrics, "log", slowly(log, 0.2))
    optim = OptimConfig(lr=1e-2, warmup_steps=2, max_bad_steps=2)
    poison(monkeypatch, {3, 4})
    assert run(make_config(corpus, tmp_path, optim=optim, checkpoint=CheckpointConfig(interval=3))) == 0
    began, ended = times
    counted = sum(phase["seconds"] for phase in ledger(tmp_path)["phases"])
    assert -0.01 < ended - began - counted < 0.19, "less than one of the delays is missing"
