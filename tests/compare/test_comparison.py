"""A whole comparison: what is run, what is not run again, and what the report says."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.image import imread

from megagrow.compare.comparison import Comparison, check, compare
from megagrow.compare.corpus import Corpus
from megagrow.compare.experiment import Experiment
from megagrow.compare.job import Job
from megagrow.compare.record import Record, key_of
from megagrow.compare.report import content, write_report
from megagrow.compare.results import Results
from megagrow.compare.runner import FailedRun, InThisProcess, Runner
from megagrow.compare.suite import NEVER_GROWN, SMALL, TUNING_SEED, Suite
from megagrow.compare.suites import suite
from megagrow.compare.sweep import Sweep
from megagrow.compare.table import to_markdown
from megagrow.config_file import load_file
from megagrow.errors import ConfigError, DataError, Preempted
from megagrow.report.run import load_run
from megagrow.report.savings import CONVENTIONS, MEASURES
from tests.compare.conftest import ARMS, Counting, Ended, Pretending


def again(made: Experiment) -> tuple[Experiment, list[str]]:
    """The same comparison as another call would make it, and what it runs."""
    counting, record = Counting([]), Record(made.runner.record.path)
    return replace(made, runner=Runner(record, 1, counting, tell=lambda line: None)), counting.names


def copied(made: Experiment, folder: Path) -> Experiment:
    """A comparison whose runs and record may be damaged, elsewhere: files name the folder, as a moved one's would."""
    shutil.copytree(made.folder, folder)
    for file in [*folder.rglob("jobs/*.json"), *folder.rglob("runs/*/config.json")]:
        file.write_text(file.read_text().replace(str(made.folder), str(folder)))
    moved = replace(made, folder=folder, runner=Runner(Record(folder / "record.jsonl"), tell=str))
    return moved


def forget(made: Experiment, *arms: str) -> list[str]:
    """Deletes the lines of arms from the record; returns the names of their runs."""
    path, names = made.runner.record.path, []
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        name = json.loads(line)["name"]
        (names if name.startswith(arms) else kept).append(name if name.startswith(arms) else line)
    path.write_text("".join(kept))
    assert len(names) == len(arms)
    return names


def test_a_finished_comparison_runs_nothing_again(finished: Experiment) -> None:
    other, names = again(finished)
    other.tune()
    other.run_seeds()
    assert names == []


def test_the_record_outlives_runs(finished: Experiment, tmp_path: Path) -> None:
    """Without run directories nothing is run, and the report is the same; it is that of the directories, too."""
    moved = copied(finished, tmp_path / "moved")
    runs = {path.name: load_run(path) for path in (moved.folder / "runs").iterdir()}
    shutil.rmtree(moved.folder / "runs")
    other, names = again(moved)
    other.run_seeds()
    assert names == []
    before, after = (content(Results.of(each)) for each in (finished, other))
    assert {**before, "date": ""} == {**after, "date": ""}
    for outcome in Results.of(other).outcomes:
        run = runs[outcome.line.name]
        assert outcome.run.final_loss == run.final_loss
        assert outcome.run.growth is None or outcome.run.growth["loss_after"] == run.growth["loss_after"]
        assert outcome.run.cost("all_in", "flops") == run.cost("all_in", "flops")
        evaluated = [line["step"] for line in run.lines if line["validation_loss"] is not None]
        assert [line["step"] for line in outcome.run.lines] == evaluated


def test_a_deleted_line_runs_that_arm_again_and_its_small_model(finished: Experiment, tmp_path: Path) -> None:
    moved = copied(finished, tmp_path / "moved")
    shutil.rmtree(moved.folder / "runs")
    lost = forget(moved, "rms_random")
    other, names = again(moved)
    before = len(moved.runner.record.path.read_text().splitlines())
    other.run_seeds()
    assert names == [moved.small(1).name, *lost]
    assert len(moved.runner.record.path.read_text().splitlines()) == before + 1  # the small model's line is there
    losses = [{arm["arm"]: arm["loss"] for arm in content(Results.of(each))["arms"]} for each in (other, finished)]
    assert losses[0] == losses[1]


