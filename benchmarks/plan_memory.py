"""Memory of real training steps on CPUs beside what the plan says, and how long planning takes.

    python benchmarks/plan_memory.py        # five minutes; writes benchmarks/results/plan_memory.json

Every configuration trains for three steps in processes of its own. What is measured is the peak of live tensor memory
in a step (see `megagrow.plan.measure`); what libraries and the allocator take is none of the plan's, so the growth of
the process is shown but not compared. Pipelines run over gloo. Ranks of the other axes are imitated by torch's fake
process group, since gloo's threads free tensors where the profiler does not see it.
"""

import resource
import sys
import time
from dataclasses import replace

import torch
from processes import MIB, launch, tell
from results_file import Row, write
from torch.profiler import record_function

from megagrow.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
from megagrow.evaluate import make_batch
from megagrow.optim import Optimizer, StepGuard
from megagrow.parallel.mesh import Mesh, init_distributed, leave_distributed, make_mesh
from megagrow.plan import Machine, make_plan
from megagrow.plan.dry_run import fake_ranks
from megagrow.plan.layout import Layout
from megagrow.plan.measure import peak_memory
from megagrow.plan.memory import step_memory
from megagrow.plan.suggest import suggest
from megagrow.train.learner import ModelLearner
from megagrow.train.part import build_part, initialize_part

BOUND, SECONDS = 0.10, 60.0
STEP = "one step"

MANY_PARAMETERS = Config(
    model=ModelConfig(hidden_size=512, num_layers=8, num_heads=8, ffn_size=1376, vocab_size=16_000),
    data=DataConfig(seq_length=64),
    train=TrainConfig(global_batch_size=4, microbatch_size=2),
)
LONG_SEQUENCES = Config(
    model=ModelConfig(hidden_size=256, num_layers=6, num_heads=8, num_kv_heads=2, ffn_size=704, vocab_size=2048),
    data=DataConfig(seq_length=2048),
    train=TrainConfig(global_batch_size=2),
)
LARGE_VOCABULARY = Config(
    model=ModelConfig(hidden_size=256, num_layers=8, num_heads=4, ffn_size=704, vocab_size=50_257),
    data=DataConfig(seq_length=512),
    train=TrainConfig(global_batch_size=8, precision="bf16", recompute="full"),
)
SELECTIVE = replace(LONG_SEQUENCES, train=replace(LONG_SEQUENCES.train, recompute="selective", precision="bf16"))
WIDER = replace(
    LONG_SEQUENCES,
    model=replace(LONG_SEQUENCES.model, hidden_size=512, head_dim=64, ffn_size=1376),
    data=DataConfig(seq_length=512),
    train=TrainConfig(global_batch_size=4),
)
ACCUMULATING = replace(WIDER, train=TrainConfig(global_batch_size=4, microbatch_size=1, precision="bf16"))
PIPELINE = replace(WIDER, train=TrainConfig(global_batch_size=8, microbatch_size=1))

CASES = {  # with the number of ranks
    "many parameters, two small microbatches": (MANY_PARAMETERS, 1),
    "long sequences": (LONG_SEQUENCES, 1),
    "large vocabulary, bf16, full recompute": (LARGE_VOCABULARY, 1),
    "bf16, selective recompute": (SELECTIVE, 1),
    "data 2": (WIDER, 2),
    "data 2, bf16, two microbatches": (ACCUMULATING, 2),
    "tensor 2, sequence parallel": (replace(WIDER, parallel=ParallelConfig(tensor=2, sequence_parallel=True)), 2),
    "context 2": (replace(WIDER, parallel=ParallelConfig(context=2)), 2),
    "pipeline 2": (replace(PIPELINE, parallel=ParallelConfig(pipeline=2)), 2),
    "pipeline 2, interleaved": (replace(PIPELINE, parallel=ParallelConfig(pipeline=2, schedule="Interleaved1F1B")), 2),
    "pipeline 2, zero bubble": (replace(PIPELINE, parallel=ParallelConfig(pipeline=2, schedule="ZBVZeroBubble")), 2),
}
LLAMA_70B = Config(
    model=ModelConfig(
        vocab_size=128_256, hidden_size=8192, num_layers=80, num_heads=64, num_kv_heads=8, ffn_size=28_672
    ),
    data=DataConfig(seq_length=8192),
    parallel=ParallelConfig(tensor=8, sequence_parallel=True, pipeline=4, schedule="Interleaved1F1B"),
    train=TrainConfig(global_batch_size=1024, microbatch_size=1, precision="bf16"),
)


def train(name: str) -> None:
    """One rank: prints its place in the pipeline, the peak of its steps and how much the process has grown."""
    config, ranks = CASES[name]
    torch.set_num_threads(1)
    imitated = 1 if config.parallel.pipeline > 1 else ranks
    with fake_ranks(imitated, rank=0):
        if imitated == 1:
            init_distributed()
        mesh = make_mesh(config.parallel)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        steps(config, mesh)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        peak = peak_memory(lambda: steps(config, mesh), since=STEP)
        tell({"rank": mesh.pp.rank, "peak": peak, "process": grown})
    leave_distributed()


def steps(config: Config, mesh: Mesh) -> None:
    part = build_part(config.model, config, mesh)
    initialize_part(part, seed=0)
    learner = ModelLearner(part, Optimizer(part.parameters, config.optim), config)
    size = config.train.global_batch_size
    tokens = torch.randint(config.model.vocab_size, (size // mesh.dp.size, config.data.seq_length + 1))
    for _ in range(3):
        with record_function(STEP):
            learner.step(make_batch(tokens, size, mesh), 1e-3, StepGuard())


def measure(name: str, ranks: int) -> dict[int, dict[str, int]]:
    """What the ranks of a case measured, by their place in the pipeline."""
    return {found["rank"]: found for found in launch(__file__, name, ranks=ranks, threads=1)}


def compare(name: str, config: Config, ranks: int) -> list[Row]:
    """Planned and measured memory of a case, for each place of its pipeline."""
    rows, measured = [], measure(name, config.parallel.pipeline)
    for held in step_memory(Layout(config, ranks), "cpu"):
        place = f"{name}, pipeline rank {held.rank}" if config.parallel.pipeline > 1 else name
        real, process = measured[held.rank]["peak"], measured[held.rank]["process"]
        off = held.total / real - 1
        rows += [
            Row(f"{place}: measured", real / MIB, "MiB"),
            Row(f"{place}: planned / measured - 1", off, "", f"within {BOUND:.0%}", abs(off) <= BOUND),
            Row(f"{place}: growth of the process", process / MIB, "MiB"),
        ]
    return rows


def planning() -> list[Row]:
    """Seconds to plan 70 billion parameters on 1,024 ranks, and to suggest layouts for them."""
    began = time.perf_counter()
    make_plan(LLAMA_70B, 1024)
    planned = time.perf_counter()
    suggest(LLAMA_70B, 1024, Machine())
    seconds = {"planned": planned - began, "layouts suggested": time.perf_counter() - planned}
    bound = f"under {SECONDS:g} s"
    return [Row(f"70B on 1,024 ranks: {what}", s, "s", bound, s < SECONDS) for what, s in seconds.items()]


def main() -> None:
    rows = [row for name, (config, ranks) in CASES.items() for row in compare(name, config, ranks)]
    write("plan_memory", rows + planning())


if __name__ == "__main__":
    train(sys.argv[1]) if len(sys.argv) == 2 else main()
