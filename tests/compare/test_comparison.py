"""A whole comparison: what is run, what is not run again, and what the report says."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.image import imread

from megagrow.compare.comparison import Comparison, compare
from megagrow.compare.corpus import Corpus
from megagrow.compare.experiment import Experiment
from megagrow.compare.job import Job
from megagrow.compare.report import write_report
from megagrow.compare.results import Results
from megagrow.compare.runner import InThisProcess, Runner
from megagrow.compare.suite import SMALL, TUNING_SEED, Suite
from megagrow.compare.suites import suite
from megagrow.compare.sweep import Sweep, recorded
from megagrow.config_file import load_file
from megagrow.errors import ConfigError, Preempted
from megagrow.report.savings import CONVENTIONS, MEASURES
from tests.compare.conftest import ARMS, Counting, Pretending


def again(made: Experiment) -> tuple[Experiment, list[str]]:
    """The same comparison as another call would make it, and what it runs."""
    counting = Counting([])
    return replace(made, runner=Runner(1, counting, tell=lambda line: None)), counting.names


def copied(made: Experiment, folder: Path) -> Experiment:
    """A comparison of which runs may be damaged, elsewhere: their files name the folder, as a moved one's would."""
    shutil.copytree(made.folder, folder)
    for file in [*folder.rglob("jobs/*.json"), *folder.rglob("runs/*/config.json")]:
        file.write_text(file.read_text().replace(str(made.folder), str(folder)))
    return replace(made, folder=folder)


def test_a_finished_comparison_runs_nothing_again(finished: Experiment) -> None:
    other, names = again(finished)
    other.tune()
    other.run_seeds()
    assert names == []


def test_what_is_missing_is_run_and_the_small_model_is_shared(finished: Experiment, tmp_path: Path) -> None:
    moved = copied(finished, tmp_path / "moved")
    lost = [path for path in (moved.folder / "runs").iterdir() if path.name.startswith(("rms_random", "ki"))]
    assert len(lost) == 2
    for path in lost:
        shutil.rmtree(path)
    other, names = again(moved)
    other.run_seeds()
    assert sorted(names) == sorted(path.name for path in lost)


def test_a_small_model_of_which_only_figures_are_left_is_trained_again_where_it_is_needed(
    finished: Experiment, tmp_path: Path
) -> None:
    moved = copied(finished, tmp_path / "moved")
    small = moved.small(1)
    shutil.rmtree(small.directory / "checkpoints")
    other, names = again(moved)
    other.run_seeds()
    assert names == []
    shutil.rmtree(next((moved.folder / "runs").glob("rms_random*")))
    other, names = again(moved)
    other.run_seeds()
    assert names[0] == small.name and len(names) == 2


def test_a_run_that_was_killed_goes_on(finished: Experiment, tmp_path: Path) -> None:
    moved = copied(finished, tmp_path / "moved")
    job = moved.job(moved.sweep.best("rms_random"), 1)
    before = job.result()
    (job.directory / "exit.json").unlink()
    (job.directory / "downstream.json").unlink()
    other, names = again(moved)
    other.run_seeds()
    assert names == [job.name]
    assert job.result().final_loss == before.final_loss


def test_a_run_with_other_settings_under_the_same_name_is_refused(finished: Experiment, tmp_path: Path) -> None:
    moved = copied(finished, tmp_path / "moved")
    job = moved.job(moved.sweep.best("ki"), 1)
    (job.directory / "exit.json").unlink()
    other, _ = again(replace(moved, suite=replace(moved.suite, base=replace(moved.suite.base, run=job.config.run))))
    job.file.write_text(job.file.read_text().replace('"lr": 0.005', '"lr": 0.006'))
    with pytest.raises(ConfigError, match=r"ki-lr0\.005-seed1 was begun with other settings"):
        other.run_seeds()


def test_only_small_models_keep_their_weights(finished: Experiment) -> None:
    kept = {path.parent.name for path in finished.folder.rglob("checkpoints")}
    assert kept == {finished.small(1).name}


