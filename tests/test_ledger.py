"""Tests ../megagrow/ledger.py: what is charged to whom, and that nothing unknown becomes zero."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megagrow.errors import CheckpointError
from megagrow.ledger import Ledger


def made(phase: str, flops: float, seconds: float = 1.0, tokens: int = 10) -> Ledger:
    ledger = Ledger()
    ledger.add(phase, flops=flops, tokens=tokens, seconds=seconds, model="m")
    return ledger


def grown(small: Ledger) -> Ledger:
    """Source, teacher and scorer are one small model; learning the operator, stage 1 and stage 2 are the run's own."""
    scores = made("scoring", 7.0)
    scores.inherit("scorer", "small@9", small)
    run = Ledger()
    run.inherit("source", "small@9", small)
    run.inherit("teacher", "small@9", small)
    run.inherit("scores", "scores-of-it", scores)
    run.add("ligo", flops=20.0, tokens=10, seconds=2.0, model="large")
    run.add("teacher", flops=3.0, tokens=10, seconds=0.5, model="small")
    run.add("salt", flops=30.0, tokens=10, seconds=3.0, model="large")
    run.add("train", flops=40.0, tokens=10, seconds=4.0, model="large")
    run.add("evaluation", flops=1000.0, tokens=1000, seconds=1000.0, model="large")
    return run


def test_a_small_model_with_three_uses_is_charged_once() -> None:
    totals = grown(made("train", 100.0, seconds=5.0)).totals()
    assert totals["papers_convention"] == {"flops": 93.0, "tokens": 30, "seconds": 9.5}
    assert totals["all_in"] == {"flops": 200.0, "tokens": 50, "seconds": 15.5}


def test_work_that_tools_did_ahead_is_no_gift() -> None:
    """A cached teacher and a checkpoint grown by a tool cost the papers' convention what they cost inside a run."""
    small = made("train", 100.0)
    grown_by_tool = made("ligo", 20.0)
    grown_by_tool.add("growth", flops=1.0, tokens=0, seconds=0.5)
    grown_by_tool.inherit("source", "small@9", small)
    run = Ledger()
    run.inherit("source", "grown", grown_by_tool)
    run.inherit("cache of 0123", "cache", made("teacher", 3.0))
    run.inherit("teacher", "small@9", small)
    run.add("teacher", flops=0.0, tokens=10, seconds=0.1)
    run.add("salt", flops=30.0, tokens=10, seconds=3.0)
    totals = run.totals()
    assert totals["papers_convention"]["flops"] == 20.0 + 1.0 + 3.0 + 30.0
    assert totals["all_in"]["flops"] == totals["papers_convention"]["flops"] + 100.0


def test_two_small_models_are_charged_twice() -> None:
    run = Ledger()
    run.inherit("source", "a", made("train", 100.0))
    run.inherit("teacher", "b", made("train", 100.0))
    assert run.totals()["all_in"]["flops"] == 200.0


def test_an_unknown_source_makes_all_in_unknown_and_leaves_the_papers_convention() -> None:
    run = made("train", 40.0)
    run.inherit("source", "from a hub", Ledger.outside())
    assert run.totals()["papers_convention"] == {"flops": 40.0, "tokens": 10, "seconds": 1.0}
    assert run.totals()["all_in"] == {"flops": None, "tokens": None, "seconds": None}


def test_given_source_flops_make_flops_known_and_seconds_stay_unknown() -> None:
    run = made("train", 40.0)
    run.inherit("source", "from a hub", Ledger.outside(60.0))
    assert run.totals()["all_in"] == {"flops": 100.0, "tokens": None, "seconds": None}


@pytest.mark.parametrize("known_first", [True, False])
def test_what_one_use_knows_counts_for_the_others(known_first: bool) -> None:
    uses = [("source", made("train", 60.0)), ("scorer", Ledger.outside())]
    run = made("train", 40.0)
    for label, ledger in uses if known_first else reversed(uses):
        run.inherit(label, "same", ledger)
    assert run.totals()["all_in"]["flops"] == 100.0


