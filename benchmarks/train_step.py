"""A whole training step on a CPU beside that of Hugging Face transformers' Llama, and tensor 2 beside one process.

    python benchmarks/train_step.py        # fifteen minutes; writes benchmarks/results/train_step.json

Same weights, same batch, same AdamW, clipping included. Every arm runs in fresh processes, the arms alternate, and the
medians of all their steps count. The reference is the fastest of transformers' eager attention, SDPA, and SDPA under
torch.compile; in bf16 it computes under autocast, which like us keeps weights, gradients and moments in float32.

Memory is shown in two ways, for both sides alike. The process: its peak while it trains, less its size after imports
(of the compiler too). Live tensors: the most bytes that tensors hold at a time, as torch counts on a GPU; what is left
of the difference is holes that the C library's allocator leaves between tensors.
"""

import argparse
import contextlib
import gc
import importlib
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import processes
import torch
import torch._dynamo
import torch._inductor.codegen.cpp  # the compiler's own size is on neither side
import torch._inductor.compile_fx
from processes import MIB, forget_peak, status, tell
from results_file import Row, write
from torch import Tensor
from torch.profiler import record_function

from megagrow import flops, ops
from megagrow.checkpoint.hf_config import hf_config_from_model
from megagrow.checkpoint.hf_families import FAMILIES
from megagrow.checkpoint.hf_tensors import FamilyTensors
from megagrow.config import Config, DataConfig, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from megagrow.evaluate import make_batch
from megagrow.model.transformer import initial_value
from megagrow.optim import Optimizer, StepGuard
from megagrow.parallel.mesh import init_distributed, leave_distributed, make_mesh
from megagrow.plan.measure import peak_memory
from megagrow.roles import parameter_names, role_of, shape_of
from megagrow.train.learner import ModelLearner
from megagrow.train.part import build_part, initialize_part

MODEL = ModelConfig(
    hidden_size=512, num_layers=8, num_heads=8, ffn_size=1376, vocab_size=32_000, max_seq_length=512
)  # fmt: skip
SEQUENCES, LEARNING_RATE, SEED = 4, 1e-3, 0
OPTIM = OptimConfig(weight_decay=0.0, clip_norm=1.0)
WARM_UP, STEPS, ROUNDS = 2, 6, 3
FASTER, SMALLER, TENSOR_2 = 1.2, 0.7, 0.8
LOSSES_AGREE = {"fp32": 1e-4, "bf16": 1e-2}  # nats, of all arms in the first step: weights and batch are the same

REFERENCES = {"eager": ("eager", False), "SDPA": ("sdpa", False), "SDPA, compiled": ("sdpa", True)}
OURS = {
    "compiled": TrainConfig(compile=True),
    "compiled, selective recompute": TrainConfig(compile=True, recompute="selective"),
    "compiled, full recompute": TrainConfig(compile=True, recompute="full"),
}
# One setting for both bounds, chosen for each precision from these very figures: all settings are in the results.
JUDGED = {"fp32": "compiled, full recompute", "bf16": "compiled, selective recompute"}
TENSOR_ARM, PEAK_ARM = "compiled, tensor 2", "matrix peak"

Step = Callable[[], float]


def our_step(arm: str, precision: str) -> Step:
    """A step of ours, which returns its loss."""
    parallel = ParallelConfig(tensor=2) if arm == TENSOR_ARM else ParallelConfig()
    train = OURS["compiled"] if arm == TENSOR_ARM else OURS[arm]
    train = replace(train, global_batch_size=SEQUENCES, precision=precision, loss_chunk=256)
    data = DataConfig(seq_length=MODEL.max_seq_length)
    config = Config(model=MODEL, data=data, optim=OPTIM, train=train, parallel=parallel)
    mesh = make_mesh(parallel)
    part = build_part(MODEL, config, mesh)
    initialize_part(part, SEED)
    learner = ModelLearner(part, Optimizer(part.parameters, OPTIM), config)
    batch, guard = make_batch(tokens(), SEQUENCES, mesh), StepGuard()
    return lambda: learner.step(batch, LEARNING_RATE, guard).loss


def reference_step(arm: str, precision: str) -> Step:
    """A step of transformers' Llama with our initial weights, which returns its loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    attention, compiled = REFERENCES[arm]
    config = LlamaConfig.from_dict(hf_config_from_model(MODEL), attn_implementation=attention, use_cache=False)
    model = LlamaForCausalLM(config)
    copy_weights(model.state_dict())
    adamw = torch.optim.AdamW(
        model.parameters(),
        lr=LEARNING_RATE,
        betas=(OPTIM.beta1, OPTIM.beta2),
        eps=OPTIM.eps,
        weight_decay=0,
        fused=True,
    )
    run = torch.compile(model) if compiled else model
    inputs_BS, labels_BS = tokens()[:, :-1], tokens()[:, 1:].contiguous()

    def step() -> float:
        half = torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
        with half:
            loss = run(input_ids=inputs_BS, labels=inputs_BS, shift_labels=labels_BS).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_norm)
        adamw.step()
        adamw.zero_grad()
        return float(loss.detach())

    return step


@torch.no_grad()
def copy_weights(state: dict[str, Tensor]) -> None:
    """Writes our initial weights into transformers' state."""
    tensors = FamilyTensors(FAMILIES[MODEL.family], MODEL)
    for name in parameter_names(MODEL):
        value = initial_value(name, shape_of(role_of(name), MODEL), MODEL, SEED)
        for key, tensor in tensors.completed_by(name, value):
            state[key].copy_(tensor)


