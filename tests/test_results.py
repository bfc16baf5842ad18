"""docs/results.md says what the committed reports say, and these what the record of ended runs says."""

import csv
import json
import re
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from benchmarks.compare_tables import FOLDER, tables
from megagrow.compare import SUITES
from megagrow.compare.controls import CONTROLS, controls_of
from megagrow.compare.suite import NEVER_GROWN, SMALL
from megagrow.compare.suites import suite
from megagrow.ledger import Ledger
from megagrow.report.savings import CONVENTIONS

ROOT = FOLDER.parents[1]
NAME = re.compile(r"(.+?)-lr.*-seed(\d+)-\w+")  # of a run: arm and seed
REPORTS = sorted(path.parent.name for path in FOLDER.glob("*/savings.csv") if path.parent.name in SUITES)


def rows(name: str) -> list[dict[str, str]]:
    with (FOLDER / name / "savings.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def record(name: str, corpus: str) -> dict[str, dict[str, Any]]:
    """Key -> line."""
    path = ROOT / "benchmarks" / "results" / "compare" / f"{name}-cpu-{corpus[:12]}.jsonl"
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {line["key"]: line for line in lines}


def test_there_are_reports() -> None:
    assert REPORTS


def test_the_tables_are_those_of_the_reports() -> None:
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for heading, table in tables().items():
        assert f"{heading}\n\n{table}\n" in text, "python benchmarks/compare_tables.py prints what it should have"


@pytest.mark.parametrize("report", REPORTS)
def test_each_line_of_a_report_is_on_record(report: str) -> None:
    """With its loss, bit for bit; and every arm and control of the suite ran on every seed, or has diverged."""
    found = rows(report)
    lines = record(report, found[0]["corpus"])
    for row in found:
        name = NAME.fullmatch(lines[row["key"]]["name"])
        assert name is not None and name.groups() == (row["arm"], row["seed"])
        assert lines[row["key"]]["loss"] == float(row["loss"])
    core = suite(report, "core")
    arms = SMALL, *core.scratch_arms, *controls_of(core.arms), *core.arms
    wanted = {(arm, str(seed)) for arm in arms for seed in core.seeds}
    names = [NAME.fullmatch(line["name"]) for line in lines.values() if line["reason"]]
    diverged = {name.groups() for name in names if name}
    assert wanted - {(row["arm"], row["seed"]) for row in found} <= diverged


@pytest.mark.parametrize("name", REPORTS)
def test_savings_follow_from_the_record(name: str) -> None:
    """By the definition of docs/compare.md: the cost at which scratch of the same seed has the same loss."""
    found = rows(name)
    for convention in CONVENTIONS:
        for row in (row for row in found if row[f"saving_flops_{convention}"]):
            scratch = [each for each in found if each["seed"] == row["seed"] and each["arm"].startswith("scratch-")]
            assert len(scratch) == len(suite(name, "core").scratch_budgets) >= 3
            points = sorted((np.log(float(each[f"flops_{convention}"])), float(each["loss"])) for each in scratch)
            saved = float(row[f"saving_flops_{convention}"])
            equal = np.log(float(row[f"flops_{convention}"]) / (1 - saved))
            (piece,) = [i for i, (a, b) in enumerate(pairwise(points)) if a[0] <= equal <= b[0]]
            parabola = np.polyfit(*np.transpose(points[max(piece - 1, 0) :][:3]), 2)
            assert np.polyval(parabola, equal) == pytest.approx(float(row["loss"]), abs=1e-9)


@pytest.mark.parametrize("name", REPORTS)
def test_costs_are_those_of_the_ledgers(name: str) -> None:
    """All-in, what a run inherits counts: every arm spent what it might, within a step; some controls more."""
    found = rows(name)
    lines = record(name, found[0]["corpus"])
    core = suite(name, "core")
    for row in found:
        ledger = Ledger.from_dict(lines[row["key"]]["ledger"])
        assert ledger.totals()["all_in"]["flops"] == float(row["flops_all_in"])
        if row["arm"] in (NEVER_GROWN, *core.arms):
            assert float(row["flops_all_in"]) == pytest.approx(core.budget, rel=0.01)
        elif row["arm"] in CONTROLS:
            most = 1.1 if CONTROLS[row["arm"]].small == SMALL else 1.81
            assert (most - 0.1) * core.budget < float(row["flops_all_in"]) < most * core.budget