def test_a_small_model_trained_in_the_run_is_left_out_by_papers_only() -> None:
    run = made("small", 25.0)
    run.add("growth", flops=0.0, tokens=0, seconds=0.5)
    run.add("train", flops=75.0, tokens=10, seconds=2.0)
    assert run.totals()["papers_convention"] == {"flops": 75.0, "tokens": 10, "seconds": 2.5}
    assert run.totals()["all_in"] == run.own() == {"flops": 100.0, "tokens": 20, "seconds": 3.5}


def test_what_a_source_was_itself_grown_from_is_charged() -> None:
    middle = made("train", 10.0)
    middle.inherit("source", "small", made("train", 1.0))
    large = made("train", 100.0)
    large.inherit("source", "middle", middle)
    assert large.totals()["all_in"]["flops"] == 111.0
    assert large.inherited_cost()["flops"] == 11.0


def test_steps_of_a_phase_add_up_in_one_entry_in_order_of_beginning() -> None:
    ledger = Ledger()
    for _ in range(3):
        ledger.add("teacher", flops=1.0, tokens=5, seconds=0.1)
        ledger.add("salt", flops=10.0, tokens=5, seconds=1.0)
    assert [(p.phase, p.steps, p.flops) for p in ledger.phases] == [("teacher", 3, 3.0), ("salt", 3, 30.0)]


def test_inheriting_again_after_a_resume_changes_nothing() -> None:
    run = grown(made("train", 100.0))
    before = run.totals()
    run.inherit("source", "small@9", made("train", 100.0))
    assert run.totals() == before
    assert len(run.inherited) == 3


def test_conventions_are_not_mixed() -> None:
    with pytest.raises(CheckpointError, match="'causal', this run by 'full'"):
        Ledger().inherit("source", "x", Ledger(convention="causal"))


def test_a_saved_ledger_reads_back_as_it_was(tmp_path: Path) -> None:
    run = grown(made("train", 0.1 + 0.2))
    run.inherit("source", "from a hub", Ledger.outside())
    run.add_event("growth", 12, method="ligo", loss_before=4.5, loss_after=None)
    run.save(tmp_path / "ledger.json")
    assert Ledger.load(tmp_path / "ledger.json") == run
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.json"]
    written = json.loads((tmp_path / "ledger.json").read_text())
    assert written["totals"] == run.totals()
    assert written["events"][0]["flops_total"] == 93.0


def test_counting_goes_on_exactly_after_a_resume(tmp_path: Path) -> None:
    steps = [0.1 * n for n in range(1, 8)]
    whole, first = Ledger(), Ledger()
    for flops in steps:
        whole.add("train", flops=flops, tokens=1, seconds=flops)
    for flops in steps[:3]:
        first.add("train", flops=flops, tokens=1, seconds=flops)
    first.save(tmp_path / "ledger.json")
    second = Ledger.load(tmp_path / "ledger.json")
    for flops in steps[3:]:
        second.add("train", flops=flops, tokens=1, seconds=flops)
    assert second == whole


def damaged(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    data = json.loads(json.dumps(grown(made("train", 1.0)).to_dict()))
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("phases"), "phases is missing"),
        (lambda d: d.update(extra=1), "unknown key extra"),
        (lambda d: d["phases"][1].update(flops="many"), r"phases\[1\]: flops='many' has the wrong type"),
        (lambda d: d["phases"][0].update(flops=-1.0), "flops=-1.0 must be finite and not negative"),
        (lambda d: d["phases"][0].update(seconds=float("nan")), "seconds=nan must be finite"),
        (lambda d: d["phases"][0].update(phase="other"), "phase='other' must be one of small"),
        (lambda d: d["phases"][0].update(tokens=True), "tokens=True has the wrong type"),
        (lambda d: d["inherited"][2]["ledger"]["inherited"][0].pop("label"), r"inherited\[0\]: label is missing"),
        (lambda d: d["events"].append({"event": "growth"}), r"events\[0\]: step is missing"),
    ],
)
def test_a_damaged_ledger_is_refused_in_one_line(change: Callable[[dict[str, Any]], object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        Ledger.from_dict(damaged(change), "runs/a/ledger.json")
    assert str(caught.value).startswith("runs/a/ledger.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "{torn", "[]"])
def test_a_file_that_is_no_ledger_is_refused(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=r"ledger\.json"):
        Ledger.load(path)