def tokens() -> Tensor:
    """The batch [B, S + 1]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(MODEL.vocab_size, (SEQUENCES, MODEL.max_seq_length + 1), generator=generator)


def measure(arm: str, precision: str) -> dict[str, object]:
    """One process: the seconds and losses of its steps, and their peaks in MiB."""
    make = reference_step if arm in REFERENCES else our_step
    if make is reference_step:
        importlib.import_module("transformers.models.llama.modeling_llama")
    imported = status("VmRSS")
    step = make(arm, precision)
    gc.collect()
    forget_peak()  # making a model is not training it
    seconds, losses = [], []
    for _ in range(WARM_UP + STEPS):
        began = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - began)
    process = (status("VmHWM") - imported) / MIB
    del step  # of which the live tensors are counted from the first one on
    return {"seconds": seconds[WARM_UP:], "losses": losses, "process": process, "live": live(make, arm, precision)}


def live(make: Callable[[str, str], Step], arm: str, precision: str) -> float:
    """Peak of live tensors in a step that is not the first, in MiB."""

    def run() -> None:
        step = make(arm, precision)
        for _ in range(2):
            with record_function("step"):
                step()

    return peak_memory(run, since="step") / MIB


def matrix_peak(precision: str) -> float:
    """The most FLOP/s of a matrix product, over the shapes of the layers and some square ones."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    rows, hidden, ffn = SEQUENCES * MODEL.max_seq_length, MODEL.hidden_size, MODEL.ffn_size
    best = 0.0
    for M, N, K in ((rows, 2 * ffn, hidden), (rows, hidden, ffn), (rows, hidden, hidden), (2048, 2048, 2048)):
        a_MK, b_NK = torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype)
        for product in (ops.product, lambda a, b: torch.mm(a, b.T)):
            times = []
            for _ in range(20):
                began = time.perf_counter()
                product(a_MK, b_NK)
                times.append(time.perf_counter() - began)
            best = max(best, 2 * M * N * K / statistics.median(times))
    return best


def launch(arm: str, precision: str) -> dict[str, object]:
    """What an arm measures in processes of its own, on two threads in all."""
    ranks = 2 if arm == TENSOR_ARM else 1
    return processes.launch(__file__, "--arm", arm, precision, ranks=ranks, threads=2 // ranks)[0]


def child(arm: str, precision: str) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    init_distributed()
    found = {"peak": matrix_peak(precision)} if arm == PEAK_ARM else measure(arm, precision)
    if int(os.environ.get("RANK", "0")) == 0:
        tell(found)
    leave_distributed()


def rows_of(precision: str, found: dict[str, list[dict]]) -> list[Row]:
    """The figures of one precision and what they must keep to."""
    num_tokens = SEQUENCES * MODEL.max_seq_length
    seconds = {
        arm: statistics.median(s for run in runs for s in run["seconds"])
        for arm, runs in found.items()
        if arm != PEAK_ARM
    }
    peaks = {kind: {arm: max(run[kind] for run in found[arm]) for arm in seconds} for kind in ("process", "live")}
    work = flops.training_flops(MODEL, num_tokens, MODEL.max_seq_length, "causal")
    matrix = statistics.median(run["peak"] for run in found[PEAK_ARM])
    best, ours = min(REFERENCES, key=seconds.__getitem__), JUDGED[precision]
    first = [run["losses"][0] for arm in seconds for run in found[arm]]
    rows = [Row(f"{precision}: peak of a matrix product", matrix / 1e9, "GFLOP/s")]
    for arm, value in seconds.items():
        side = "transformers" if arm in REFERENCES else "ours"
        rows += [
            Row(f"{precision}: {side}, {arm}: tokens per second", num_tokens / value, "token/s"),
            Row(f"{precision}: {side}, {arm}: share of the matrix peak", work / value / matrix, ""),
            Row(f"{precision}: {side}, {arm}: peak of the process", peaks["process"][arm], "MiB"),
            Row(f"{precision}: {side}, {arm}: peak of live tensors", peaks["live"][arm], "MiB"),
        ]

    def judge(what: str, value: float, sign: str, bound: float) -> Row:
        return Row(
            f"{precision}: {what}", value, "x", f"{sign} {bound}", value >= bound if sign == ">=" else value <= bound
        )

    rows += [
        judge(
            f"tokens per second, ours ({ours}) to transformers ({best})", seconds[best] / seconds[ours], ">=", FASTER
        ),
        judge("peak of the process, likewise", peaks["process"][ours] / peaks["process"][best], "<=", SMALLER),
        judge("peak of live tensors, likewise", peaks["live"][ours] / peaks["live"][best], "<=", SMALLER),
        judge("tensor 2 to one process of two threads", seconds["compiled"] / seconds[TENSOR_ARM], ">=", TENSOR_2),
        judge("losses of the first step apart, nats", max(first) - min(first), "<=", LOSSES_AGREE[precision]),
    ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", nargs=2, metavar=("ARM", "PRECISION"), help="what a child process measures")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    if arguments.arm:
        return child(*arguments.arm)
    rows = []
    for precision in arguments.precisions:
        found: dict[str, list[dict]] = {arm: [] for arm in (PEAK_ARM, *REFERENCES, *OURS, TENSOR_ARM)}
        for _ in range(arguments.rounds):
            for arm, runs in found.items():
                runs.append(launch(arm, precision))
        rows += rows_of(precision, found)
    write("train_step", rows)


if __name__ == "__main__":
    main()
