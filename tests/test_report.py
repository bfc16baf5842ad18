"""Tests ../megagrow/report/: savings whose answers are known, and what is said where there is no answer."""

import json
import math
import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from megagrow.config import Config, DataConfig, ModelConfig, TrainConfig
from megagrow.config_file import dump
from megagrow.errors import ConfigError, DataError
from megagrow.ledger import Ledger
from megagrow.metrics import Metrics, write_exit
from megagrow.report import build_report, to_markdown
from megagrow.report.build import commit, summarize
from megagrow.report.curves import quantity
from megagrow.report.run import load_run
from megagrow.report.savings import cost_at_loss, loss_at_cost, pareto_front
from megagrow.roles import num_parameters

SMALL = ModelConfig(vocab_size=64, hidden_size=16, num_layers=1, num_heads=2, ffn_size=32)
LARGE = ModelConfig(vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, ffn_size=64)
ROOT = Path(__file__).resolve().parents[1]


def make_run(
    run_dir: Path,
    flops: float,
    loss: float | None,
    *,
    model: ModelConfig = LARGE,
    code: int | None = 0,
    validation: str = "data/validation",
    inherited: dict[str, Ledger] | None = None,
    growth: dict[str, Any] | None = None,
    convention: str = "full",
    **data: Any,
) -> Ledger:
    """A run directory whose last validation loss is `loss`; a second of work does 1e12 FLOPs."""
    run_dir.mkdir(parents=True)
    data = {"train": "data/train", "validation": validation, **data}
    config = Config(model=model, data=DataConfig(**data), train=TrainConfig(steps=4))
    (run_dir / "config.json").write_text(dump(config))
    ledger = Ledger(convention)
    for identity, cost in (inherited or {}).items():
        ledger.inherit("source", identity, cost)
    if growth:
        ledger.add_event("growth", 0, method="clone", **growth)
    metrics = Metrics(run_dir, config)
    for step in range(1, 5):
        ledger.add("train", flops=flops / 4, tokens=512, seconds=flops / 4e12)
        validation_loss = loss + 0.5 * (4 - step) if loss is not None and step % 2 == 0 else None
        own = ledger.own()
        totals = {"flops_total": own["flops"], "seconds_total": own["seconds"]}
        metrics.log(step=step, phase="train", loss=3.0, validation_loss=validation_loss, **totals)
    ledger.save(run_dir / "ledger.json")
    if code is not None:
        write_exit(run_dir, code, "done" if code == 0 else "loss nan", 4, 0, "host")
    return ledger


def make_comparison(folder: Path, grown_flops: float, grown_loss: float, **options: Any) -> list[Path]:
    """Small model 2e12, scratch 8, 16 and 32e12 FLOPs with losses 4.0, 3.5 and 3.0, and one grown arm."""
    small = make_run(folder / "small", 2e12, 4.5, model=SMALL)
    for name, flops, loss in (("a", 8e12, 4.0), ("b", 16e12, 3.5), ("c", 32e12, 3.0)):
        make_run(folder / f"scratch-{name}", flops, loss)
    options = {"inherited": {"small@4": small}, "growth": {"loss_before": 4.5, "loss_after": 4.7}, **options}
    make_run(folder / "grown_salt", grown_flops, grown_loss, **options)
    return sorted(path for path in folder.iterdir() if path.is_dir())


def report_of(folder: Path, *runs: Path) -> dict[str, Any]:
    """What report.json would hold; nothing is drawn, which takes longer than all the rest."""
    return json.loads(json.dumps(summarize([load_run(path) for path in runs], folder / "out"), allow_nan=False))


def test_savings_are_those_of_the_interpolated_baseline(tmp_path: Path) -> None:
    report = report_of(tmp_path, *make_comparison(tmp_path / "runs", 10e12, 3.25))
    scratch = math.sqrt(16e12 * 32e12)  # half of the way from 3.5 to 3.0, in log cost
    papers, all_in = (report["savings"][convention] for convention in ("papers_convention", "all_in"))
    assert papers["flops"] == pytest.approx(1 - 10e12 / scratch)
    assert papers["seconds"] == pytest.approx(1 - 10e12 / scratch)
    assert all_in["flops"] == pytest.approx(1 - 12e12 / scratch)
    assert all_in["seconds"] == pytest.approx(1 - 12e12 / scratch)
    assert papers["reason"] == papers["bound"] == {"flops": None, "seconds": None}


