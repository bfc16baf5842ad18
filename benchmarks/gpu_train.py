"""Training steps of five models on one GPU: tokens per second, MFU, and memory beside the plan's.

    python benchmarks/gpu_train.py              # four minutes on one GPU; writes benchmarks/results/gpu_train.json
    python benchmarks/gpu_train.py --tiny       # the same arms of a toy model on whatever is there; writes nothing

Each model is trained with torch.compile on and off and with the Triton kernels on and off, each arm in a process of its
own. MFU is the model's FLOPs (recompute not counted) over the matrix products' measured peak, by both conventions for
attention. Results are written after every arm: no arm is started when the time is up, and an arm that fails is told of
in its row.
"""

import argparse
import itertools
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from results_file import save
from rich.console import Console
from rich.table import Table
from torch.profiler import record_function

from megagrow import flops, ops
from megagrow.cluster.compute import product_seconds
from megagrow.config import Config, DataConfig, ModelConfig, TrainConfig
from megagrow.evaluate import make_batch
from megagrow.optim import Optimizer, StepGuard
from megagrow.parallel.mesh import init_distributed, leave_distributed, make_mesh
from megagrow.plan.layout import Layout
from megagrow.plan.measure import peak_memory
from megagrow.plan.memory import step_memory
from megagrow.roles import num_parameters
from megagrow.train.learner import ModelLearner
from megagrow.train.part import build_part, compute_dtype

WARM_UP, STEPS = 3, 8
SECONDS, ARM_SECONDS = 240.0, 150.0  # for all arms, and for the longest
AIM = {"1.3B": 0.45}  # MFU with halved attention, compiled and with kernels
MATRIX = {"cuda": 8192, "cpu": 512}


def llama(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int, length: int) -> ModelConfig:
    return ModelConfig(
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        ffn_size=ffn,
        vocab_size=vocab,
        max_seq_length=length,
    )


@dataclass(frozen=True)
class Case:
    """A model, the sequences of a step, and what is recomputed."""

    model: ModelConfig
    sequences: int
    recompute: Literal["none", "selective", "full"] = "none"


CASES = {
    "1.3B": Case(llama(2048, 24, 16, 16, 5504, 32_000, 2048), 8),
    "125M": Case(llama(768, 12, 12, 12, 2048, 32_000, 2048), 32),
    "350M": Case(llama(1024, 24, 16, 16, 2816, 32_000, 2048), 24),
    "3B": Case(llama(3072, 28, 24, 8, 8192, 128_256, 4096), 2),
    "8B, 4 of 32 layers": Case(llama(4096, 4, 32, 8, 14_336, 128_256, 8192), 2),
}
TINY = {"tiny": Case(llama(64, 2, 4, 2, 172, 512, 64), 2)}


def config_of(case: Case, compiled: bool, kernels: bool) -> Config:
    train = TrainConfig(
        global_batch_size=case.sequences,
        microbatch_size=case.sequences,
        precision="bf16",
        recompute=case.recompute,
        compile=compiled,
        kernels="all" if kernels else "none",
    )
    return Config(model=case.model, data=DataConfig(seq_length=case.model.max_seq_length), train=train)


def measure(case: Case, compiled: bool, kernels: bool) -> dict[str, Any]:
    """One process: seconds per step, loss, peak memory of a step as measured and as planned, the matrix peak."""
    init_distributed()
    config = config_of(case, compiled, kernels)
    ops.let_kernels_serve(config.train.kernels)
    mesh = make_mesh(config.parallel)
    on_gpu = mesh.device.type == "cuda"
    if on_gpu:
        ops.check_kernels(config.train.kernels, mesh.device)  # else an arm would have the wrong name
    side, dtype = MATRIX[mesh.device.type], compute_dtype(config) or torch.float32
    matrix = 2.0 * side**3 / product_seconds(side, dtype, mesh.device)
    tokens = torch.randint(case.model.vocab_size, (case.sequences, case.model.max_seq_length + 1))
    learner, batch = None, make_batch(tokens, case.sequences, mesh)

    def run() -> list[float]:
        nonlocal learner
        part = build_part(case.model, config, mesh)
        for parameter in part.parameters.values():  # on the device: minutes of a host's random numbers show nothing
            torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
        learner = ModelLearner(part, Optimizer(part.parameters, config.optim), config)
        seconds, guard = [], StepGuard()
        for _ in range(WARM_UP + STEPS):
            with record_function("step"):
                if len(seconds) == WARM_UP and on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                began = time.perf_counter()
                result = learner.step(batch, 1e-4, guard)  # reads the loss: the device has finished
                seconds.append(time.perf_counter() - began)
        assert result.loss < 2 * torch.tensor(float(case.model.vocab_size)).log(), result
        return seconds

    seconds = run()
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_memory(run, since="step")
    planned = step_memory(Layout(config, 1), mesh.device.type)[0].total
    leave_distributed()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "seconds": statistics.median(seconds[WARM_UP:]),
        "peak": peak,
        "planned": planned,
        "matrix": matrix,
    }