def test_the_small_model_reads_other_samples_than_those_that_grow_from_it(finished: Experiment) -> None:
    small, grown = (
        load_file(finished.job(finished.sweep.best(arm), 1).directory / "config.json") for arm in (SMALL, "ki")
    )
    assert small.data.seed != grown.data.seed
    assert small.train.seed == grown.train.seed == 1


@pytest.fixture(scope="module")
def report(finished: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(Results.of(finished), folder, parallel=2)
    return folder


def test_the_report_has_every_arm_with_savings_by_both_conventions(report: Path, finished: Experiment) -> None:
    found = json.loads((report / "report.json").read_text())
    assert {arm["arm"] for arm in found["arms"]} == set(ARMS) - {"clone_zero_pad"}
    assert [arm["loss"]["value"] for arm in found["arms"]] == sorted(arm["loss"]["value"] for arm in found["arms"])
    assert len(found["scratch"]) == 3 and found["small"]["arm"] == SMALL
    assert "zero_pad" in found["refused"]["clone_zero_pad"]
    assert found["corpus"]["sha256"] == finished.corpus.sha256
    for arm in found["arms"]:
        for convention in CONVENTIONS:
            for measure in MEASURES:
                saving = arm["savings"][convention][measure]
                assert saving["value"] is not None or saving["reason"]
        assert 0 <= arm["scores"]["choice"]["value"] <= 1
    assert found["not_finished"] == []


def test_growth_is_told_with_its_losses(report: Path) -> None:
    arms = {arm["arm"]: arm for arm in json.loads((report / "report.json").read_text())["arms"]}
    learned = arms["ligo_salt"]
    assert all(learned[name]["value"] > 0 for name in ("loss_before", "loss_initial", "loss_after"))
    assert arms["ki"]["loss_after"] is None


def test_each_run_is_a_line_of_the_table(report: Path, finished: Experiment) -> None:
    with (report / "savings.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 1 + 3 + len(ARMS) - 1
    grown = next(line for line in lines if line["arm"] == "rms_random")
    assert float(grown["flops_papers_convention"]) < float(grown["flops_all_in"]) <= finished.suite.budget
    assert grown["saving_flops_all_in"] or grown["reason"]
    assert next(line for line in lines if line["arm"] == "scratch-0.6")["saving_flops_all_in"] == ""


def test_the_report_for_people_names_all_and_shows_no_path(report: Path, text: Path) -> None:
    words = (report / "report.md").read_text()
    assert all(f"`{arm}`" in words for arm in ARMS)
    assert "**Not possible here**" in words
    assert "Nothing was tuned" in words
    assert str(text) not in words + (report / "report.json").read_text()


def test_the_picture_has_something_on_it(report: Path) -> None:
    picture = imread(report / "curves.png")
    assert 0.01 < (picture[..., :3].min(axis=-1) < 0.9).mean() < 0.5


def test_tuning_tries_the_baseline_first_and_reports_other_seeds(corpus: Corpus, tmp_path: Path) -> None:
    tiny = suite("llama_depth", "tiny")
    chosen = replace(tiny, arms=("stack", "ligo", "ligo_0"), rates=(2e-3, 4e-3), refines=True, num_questions=0)
    pretending = Pretending([])
    made = Experiment(chosen, corpus, tmp_path, Runner(1, pretending, tell=str), Sweep())
    made.tune()
    names = [SMALL, *chosen.scratch_arms, *chosen.arms]
    tried = {name: [row.key for row in made.sweep.rows if row.arm == name] for name in names}
    assert {len(tries) for tries in tried.values()} == {4}
    half = 2**0.5
    for plain in ("stack", "ligo_0", "scratch-1", SMALL):
        assert [each.lr for each in tried[plain]] == pytest.approx([2e-3, 4e-3, 2e-3 / half, 2e-3 * half])
    assert [each.map_lr for each in tried["ligo"]] == [None, None, 1e-3, 1e-2]
    order = [name.split("-lr")[0] for name in pretending.names]
    assert set(order[:4]) == {SMALL}
    assert max(i for i, name in enumerate(order) if name.startswith("scratch")) < order.index("stack")
    assert all(name.endswith(f"seed{TUNING_SEED}") for name in pretending.names)
    begun = len(pretending.names)
    made.run_seeds()
    reported = pretending.names[begun:]
    assert sorted(reported) == sorted(f"{made.sweep.best(name).name}-seed1" for name in names)
    assert made.sweep.best("ligo").map_lr == 1e-3
    made.tune()
    assert len(pretending.names) == begun + len(reported)


@pytest.fixture
def two_arms(monkeypatch: pytest.MonkeyPatch) -> Suite:
    """What every suite's name stands for here."""
    few = replace(suite("bert", "tiny"), arms=("fpi", "ligo"), rates=(2e-3, 4e-3))
    monkeypatch.setattr("megagrow.compare.comparison.suite", lambda name, size: few)
    return few


def test_a_recorded_sweep_is_run_by_nobody_again(two_arms: Suite, text: Path, tmp_path: Path) -> None:
    """With rates that are recorded only the reported seeds are run; the report says where they come from."""
    rates, pretending = tmp_path / "rates.json", Pretending([])
    arms = [SMALL, *two_arms.scratch_arms, *two_arms.arms]
    rows = ",\n".join(f'  ["{arm}", 0.004, null, 3.0]' for arm in arms)
    facts = '"corpus": "abc", "kind": "text files", "date": "2026-01-02", "commit": "0123", "machine": "m"'
    rates.write_text(f'{{"bert-tiny": {{{facts}, "rows": [\n{rows}\n]}}}}')

    def start(job: Job) -> InThisProcess:
        if len(pretending.names) == 4:
            raise KeyboardInterrupt
        return pretending(job)

    asked = Comparison("bert", "tiny", text, tmp_path / "out", parallel=1, rates=rates)
    with pytest.raises(KeyboardInterrupt):
        compare(asked, start, str)
    assert len(pretending.names) == 4
    assert all("lr0.004" in name and name.endswith("seed1") for name in pretending.names)
    folder = compare(replace(asked, only_reports=True), start, str)
    words = (folder / "report.md").read_text()
    assert "a sweep recorded on 2026-01-02" in words
    assert "Learning rates are those of a sweep on another corpus (abc)" in words
    assert "Not finished: " in words and "Encoders are asked no questions" in words


def test_a_sweep_is_recorded_where_that_is_asked_for(two_arms: Suite, text: Path, tmp_path: Path) -> None:
    rates, pretending = tmp_path / "rates.json", Pretending([])
    asked = Comparison("bert", "tiny", text, tmp_path / "out", parallel=1, records=True, rates=rates)
    compare(asked, pretending, str)
    found = recorded("bert-tiny", rates)
    assert found is not None and len(found.facts["corpus"]) == 64
    assert found.knows([SMALL, *two_arms.scratch_arms, *two_arms.arms])
    begun = len(pretending.names)
    compare(replace(asked, records=False, output=tmp_path / "other"), pretending, str)
    assert len(pretending.names) - begun == 1 + 3 + 2


def test_time_that_is_over_stops_before_the_next_run(text: Path, tmp_path: Path) -> None:
    asked = Comparison("llama_depth", "tiny", text, tmp_path, parallel=1, minutes=1e-9, fixed=1e-3)
    with pytest.raises(Preempted, match="the same command goes on"):
        compare(asked, lambda job: pytest.fail("nothing may be begun"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parallel": 0}, "--jobs 0"),
        ({"minutes": -1.0}, "--minutes -1"),
        ({"fixed": 1e-3, "sweeps": True}, "--lr leaves no sweep"),
        ({"suite": "llama"}, "no suite llama; there are llama_width"),
        ({"size": "huge"}, "no size huge"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        compare(Comparison(**{"suite": "salt", "output": tmp_path, **options}))
