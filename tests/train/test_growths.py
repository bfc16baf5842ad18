"""When a model grows inside a run, how often, and what stays as it was: samples, schedule, the checkpoints on disk."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from torch import Tensor

from megagrow import flops
from megagrow.checkpoint import store
from megagrow.config import (
    CheckpointConfig,
    Config,
    GrowthConfig,
    InitConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
)
from megagrow.earlier_growth import EarlierGrowth
from megagrow.errors import ConfigError
from megagrow.optim import Optimizer, StepGuard
from megagrow.parallel.mesh import make_mesh
from megagrow.plan import make_plan
from megagrow.train import growing, run, saving, timing
from megagrow.train.learner import Learner, MapLearner, ModelLearner
from megagrow.train.state import RunState
from megagrow.train.timing import is_flat
from tests.ranks import run_ranks
from tests.train.resumed import samples_noted
from tests.train.runs import LARGE, SMALL, final_loss, make_config, metrics, run_on_ranks
from tests.train.test_run import assert_same_run, cut_back, grown, ledger, resumed_at

WIDE = dataclasses.replace(LARGE, num_layers=SMALL.num_layers)
DEEP = dataclasses.replace(SMALL, num_layers=8)
STEPS = 9
EVERY_STEP = CheckpointConfig(interval=1, keep_last=0)


def grown_twice(corpus: Path, directory: Path, **fields: Any) -> Config:
    """Wider FFN before step 3, the rest of the width before step 6: both keep the function."""
    earlier = EarlierGrowth(ffn_size=WIDE.ffn_size, at_step=3)
    fields = {"method": "clone", "source": SMALL, "at_step": 6, "earlier": (earlier,), **fields}
    return make_config(corpus, directory, STEPS, model=WIDE, growth=GrowthConfig(**fields), checkpoint=EVERY_STEP)


def learned_then_stacked(corpus: Path, directory: Path) -> Config:
    """LiGO from 2 to 3 layers before step 2, learning for 2 steps; G_stack to 8 before step 4."""
    earlier = EarlierGrowth(num_layers=3, method="ligo", optimizer="reset", at_step=2, rewarmup_steps=2)
    stacked = GrowthConfig("stack", source=SMALL, at_step=4, ligo_steps=2, earlier=(earlier,))
    return make_config(corpus, directory, 6, model=DEEP, growth=stacked, checkpoint=EVERY_STEP)


@pytest.fixture(scope="module")
def twice(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `grown_twice`, with the ids of its samples."""
    directory = tmp_path_factory.mktemp("twice") / "run"
    trained_on(grown_twice(corpus, directory))
    return directory