def launch(name: str, compiled: bool, kernels: bool, seconds: float) -> dict[str, Any]:
    """What an arm measures in a process of its own, or why it did not."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, __file__, "--arm", name, str(int(compiled)), str(int(kernels)), str(answer)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done in {seconds:.0f} s"}
        if done.returncode:
            return {"failed": reason(done.stderr) or f"exit code {done.returncode}"}
        return json.loads(answer.read_text())


def reason(errors: str) -> str:
    """The last line that names an error; what follows it may be advice."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Failed)\b", line)]
    return (named or lines or [""])[-1][:500]


def row(name: str, case: Case, compiled: bool, kernels: bool, found: dict[str, Any]) -> dict[str, Any]:
    """The figures of an arm."""
    arm = {
        "name": name,
        "compile": compiled,
        "kernels": kernels,
        **asdict(case),
        "parameters": num_parameters(case.model),
    }
    if "failed" in found:
        return arm | found
    length = case.model.max_seq_length
    num_tokens = case.sequences * length
    work = {kind: flops.training_flops(case.model, num_tokens, length, kind) for kind in ("causal", "full")}
    rate = {kind: each / found["seconds"] / found["matrix"] for kind, each in work.items()}
    return {
        **arm,
        **found,
        "tokens_per_second": num_tokens / found["seconds"],
        "mfu_causal": rate["causal"],
        "mfu_full": rate["full"],
        "planned_to_measured": found["planned"] / found["peak"],
    }


def arms(cases: dict[str, Case]) -> list[tuple[str, bool, bool]]:
    """The most telling first: compiled, each model with kernels and without them; then the same without a compiler."""
    switches = itertools.product((True, False), cases, (True, False))
    return [(name, compiled, kernels) for compiled, name, kernels in switches]


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(
        "model", "compile", "kernels", "token/s", "MFU causal", "MFU full", "GiB", "planned", title="gpu_train"
    )
    for each in rows:
        figures = (
            [each["failed"]]
            if "failed" in each
            else [
                f"{each['tokens_per_second']:,.0f}",
                f"{each['mfu_causal']:.1%}",
                f"{each['mfu_full']:.1%}",
                f"{each['peak'] / 2**30:.2f}",
                f"{each['planned_to_measured']:.2f}",
            ]
        )
        table.add_row(each["name"], str(each["compile"]), str(each["kernels"]), *figures)
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which no arm is started")
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--output", type=Path, help="a folder for a copy of the results")
    parser.add_argument("--arm", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cases = CASES | TINY
    if arguments.arm:
        name, compiled, kernels, answer = arguments.arm
        found = measure(cases[name], compiled == "1", kernels == "1")
        Path(answer).write_text(json.dumps(found))
        return
    if not arguments.tiny and not torch.cuda.is_available():
        print("gpu_train: no GPU here: nothing to measure; --tiny tries the script without one")
        return
    began, rows = time.perf_counter(), []
    for name, compiled, kernels in arms(TINY if arguments.tiny else {name: CASES[name] for name in arguments.models}):
        left = arguments.seconds - (time.perf_counter() - began)
        if left > 0:
            found = launch(name, compiled, kernels, min(ARM_SECONDS, left + 30))
        else:
            found = {"failed": "the time was up"}
        rows.append(row(name, cases[name], compiled, kernels, found))
        if not arguments.tiny:
            path = save("gpu_train", rows, aim=AIM)
            if arguments.output:
                shutil.copy(path, arguments.output)
    show(rows)
    if arguments.tiny and any("failed" in each for each in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