def test_what_is_missing_is_run_and_the_small_model_is_shared(finished: Experiment, tmp_path: Path) -> None:
    moved = copied(finished, tmp_path / "moved")
    lost = forget(moved, "rms_random", "ki")
    for name in lost:
        shutil.rmtree(moved.folder / "runs" / name)
    other, names = again(moved)
    other.run_seeds()
    assert sorted(names) == sorted(lost)


def test_a_small_model_of_which_only_figures_are_left_is_trained_again_where_it_is_needed(
    finished: Experiment, tmp_path: Path
) -> None:
    moved = copied(finished, tmp_path / "moved")
    small = moved.small(1)
    shutil.rmtree(small.directory / "checkpoints")
    other, names = again(moved)
    other.run_seeds()
    assert names == []
    shutil.rmtree(moved.folder / "runs" / forget(moved, "rms_random")[0])
    other, names = again(moved)
    other.run_seeds()
    assert names[0] == small.name and len(names) == 2


def test_a_run_that_was_killed_goes_on(finished: Experiment, tmp_path: Path) -> None:
    moved = copied(finished, tmp_path / "moved")
    job = moved.job(moved.sweep.best("rms_random"), 1)
    forget(moved, "rms_random")
    (job.directory / "exit.json").unlink()
    (job.directory / "downstream.json").unlink()
    other, names = again(moved)
    other.run_seeds()
    assert names == [job.name]
    assert other.runner.record.find(job.key).loss == finished.runner.record.find(job.key).loss


def test_other_settings_are_another_run(finished: Experiment) -> None:
    """Neither the record nor a directory of the old ones is taken for it; where things lie does not matter."""
    base, chosen = finished.suite.base, finished.sweep.best("rms_random")
    longer = replace(finished, suite=replace(finished.suite, steps=2 * finished.suite.steps), _steps={})
    smoother = replace(base, optim=replace(base.optim, beta2=0.9))
    small = replace(finished, suite=replace(finished.suite, source_share=0.3), _steps={})
    other = replace(finished, suite=replace(finished.suite, base=smoother))
    elsewhere = replace(finished, corpus=replace(finished.corpus, sha256="0" * 64))
    jobs = [each.job(chosen, 1) for each in (finished, longer, small, other, elsewhere)]
    assert len({job.key for job in jobs}) == len({job.directory for job in jobs}) == 5
    assert [finished.runner.record.find(job.key) is not None for job in jobs] == [True] + [False] * 4
    ledgers = [each.job(finished.sweep.best(SMALL), 1).key for each in (finished, small)]
    assert ledgers[0] != ledgers[1]
    moved = replace(finished, folder=Path("elsewhere"), corpus=replace(finished.corpus, folder=Path("other")))
    assert key_of(moved._placed(chosen, 1)[1]) == jobs[0].key
    assert "beta2" not in json.dumps(jobs[0].settings) and "beta2" in json.dumps(jobs[3].settings)


def test_only_small_models_keep_their_weights(finished: Experiment) -> None:
    kept = {path.parent.name for path in finished.folder.rglob("checkpoints")}
    assert kept == {finished.small(1).name, finished.small(1, "salt_by_never_grown").name}
    assert len(kept) == 2


def test_the_small_model_reads_other_samples_than_those_that_grow_from_it(finished: Experiment) -> None:
    small, grown = (
        load_file(finished.job(finished.sweep.best(arm), 1).directory / "config.json") for arm in (SMALL, "ki")
    )
    assert small.data.seed != grown.data.seed
    assert small.train.seed == grown.train.seed == 1