@pytest.fixture(scope="module")
def learned(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `learned_then_stacked`."""
    directory = tmp_path_factory.mktemp("learned") / "run"
    assert run(learned_then_stacked(corpus, directory)) == 0
    return directory


def saved_state(directory: Path, step: int) -> dict[str, Any]:
    """What the checkpoint of a step holds beside tensors."""
    return store.read_manifest(directory / "checkpoints" / f"step-{step}").state


def sample_ids(directory: Path) -> list[int]:
    lines = (directory / "samples-0.jsonl").read_text().splitlines()
    return [i for line in lines for i in json.loads(line)[1]]


def trained_on(config: Config) -> list[int]:
    """Runs, and returns the ids of the samples that were learned from, in their order."""
    directory = Path(config.run.dir)
    directory.mkdir(parents=True)
    with samples_noted(directory):
        assert run(config) == 0
    return sample_ids(directory)


def test_a_model_grows_twice_in_one_run(corpus: Path, tmp_path: Path, twice: Path) -> None:
    """No sample is left out or seen twice, losses go on where they were, and so does whoever resumes."""
    found = sample_ids(twice)
    assert found == trained_on(make_config(corpus, tmp_path / "plain", STEPS))
    assert len(set(found)) == len(found) == STEPS * 4
    lines = metrics(twice)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["phase"] for line in lines] == ["small"] * 6 + ["train"] * 3
    assert [line["lr"] for line in lines] == [line["lr"] for line in metrics(tmp_path / "plain")]
    events = ledger(twice)["events"]
    assert [(e["step"], e["number"], e["reason"]) for e in events] == [(3, 0, "step"), (6, 1, "step")]
    for event in events:
        assert event["loss_after"] == pytest.approx(event["loss_before"], abs=1e-5)
    grown = [phase["model"].split()[1] for phase in ledger(twice)["phases"] if phase["phase"] == "growth"]
    assert grown == ["2x16", "2x32"]
    for step in (2, 5, 7):
        found = resumed_at(step, twice, lambda folder: grown_twice(corpus, folder), tmp_path / f"at-{step}")
        assert_same_run(found, twice)


def test_maps_are_learned_between_two_growths(corpus: Path, tmp_path: Path, learned: Path) -> None:
    lines = metrics(learned)
    assert [line["phase"] for line in lines] == ["small"] * 2 + ["ligo"] * 2 + ["small"] * 2 + ["train"] * 2
    assert lines[4]["lr"] == pytest.approx(lines[5]["lr"] / 2)  # the growth's own warm-up
    first, second = ledger(learned)["events"]
    assert (first["method"], second["method"]) == ("ligo", "stack")
    assert first["loss_initial"] != first["loss_after"]
    for step in (3, 5):
        found = resumed_at(step, learned, lambda folder: learned_then_stacked(corpus, folder), tmp_path / f"at-{step}")
        assert_same_run(found, learned)


def test_padding_twice_says_which_norm_eps_it_needs(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each padding of the hidden axis has its own; the error names the growth."""
    model = dataclasses.replace(SMALL, hidden_size=32, head_dim=8, norm_eps=5e-6)
    earlier = EarlierGrowth(hidden_size=24, at_step=1)
    growth = GrowthConfig("zero_pad", source=SMALL, at_step=2, optimizer="reset", earlier=(earlier,))
    assert run(make_config(corpus, tmp_path, 3, model=model, growth=growth)) == 2
    needed = 1e-5 * (16 / 24)
    error = capfd.readouterr().err
    assert "growth.earlier[0]: growth.method=zero_pad needs" in error and f"set norm_eps={needed!r}" in error
    growth = dataclasses.replace(growth, earlier=(dataclasses.replace(earlier, norm_eps=needed),))
    assert run(make_config(corpus, tmp_path, 3, model=model, growth=growth)) == 0
    for event in ledger(tmp_path)["events"]:
        assert event["loss_after"] == pytest.approx(event["loss_before"], abs=1e-5)


def grown_apart(corpus: Path, directory: Path, policy: Any) -> Config:
    """A wider FFN before step 3, whose new entries have updates of their own for 5 steps; more width before step 8."""
    method = "clone" if policy == "asymmetric" else "zero_pad"
    warm: dict[str, Any] = {"rewarmup_steps": 5, "rewarmup_part": "new"}
    earlier = EarlierGrowth(ffn_size=WIDE.ffn_size, at_step=3)
    growth = GrowthConfig(method, source=SMALL, at_step=8, optimizer=policy, earlier=(earlier,), **warm)
    optim = OptimConfig(lr=1e-2, warmup_steps=2, beta1=0.1, beta2=0.15)
    model = dataclasses.replace(WIDE, norm_eps=5e-6) if method == "zero_pad" else WIDE
    return make_config(corpus, directory, 12, model=model, growth=growth, optim=optim, checkpoint=EVERY_STEP)


@pytest.mark.parametrize(("policy", "step"), [("asymmetric", 5), ("zero_pad", 10)])
def test_new_entries_of_two_growths_and_resuming_among_them(
    corpus: Path, tmp_path: Path, policy: str, step: int
) -> None:
    def config(directory: Path) -> Config:
        return grown_apart(corpus, directory, policy)

    assert run(config(tmp_path / "whole")) == 0
    parts = [saved_state(tmp_path / "whole", step)["optimizer"].get("new_part") for step in range(1, 13)]
    assert [part and part["since"] for part in parts] == [None] * 3 + [3] * 4 + [None] + [8] * 4
    assert_same_run(resumed_at(step, tmp_path / "whole", config, tmp_path / "resumed"), tmp_path / "whole")


def test_a_growth_waits_for_the_new_entries_of_the_one_before(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates that were refused do not count, so that the steps of the configuration are too few."""
    accepts = StepGuard.accepts
    monkeypatch.setattr(StepGuard, "accepts", lambda self, *a: accepts(self, *a) and refused.pop(0))
    refused = [step not in (5, 6) for step in range(1, 15)]
    assert run(grown_apart(corpus, tmp_path, "zero_pad")) == 0
    assert [event["step"] for event in ledger(tmp_path)["events"]] == [3, 10]


@pytest.mark.parametrize("case", ["from a checkpoint", "resumed", "planned"])
def test_every_model_of_the_chain_must_fit_the_mesh(case: str, corpus: Path, trained: Path, tmp_path: Path) -> None:
    """Two heads, then three, then four: tensor=2 does not divide those in between, whoever says what the first are."""
    earlier, target = EarlierGrowth(num_heads=3, at_step=3), dataclasses.replace(SMALL, num_heads=4, num_kv_heads=4)
    growth = GrowthConfig("fpi", optimizer="reset", at_step=6, earlier=(earlier,))
    init = InitConfig(from_=str(trained))
    config = make_config(corpus, tmp_path / "run", STEPS, model=target, growth=growth, init=init)
    expected = "tensor=2 does not divide num_heads=3 of growth.earlier[0]"
    halves = dataclasses.replace(config, parallel=ParallelConfig(tensor=2))
    if case == "planned":
        with pytest.raises(ConfigError, match=re.escape(expected)):
            make_plan(halves, 2)
        return
    if case == "resumed":
        shorter = dataclasses.replace(config.train, steps=7)
        assert run(dataclasses.replace(config, train=shorter)) == 0
        cut_back(tmp_path / "run", 2)
    assert run_ranks(run_on_ranks, 2, config, 2) == [2, 2]
    assert expected in json.loads((tmp_path / "run" / "exit.json").read_text())["reason"]


def test_a_source_that_grew_lately_is_refused(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = grown_apart(corpus, tmp_path / "source", "zero_pad")
    assert run(config) == 0
    for number, (policy, at_step, code) in enumerate([("exact", 0, 2), ("exact", 1, 0), ("reset", 0, 0)]):
        growth = GrowthConfig("stack", at_step=at_step, optimizer=policy)
        again = dataclasses.replace(
            make_config(corpus, tmp_path / str(number), 2, model=dataclasses.replace(config.model, num_layers=4)),
            growth=growth,
            init=InitConfig(from_=str(tmp_path / "source"), skip_source_check=True),
            optim=config.optim,
        )
        assert run(again) == code
        assert ("grew lately" in capfd.readouterr().err) == bool(code)


def test_growing_at_a_number_of_tokens(corpus: Path, tmp_path: Path) -> None:
    """Each step has 64 tokens: 150 are reached with the third, and the two that learn each growth's maps count."""
    fields = {"method": "ligo", "optimizer": "reset", "ligo_steps": 2}
    earlier = EarlierGrowth(num_layers=3, at_tokens=150)
    growth = GrowthConfig(source=SMALL, at_tokens=7 * 64, earlier=(earlier,), **fields)
    assert run(make_config(corpus, tmp_path, 8, model=DEEP, growth=growth)) == 0
    events = ledger(tmp_path)["events"]
    assert [(e["step"], e["train_step"], e["reason"]) for e in events] == [(5, 3, "tokens"), (9, 5, "tokens")]
    assert [line["phase"] for line in metrics(tmp_path)].count("ligo") == 4
    assert {path.name for path in tmp_path.glob("maps*")} == {"maps-0.safetensors", "maps.safetensors"}


@pytest.mark.parametrize(
    ("losses", "flat"),
    [
        ([4.0, 4.0, 3.0, 3.0], False),
        ([4.0, 4.0, 3.61, 3.61], True),  # by 9.75 %
        ([4.0, 4.0, 3.59, 3.59], False),  # by 10.25 %
        ([9.0, 4.0, 4.0, 4.0, 4.0], True),  # what is older than two windows does not count
        ([4.0, 4.0, 4.0], False),  # too few
        ([4.0, 4.0, 5.0, 5.0], True),
    ],
)
def test_a_loss_is_flat_when_it_falls_by_less_than_a_share(losses: list[float], flat: bool) -> None:
    assert is_flat(losses, 2, 0.1) is flat


def test_growing_when_the_loss_is_flat(corpus: Path, tmp_path: Path) -> None:
    """At the step that the losses of metrics.jsonl say, warm-up left out; the same after a resume in the window."""
    threshold, window = 0.06, 2

    def config(directory: Path) -> Config:
        growth = GrowthConfig("stack", source=SMALL, at_step=13, at_plateau=threshold, plateau_window=window)
        return make_config(corpus, directory, 15, model=DEEP, growth=growth, checkpoint=EVERY_STEP)

    assert run(config(tmp_path / "whole")) == 0
    (event,) = ledger(tmp_path / "whole")["events"]
    losses = [line["loss"] for line in metrics(tmp_path / "whole")][2:]  # two steps of warm-up
    flat = [n for n in range(len(losses) + 1) if is_flat(losses[:n], window, threshold)]
    assert event["reason"] == "plateau" and event["step"] == flat[0] + 2 < 13
    step = event["step"] - 1
    assert_same_run(resumed_at(step, tmp_path / "whole", config, tmp_path / "resumed"), tmp_path / "whole")


def due_on_ranks(config: Config, flat_rank: int) -> str | None:
    """What a rank says of the plateau that one rank alone sees."""
    mesh = make_mesh(config.parallel)
    losses = [1.0, 1.0] if mesh.world.rank == flat_rank else [9.0, 1.0]
    return timing.due(RunState(SMALL, "small", train_step=5, losses=losses), config, mesh)


def test_ranks_agree_that_the_loss_is_flat(tmp_path: Path) -> None:
    growth = GrowthConfig("stack", source=SMALL, at_step=13, at_plateau=0.1, plateau_window=1)
    config = make_config(tmp_path, tmp_path, 15, model=DEEP, growth=growth)
    assert run_ranks(due_on_ranks, 2, config, 0) == ["plateau"] * 2
    assert run_ranks(due_on_ranks, 2, config, 1) == [None] * 2


def files(directory: Path) -> dict[str, str]:
    """What a resumed run would read."""
    found = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def crashing(monkeypatch: pytest.MonkeyPatch, name: str, target: ModelConfig, then: Callable[[], None]) -> None:
    """Growing into `target` ends with a crash in the middle of the work."""
    real = getattr(growing, name)

    def crash(first: Any, *args: Any) -> Any:
        made = real(first, *args)
        if target in (getattr(first, "target", None), getattr(args[0], "model", None)):
            then()
            raise RuntimeError("the machine is gone")
        return made

    monkeypatch.setattr(growing, name, crash)


@pytest.mark.parametrize("case", ["second of two", "while maps are made"])
def test_a_crash_while_growing_leaves_the_run_before_it(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, twice: Path, learned: Path, case: str
) -> None:
    before: dict[str, str] = {}
    checkpoints = tmp_path / "run" / "checkpoints"
    if case == "second of two":
        config, whole, step, growths = grown_twice(corpus, tmp_path / "run"), twice, 6, 1
        name, target = "grow_into", WIDE
    else:
        config, whole, step, growths = learned_then_stacked(corpus, tmp_path / "run"), learned, 2, 0
        name, target = "map_learner", dataclasses.replace(SMALL, num_layers=3)
    crashing(monkeypatch, name, target, lambda: before.update(files(checkpoints)))
    assert run(config) == 1
    assert before and files(checkpoints) == before
    newest = store.candidates(checkpoints)[0]
    assert newest.name == f"step-{step}" and store.read_manifest(newest).state["growths"] == growths
    monkeypatch.undo()
    assert run(config) == 0
    assert_same_run(tmp_path / "run", whole)


def test_a_crash_before_the_grown_model_is_saved_leaves_its_maps_to_be_learned_on(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learned: Path
) -> None:
    """The growth is complete in memory, its first checkpoint is not."""
    config, save = learned_then_stacked(corpus, tmp_path / "run"), saving.save

    def crash(saver: Any, learner: Any, state: RunState, *rest: Any) -> None:
        if state.growths == 1:
            raise RuntimeError("the machine is gone")
        save(saver, learner, state, *rest)

    monkeypatch.setattr(saving, "save", crash)
    assert run(config) == 1
    newest = store.candidates(tmp_path / "run/checkpoints")[0]
    assert store.read_manifest(newest).state["phase"] == "ligo"
    monkeypatch.undo()
    assert run(config) == 0
    assert_same_run(tmp_path / "run", learned)


def num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.untyped_storage().size() for tensor in tensors)


def test_what_learned_the_maps_is_gone_before_the_moments_come(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """So are the small model's moments before the large one comes; and a file of maps that fails ends no run."""
    held: dict[str, int] = {}
    begin, finish, build, optimizer = growing.begin, growing.finish, growing.map_learner, growing.Optimizer
    learners: list[Learner] = []

    def noted(stage: Any, learner: Learner, *rest: Any) -> Learner:
        learners[:] = [learner]
        return cast(Learner, stage(learner, *rest))

    def watched_build(*args: Any) -> MapLearner:
        assert isinstance(learners[0], ModelLearner)
        held["moments"] = num_bytes(learners[0].optimizer.tensors().values())
        return build(*args)

    def watched_optimizer(*args: Any) -> Optimizer:
        if learners:
            held["learning"] = num_bytes(learners[0].tensors().values())
        return optimizer(*args)

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(growing, "begin", partial(noted, begin))
    monkeypatch.setattr(growing, "finish", partial(noted, finish))
    monkeypatch.setattr(growing, "map_learner", watched_build)
    monkeypatch.setattr(growing, "Optimizer", watched_optimizer)
    monkeypatch.setattr(growing, "save_maps", fail)
    config = grown(make_config(corpus, tmp_path, 4), "ligo")
    assert run(config) == 0
    assert held == {"moments": 0, "learning": 0}
    assert "warning: the learned maps are not kept" in capfd.readouterr().err
    (generated,) = [phase["flops"] for phase in ledger(tmp_path)["phases"] if phase["phase"] == "growth"]
    assert generated == flops.ligo_generation_flops(SMALL, LARGE)  # once: the steps that learn have their own


def test_growing_twice_on_shards_equals_one_process(corpus: Path, tmp_path: Path, twice: Path) -> None:
    many = grown_twice(corpus, tmp_path / "many", at_plateau=0.001, plateau_window=1)  # asked for, not met
    assert run_ranks(run_on_ranks, 4, many, 2, 1) == [0] * 4
    for ours, theirs in zip(metrics(tmp_path / "many"), metrics(twice), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-4), ours["step"]
    assert final_loss(tmp_path / "many") == pytest.approx(final_loss(twice), abs=2e-4)


def test_a_run_without_a_small_model_trains_one_first(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make_config(corpus, tmp_path, 8, model=DEEP, growth=GrowthConfig("stack", bootstrap=True))
    assert run(config) == 0
    assert "growth.bootstrap: a model of 2 layers is trained first" in capfd.readouterr().err
    assert [line["phase"] for line in metrics(tmp_path)] == ["small"] * 2 + ["train"] * 6
    written = json.loads((tmp_path / "config.json").read_text())["growth"]
    assert (written["source"]["num_layers"], written["at_step"]) == (2, 2)
    totals = ledger(tmp_path)["totals"]
    assert totals["all_in"]["tokens"] == 8 * 64 and totals["papers_convention"]["tokens"] == 6 * 64
    cut_back(tmp_path, 4)
    assert run(config) == 0  # the unchanged command
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=12))  # a quarter of it is 3
    assert run(longer) == 0
    (event,) = ledger(tmp_path)["events"]
    assert event["step"] == 2 and len(metrics(tmp_path)) == 12
    capfd.readouterr()
    for at_step, code in ((2, 0), (3, 4)):  # what the command says counts
        assert run(dataclasses.replace(longer, growth=dataclasses.replace(config.growth, at_step=at_step))) == code
    assert "growth.at_step was 2 there" in capfd.readouterr().err