def test_the_report_has_what_programs_read(tmp_path: Path) -> None:
    report = report_of(tmp_path, *make_comparison(tmp_path / "runs", 10e12, 3.25))
    grown, scratch, small = (report["arms"][name] for name in ("grown_salt", "scratch", "small"))
    assert [(arm["params"], arm["final_validation_loss"]) for arm in (small, scratch, grown)] == [
        (num_parameters(SMALL), 4.5),
        (num_parameters(LARGE), 3.0),
        (num_parameters(LARGE), 3.25),
    ]
    assert scratch["run"] == "scratch-c"
    assert (grown["flops"], grown["tokens"], grown["seconds"]) == (10e12, 2048, 10.0)
    assert grown["all_in"] == {"flops": 12e12, "tokens": 4096, "seconds": 12.0}
    assert [budget["flops"] for budget in report["scratch_budgets"]] == [8e12, 16e12, 32e12]
    assert (report["loss_before_growth"], report["loss_after_growth"]) == (4.5, 4.7)
    assert report["machine"]["torch"] == torch.__version__
    assert report["machine"]["cpu"]
    assert report["commit"] == commit()
    assert report["corpus"]["train"] == "data/train"
    assert report["flops_convention"] == "full"


@pytest.mark.parametrize(("loss", "beats", "nats"), [(3.5, True, 0.20752), (3.8, False, -0.09248)])
def test_equal_all_in_flops_are_compared_by_loss(loss: float, beats: bool, nats: float, tmp_path: Path) -> None:
    """All-in 12e12 lies log2(12/8) = 0.585 of the way from 8 to 16e12: scratch's loss there is 4.0 - 0.2925."""
    report = report_of(tmp_path, *make_comparison(tmp_path / "runs", 10e12, loss))
    comparison = report["comparison_at_equal_all_in_flops"]
    assert comparison["beats"] is beats
    assert comparison["nats"] == pytest.approx(nats, abs=1e-4)
    words = "beats" if beats else "does not beat"
    assert comparison["sentence"] == (f"the grown arm {words} scratch at equal all-in FLOPs (by {abs(nats):.4f} nats)")
    assert words in to_markdown(report).splitlines()[2]


def test_a_loss_that_scratch_never_reaches_gives_a_lower_bound(tmp_path: Path) -> None:
    report = report_of(tmp_path, *make_comparison(tmp_path / "runs", 14e12, 2.9))
    savings = report["savings"]["all_in"]
    assert savings["flops"] is savings["seconds"] is None
    assert "no finished scratch run reaches 2.9" in savings["reason"]["flops"]
    assert savings["bound"]["flops"] == {"at_least": 0.5}
    assert "at least 50.0% fewer FLOPs" in to_markdown(report)


def test_a_grown_arm_that_cost_more_than_every_budget_says_so(tmp_path: Path) -> None:
    report = report_of(tmp_path, *make_comparison(tmp_path / "runs", 62e12, 2.9))
    assert report["savings"]["all_in"]["bound"]["flops"] == {"at_least": -1.0}
    assert report["comparison_at_equal_all_in_flops"]["beats"] is None
    text = to_markdown(report)
    assert "at most 100.0% more FLOPs" in text
    assert "No scratch run was given as many FLOPs" in text


def test_a_loss_above_every_scratch_run_gives_an_upper_bound(tmp_path: Path) -> None:
    savings = report_of(tmp_path, *make_comparison(tmp_path / "runs", 2e12, 4.2))["savings"]["papers_convention"]
    assert savings["flops"] is None
    assert savings["bound"]["flops"] == {"at_most": 0.75}


