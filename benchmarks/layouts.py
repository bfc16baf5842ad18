"""Training steps of the quickstart's large model: two ranks of one thread in each layout against one such rank.

    python benchmarks/layouts.py        # a minute; writes benchmarks/results/layouts.json

Every layout runs in the same session, layouts alternate, and the median step counts. The figures inform; part of what
they show is gloo, which copies through memory where GPUs would use links of their own.
"""

import dataclasses
import os
import statistics
import subprocess
import sys
import time

import torch
import torch.distributed as dist
from results_file import Row, write

from megagrow import presets
from megagrow.config import ParallelConfig
from megagrow.evaluate import make_batch
from megagrow.optim import Optimizer
from megagrow.parallel.mesh import init_distributed, make_mesh
from megagrow.train.part import build_part, initialize_part

LAYOUTS = {"data 2": (2, 1, 1), "tensor 2": (2, 2, 1), "pipeline 2": (2, 1, 2), "one rank": (1, 1, 1)}
ROUNDS, STEPS = 3, 8


def measure(tensor: int, pipeline: int) -> None:
    """One rank: prints the median seconds per step."""
    torch.set_num_threads(1)
    init_distributed()
    config = dataclasses.replace(
        presets.get("quickstart_scratch"), parallel=ParallelConfig(tensor=tensor, pipeline=pipeline)
    )
    mesh = make_mesh(config.parallel)
    part = build_part(config.model, config, mesh)
    initialize_part(part, seed=0)
    optimizer = Optimizer(part.parameters, config.optim)
    size = config.train.global_batch_size
    tokens = torch.randint(config.model.vocab_size, (size // mesh.dp.size, config.data.seq_length + 1))
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        part.engine.train_step(make_batch(tokens, size, mesh))
        optimizer.step(lr=1e-3)
        times.append(time.perf_counter() - began)
    if mesh.is_main:
        print(statistics.median(times[2:]))
    if dist.is_initialized():
        dist.destroy_process_group()


def launch(ranks: int, tensor: int, pipeline: int) -> float:
    """The median seconds per step of a layout in processes of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [*command, __file__, str(tensor), str(pipeline)], capture_output=True, text=True, check=True, env=environment
    )
    return float(found.stdout.split()[-1])


def main() -> None:
    seconds: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    for _ in range(ROUNDS):
        for name, layout in LAYOUTS.items():
            seconds[name].append(launch(*layout))
    config = presets.get("quickstart_scratch")
    tokens = config.train.global_batch_size * config.data.seq_length
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [Row(f"{name}: tokens per second", tokens / s, "token/s") for name, s in median.items()]
    rows += [Row(f"{name}: speed-up over one rank", median["one rank"] / s, "x") for name, s in median.items()]
    write("layouts", rows)


if __name__ == "__main__":
    measure(int(sys.argv[1]), int(sys.argv[2])) if len(sys.argv) == 3 else main()
