"""Stage 1 inside runs: the data that it picks, how it ends, what is left of it, and resuming around all of that."""

import dataclasses
import json
import shutil
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megagrow import flops
from megagrow.checkpoint import store
from megagrow.checkpoint.source import open_source
from megagrow.config import CheckpointConfig, Config, InitConfig, OptimConfig, SaltConfig
from megagrow.data.dataset import PackedDataset
from megagrow.data.domains import Domains, domains_path, write_domains
from megagrow.data.indexed import IndexedDataset, IndexedWriter
from megagrow.data.merge import merge_datasets
from megagrow.ledger import Ledger
from megagrow.parallel.mesh import Mesh
from megagrow.roles import num_parameters
from megagrow.salt.score import ScoreSettings, score_corpus
from megagrow.salt.score_files import DTYPES, Cost, identity_of, write_scores
from megagrow.salt.select import make_selection
from megagrow.salt.teacher import Teacher
from megagrow.train import run, trainer
from megagrow.train.salt_stage import SaltStage
from tests.ranks import run_ranks
from tests.salt.test_teacher import live_bytes
from tests.train.resumed import train_on_rank
from tests.train.runs import SMALL, final_loss, make_config, metrics, run_on_ranks
from tests.train.test_run import assert_same_run, cut_back, grown, ledger, poison

EVERY_STEP = CheckpointConfig(interval=1, keep_last=0)
BATCH, LENGTH = 4, 16


