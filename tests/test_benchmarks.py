"""The benchmarks that need another machine, or minutes, run here on what is small."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megagrow import ops
from megagrow.checkpoint import store
from megagrow.config import ModelConfig
from megagrow.roles import num_parameters
from megagrow_kernels.launch import ANY

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
    # Not below 1: a CPU without instructions for bf16 computes some of a step faster than it multiplies large matrices.
    work = gpu_train.flops.training_flops(case.model, tokens, case.model.max_seq_length, "full")
    assert row["mfu_full"] == pytest.approx(work / row["seconds"] / row["matrix"])
    assert 0 < row["mfu_causal"] < row["mfu_full"]
    assert row["planned_to_measured"] == pytest.approx(1, abs=0.2)


def test_gpu_train_tells_of_arms_that_fail_or_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_train = load("gpu_train", monkeypatch)
    failed = gpu_train.launch("no such model", True, True, 100.0)
    assert "no such model" in failed["failed"]
    assert gpu_train.launch("tiny", True, True, 0.1) == {"failed": "not done in 0 s"}
    assert gpu_train.row("3B", gpu_train.CASES["3B"], True, True, failed)["failed"] == failed["failed"]


def test_gpu_train_tries_every_switch_on_every_model_and_pairs_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_train = load("gpu_train", monkeypatch)
    arms = gpu_train.arms(gpu_train.CASES)
    assert len(set(arms)) == len(arms) == 4 * len(gpu_train.CASES) == 20
    assert arms[:3] == [("1.3B", True, True), ("1.3B", True, False), ("125M", True, True)]
    assert all(compiled for _, compiled, _ in arms[:10])
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


def test_convert_memory_judges_by_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    convert_memory = load("convert_memory", monkeypatch)
    assert 1e9 < convert_memory.num_parameters(convert_memory.LLAMA_1B) < 1.6e9
    largest = 2 * 128_256 * 2048
    within, beyond = (
        {"peak": 1.5 * largest + 2**30, "seconds": 1.0},
        {"peak": 1.5 * largest + 2**30 + 1, "seconds": 1.0},
    )
    rounded = {"peak": 2.5 * largest + 2**30 + 1, "seconds": 1.0}
    found = {
        "files": 5,
        "there": within,
        "back": beyond,
        "single": within,
        "rounded": rounded,
        "differing": ["lm_head.weight"],
    }
    rows = [row for row in convert_memory.rows_of(convert_memory.LLAMA_1B, found) if row.bound]
    assert [row.holds for row in rows] == [True, False, True, False, False]
    found["rounded"] = {"peak": 2.5 * largest + 2**30, "seconds": 1.0}
    assert [row.holds for row in convert_memory.rows_of(convert_memory.LLAMA_1B, found) if row.bound][3]


def test_convert_memory_converts_each_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    convert_memory = load("convert_memory", monkeypatch)
    model = ModelConfig(vocab_size=31, hidden_size=8, num_layers=2, num_heads=2, ffn_size=12)
    found = convert_memory.measure(model, tmp_path, shard_bytes=1000)
    assert found["files"] > 2 and found["differing"] == []
    assert [path.name for path in (tmp_path / "single").glob("*.safetensors")] == ["model.safetensors"]
    assert store.read_manifest(tmp_path / "rounded/step-0").tensors["model.embedding.tokens"].dtype == "float16"
    assert all(row.holds for row in convert_memory.rows_of(model, found) if row.bound)


def test_convert_memory_sees_a_single_bit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    convert_memory = load("convert_memory", monkeypatch)
    model = ModelConfig(vocab_size=31, hidden_size=8, num_layers=2, num_heads=2, ffn_size=12)
    for name in ("one", "other"):
        convert_memory.make_folder(tmp_path / name, model, shard_bytes=1000)
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 2
    assert convert_memory.differing_tensors(tmp_path / "one", tmp_path / "other") == []
    changed = next(path for path in (tmp_path / "other").glob("*.safetensors"))
    raw = bytearray(changed.read_bytes())
    raw[-1] ^= 1
    changed.write_bytes(raw)
    assert len(convert_memory.differing_tensors(tmp_path / "one", tmp_path / "other")) == 1


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


def test_ligo_gives_every_arm_as_many_tries_and_reports_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    ligo = load("ligo", monkeypatch)
    seen: list[tuple[Any, int]] = []

    def measure(runs: Any) -> list[dict[str, Any]]:
        """Ends lowest at a rate of 2.9e-3 and, of the maps, 1e-2."""
        found = []
        for each, seed in runs:
            seen.append((each, seed))
            map_lr = each.growth.ligo_lr if each.growth and each.growth.method == "ligo" else None
            loss = abs(each.lr - 2.9e-3) - (map_lr or 0.0)
            found.append({"arm": each.arm, "lr": each.lr, "ligo_lr": map_lr, "loss": loss})
        return found

    for pair in ligo.PAIRS:
        seen.clear()
        bench = ligo.Bench(FOLDER, pair, ligo.Plan())
        chosen, tried = ligo.choose(bench.arms(), measure)
        assert {seed for _, seed in seen} == {0}
        assert all(sum(each.arm == arm for each, _ in seen) == 5 for arm in bench.arms())
        assert len(set(seen)) == len(tried) == 5 * len(bench.arms())
        for each in chosen:
            learns = each.growth is not None and each.growth.method == "ligo"
            assert each.lr == (2e-3 if learns else pytest.approx(2e-3 * 2**0.5))
            assert not learns or each.growth.ligo_lr == 1e-2


def test_ligo_spends_the_same_on_every_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    ligo = load("ligo", monkeypatch)
    for pair in ligo.PAIRS:
        bench = ligo.Bench(FOLDER, pair, ligo.Plan())
        small, large = bench.models
        tokens = ligo.BATCH * ligo.LENGTH
        source, step = (ligo.flops.training_flops(each, tokens, ligo.LENGTH) for each in (small, large))
        for growth in bench.arms().values():
            spent = step * bench.steps(growth) + (0 if growth is None else source * bench.plan.source_steps)
            if growth is not None and growth.method == "ligo":
                learning = ligo.flops.ligo_step_flops(small, large, tokens, ligo.LENGTH, variant=growth.ligo_variant)
                spent += growth.ligo_steps * learning
            assert spent == pytest.approx(400 * (step + source), rel=2e-3)


def test_toy_salt_gives_every_arm_as_many_tries_and_reports_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    toy_salt, seen = load("toy_salt", monkeypatch), list[tuple[Any, int]]()

    def measure(runs: list[tuple[Any, int]]) -> list[dict[str, Any]]:
        """Ends lowest at a rate of 2e-3, and with more of a teacher."""
        seen.extend(runs)
        return [{"loss": abs(arm.lr - 2e-3) - arm.weight} for arm, _ in runs]

    chosen, tried = toy_salt.choose(measure)
    assert [arm.name for arm in chosen] == [arm.name for arm in toy_salt.ARMS]
    assert {arm.lr for arm in chosen} == {2e-3}
    assert {seed for _, seed in seen} == {0} and len(set(seen)) == len(tried) == len(seen) == 15
    numbers = {arm.name: sum(each.name == arm.name for each, _ in seen) for arm in chosen}
    assert set(numbers.values()) == {3, 0} and numbers["baseline, teacher given"] == 0
    weights = {"KD throughout": 0.75, "SALT": 0.75, "SALT and selection": 0.5}
    assert {arm.name: arm.weight for arm in chosen if arm.weight} == weights


def test_toy_salt_spends_the_same_on_every_arm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As the ledgers of tiny runs count it; a finished run is not run again, one of other settings not overwritten."""
    toy_salt = load("toy_salt", monkeypatch)
    monkeypatch.setattr(toy_salt, "TEACHER", toy_salt.llama_model(1, 32, 32, 64, 2048, 128))
    monkeypatch.setattr(toy_salt, "STUDENT", toy_salt.llama_model(2, 32, 32, 64, 2048, 128))
    bench = toy_salt.make_bench(tmp_path, toy_salt.Plan(steps=30, teacher_steps=10, limit_bytes=150_000))
    teacher = bench.prepare(1)
    rows = [bench.measure(arm, 1) for arm in toy_salt.ARMS]
    step = toy_salt.flops.training_flops(toy_salt.STUDENT, 1024, 128)
    for arm, row in zip(toy_salt.ARMS, rows, strict=True):
        missing = teacher["flops"] if arm.is_given else 0.0
        assert row["all_in_flops"] == pytest.approx(30 * step - missing, abs=0.6 * step), arm.name
        scoring = teacher["scoring_flops"] if arm.keep < 1 else 0.0
        inherited = teacher["flops"] + scoring if arm.weight or scoring else 0.0
        assert row["papers_convention_flops"] == pytest.approx(row["all_in_flops"] - inherited)
    monkeypatch.setattr(toy_salt, "run", None)
    assert bench.prepare(1) == teacher and [bench.measure(arm, 1) for arm in toy_salt.ARMS] == rows
    (below,) = [row for row in toy_salt.summary(rows) if row["name"] == "SALT"]
    assert below["below baseline"]["mean"] == pytest.approx(rows[0]["loss"] - rows[3]["loss"])
    other = dataclasses.replace(bench, plan=dataclasses.replace(bench.plan, steps=31))
    with pytest.raises(SystemExit, match="is a run of other settings"):
        other.measure(toy_salt.ARMS[0], 1)


