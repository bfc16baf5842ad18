"""Tests ../../megagrow/compare/record.py: lines that a crash, a merge or an editor damages; what runs are charged."""

from dataclasses import replace
from pathlib import Path

import pytest

from megagrow.compare.experiment import Experiment
from megagrow.compare.record import Line, Record
from megagrow.compare.suite import SMALL
from megagrow.config import Config
from megagrow.errors import DataError
from megagrow.ledger import Ledger


def line(key: str, loss: float | None = 3.0) -> Line:
    return Line(key, f"arm-{key}", 10, loss, "", Ledger().to_dict(), [], None, {}, "machine", 1, "0123", "2026-01-02")


def test_lines_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "record.jsonl"
    record = Record(path)
    assert record.find("a") is None
    for each in (line("a"), line("b", None), line("a", 4.0)):
        record.add(each)
    found = Record(path)
    assert found.find("a") == line("a") and found.find("b") == line("b", None)
    assert len(path.read_text().splitlines()) == 2


def test_a_run_that_another_suite_has_is_copied_from_there(tmp_path: Path) -> None:
    other, path = Record(tmp_path / "other.jsonl"), tmp_path / "record.jsonl"
    other.add(line("a"))
    assert Record(path).adopt("b") is None
    assert Record(path).find("a") == line("a") and not path.exists()  # a report writes nothing here
    assert Record(path).adopt("a") == line("a")
    (tmp_path / "other.jsonl").unlink()
    assert Record(path).find("a") == line("a")


def test_two_files_that_contradict_each_other_are_refused_by_a_third_that_needs_the_run(tmp_path: Path) -> None:
    Record(tmp_path / "a.jsonl").add(line("a"))
    Record(tmp_path / "b" / "b.jsonl").add(line("a", 3.5))
    (tmp_path / "b" / "b.jsonl").rename(tmp_path / "b.jsonl")
    assert Record(tmp_path / "b.jsonl").find("a") == line("a", 3.5)
    third = Record(tmp_path / "new.jsonl")
    assert third.find("b") is None
    with pytest.raises(DataError, match=r"arm-a ends at 3.0 \(.*a.jsonl\) and 3.5 \(.*b.jsonl\); delete all lines"):
        third.find("a")


def test_a_torn_last_line_is_ignored_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    Record(path).add(line("a"))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])
    record = Record(path)
    record.add(line("b"))
    assert path.read_bytes().startswith(whole)
    assert Record(path).find("b") == line("b")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text + text.replace("3.0", "3.5"), "two lines of arm-a end at 3.0 and 3.5; delete one"),
        (lambda text: text[:40] + "\n" + text, "line 1: not valid JSON"),
        (lambda text: text.replace('"curve"', '"curves"'), "line 1: is no run of a comparison; restore the file"),
    ],
)
def test_a_damaged_file_is_refused(damage: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    Record(path).add(line("a"))
    path.write_text(damage(path.read_text()))
    with pytest.raises(DataError, match=message):
        Record(path)


@pytest.mark.parametrize(("arm", "uses_small"), [("mslt", False), ("bootstrap", False), ("progressive", True)])
def test_the_papers_convention_charges_a_runs_own_stages(arm: str, uses_small: bool, finished: Experiment) -> None:
    """And nothing of a small model that was given."""
    costs = {}
    for name in (arm, SMALL):
        chosen = finished.sweep.best(name)
        run = finished.ended(chosen, 1).run(finished.job(chosen, 1).config)
        costs[name] = {convention: run.cost(convention, "flops") for convention in ("papers_convention", "all_in")}
    given = costs[SMALL]["all_in"] if uses_small else 0.0
    assert costs[arm]["papers_convention"] == pytest.approx(costs[arm]["all_in"] - given, rel=1e-12)


def test_scoring_is_not_charged_by_the_papers_convention() -> None:
    ledger = Ledger()
    ledger.add("scoring", flops=3.0, tokens=1, seconds=1.0)
    ledger.add("small", flops=5.0, tokens=1, seconds=1.0)
    ledger.add("train", flops=7.0, tokens=1, seconds=1.0)
    run = replace(line("a"), ledger=ledger.to_dict()).run(Config())
    assert (run.cost("papers_convention", "flops"), run.cost("all_in", "flops")) == (12.0, 15.0)