@pytest.fixture(scope="module")
def beginner(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a model that has learned for one step, so that others soon pass it."""
    directory = tmp_path_factory.mktemp("beginner")
    assert run(make_config(corpus, directory, steps=1)) == 0
    return directory


def make_scores(folder: Path, prefix: Path, model: str = "small", seed: int = 1) -> str:
    """Scores that differ from sample to sample."""
    dataset, generator = PackedDataset(prefix, LENGTH), np.random.default_rng(seed)
    arrays = {name: generator.random(dataset.num_samples).astype(dtype) for name, dtype in DTYPES.items()}
    write_scores(folder, arrays, identity_of(dataset, model, 10, "float32"), Cost(1.0, 1.0, 1))
    return str(folder)


def online(teacher: Path, **changes: Any) -> SaltConfig:
    """Buffers of three batches, two of which are kept."""
    salt = SaltConfig(str(teacher), 5, online_buffer=3, keep_fraction=0.6, score="mean_nll")
    return dataclasses.replace(salt, **changes)


def ids_drawn(directory: Path, ranks: int = 1) -> list[list[int]]:
    """The sample ids of every batch, over all data ranks."""
    files = [(directory / f"samples-{rank}.jsonl").read_text().splitlines() for rank in range(ranks)]
    return [sum((json.loads(line)[1] for line in lines), []) for lines in zip(*files, strict=True)]


def state_at(directory: Path, step: int) -> dict[str, Any]:
    (path,) = [path for path in store.candidates(directory / "checkpoints") if path.name == f"step-{step}"]
    return store.read_manifest(path).state


def test_a_share_of_the_run_is_stage_one(corpus: Path, trained: Path, tmp_path: Path) -> None:
    assert run(make_config(corpus, tmp_path, salt=SaltConfig(str(trained), share=0.5, schedule="cosine"))) == 0
    assert [line["phase"] for line in metrics(tmp_path)] == ["salt"] * 3 + ["train"] * 3
    assert json.loads((tmp_path / "config.json").read_text())["salt"]["steps"] == 3
    for line, weight in zip(metrics(tmp_path), (0.5, 0.375, 0.125), strict=False):
        assert line["loss"] == pytest.approx((1 - weight) * line["ce"] + weight * line["kd"], rel=1e-6)


def test_an_online_selection_trains_on_the_best_of_each_buffer(corpus: Path, trained: Path, tmp_path: Path) -> None:
    """By the teacher's own scores; what it passes over stage 2 does not come back to; scoring is charged."""
    config = make_config(corpus, tmp_path, salt=online(trained), checkpoint=EVERY_STEP)
    assert train_on_rank(config, None) == 0
    drawn = ids_drawn(tmp_path)
    assert len(drawn) == 6 and len(set(sum(drawn, []))) == 6 * BATCH
    cursors = [state_at(tmp_path, step)["cursors"] for step in range(1, 7)]
    assert [c["all"] for c in cursors] == [12, 12, 24, 24, 36, 40]
    assert [c["selected"] for c in cursors] == [4, 8, 12, 16, 20, 20]
    (scoring,) = [phase for phase in ledger(tmp_path)["phases"] if phase["phase"] == "scoring"]
    tokens = 3 * 3 * BATCH * LENGTH
    assert (scoring["steps"], scoring["tokens"]) == (9, tokens)
    assert scoring["flops"] == flops.forward_flops(SMALL, tokens, LENGTH)


@pytest.mark.parametrize("step", [1, 2, 5])
def test_an_online_selection_resumes_exactly(corpus: Path, trained: Path, tmp_path: Path, step: int) -> None:
    """In the midst of a buffer, between two, and at the switch."""
    sections: dict[str, Any] = {"salt": online(trained), "checkpoint": EVERY_STEP}
    whole, broken = (make_config(corpus, tmp_path / name, **sections) for name in ("whole", "broken"))
    assert train_on_rank(whole, None) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    cut_back(tmp_path / "broken", step)
    (tmp_path / "broken/samples-0.jsonl").unlink()
    assert train_on_rank(broken, None) == 0
    assert_same_run(tmp_path / "broken", tmp_path / "whole")
    assert ids_drawn(tmp_path / "broken") == ids_drawn(tmp_path / "whole")[step:]
    assert [state_at(tmp_path / name, 6)["cursors"] for name in ("broken", "whole")] == [
        {"all": 40, "selected": 20}
    ] * 2


def test_an_online_selection_is_the_same_on_any_number_of_data_ranks(
    corpus: Path, trained: Path, tmp_path: Path
) -> None:
    configs = {n: make_config(corpus, tmp_path / str(n), salt=online(trained)) for n in (1, 2)}
    assert train_on_rank(configs[1], None) == 0
    assert run_ranks(train_on_rank, 2, configs[2], None) == [0, 0]
    assert ids_drawn(tmp_path / "2", ranks=2) == ids_drawn(tmp_path / "1")


def test_an_online_selection_in_a_pipeline(corpus: Path, trained: Path, tmp_path: Path) -> None:
    """The first rank scores too, with an output matrix that it does not need to teach."""
    assert run(make_config(corpus, tmp_path / "one", salt=online(trained))) == 0
    assert run_ranks(run_on_ranks, 2, make_config(corpus, tmp_path / "two", salt=online(trained)), 1, 2) == [0, 0]
    for ours, theirs in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-4)


def early(teacher: Path, corpus: Path, directory: Path) -> Config:
    """Stage 1 of five steps, with an evaluation after every second one."""
    salt, init = SaltConfig(str(teacher), 5, weight=0.3, end_when_better=True), InitConfig(skip_source_check=True)
    config = make_config(corpus, directory, salt=salt, checkpoint=EVERY_STEP, init=init)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, eval_interval=2))


