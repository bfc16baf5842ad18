"""Runs with a teacher beside plain ones: the time of a step, and what is left in memory. `salt.py` is the way in.

Both train the same model on the same samples with the same settings, in processes of their own that alternate. One is
taught in its first steps, of which the first does not count, and ends in stage 2; the plain one never has a teacher. A
step's seconds and FLOPs are what it adds to the totals of the run's ledger, the teacher's included.

At its end, in stage 2, each rank tells what it holds after a collection and a trim: anonymous pages of the process, and
the bytes of all tensors that the interpreter knows.
"""

import gc
import importlib
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from processes import MIB, launch, settle, tell
from results_file import Row
from torch import Tensor, nn

from megagrow.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    InitConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    SaltConfig,
    TrainConfig,
)
from megagrow.data.indexed import IndexedWriter
from megagrow.metrics import METRICS_FILE, read_metrics
from megagrow.train import run
from megagrow.train.trainer import Trainer

STUDENT = ModelConfig(hidden_size=512, num_layers=8, num_heads=8, ffn_size=1376, vocab_size=32_000)
TEACHER = ModelConfig(hidden_size=256, num_layers=4, num_heads=4, ffn_size=688, vocab_size=32_000)
LENGTH, BATCH = 256, 4
WARM_UP, STEPS, AFTER, ROUNDS = 1, 4, 2, 3
TIME_SHARE, MEMORY_SHARE = 0.10, 0.01
PLAIN, TAUGHT = "plain", "taught"
LAYOUTS = {
    "one process": (ParallelConfig(), 2),  # with the threads of each rank
    "pipeline 2": (ParallelConfig(pipeline=2), 1),
}
Runs = dict[str, list[dict[str, Any]]]


class Watched(Trainer):
    """A run that tells what it holds before it saves, which it does at its end only."""

    def _save(self) -> None:
        tell({"rank": self.mesh.world.rank, "process": settle(), "live tensors": live_bytes()})
        super()._save()


def live_bytes() -> int:
    """Of all tensors that the interpreter knows."""
    tensors = (x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu")
    storages = (x.untyped_storage() for x in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def config_of(folder: Path, kind: str, layout: str, directory: str) -> Config:
    parallel, threads = LAYOUTS[layout]
    salt = SaltConfig(str(folder / "teacher"), WARM_UP + STEPS) if kind == TAUGHT else SaltConfig()
    return Config(
        model=STUDENT,
        data=DataConfig(str(folder / "tokens"), seq_length=LENGTH),
        parallel=parallel,
        train=TrainConfig(
            steps=WARM_UP + STEPS + AFTER,
            global_batch_size=BATCH,
            microbatch_size=1 if parallel.pipeline > 1 else 0,
            threads=threads,
        ),
        optim=OptimConfig(warmup_steps=0),
        salt=salt,
        checkpoint=CheckpointConfig(interval=0),
        init=InitConfig(skip_source_check=True),  # the teacher has learned nothing
        run=RunConfig(dir=directory),
    )


def make_inputs(folder: Path) -> None:
    """Random tokens, and a teacher that has been trained for one step."""
    generator = np.random.default_rng(0)
    with IndexedWriter(folder / "tokens", np.uint16) as writer:
        writer.add_document(generator.integers(STUDENT.vocab_size, size=(WARM_UP + STEPS + AFTER) * BATCH * LENGTH + 1))
        writer.close()
    config = config_of(folder, PLAIN, "one process", str(folder / "teacher"))
    assert run(replace(config, model=TEACHER, train=replace(config.train, steps=1))) == 0


def train(folder: Path, kind: str, layout: str) -> dict[str, Any]:
    """One run: seconds and FLOPs of its steps, and what every rank holds at its end."""
    parallel, threads = LAYOUTS[layout]
    with tempfile.TemporaryDirectory(dir=folder) as directory:
        ranks = launch(__file__, str(folder), kind, layout, directory, ranks=parallel.pipeline, threads=threads)
        lines = read_metrics(Path(directory) / METRICS_FILE)[WARM_UP - 1 : WARM_UP + STEPS]
    steps = {name: np.diff([line[f"{name}_total"] for line in lines]).tolist() for name in ("seconds", "flops")}
    return {**steps, "ranks": sorted(ranks, key=lambda each: each["rank"])}


def measure(layout: str) -> Runs:
    """All runs of a layout."""
    found: Runs = {PLAIN: [], TAUGHT: []}
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder))
        for _ in range(ROUNDS):
            for kind, runs in found.items():
                runs.append(train(Path(folder), kind, layout))
    return found


def time_rows(layout: str, runs: Runs) -> list[Row]:
    """The time of a step of stage 1 beside a plain one, and beside what the ledger says of their FLOPs."""
    seconds, spent = (
        {kind: statistics.median(x for each in found for x in each[name]) for kind, found in runs.items()}
        for name in ("seconds", "flops")
    )
    times, work = (each[TAUGHT] / each[PLAIN] for each in (seconds, spent))
    off = times / work - 1
    return [
        Row(f"{layout}: plain step", seconds[PLAIN], "s"),
        Row(f"{layout}: step of stage 1", seconds[TAUGHT], "s"),
        Row(f"{layout}: time of a step of stage 1 / plain step", times, "x"),
        Row(f"{layout}: FLOPs of the same by the ledger", work, "x"),
        Row(f"{layout}: the former / the latter - 1", off, "", f"within {TIME_SHARE:.0%}", abs(off) <= TIME_SHARE),
    ]


def memory_rows(layout: str, runs: Runs) -> list[Row]:
    """What is held in stage 2, on every rank, beside a run that never had a teacher."""
    rows = []
    for rank in range(len(runs[PLAIN][0]["ranks"])):
        place = f"{layout}, rank {rank}" if len(runs[PLAIN][0]["ranks"]) > 1 else layout
        for way in ("process", "live tensors"):
            held = {kind: statistics.median(each["ranks"][rank][way] for each in runs[kind]) for kind in runs}
            off = held[TAUGHT] / held[PLAIN] - 1
            holds = abs(off) <= MEMORY_SHARE
            rows += [
                Row(f"{place}: {way} of a plain run", held[PLAIN] / MIB, "MiB"),
                Row(f"{place}: {way} after stage 1 / that - 1", off, "", f"within {MEMORY_SHARE:.0%}", holds),
            ]
    return rows


def work(folder: str, kind: str, layout: str, directory: str) -> int:
    """One rank of a run."""
    with mock.patch.object(importlib.import_module("megagrow.train.run"), "Trainer", Watched):
        return run(config_of(Path(folder), kind, layout, directory))


if __name__ == "__main__":
    sys.exit(work(*sys.argv[1:]))