@pytest.fixture(scope="module")
def report(finished: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(Results.of(finished), folder)
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


def test_evaluations_are_dense_right_after_growth(finished: Experiment) -> None:
    """At the start of a run, in its middle, and nowhere else."""
    runs = {name: finished.ended(finished.sweep.best(name), 1) for name in ("rms_random", "mslt", "ki")}
    steps = {name: [step for step, *_ in line.curve] for name, line in runs.items()}
    interval = finished.suite.base.train.eval_interval
    grown_at = [event["step"] for event in runs["mslt"].ledger["events"] if event["event"] == "growth"]
    assert len(grown_at) == 2 and grown_at[1] > 0
    assert set(steps["rms_random"]) >= {1, 2}
    assert set(steps["mslt"]) >= {grown_at[1] + 1, grown_at[1] + 2}
    assert all(step % interval == 0 for step in steps["ki"])


def test_each_run_is_a_line_of_the_table(report: Path, finished: Experiment) -> None:
    with (report / "savings.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 1 + 3 + 2 + len(ARMS) - 1
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
    record = Record(tmp_path / "record.jsonl")
    made = Experiment(chosen, corpus, tmp_path, Runner(record, 1, pretending, tell=str), Sweep())
    made.tune()
    names = [SMALL, *chosen.scratch_arms, *chosen.arms]
    tried = {name: [row.key for row in made.sweep.rows if row.arm == name] for name in names}
    assert {len(tries) for tries in tried.values()} == {4}
    half = 2**0.5
    for plain in ("stack", "ligo_0", "scratch-1", SMALL):
        assert [each.lr for each in tried[plain]] == pytest.approx([2e-3, 4e-3, 2e-3 / half, 1e-3])
    assert [each.map_lr for each in tried["ligo"]] == [None, None, 3e-4, 1e-4]
    order = [name.split("-lr")[0] for name in pretending.names]
    assert set(order[:4]) == {SMALL}
    assert max(i for i, name in enumerate(order) if name.startswith("scratch")) < order.index("stack")
    assert all(f"-seed{TUNING_SEED}-" in name for name in pretending.names)
    begun = len(pretending.names)
    made.run_seeds()
    reported = pretending.names[begun:]
    assert made.controls == [NEVER_GROWN, "ligo_uncharged"]
    assert sorted(reported) == sorted(made.job(made.chosen(name), 1).name for name in [*names, *made.controls])
    assert made.chosen(NEVER_GROWN).lr == made.sweep.best(SMALL).lr
    assert (made.chosen("ligo_uncharged").lr, made.chosen("ligo_uncharged").map_lr) == (2e-3, 1e-4)
    assert made.sweep.best("ligo").map_lr == 1e-4
    assert any("The best rate of the maps is the lowest" in each for each in content(Results.of(made))["caveats"])
    made.tune()
    assert len(pretending.names) == begun + len(reported)


@pytest.fixture
def two_arms(monkeypatch: pytest.MonkeyPatch) -> Suite:
    """What every suite's name stands for here."""
    few = replace(suite("bert", "tiny"), arms=("fpi", "ligo"), rates=(2e-3, 4e-3))
    monkeypatch.setattr("megagrow.compare.comparison.suite", lambda name, size: few)
    return few


def test_a_comparison_that_is_interrupted_goes_on_from_its_record(two_arms: Suite, text: Path, tmp_path: Path) -> None:
    """In the middle of the sweep, on a machine of which nothing but the record is left."""
    pretending, stop_at = Pretending([]), 9

    def start(job: Job) -> InThisProcess:
        if len(pretending.names) == stop_at:
            raise KeyboardInterrupt
        return pretending(job)

    asked = Comparison("bert", "tiny", text, tmp_path / "out", parallel=1, results=tmp_path / "results")
    with pytest.raises(KeyboardInterrupt):
        compare(asked, start, str)
    (file,) = (tmp_path / "results").iterdir()
    assert len(file.read_text().splitlines()) == 9
    halfway = (compare(replace(asked, only_reports=True), start, str) / "report.md").read_text()
    assert "No arm is finished yet" in halfway
    assert "scratch-1.7, seed 1; scratch-0.6; never_grown; ligo_uncharged; fpi; ligo. " in " ".join(halfway.split())
    shutil.rmtree(next((tmp_path / "out").glob("bert*")))
    stop_at = 99
    folder = compare(asked, start, str)
    tried, reported = 4 + 2 * (3 + 1 + 2), 1 + 3 + 2 + 2
    small_again = 1
    assert len(pretending.names) == tried + reported + small_again
    assert len(file.read_text().splitlines()) == tried + reported
    words = (folder / "report.md").read_text()
    assert "Best on the tuning seed: fpi" in words and "on seeds 1" in words
    assert "Encoders are asked no questions" in words and "Not finished" not in words
    begun = len(pretending.names)
    shutil.rmtree(tmp_path / "out")
    assert (compare(asked, start, str) / "report.md").read_text() == words
    assert len(pretending.names) == begun


def test_an_arm_that_is_added_is_the_only_one_that_is_run(
    two_arms: Suite, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretending = Pretending([])
    asked = Comparison("bert", "tiny", text, tmp_path / "out", parallel=1, results=tmp_path / "results")
    compare(asked, pretending, str)
    more = replace(two_arms, arms=(*two_arms.arms, "aki"))
    monkeypatch.setattr("megagrow.compare.comparison.suite", lambda name, size: more)
    begun = len(pretending.names)
    compare(asked, pretending, str)
    assert [name.split("-")[0] for name in pretending.names[begun:]] == ["aki"] * 3


def pretended(chosen: Suite, corpus: Corpus, folder: Path, **worse: float | None) -> Experiment:
    """A finished comparison in which nothing was trained."""
    runner = Runner(Record(folder / "record.jsonl"), 1, Pretending([], worse), tell=str)
    made = Experiment(chosen, corpus, folder, runner, Sweep())
    made.tune()
    made.run_seeds()
    return made


def test_the_best_arm_is_chosen_on_the_tuning_seed_and_reported_on_others(corpus: Corpus, tmp_path: Path) -> None:
    """`rms_random` wins the sweep and loses afterwards; nobody may exchange it for the winner of the reported seeds."""
    chosen = replace(suite("llama_both", "tiny"), arms=("aki", "rms_random"), seeds=(1, 2, 3), num_questions=0)
    lucky = {"rms_random-lr0.001-seed0": -0.5, "rms_random": 0.0, "aki": -0.1}
    results = Results.of(pretended(chosen, corpus, tmp_path, **lucky))
    report = content(results)
    assert report["winner"] == "rms_random" and report["arms"][0]["arm"] == "aki"
    words = to_markdown(report)
    assert "On the same budget the small model, never grown, ends at 3.0" in words
    assert "**Best on the tuning seed: rms_random. FLOPs that it saves at equal loss, on seeds 1, 2, 3:" in words
    assert "The lowest mean loss of those seeds is that of aki." in words


def test_of_all_arms_the_best_is_run_on_fresh_seeds(corpus: Corpus, tmp_path: Path) -> None:
    """With its small model and the baseline; the others are run on one."""
    arms = ("aki", "rms_random", "salt")
    chosen = replace(suite("llama_both", "tiny"), arms=arms, seeds=(1,), winner_seeds=(2, 3), num_questions=0)
    found = content(Results.of(pretended(chosen, corpus, tmp_path, aki=-0.2)))
    everyone = [found["small"], *found["scratch"], *found["controls"], *found["arms"]]
    assert {each["arm"]: each["seeds"] for each in everyone} == {
        **dict.fromkeys((SMALL, *chosen.scratch_arms, NEVER_GROWN, "aki"), [1, 2, 3]),
        **dict.fromkeys(("rms_random", "salt", "salt_by_never_grown"), [1]),
    }


def test_core_and_full_share_what_they_have_in_common(corpus: Corpus, tmp_path: Path) -> None:
    core = replace(suite("llama_depth", "tiny"), arms=("stack",), refines=True, num_questions=0)
    full = replace(core, arms=("stack", "interleave"), refines=False)
    made = pretended(core, corpus, tmp_path)
    runner = Runner(made.runner.record, 1, Pretending([]), tell=str)
    other = Experiment(full, corpus, tmp_path, runner, Sweep())
    other.tune()
    assert [name.split("-")[0] for name in runner.start.names] == ["interleave"] * 3


def test_runs_that_diverge_are_told_and_leave_savings_unknown(corpus: Corpus, tmp_path: Path) -> None:
    """Means of the survivors would flatter an arm that is not stable."""
    chosen = replace(suite("llama_both", "tiny"), arms=("aki", "rms_random", "ki"), seeds=(1, 2), num_questions=0)
    worse = {"aki-lr0.001-seed2": None, "aki": -0.5, "ki": None}
    found = content(Results.of(pretended(chosen, corpus, tmp_path, **worse)))
    assert found["diverged"] == ["aki, seed 2: it ended with exit code 5: as told", "ki, at every learning rate"]
    assert found["not_finished"] == []
    assert [arm["arm"] for arm in found["arms"]] == ["rms_random", "aki"]
    unstable = found["arms"][1]
    assert (unstable["seeds"], unstable["diverged"]) == ([1], [2])
    saving = unstable["savings"]["all_in"]["flops"]
    assert saving["value"] is None and "1 of 2 seeds: the run diverged" in saving["reason"]
    words = to_markdown(found)
    assert "| aki | 1 of 2 |" in words and "Diverged: aki, seed 2" in words


def test_a_run_whose_small_model_diverges_is_told_and_not_waited_for(corpus: Corpus, tmp_path: Path) -> None:
    chosen = replace(suite("llama_both", "tiny"), arms=("aki", "mslt"), seeds=(1, 2), num_questions=0)
    made = pretended(chosen, corpus, tmp_path, **{"small-lr0.0005-seed2": None})
    found = content(Results.of(made))
    assert found["diverged"] == ["small, seed 2: it ended with exit code 5: as told", "the small model of aki, seed 2"]
    assert found["not_finished"] == []


def test_the_commit_on_record_is_that_of_the_beginning(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code may change while a run goes on, which has loaded the old one."""
    commits, pretending = ["old"], Pretending([])
    monkeypatch.setattr("megagrow.compare.runner.commit", lambda: commits[-1])

    def start(job: Job) -> InThisProcess:
        commits.append("new")
        return pretending(job)

    chosen = replace(suite("llama_depth", "tiny"), arms=("stack",), num_questions=0)
    made = Experiment(chosen, corpus, tmp_path, Runner(Record(tmp_path / "record.jsonl"), 1, start, tell=str), Sweep())
    made.tune()
    lines = [json.loads(line)["commit"] for line in made.runner.record.path.read_text().splitlines()]
    assert lines == ["old"] + ["new"] * (len(lines) - 1)


def test_a_chord_in_place_of_a_parabola_is_told(corpus: Corpus, tmp_path: Path) -> None:
    """Where the dearest scratch run of a seed ends above a cheaper one."""
    chosen = replace(suite("llama_depth", "tiny"), arms=("stack",), seeds=(1, 2), num_questions=0)
    falling = {"scratch-0.6": 0.4, "scratch-1-": 0.2}
    unlucky = {"scratch-1.7-lr0.001-seed2": 0.3, "stack": 0.25, **falling}
    told = [
        [each for each in content(Results.of(made))["caveats"] if "chord" in each]
        for made in (
            pretended(chosen, corpus, tmp_path / "a", **{**falling, "stack": 0.25}),
            pretended(chosen, corpus, tmp_path / "b", **unlucky),
        )
    ]
    assert told[0] == [] and "count on seeds 2, as others" in told[1][0]


@pytest.mark.parametrize("change", [{"machine": "other"}, {"parallel": 3}])
def test_seconds_are_compared_on_one_kind_of_machine_only(
    change: dict[str, object], corpus: Corpus, tmp_path: Path
) -> None:
    """Shared by as many runs; losses and FLOPs are compared across them."""
    chosen = replace(suite("llama_both", "tiny"), arms=("aki", "mslt"), num_questions=0)
    made = pretended(chosen, corpus, tmp_path)
    for arm, suffers in ((SMALL, {"aki"}), ("mslt", {"mslt"}), ("scratch-1", {"aki", "mslt"})):
        key = made.job(made.sweep.best(arm), 1).key
        moved = tmp_path / arm / "record.jsonl"
        moved.parent.mkdir()
        lines = [json.loads(line) for line in made.runner.record.path.read_text().splitlines()]
        moved.write_text("".join(json.dumps(each | (change if each["key"] == key else {})) + "\n" for each in lines))
        elsewhere = replace(made, runner=Runner(Record(moved), tell=str))
        found = content(Results.of(elsewhere))
        caveats = " ".join(found["caveats"])
        assert ("several kinds of machine" in caveats) == (len(found["machines"]) == 2) == ("machine" in change)
        assert ("1 or 3 runs shared the machine" in caveats) == ("parallel" in change)
        for each in found["arms"]:
            for savings in each["savings"].values():
                told = "several kinds of machine" in (savings["seconds"]["reason"] or "")
                assert told == (each["arm"] in suffers), (arm, each["arm"])
                assert "machine" not in (savings["flops"]["reason"] or "")


def test_an_arm_that_fails_leaves_the_others_alone(two_arms: Suite, text: Path, tmp_path: Path) -> None:
    """It is told at the end, after the report, and tried again by the next call."""
    pretending = Pretending([])

    def start(job: Job) -> InThisProcess:
        return Ended(3) if job.name.startswith("fpi") else pretending(job)

    asked = Comparison("bert", "tiny", text, tmp_path / "out", parallel=1, results=tmp_path / "results")
    with pytest.raises(FailedRun, match=r"fpi-lr0\.002-seed0-\w+ ended with exit code 3"):
        compare(asked, start, str)
    assert any(name.startswith("ligo") and "seed1" in name for name in pretending.names)
    (words,) = [path.read_text() for path in (tmp_path / "out").rglob("report.md")]
    assert "Not finished: fpi." in words and "Best on the tuning seed: ligo" in words
    compare(asked, pretending, str)


def test_what_is_run_again_is_checked_against_the_record(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = replace(suite("llama_depth", "tiny"), arms=("stack", "mslt"), seeds=(1, 2), num_questions=0)
    monkeypatch.setattr("megagrow.compare.comparison.suite", lambda name, size: few)
    asked = Comparison("llama_depth", "tiny", text, tmp_path / "out", parallel=1, results=tmp_path / "results")
    spread = {"stack-lr0.001-seed1": -0.01, "stack-lr0.001-seed2": 0.01}
    with pytest.raises(DataError, match="holds no whole comparison to check against"):
        check(asked, Pretending([]), str)
    compare(asked, Pretending([], spread), str)
    (file,) = (tmp_path / "results").iterdir()
    before = file.read_text()
    same, reported = Pretending([]), 2 * (1 + 3 + 1 + 2)
    assert check(asked, same, str) == [] and len(same.names) == reported
    assert file.read_text() == before
    (found,) = check(asked, Pretending([], {"stack-lr0.001-seed1": 0.03}), str)
    assert found.startswith("stack: loss is 3.0")
    found = check(asked, Pretending([], {"mslt": None}), str)
    assert len(found) == 3 and found[0].startswith("mslt: loss is unknown, not ")


def test_rates_at_an_end_are_named(corpus: Corpus, tmp_path: Path) -> None:
    chosen = replace(suite("llama_depth", "tiny"), arms=("stack",), num_questions=0)
    caveats = content(Results.of(pretended(chosen, corpus, tmp_path)))["caveats"]
    assert any("the lowest that was tried; one beyond may be better: small, scratch-0.6" in each for each in caveats)


def test_time_that_is_over_stops_before_the_next_run(text: Path, tmp_path: Path) -> None:
    asked = Comparison("llama_depth", "tiny", text, tmp_path, parallel=1, minutes=1e-9, fixed=1e-3, results=tmp_path)
    with pytest.raises(Preempted, match="the same command goes on"):
        compare(asked, lambda job: pytest.fail("nothing may be begun"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parallel": 0}, "--jobs 0"),
        ({"minutes": -1.0}, "--minutes -1"),
        ({"suite": "llama"}, "no suite llama; there are llama_width"),
        ({"size": "huge"}, "no size huge"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        compare(Comparison(**{"suite": "salt", "output": tmp_path, **options}))
