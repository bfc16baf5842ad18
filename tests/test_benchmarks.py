"""The benchmarks that need another machine, or minutes, run here on what is small."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_gpu_train_measures_an_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_train = load("gpu_train", monkeypatch)
    case = gpu_train.TINY["tiny"]
    row = gpu_train.row("tiny", case, False, True, gpu_train.launch("tiny", False, True, 100.0))
    assert "failed" not in row, row
    tokens = case.sequences * case.model.max_seq_length
    assert row["tokens_per_second"] == pytest.approx(tokens / row["seconds"])
    assert 0 < row["mfu_causal"] < row["mfu_full"] < 1
    assert row["planned_to_measured"] == pytest.approx(1, abs=0.2)


def test_gpu_train_tells_of_arms_that_fail_or_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_train = load("gpu_train", monkeypatch)
    failed = gpu_train.launch("no such model", True, True, 100.0)
    assert "no such model" in failed["failed"]
    assert gpu_train.launch("tiny", True, True, 0.1) == {"failed": "not done in 0 s"}
    assert gpu_train.row("3B", gpu_train.CASES["3B"], True, True, failed)["failed"] == failed["failed"]


def test_gpu_train_tries_every_switch_on_every_model_and_begins_with_all_on(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_train = load("gpu_train", monkeypatch)
    arms = gpu_train.arms(gpu_train.CASES)
    assert len(set(arms)) == len(arms) == 4 * len(gpu_train.CASES) == 20
    assert arms[0] == ("1.3B", True, True) and all(each[1:] == (True, True) for each in arms[:5])
    sizes = {name: gpu_train.num_parameters(case.model) / 1e9 for name, case in gpu_train.CASES.items()}
    expected = {"125M": 0.134, "350M": 0.37, "1.3B": 1.35, "3B": 3.6, "8B, 4 of 32 layers": 1.92}
    assert sizes == pytest.approx(expected, rel=0.05)


def test_train_step_judges_by_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    train_step = load("train_step", monkeypatch)

    def run(seconds: float, peak: float) -> dict[str, Any]:
        return {"seconds": [seconds], "losses": [10.0], "process": peak, "live": peak}

    found: dict[str, list[dict[str, Any]]] = {name: [run(2.0, 200.0)] for name in train_step.REFERENCES}
    found |= {name: [run(1.0, 100.0)] for name in train_step.OURS}
    found |= {train_step.TENSOR_ARM: [run(1.5, 60.0)], train_step.PEAK_ARM: [{"peak": 1e12}]}
    judged = {row.name.split(": ", 1)[1].split(",")[0]: row for row in train_step.rows_of("bf16", found) if row.bound}
    assert [row.holds for row in judged.values()] == [True, True, True, False, True]
    assert judged["tokens per second"].value == 2.0
    assert judged["peak of the process"].value == 0.5
    found["compiled"] = [run(1.0, 100.0) | {"losses": [10.1]}]
    assert [row.holds for row in train_step.rows_of("bf16", found) if row.bound][-1] is False


def test_both_sides_of_train_step_start_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Same weights, same batch, same update: losses agree for three steps."""
    train_step = load("train_step", monkeypatch)
    small = train_step.ModelConfig(
        hidden_size=32, num_layers=2, num_heads=4, ffn_size=48, vocab_size=64, max_seq_length=16
    )
    monkeypatch.setattr(train_step, "MODEL", small)
    monkeypatch.setattr(train_step, "OURS", {"plain": train_step.TrainConfig()})
    ours, theirs = train_step.our_step("plain", "fp32"), train_step.reference_step("eager", "fp32")
    assert [ours() for _ in range(3)] == pytest.approx([theirs() for _ in range(3)], abs=2e-5)


def test_the_reason_of_a_failed_arm_is_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = load("gpu_train", monkeypatch).reason
    advice = "Set TORCHDYNAMO_VERBOSE=1 for the internal stack trace"
    assert (
        reason(f"Traceback\n  line\ntorch._dynamo.exc.BackendError: no\n\n{advice}\n")
        == "torch._dynamo.exc.BackendError: no"
    )
    assert reason("killed\n") == "killed"
    assert reason("") == ""