def test_stage_one_ends_when_the_model_is_better_than_its_teacher(
    corpus: Path, beginner: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """At the first evaluation that finds it so. Runs that go on from before, at and after it are the same."""
    assert run(early(beginner, corpus, tmp_path / "whole")) == 0
    lines = metrics(tmp_path / "whole")
    state = state_at(tmp_path / "whole", 6)
    assert state["teacher_loss"] == pytest.approx(final_loss(beginner), rel=1e-6)
    judged = [line["step"] for line in lines if (line["validation_loss"] or 9.0) < state["teacher_loss"]]
    end = state["stage_one_end"]
    assert end == judged[0] < 5
    assert [line["phase"] for line in lines] == ["salt"] * end + ["train"] * (6 - end)
    assert "is below the teacher's" in capfd.readouterr().err
    for step in (end - 1, end, end + 1):
        broken = tmp_path / f"broken-{step}"
        shutil.copytree(tmp_path / "whole", broken)
        cut_back(broken, step)
        assert run(early(beginner, corpus, broken)) == 0
        assert_same_run(broken, tmp_path / "whole")


def test_stage_one_goes_on_while_the_teacher_is_better(corpus: Path, trained: Path, tmp_path: Path) -> None:
    assert run(early(trained, corpus, tmp_path)) == 0
    assert [line["phase"] for line in metrics(tmp_path)] == ["salt"] * 5 + ["train"]
    assert state_at(tmp_path, 6)["stage_one_end"] is None


def judged_on_ranks(config: Config) -> int:
    """The first rank finds the model better than the others do."""
    judge = SaltStage.judge

    def rounded_otherwise(self: SaltStage, loss: float) -> None:
        judge(self, loss if self.mesh.is_main else loss + 10.0)

    with mock.patch.object(SaltStage, "judge", rounded_otherwise):
        return run_on_ranks(config)


def test_the_ranks_end_stage_one_together(corpus: Path, beginner: Path, tmp_path: Path) -> None:
    """Whatever the last bits of a loss say on each of them."""
    assert run_ranks(judged_on_ranks, 2, early(beginner, corpus, tmp_path)) == [0, 0]
    phases = [line["phase"] for line in metrics(tmp_path)]
    assert phases[-1] == "train" and phases.count("salt") < 5


def test_a_scorer_from_outside_may_have_a_known_cost(corpus: Path, tmp_path: Path) -> None:
    """Where nothing else is from outside, the user's word is of the model that scored."""
    salt = SaltConfig(steps=2, scores=make_scores(tmp_path / "scores", corpus / "train"))
    config = make_config(corpus, tmp_path / "run", 2, salt=salt, init=InitConfig(source_flops=3e9))
    assert run(config) == 0
    costs = {item["label"]: item["ledger"]["phases"][0]["flops"] for item in ledger(tmp_path / "run")["inherited"]}
    assert costs == {"scores": 1.0, "scorer": 3e9}


def test_scores_know_what_their_model_cost(corpus: Path, beginner: Path, tmp_path: Path) -> None:
    """So that a run on selected data has a known all-in cost, though it never sees the model that selected it."""
    dataset = PackedDataset(corpus / "train", LENGTH)
    settings = ScoreSettings(skip_source_check=True)
    scores = score_corpus(open_source(beginner), dataset, tmp_path / "scores", Mesh.single(), settings, flops=5e9)
    salt = SaltConfig(steps=2, scores=str(scores))
    assert run(make_config(corpus, tmp_path / "run", 2, salt=salt)) == 0
    own, begun = (Ledger.load(folder / "ledger.json") for folder in (tmp_path / "run", beginner))
    expected = own.own()["flops"] + 5e9 + begun.own()["flops"]
    assert own.totals()["all_in"]["flops"] == pytest.approx(expected)


def test_scores_of_documents_seen_otherwise_are_noted(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    scores = make_scores(tmp_path / "scores", corpus / "train")
    config = make_config(corpus, tmp_path / "run", 1, salt=SaltConfig(steps=1, scores=scores))
    assert run(dataclasses.replace(config, data=dataclasses.replace(config.data, mask_documents=True))) == 0
    shown = capfd.readouterr().err
    assert f"{scores} was made with mask_documents=False, training has data.mask_documents=True" in shown
    assert "reset_positions" not in shown


@pytest.mark.parametrize("kind", ["teacher", "scores", "online", "early"])
def test_stage_two_is_a_plain_run_from_the_same_state(
    corpus: Path, trained: Path, beginner: Path, tmp_path: Path, kind: str
) -> None:
    """Bit for bit: the run that goes on from the switch has no SALT section at all."""
    if kind == "early":
        config = early(beginner, corpus, tmp_path / "whole")
    else:
        salt = {
            "teacher": SaltConfig(str(trained), 3),
            "scores": SaltConfig(steps=3, scores=make_scores(tmp_path / "scores", corpus / "train")),
            "online": online(trained, steps=3),
        }[kind]
        config = make_config(corpus, tmp_path / "whole", salt=salt, checkpoint=EVERY_STEP)
    assert run(config) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "plain")
    cut_back(tmp_path / "plain", state_at(tmp_path / "whole", config.train.steps)["stage_one_end"] or 3)
    plain = dataclasses.replace(config.run, dir=str(tmp_path / "plain"))
    assert run(dataclasses.replace(config, salt=SaltConfig(), run=plain)) == 0
    assert_same_run(tmp_path / "plain", tmp_path / "whole")


def measured(config: Config, monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...]) -> list[int]:
    """Bytes of all tensors that a run holds after these steps, beyond those of before."""
    found, before, count = [], live_bytes(), trainer.Trainer._count

    def counted(self: trainer.Trainer, *args: Any) -> None:
        count(self, *args)
        if self.state.step in steps:
            found.append(live_bytes() - before)

    with monkeypatch.context() as patched:
        patched.setattr(trainer.Trainer, "_count", counted)
        assert run(config) == 0
    return found


