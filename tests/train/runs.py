"""Tiny runs for the tests of megagrow/train: a corpus of bytes, models of a few thousand parameters."""

import dataclasses
import inspect
import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from megagrow.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from megagrow.data.indexed import IndexedWriter
from megagrow.train import run

SMALL = ModelConfig(vocab_size=256, hidden_size=16, num_layers=2, num_heads=2, ffn_size=32, max_seq_length=32)
LARGE = dataclasses.replace(SMALL, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=4, ffn_size=64)
# What two runs of one configuration may differ in.
TIMES = ("tokens_per_second", "seconds_total", "checkpoint_seconds", "mfu")


def make_corpus(folder: Path) -> Path:
    """Byte tokens of two modules' source: `train` and `validation` token files in the folder."""
    for split, module in (("train", random), ("validation", inspect)):
        text = inspect.getsource(module).encode()[:40_000]
        with IndexedWriter(folder / split, np.uint16) as writer:
            writer.add_document(np.frombuffer(text, np.uint8))
            writer.close()
    return folder


def make_config(corpus: Path, directory: Path, steps: int = 6, **sections: Any) -> Config:
    """A run of a few steps; `sections` replace whole sections of the configuration."""
    config = Config(
        model=SMALL,
        data=DataConfig(train=str(corpus / "train"), validation=str(corpus / "validation"), seq_length=16),
        train=TrainConfig(steps=steps, global_batch_size=4, eval_interval=3, eval_batches=2),
        optim=OptimConfig(lr=1e-2, warmup_steps=2),
        checkpoint=CheckpointConfig(interval=2, keep_last=0),
        run=RunConfig(dir=str(directory)),
    )
    return dataclasses.replace(config, **sections)


def metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def final_loss(directory: Path) -> float:
    """The validation loss at the end of a run."""
    return float(metrics(directory)[-1]["validation_loss"])


def run_on_ranks(config: Config, tensor: int = 1, pipeline: int = 1, **parallel: Any) -> int:
    """Runs in every rank of the harness; returns the exit code."""
    return run(dataclasses.replace(config, parallel=ParallelConfig(tensor, pipeline, **parallel)))