def test_a_source_of_unknown_cost_gives_null_all_in_and_never_zero(tmp_path: Path) -> None:
    runs = make_comparison(tmp_path / "runs", 10e12, 3.25, inherited={"hub": Ledger.outside()})
    report = report_of(tmp_path, *runs)
    assert report["arms"]["grown_salt"]["all_in"] == {"flops": None, "tokens": None, "seconds": None}
    assert report["savings"]["all_in"]["flops"] is None
    assert "unknown" in report["savings"]["all_in"]["reason"]["flops"]
    assert report["savings"]["papers_convention"]["flops"] > 0
    assert report["comparison_at_equal_all_in_flops"]["beats"] is None
    assert "unknown" in to_markdown(report)


def test_given_source_flops_give_flops_and_leave_seconds_null(tmp_path: Path) -> None:
    runs = make_comparison(tmp_path / "runs", 10e12, 3.25, inherited={"hub": Ledger.outside(2e12)})
    savings = report_of(tmp_path, *runs)["savings"]["all_in"]
    assert savings["flops"] == pytest.approx(1 - 12e12 / math.sqrt(16e12 * 32e12))
    assert savings["seconds"] is None


@pytest.mark.parametrize("code", [None, 5, 7])
def test_unfinished_scratch_runs_are_left_out(code: int | None, tmp_path: Path) -> None:
    """A cheap run with a very low loss would turn every saving around if it entered."""
    runs = make_comparison(tmp_path / "runs", 10e12, 3.25)
    make_run(tmp_path / "runs" / "scratch-x", 1e12, 2.0, code=code)
    report = report_of(tmp_path, *runs, tmp_path / "runs" / "scratch-x")
    assert report["savings"]["all_in"]["flops"] == pytest.approx(1 - 12e12 / math.sqrt(16e12 * 32e12))
    assert list(report["unfinished"]) == ["scratch-x"]
    assert len(report["scratch_budgets"]) == 3


def test_a_run_without_a_loss_at_its_end_is_not_finished(tmp_path: Path) -> None:
    make_run(tmp_path / "scratch-x", 1e12, None)
    assert "no validation loss at its last step 4" in load_run(tmp_path / "scratch-x").unfinished
    make_run(tmp_path / "scratch-y", 1e12, 2.0)
    lines = (tmp_path / "scratch-y" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "scratch-y" / "metrics.jsonl").write_text("".join(lines[:2]))
    assert "no validation loss at its last step 4" in load_run(tmp_path / "scratch-y").unfinished


def test_an_unfinished_grown_arm_has_no_savings(tmp_path: Path) -> None:
    report = report_of(tmp_path, *make_comparison(tmp_path / "runs", 10e12, 3.25, code=7))
    assert report["arms"]["grown_salt"]["final_validation_loss"] is None
    assert report["savings"]["papers_convention"]["flops"] is None
    assert "not finished" in report["savings"]["papers_convention"]["reason"]["flops"]


def test_an_unlucky_scratch_run_does_not_help_the_grown_arm(tmp_path: Path) -> None:
    """A dearer run with a worse loss is dominated: the baseline is what cheaper runs reached."""
    runs = make_comparison(tmp_path / "runs", 10e12, 3.25)
    make_run(tmp_path / "runs" / "scratch-x", 20e12, 3.9)
    report = report_of(tmp_path, *runs, tmp_path / "runs" / "scratch-x")
    assert report["savings"]["papers_convention"]["flops"] == pytest.approx(1 - 10e12 / math.sqrt(16e12 * 32e12))