def test_nothing_of_the_teacher_is_left_after_the_switch(
    corpus: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that taught, scored and was measured: the memory of a run without it, to 1 %, and no weight is left."""
    weights: list[weakref.ref[torch.Tensor]] = []
    make = Teacher.__init__

    def noted(self: Teacher, *args: Any) -> None:
        make(self, *args)
        weights.extend(weakref.ref(p) for p in self.model.parameters())

    monkeypatch.setattr(Teacher, "__init__", noted)
    salt = online(trained, steps=3, end_when_better=True)
    taught = make_config(corpus, tmp_path / "taught", 5, salt=salt, checkpoint=CheckpointConfig(interval=0))
    elsewhere = dataclasses.replace(taught.run, dir=str(tmp_path / "plain"))
    (without,) = measured(dataclasses.replace(taught, salt=SaltConfig(), run=elsewhere), monkeypatch, (4,))
    during, after = measured(taught, monkeypatch, (2, 4))
    assert during >= without + 4 * num_parameters(SMALL)
    assert after == pytest.approx(without, rel=0.01)
    assert weights and all(reference() is None for reference in weights)


@pytest.mark.parametrize("kind", ["taught", "online"])
def test_a_roll_back_over_the_switch_brings_the_teacher_back(
    corpus: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Steps 5 and 6, of stage 2, are bad; the run goes on from step 3, of stage 1."""
    poison(monkeypatch, {4, 5})
    optim = OptimConfig(lr=1e-2, warmup_steps=2, max_bad_steps=2)
    salt = SaltConfig(str(trained), 4) if kind == "taught" else online(trained, steps=4)
    config = make_config(corpus, tmp_path, 7, optim=optim, salt=salt, checkpoint=CheckpointConfig(interval=3))
    assert run(config) == 0
    lines = metrics(tmp_path)
    assert [line["phase"] for line in lines] == ["salt"] * 4 + ["train"] * 3
    assert not any(line["skipped"] for line in lines) and lines[3]["kd"] > 0


def test_a_roll_back_into_the_midst_of_a_buffer_repeats_no_sample(
    corpus: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage 1 ends with half of a buffer trained on; what stage 2 took next is not taken for the rest of it."""
    poison(monkeypatch, {3})  # step 4, the first of stage 2
    optim = OptimConfig(lr=1e-2, warmup_steps=2, max_bad_steps=1)
    salt, checkpoint = online(trained, steps=3), CheckpointConfig(interval=2)
    config = make_config(corpus, tmp_path, 5, optim=optim, salt=salt, checkpoint=checkpoint)
    assert train_on_rank(config, None) == 0
    assert [line["phase"] for line in metrics(tmp_path)] == ["salt"] * 3 + ["train"] * 2
    drawn = ids_drawn(tmp_path)
    assert len(drawn) == 4 + 3 and len(set(sum(drawn, []))) == 7 * BATCH


def test_a_roll_back_across_the_growth_repeats_no_sample(
    corpus: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 4, the first of stage 1, is bad: the small model trains on what comes after the buffer that it began."""
    poison(monkeypatch, {3})
    optim, salt = OptimConfig(lr=1e-2, warmup_steps=2, max_bad_steps=1), online(trained, steps=2)
    config = grown(
        make_config(corpus, tmp_path, optim=optim, salt=salt, checkpoint=CheckpointConfig(interval=2)), "clone"
    )
    assert train_on_rank(config, None) == 0
    assert [line["phase"] for line in metrics(tmp_path)] == ["small"] * 3 + ["salt"] * 2 + ["train"]
    drawn = ids_drawn(tmp_path)
    assert len(drawn) == 4 + 4 and len(set(sum(drawn, []))) == 8 * BATCH


@pytest.fixture(scope="module")
def merged(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets in one, with the domains that merging writes."""
    folder = tmp_path_factory.mktemp("merged")
    whole = IndexedDataset(corpus / "train")
    for name, part in (("web", whole.tokens[:12_000]), ("code", whole.tokens[12_000:18_000])):
        with IndexedWriter(folder / name, np.uint16) as writer:
            writer.add_document(part)
            writer.close()
    merge_datasets([folder / "web", folder / "code"], folder / "both")
    return folder / "both"


@pytest.mark.parametrize(
    "rule",
    [
        {"keep_fraction": 0.01, "quotas": ("code=0.02",)},
        {"keep": "band", "band_low": 0.5, "band_high": 0.51},
        {"keep": "threshold", "threshold": 0.99},
        {"score": "excess_nll", "keep_fraction": 0.01},
    ],
    ids=str,
)
def test_stage_one_trains_on_what_is_selected(
    corpus: Path, merged: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], rule: dict[str, Any]
) -> None:
    scores, domains = make_scores(tmp_path / "scores", merged), str(domains_path(merged))
    salt = SaltConfig(steps=4, scores=scores, domains=domains, **rule)
    if "score" in rule:
        reference = make_scores(tmp_path / "reference", merged, "large", seed=2)
        salt = dataclasses.replace(salt, reference_scores=reference)
    config = make_config(corpus, tmp_path / "run", 4, salt=salt)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=str(merged)))
    assert train_on_rank(config, None) == 0
    selection = make_selection(salt, PackedDataset(merged, LENGTH))
    assert 0 < len(selection.ids) <= 4 * BATCH < len(selection.values)
    drawn = sum(ids_drawn(tmp_path / "run"), [])
    assert set(drawn) == set(selection.ids.tolist()), "four batches are an epoch of them or more"
    assert "of each domain: web " in capfd.readouterr().err
    labels = {item["label"] for item in ledger(tmp_path / "run")["inherited"]}
    assert labels == {"scores", "scorer"} | ({"reference_scores"} if "score" in rule else set())


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"quotas": ("books=0.5",)}, 2, "salt.quotas names books"),
        ({"domains": "nowhere"}, 3, "nowhere: no such file"),
        ({"keep": "threshold", "threshold": 2.0}, 3, "no sample is kept"),
    ],
)
def test_a_selection_that_cannot_be_made_is_refused_before_training(
    corpus: Path,
    merged: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    change: dict[str, Any],
    code: int,
    words: str,
) -> None:
    salt = SaltConfig(steps=4, scores=make_scores(tmp_path / "scores", merged), domains=str(domains_path(merged)))
    config = make_config(corpus, tmp_path / "run", 4, salt=dataclasses.replace(salt, **change))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=str(merged)))
    assert run(config) == code
    assert words in capfd.readouterr().err and not (tmp_path / "run/metrics.jsonl").exists()


def test_domains_of_another_corpus_are_refused(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_domains(tmp_path / "other", Domains(("a",), np.zeros(7, np.int32)))
    salt = SaltConfig(
        steps=4, scores=make_scores(tmp_path / "s", corpus / "train"), domains=str(domains_path(tmp_path / "other"))
    )
    assert run(make_config(corpus, tmp_path / "run", salt=salt)) == 3
    assert "domains is int32 [7], must be whole numbers [1]" in capfd.readouterr().err
