"""docs/results.md says what the committed reports say, and these what the record of ended runs says."""

import csv
import json
import re
from typing import Any

import pytest

from benchmarks.compare_tables import FOLDER, tables
from megagrow.compare import SUITES
from megagrow.compare.suite import SMALL
from megagrow.compare.suites import suite
from megagrow.ledger import Ledger
from megagrow.report.savings import CONVENTIONS, pareto_front, saving_at

ROOT = FOLDER.parents[1]
NAME = re.compile(r"(.+?)-lr.*-seed(\d+)-\w+")  # of a run: arm and seed
REPORTS = sorted(path.parent.name for path in FOLDER.glob("*/savings.csv") if path.parent.name in SUITES)


def rows(name: str) -> list[dict[str, str]]:
    with (FOLDER / name / "savings.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def record(name: str, corpus: str) -> list[dict[str, Any]]:
    path = ROOT / "benchmarks" / "results" / "compare" / f"{name}-cpu-{corpus[:12]}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_tables_are_those_of_the_reports() -> None:
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for heading, table in tables().items():
        assert f"{heading}\n\n{table}\n" in text, "python benchmarks/compare_tables.py prints what it should have"


@pytest.mark.parametrize("report", REPORTS)
def test_each_line_of_a_report_is_on_record(report: str) -> None:
    """With its loss, bit for bit; and every arm of the suite ran on every seed, or has diverged."""
    found = rows(report)
    lines = record(report, found[0]["corpus"])
    names = {line["loss"]: line["name"] for line in lines}
    for row in found:
        name = NAME.fullmatch(names[float(row["loss"])])
        assert name is not None and name.groups() == (row["arm"], row["seed"])
    core = suite(report, "core")
    wanted = {(arm, str(seed)) for arm in (SMALL, *core.scratch_arms, *core.arms) for seed in core.seeds}
    diverged = {NAME.fullmatch(line["name"]).groups() for line in lines if line["reason"]}  # type: ignore[union-attr]
    assert wanted - {(row["arm"], row["seed"]) for row in found} <= diverged


@pytest.mark.parametrize("name", REPORTS)
def test_savings_follow_from_the_record(name: str) -> None:
    """By the definition of docs/compare.md: the cost at which scratch of the same seed has the same loss."""
    found = rows(name)
    for convention in CONVENTIONS:
        for row in (row for row in found if row[f"saving_flops_{convention}"]):
            scratch = [each for each in found if each["seed"] == row["seed"] and each["arm"].startswith("scratch-")]
            assert len(scratch) == 3
            front = pareto_front([(float(each[f"flops_{convention}"]), float(each["loss"])) for each in scratch])
            saved = saving_at(float(row[f"flops_{convention}"]), float(row["loss"]), front, front[-1][0])
            assert saved["value"] == pytest.approx(float(row[f"saving_flops_{convention}"]), abs=1e-12)


@pytest.mark.parametrize("name", REPORTS)
def test_costs_are_those_of_the_ledgers(name: str) -> None:
    """All-in, what a run inherits counts: every arm but the small model spent what it might, within a step."""
    found = rows(name)
    ledgers = {line["loss"]: line["ledger"] for line in record(name, found[0]["corpus"])}
    budget = suite(name, "core").budget
    for row in found:
        ledger = Ledger.from_dict(ledgers[float(row["loss"])])
        assert ledger.totals()["all_in"]["flops"] == float(row["flops_all_in"])
        if not row["arm"].startswith(("scratch-", SMALL)):
            assert float(row["flops_all_in"]) == pytest.approx(budget, rel=0.01)
