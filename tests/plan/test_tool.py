"""Tests ../../tools/plan.py: once as a user starts it, else in this process, which has imported torch."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megagrow.__main__ import main as megagrow_main
from tests.tools import TOOLS, run_tool

CONFIG = """
model: {vocab_size: 128256, hidden_size: 8192, num_layers: 80, num_heads: 64, num_kv_heads: 8, ffn_size: 28672}
data: {seq_length: 8192}
parallel: {tensor: 8, sequence_parallel: true, pipeline: 4, schedule: Interleaved1F1B}
train: {global_batch_size: 1024, microbatch_size: 1, precision: bf16}
"""


@dataclass(frozen=True)
class Done:
    """How the tool ended."""

    returncode: int
    stdout: str
    stderr: str


Plan = Callable[..., Done]


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Plan:
    """Runs the tool."""
    return lambda *arguments: Done(run_tool("plan", *arguments), *capsys.readouterr())


@pytest.fixture
def llama_70b(tmp_path: Path) -> Path:
    path = tmp_path / "llama-70b.yaml"
    path.write_text(CONFIG)
    return path


def test_70b_on_1024_ranks(llama_70b: Path, tmp_path: Path) -> None:
    command = [sys.executable, TOOLS / "plan.py", llama_70b, "--world-size", "1024", "--json", tmp_path / "plan.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "70,553,706,496 parameters" in done.stdout
    assert "pipeline 4, data 32, context 1, tensor 8" in done.stdout
    written = json.loads((tmp_path / "plan.json").read_text())
    (phase,) = written["phases"]
    assert phase["name"] == "train" and len(phase["ranks"]) == 4
    assert phase["flops_per_step"]["full"] > phase["flops_per_step"]["causal"] > 3e18
    assert all(rank["total_bytes"] == sum(rank["bytes"].values()) for rank in phase["ranks"])
    assert sum(len(stage["layers"]) for stage in written["stages"]) == 80
    assert 0 < written["bubble"] < 0.1


def test_a_dry_run_builds_what_the_plan_counts(plan: Plan, llama_70b: Path, tmp_path: Path) -> None:
    done = plan(llama_70b, "--world-size", "1024", "--dry-run", "--json", tmp_path / "plan.json")
    assert done.returncode == 0, done.stderr
    for stage in json.loads((tmp_path / "plan.json").read_text())["stages"]:
        assert f"{stage['parameters']:,}" in done.stdout


def test_every_broken_rule_is_told_with_its_remedy(plan: Plan, llama_70b: Path) -> None:
    done = plan(llama_70b, "--world-size", "1000", "--parallel.tensor", "7", "--train.global_batch_size", "999")
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 4 and all(line.startswith("error: ") for line in lines)
    for rule in (
        "does not divide the 1000 launched ranks",
        "does not divide num_heads=64",
        "does not divide them",
        "999",
    ):
        assert any(rule in line for line in lines), rule


def test_presets_grow_and_learn_from_teachers_that_are_not_there_yet(plan: Plan) -> None:
    taught = "--salt.teacher", "runs/none", "--salt.steps", "1700"
    done = plan("grow_llama_125m", "--world-size", "8", "--init.from", "runs/none", *taught)
    assert done.returncode == 0, done.stderr
    assert "salt: " in done.stdout and "train: " in done.stdout
    assert "note: the source, init.from=runs/none: no such folder yet" in done.stdout
    assert "note: salt.teacher=runs/none" in done.stdout


def test_what_does_not_fit_is_told(plan: Plan, llama_70b: Path) -> None:
    found = [plan(llama_70b, "--world-size", "1024", *memory).stdout for memory in ((), ("--gpu-memory", "20"))]
    assert ["warning: does not fit" in each for each in found] == [False, True]
    assert "(train" in found[1] and "and tensors can have 18.0 GiB of a GPU" in found[1].replace("\n", " ")


def test_suggestions(plan: Plan, tmp_path: Path) -> None:
    given = ("llama_125m", "--world-size", "8", "--suggest", "--count", "3", "--json", tmp_path / "found.json")
    done = plan(*given, "--gpu-memory", "80")
    assert done.returncode == 0, done.stderr
    assert "--parallel.tensor " in done.stdout and "assumptions" in done.stdout
    best = json.loads((tmp_path / "found.json").read_text())[0]
    options = shlex.split(done.stdout.split("the first: ")[1])
    assert "--parallel.layers_per_stage" not in options
    assert plan("llama_125m", "--world-size", "8", *options).returncode == 0
    assert best["bytes"] < 0.9 * 80 * 2**30


def test_the_options_of_a_suggestion_take_back_a_split_into_stages(plan: Plan, tmp_path: Path) -> None:
    split = ("llama_125m", "--parallel.pipeline", "2", "--parallel.layers_per_stage", "[5, 7]")
    done = plan(*split, "--world-size", "8", "--suggest")
    assert done.returncode == 0, done.stderr
    options = shlex.split(done.stdout.split("the first: ")[1])
    done = plan(*split, "--world-size", "8", *options, "--json", tmp_path / "plan.json")
    assert done.returncode == 0, done.stderr


def test_suggestions_for_a_run_that_makes_its_own_small_model(plan: Plan) -> None:
    done = plan(
        "llama_125m", "--world-size", "8", "--growth.method", "stack", "--growth.bootstrap", "true", "--suggest"
    )
    assert done.returncode == 0, done.stderr


def test_a_rule_that_no_layout_mends_is_told_instead_of_memory(plan: Plan) -> None:
    done = plan("llama_125m", "--world-size", "8", "--salt.teacher", "x", "--suggest")
    assert done.returncode == 2 and "salt." in done.stderr and "--gpu-memory" not in done.stderr


def test_no_layout_fits(plan: Plan) -> None:
    done = plan("llama_125m", "--world-size", "8", "--suggest", "--gpu-memory", "0.01")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no layout of this model on 8 ranks fits") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["llama_125m"], ["nothing", "--world-size", "8"], ["llama_125m", "--world-size", "0"]]
)
def test_wrong_usage_is_one_line(plan: Plan, arguments: list[str]) -> None:
    done = plan(*arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")


def test_a_dry_run_of_the_run_itself_shows_the_plan_and_leaves_nothing(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    arguments = ["llama_125m", "--parallel.pipeline", "2", "--dry-run", "--run.dir", str(tmp_path / "run")]
    assert megagrow_main(arguments) == 0
    shown = capfd.readouterr().out
    assert "built without memory: 2 ranks" in shown and "67,053,312" in shown
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert megagrow_main(arguments) == 0
    assert "built without memory: 8 ranks" in capfd.readouterr().out
    monkeypatch.setenv("RANK", "3")
    assert megagrow_main(arguments) == 0
    assert capfd.readouterr().out == "", "the first rank speaks"


def test_a_dry_run_refuses_what_the_run_would(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert megagrow_main(["llama_125m", "--dry-run", "--parallel.tensor", "2"]) == 2
    error = capfd.readouterr().err
    assert error.startswith("megagrow: error: ") and error.count("\n") == 1


@pytest.mark.parametrize("ranks", ["abc", "", "0", "-2"])
def test_a_dry_run_wants_a_number_of_ranks(
    ranks: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", ranks)
    assert megagrow_main(["llama_125m", "--dry-run"]) == 2
    assert f"WORLD_SIZE={ranks!r}" in capfd.readouterr().err