def test_without_baseline_or_growth_there_is_a_report_and_no_number(tmp_path: Path) -> None:
    small = make_run(tmp_path / "small", 2e12, 4.5, model=SMALL)
    make_run(tmp_path / "grown_salt", 10e12, 3.25, inherited={"s": small})
    alone = report_of(tmp_path, tmp_path / "small")
    assert alone["savings"]["all_in"]["flops"] is alone["comparison_at_equal_all_in_flops"] is None
    grown = report_of(tmp_path, tmp_path / "small", tmp_path / "grown_salt")
    told = "no scratch run is finished; its directory is called scratch, or scratch-…"
    assert grown["savings"]["all_in"]["reason"]["flops"] == told
    assert told in grown["comparison_at_equal_all_in_flops"]["sentence"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": SMALL}, "grown_salt has parameters="),
        ({"validation": "data/other"}, r"grown_salt has data\.validation="),
        ({"validation": "", "order": "megatron", "split": "9,1"}, r"grown_salt has data\.validation="),
        ({"mask_documents": True}, r"grown_salt has data\.mask_documents and \.reset_positions=\(True, False\)"),
        ({"convention": "causal", "inherited": {}}, "ledger convention=causal"),
    ],
)
def test_losses_that_do_not_compare_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    runs = make_comparison(tmp_path / "runs", 10e12, 3.25, **options)
    with pytest.raises(DataError, match=message):
        build_report(sorted(runs, reverse=True)[:3] + runs[:1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", [{"seed": 2}, {"split": "90,10"}, {"train": "data/other"}, {}], ids=str)
def test_shares_that_are_held_out_have_to_be_the_same(field: dict[str, Any], tmp_path: Path) -> None:
    given = {"validation": "", "order": "megatron", "split": "99,1"}
    small = make_run(tmp_path / "small", 2e12, 4.5, model=SMALL)
    make_run(tmp_path / "scratch-1", 8e12, 4.0, **given)
    make_run(tmp_path / "grown", 8e12, 3.9, inherited={"s": small}, **{**given, **field})
    build = partial(build_report, [tmp_path / "scratch-1", tmp_path / "grown"], tmp_path / "out")
    if field:
        with pytest.raises(DataError, match=r"grown has data\.split, of train and seed="):
            build()
    else:
        build()


def test_curves_are_a_picture_with_something_on_it(tmp_path: Path) -> None:
    report = build_report(make_comparison(tmp_path / "runs", 10e12, 3.25), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    picture = imread(tmp_path / "out" / "curves.png")
    height, width = picture.shape[:2]
    assert width > height > 600
    assert 0.01 < (picture[..., :3].min(axis=-1) < 0.9).mean() < 0.5
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["curves.png", "report.json", "report.md"]


def test_curves_are_drawn_for_runs_that_have_not_evaluated_yet(tmp_path: Path) -> None:
    make_run(tmp_path / "grown_salt", 1e12, None, code=None, growth={"loss_before": None, "loss_after": None})
    (tmp_path / "grown_salt" / "ledger.json").unlink()
    assert build_report([tmp_path / "grown_salt"], tmp_path / "out")["unfinished"]


def test_matplotlib_that_is_not_installed_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "small", 2e12, 4.5)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"megagrow\[plot\]"):
        build_report([tmp_path / "small"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_arms_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        make_run(tmp_path / folder / "small", 2e12, 4.5)
    with pytest.raises(ConfigError, match="two run directories are called small"):
        build_report([tmp_path / "a" / "small", tmp_path / "b" / "small"], tmp_path / "out")


def run_tool(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools" / "report.py"), run_name="__main__")
    return ended.value.code


def test_the_tool_prints_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(path) for path in make_comparison(tmp_path / "runs", 10e12, 3.25)]
    assert run_tool([*runs, "--output", str(tmp_path / "out")], monkeypatch) == 0
    assert (tmp_path / "out" / "report.md").read_text() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code"), [(["nowhere", "--output", "out"], 3), (["--output", "out"], 2), (["a"], 2)]
)
def test_the_tool_says_what_is_wrong_in_one_line(
    arguments: list[str],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_tool(arguments, monkeypatch) == code
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_interpolation_passes_through_the_runs_and_back() -> None:
    front = pareto_front([(4.0, 2.0), (1.0, 4.0), (2.0, 3.0), (3.0, 3.5), (2.0, 3.2)])
    assert front == [(1.0, 4.0), (2.0, 3.0), (4.0, 2.0)]
    for loss in (4.0, 3.9, 3.0, 2.2, 2.0):
        assert loss_at_cost(front, cost_at_loss(front, loss)) == pytest.approx(loss)
    assert cost_at_loss(front, 3.5) == pytest.approx(math.sqrt(2.0))
    assert loss_at_cost(front, 9.0) == 2.0
    assert cost_at_loss([(5.0, 1.0)], 1.0) == 5.0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0 FLOP"), (950.0, "950 FLOP"), (1.234e15, "1.23 PFLOP"), (999.6e9, "1 TFLOP"), (None, "unknown")],
)
def test_quantities_are_readable(value: float | None, text: str) -> None:
    assert quantity(value, "FLOP") == text