def run_tiny(*flags: str) -> str:
    command = [sys.executable, str(FOLDER / "gpu_kernels.py"), "--tiny", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_gpu_kernels_measures_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line that a GPU will see runs, but for the events; right results, and no provider fails but Liger's."""
    gpu_kernels = load("gpu_kernels", monkeypatch)
    rows = {case.name for case in gpu_kernels.cases(tiny=True)}
    output = run_tiny()
    assert f" of {len(rows)}, " in output and all(case.kernel in output for case in gpu_kernels.cases(tiny=True))
    assert len(rows) == len(gpu_kernels.cases(tiny=True))
    assert {case.file for case in gpu_kernels.cases(tiny=False)} == ops.KERNELS == gpu_kernels.AIMS.keys()


def test_gpu_kernels_tries_other_launches_of_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_kernels = load("gpu_kernels", monkeypatch)
    items = gpu_kernels.tunings(gpu_kernels.cases(tiny=False))
    assert {item.launch for item in items} == ANY.keys()
    tune = sys.modules["kernel_tune"]
    for item in items:
        tried = list(tune.candidates(item))
        assert tried[0] == tune.pick(item.launch, item.columns) and len(tried) == len(set(tried)) > 1
        assert item.launch != "norm_fwd" or {entry.block for entry in tried} == {item.columns}
    output = run_tiny("--tune", "--only", "rms_norm", "swiglu", "adamw_")
    assert all(f'"{name}": (Launch(' in output for name in ("norm_fwd", "norm_bwd", "glu", "adamw"))


def test_a_launch_is_pinned_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    load("gpu_kernels", monkeypatch)
    tune = sys.modules["kernel_tune"]
    entry, usual = tune.Launch(64, 2), tune.pick("glu", 4096, tune.DEVICE)
    with tune._pinned("glu", entry):
        assert tune.pick("glu", 4096, tune.DEVICE) == entry
    assert tune.pick("glu", 4096, tune.DEVICE) == usual


@pytest.mark.parametrize(
    ("block", "num_warps", "spills", "failed", "best"),
    [
        (2048, 4, 0, None, (2048, 4)),
        (2048, 4, 8, None, (1024, 4)),  # what spills registers is not chosen
        (2048, 4, 0, "out of shared memory", (1024, 4)),
    ],
)
def test_tuning_takes_the_fastest_that_can_serve(
    block: int, num_warps: int, spills: int, failed: str | None, best: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    load("gpu_kernels", monkeypatch)
    tune = sys.modules["kernel_tune"]
    pinned = {"block": 1024, "num_warps": 4, "seconds": [2.0, 2.0], "spills": 0}
    other = {"block": block, "num_warps": num_warps, "seconds": [1.0, 2.0], "spills": spills}
    found = iter([pinned, {"block": block, "num_warps": num_warps, "failed": failed} if failed else other])
    monkeypatch.setattr(tune, "_timed", lambda *_: next(found))
    item = tune.Tuning("glu", 2**20, ())
    row = tune.tune(item, None, None, None, 2)
    assert (row["best"]["block"], row["best"]["num_warps"]) == best
    assert f"Launch({best[0]}, {best[1]}),)" in tune.launch_table("GPU", [row])
    assert "<- best" in "".join(tune.tuning_lines([row]))


def fabricated(case: Any, seconds: dict[str, float], correct: bool = True) -> dict[str, Any]:
    """A row as gpu_kernels.py would write it."""
    row = sys.modules["gpu_kernels"].describe(case) | {"correct": correct, "errors": {"y": 0.5}}
    totals = {name: {"total": seconds.get(name, 2.0)} for name in case.providers}
    return json.loads(json.dumps(row | {"providers": totals}))


def test_gpu_kernels_judges_by_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_kernels = load("gpu_kernels", monkeypatch)
    judged = [case for case in gpu_kernels.cases(tiny=False) if case.judged]

    def unproven(change: Any = None, **facts: str) -> list[str]:
        rows = [fabricated(case, {"ours": 1.0}) for case in judged]
        if change:
            rows = [changed for row in rows if (changed := change(row))]
        return gpu_kernels.unproven(ops.KERNELS, {"device_type": "cuda", "rows": rows} | facts)

    assert unproven() == []
    assert gpu_kernels.unproven(["norm", "no such file"], {"device_type": "cuda", "rows": []}) == [
        "no such file",
        "norm",
    ]
    assert unproven(device_type="cpu") == sorted(ops.KERNELS)

    def one(kernel: str, change: Any) -> Any:
        return lambda row: change(row) if row["kernel"] == kernel and "over 2^31" not in row["name"] else row

    slower = {"ours": {"total": 2.1}, "eager": {"total": 3.0}, "compiled": {"total": 2.0}}
    assert unproven(one("swiglu", lambda row: row | {"providers": slower})) == ["glu"]
    assert unproven(one("swiglu", lambda row: row | {"correct": False})) == ["glu"]
    assert unproven(one("swiglu", lambda row: row | {"failed": "the time was up"})) == ["glu"]
    assert unproven(one("swiglu", lambda row: None)) == ["glu"]  # a size that was not measured
    no_rival = {"ours": {"total": 1.0}, "eager": {"total": 3.0}, "compiled": {"failed": "no compiler"}}
    assert unproven(one("rope_", lambda row: row | {"providers": no_rival})) == ["rope"]
    assert unproven(lambda row: row | {"correct": "over 2^31" not in row["name"]}) == ["norm", "vocab_loss"]
    rows = [fabricated(case, {"ours": 1.0 if case.kernel != "rank" else 9.0}) for case in judged]
    assert gpu_kernels.verdicts(rows)["vocab_loss"] == {"beats": False, "not": ["rank 8192 x 131072"]}


def test_rows_are_written_as_they_come_and_others_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_kernels = load("gpu_kernels", monkeypatch)
    monkeypatch.setattr(gpu_kernels.results_file, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(gpu_kernels, "warm_up", lambda *_: None)
    copy = tmp_path / "copy"
    copy.mkdir()
    written = list[int]()

    def run(seconds: float, **options: Any) -> dict[str, Any]:
        """With a process that finds the same figures for every case, but cannot do layer_norm."""

        def supervise(command: list[str], content: dict[str, Any], changed: Any, longest: float) -> dict[str, Any]:
            found = content | {"rows": [], "facts": {"device": "GPU", "device_type": "cuda"}}
            for case in gpu_kernels.cases(tiny=False):
                if case.name in content["jobs"]:
                    row = fabricated(case, {"ours": seconds})
                    failed = {"name": case.name, "failed": "Triton Error [CUDA]: no [/reason]"}
                    found["rows"].append(failed if case.kernel == "layer_norm" else row)
                    changed(found)
                    written.append(len(json.loads((copy / "gpu_kernels.json").read_text())["rows"]))
            return found

        monkeypatch.setattr(gpu_kernels, "supervise", supervise)
        given = {"only": None, "tiny": False, "tune": False, "seconds": None, "output": copy} | options
        monkeypatch.setattr(gpu_kernels, "cells", lambda row, peers: [row["name"]])
        gpu_kernels.run(SimpleNamespace(**given))
        return json.loads((copy / "gpu_kernels.json").read_text())

    num_cases = len(gpu_kernels.cases(tiny=False))
    first = run(1.0)
    assert written == [*range(1, num_cases + 1)]
    assert gpu_kernels.unproven(ops.KERNELS, first) == ["norm"]
    assert first["verdicts"]["glu"]["beats"] and not first["verdicts"]["norm"]["beats"]
    second = run(3.0, only=["rope_", "glu"])
    assert len(second["rows"]) == num_cases
    assert gpu_kernels.unproven(ops.KERNELS, second) == ["glu", "norm", "rope"]
    assert all(("commit" in row) == (row["file"] not in ("rope", "glu")) for row in second["rows"])
    with pytest.raises(SystemExit, match="no kernel and no file"):
        run(1.0, only=["rmsnorm"])


def test_kernels_that_serve_by_default_have_been_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    results = FOLDER / "results" / "gpu_kernels.json"
    content = json.loads(results.read_text()) if results.exists() else {"rows": []}
    assert load("gpu_kernels", monkeypatch).unproven(ops.MEASURED, content) == []


def test_an_error_is_measured_by_that_of_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    load("gpu_kernels", monkeypatch)
    measure = sys.modules["kernel_measure"]
    truth = torch.ones(2, 4, dtype=torch.float64)

    def worst(error: float, twin_error: float) -> float:
        accuracy = measure.Accuracy()
        accuracy.add("y", torch.full((2, 4), 1 + error), torch.full((2, 4), 1 + twin_error), truth)
        assert accuracy.holds(["y"]) == (accuracy.worst["y"] <= 1)
        assert not accuracy.holds(["y", "dx"])
        return accuracy.worst["y"]

    assert worst(0.0, 0.0) == 0
    assert worst(2**-22, 0.0) == pytest.approx(1)
    assert worst(2**-20, 2**-20) == pytest.approx(4 / 7)
    assert worst(2**-10, 2**-10) > 1  # a twin that is wrong excuses nothing
    assert worst(torch.nan, torch.nan) > 1
    accuracy = measure.Accuracy()
    accuracy.add("y", torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(2, 4), truth)
    assert not accuracy.holds(["y"])


def test_the_timer_takes_what_lies_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is none: the order is flush, wait, event, run, event."""
    load("gpu_kernels", monkeypatch)
    measure, seen = sys.modules["kernel_measure"], list[str]()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            seen.append("event")

        def elapsed_time(self, end: "Event") -> float:
            return 2.0  # ms

    gpu = SimpleNamespace(
        Event=Event,
        _sleep=lambda cycles: seen.append("wait") if cycles >= 2e5 else None,
        synchronize=lambda: seen.append("synchronize"),
        reset_peak_memory_stats=lambda: None,
        memory_allocated=lambda: 100,
        max_memory_allocated=lambda: 150,
        get_device_properties=lambda device: SimpleNamespace(L2_cache_size=10),
    )
    timer = measure.Timer()
    timer._other = SimpleNamespace(zero_=lambda: seen.append("flush"))
    monkeypatch.setattr(measure, "ON_GPU", True)
    monkeypatch.setattr(measure, "REPETITIONS", 20)
    monkeypatch.setattr(measure.torch, "cuda", gpu)
    work = measure.Work(lambda: seen.append("run"), lambda: None, lambda: seen.append("before"))
    found = measure.measure(work, timer)
    assert found["forward"]["median"] == found["forward"]["low"] == found["backward"]["high"] == 0.002
    assert found["total"] == 0.004 and found["forward"]["peak"] == 50
    once = ["before", "flush", "wait", "event", "run", "event"]
    first = len(["before", "synchronize", "run", "synchronize"]) * measure.WARM_UP
    assert seen[first : first + 20 * len(once)] == once * 20


WORKER = """
import json, os, sys, time
path = sys.argv[1]
content = json.loads(open(path).read())
def write():
    open(path + "new", "w").write(json.dumps(content))
    os.replace(path + "new", path)
while content["jobs"] and content["jobs"][0] != "late":
    content["current"] = name = content["jobs"][0]
    write()
    if name == "crashes":
        raise RuntimeError("of no use")
    if name == "hangs":
        time.sleep(60)
    content["rows"].append({"name": name, "figure": 1})
    content["jobs"].remove(name)
    content["current"] = None
    write()
    if name == "breaks":
        os._exit(3)
"""


def test_a_crash_costs_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    load("gpu_kernels", monkeypatch)
    process, seen = sys.modules["kernel_process"], list[int]()
    names = ["first", "crashes", "breaks", "hangs", "last", "late"]
    command, content = [sys.executable, "-c", WORKER], {"jobs": names}
    began = time.monotonic()
    rows = process.supervise(command, content, lambda content: seen.append(len(content["rows"])), 1.0)["rows"]
    assert time.monotonic() - began < 30
    failed = {row["name"]: row["failed"] for row in rows if "failed" in row}
    assert [row["name"] for row in rows] == names
    assert failed == {
        "crashes": "RuntimeError: of no use (exit code 1)",
        "hangs": "not done in 1 s",
        "late": "the time was up",
    }
    assert seen[-1] == len(names)
    assert process.is_broken({"providers": {"liger": {"failed": "RuntimeError: CUDA error: illegal access"}}})
    assert not process.is_broken({"failed": "OutOfMemoryError: CUDA out of memory"})


def test_without_a_first_row_no_process_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    load("gpu_kernels", monkeypatch)
    command = [sys.executable, "-c", "raise ImportError('gone')"]
    content = sys.modules["kernel_process"].supervise(command, {"jobs": ["a", "b"]}, lambda content: None, 9.0)
    assert [row["failed"] for row in content["rows"]] == ["ImportError: gone (exit code 1)"] * 2


def test_preprocess_measures_both(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    preprocess = load("preprocess", monkeypatch)
    count = preprocess.make_corpus(tmp_path / "corpus.jsonl", 100_000)
    options = SimpleNamespace(runs=1, workers=[1])
    rows = preprocess.measure("byte", tmp_path / "corpus.jsonl", "byte", lambda text: text.encode(), options, count)
    assert [row.unit for row in rows] == ["documents/s", "documents/s", "x"]
    assert rows[2].value == pytest.approx(rows[1].value / rows[0].value)
    assert rows[2].holds == (rows[2].value >= preprocess.SHARE)


def test_growth_judges_by_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    growth = load("growth", monkeypatch)
    assert 110e6 < num_parameters(growth.SMALL) < 130e6
    assert 330e6 < num_parameters(growth.LARGE) < 380e6
    name, case = next((name, case) for name, case in growth.GROWTHS.items() if case.is_local)
    planned = growth.phases(growth.Layout(case.config, 4), "cpu")[0][1].memory
    rank = {"source": 100.0, "target": 1000.0, "layer": 10.0, "sent": 0.0, "send_seconds": [0.0, 0.0]}

    def holds(peak: float, seconds: float) -> list[bool]:
        found = [
            rank
            | {"pipeline": held.rank, "peak": peak * held.total, "target": 1.06 * held.total}
            | {"seconds": [seconds, seconds], "copy_seconds": [1.0, 1.0]}
            for held in planned
        ]
        monkeypatch.setattr(growth, "launch", lambda *_: found)
        return [row.holds for row in growth.growth_rows(name, case) if row.bound]

    assert holds(1.05, 2.9) == [True] * 3
    assert holds(1.05, 3.1) == [True, True, False]
    assert holds(1.2, 2.9) == [False, False, True]


def test_growth_is_told_by_medians_over_runs_and_the_highest_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    growth = load("growth", monkeypatch)
    runs = [{"peak": peak, "seconds": [time, 2 * time]} for peak, time in ((5, 1.0), (9, 7.0), (2, 3.0))]
    assert growth.over_runs(runs) == {"peak": 9, "seconds": [3.0, 6.0]}
    order = iter(([3, 1], [1, 3], [3, 1]))

    def tell(*_: str, **__: Any) -> list[dict[str, Any]]:
        return [{"rank": rank, "peak": rank} for rank in next(order)]

    monkeypatch.setattr(growth.processes, "launch", tell)
    assert growth.launch("", "grow") == [{"rank": 1, "peak": 1}, {"rank": 3, "peak": 3}]


def test_learning_is_judged_beside_a_plain_step(monkeypatch: pytest.MonkeyPatch) -> None:
    growth = load("growth", monkeypatch)
    name, case = list(growth.LEARNING.items())[-1]
    planned = {held.rank: held.total for held in growth.phases(growth.Layout(case.config, 4), "cpu")[0][1].memory}
    steps = {"learn": (1.0, 2.1), "plain": (1.2, 1.0)}

    def launch(_: str, kind: str, __: int) -> list[dict[str, Any]]:
        share, seconds = steps[kind]
        return [{"pipeline": r, "peak": share * b, "seconds": [seconds, seconds]} for r, b in planned.items()]

    monkeypatch.setattr(growth, "launch", launch)
    assert [row.holds for row in growth.learning_rows(name, case) if row.bound] == [True, False]


def judged(rows: list[Any]) -> list[bool]:
    return [row.holds for row in rows if row.bound]


def test_salt_measures_the_memory_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    salt_loss = load("salt_loss", monkeypatch)
    sizes = salt_loss.Sizes(vocab=4000, tokens=2048, hidden=32, teacher_hidden=16)
    mixed, plain, dense = (salt_loss.measure(kind, sizes) for kind in salt_loss.KINDS)
    logits = 4 * 4000 * 1024  # of a chunk of both models' tokens
    assert logits < plain["live tensors"] < mixed["live tensors"] < 2 * logits + 12 * 2**20
    assert dense["live tensors"] > 4 * 4 * 4000 * 2048
    assert all(found["process"] > 0.9 * found["live tensors"] for found in (mixed, plain, dense))


@pytest.mark.parametrize(("process", "holds"), [(599, True), (601, False)])
def test_salt_judges_the_memory_of_the_mixed_loss(monkeypatch: pytest.MonkeyPatch, process: int, holds: bool) -> None:
    salt_loss = load("salt_loss", monkeypatch)
    found = {"live tensors": 500.0 * 2**20, "process": process * 2.0**20}
    monkeypatch.setattr(salt_loss, "launch", lambda *_: [found])
    assert judged(salt_loss.rows()) == [True, holds]


def test_scoring_finds_what_transformers_finds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    salt_scoring = load("salt_scoring", monkeypatch)
    small = ModelConfig(hidden_size=64, num_layers=2, num_heads=4, ffn_size=96, vocab_size=256, max_seq_length=32)
    for name, value in {"MODEL": small, "LENGTH": 32, "TOP_K": 3, "DTYPE": torch.float32}.items():
        monkeypatch.setattr(salt_scoring, name, value)
    salt_scoring.make_inputs(tmp_path)
    ours, theirs = salt_scoring.score_ours(tmp_path, "ours"), salt_scoring.score_reference(tmp_path, "SDPA")
    assert ours.keys() == theirs.keys() and len(ours["mean_nll"]) == salt_scoring.SAMPLES
    for name in ours.keys() - {"seconds"}:
        assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name
    assert all(0.1 < share < 0.8 for share in ours["in_top_k_fraction"])  # chance: 0.012
    rows = salt_scoring.rows_of(
        {"ours": [ours], "ours, compiled": [ours], "SDPA": [theirs], "SDPA, compiled": [theirs]}
    )
    assert judged(rows)[1:] == [True, True]


def test_scoring_is_judged_beside_the_faster_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    salt_scoring = load("salt_scoring", monkeypatch)

    def run(seconds: float, nll: float = 1.0) -> list[dict[str, Any]]:
        names = ("mean_nll", "median_in_top_k", "in_top_k_fraction")
        return [{"seconds": seconds, **dict.fromkeys(names, [nll])}]

    found = {"SDPA": run(3.0), "SDPA, compiled": run(1.31), "ours": run(1.0), "ours, compiled": run(2.0)}
    assert judged(salt_scoring.rows_of(found)) == [True, True, True]
    assert judged(salt_scoring.rows_of(found | {"SDPA, compiled": run(1.29)})) == [False, True, True]
    assert judged(salt_scoring.rows_of(found | {"ours": run(1.0, nll=1.02)})) == [True, False, False]


def fabricated_runs(taught_seconds: float, taught_bytes: int) -> dict[str, Any]:
    def run(seconds: float, spent: float, held: int) -> list[dict[str, Any]]:
        ranks = [{"rank": 0, "process": held, "live tensors": held}]
        return [{"seconds": [9 * seconds, seconds, seconds], "flops": [spent], "ranks": ranks}]

    return {"plain": run(1.0, 100.0, 1000), "taught": run(taught_seconds, 120.0, taught_bytes)}


def test_stage_one_is_judged_beside_the_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    salt_runs = load("salt_runs", monkeypatch)
    for seconds, holds in ((1.07, False), (1.09, True), (1.2, True), (1.31, True), (1.33, False)):
        assert judged(salt_runs.time_rows("one process", fabricated_runs(seconds, 1000))) == [holds]
    for held, holds in ((989, False), (991, True), (1009, True), (1011, False)):
        assert judged(salt_runs.memory_rows("one process", fabricated_runs(1.0, held))) == [holds, holds]


def test_salt_runs_train_and_tell_what_they_hold(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    salt_runs = load("salt_runs", monkeypatch)
    tiny = ModelConfig(hidden_size=32, num_layers=2, num_heads=2, ffn_size=48, vocab_size=256)
    for name, value in {"STUDENT": tiny, "TEACHER": tiny, "LENGTH": 16}.items():
        monkeypatch.setattr(salt_runs, name, value)
    runs = sys.modules["megagrow.train.run"]
    monkeypatch.setattr(runs, "Trainer", runs.Trainer)  # put back afterwards
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)

    def launch(script: str, *arguments: str, ranks: int, threads: int) -> list[dict[str, Any]]:
        assert salt_runs.work(*arguments) == 0
        output = capfd.readouterr().out
        return [json.loads(output[output.index("{") :])]

    monkeypatch.setattr(salt_runs, "launch", launch)
    salt_runs.make_inputs(tmp_path)
    found = {kind: [salt_runs.train(tmp_path, kind, "one process")] for kind in (salt_runs.PLAIN, salt_runs.TAUGHT)}
    plain, taught = (found[kind][0] for kind in found)
    assert len(plain["seconds"]) == len(taught["seconds"]) == salt_runs.STEPS
    assert taught["flops"][0] / plain["flops"][0] == pytest.approx(4 / 3)  # the teacher is as large as the student
    held = [each["ranks"][0]["live tensors"] for each in (plain, taught)]
    assert held[0] > 3 * 4 * num_parameters(tiny)
    assert held[1] == pytest.approx(held[0], rel=0.01)
