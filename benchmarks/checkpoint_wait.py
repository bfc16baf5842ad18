"""How long a training step waits for a checkpoint: written beside training, written at once, and the copy alone.

One process on the CPU; the tensors are those of a model with AdamW's moments, in float32. All three are measured in
turn, round by round, in the same run; the copy alone is `copy_` into tensors that have been written before, as are the
buffers of all saves but the first. After an asynchronous save the writer is waited for, which is not counted.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import results_file
import torch
from results_file import Row
from torch import Tensor

from megagrow.checkpoint import store
from megagrow.checkpoint.saver import Saver
from megagrow.checkpoint.store import Snapshot

FACTOR, EXTRA = 1.3, 0.010  # the bound: so many times the copy alone, and so many seconds


def make_tensors(num_layers: int, width: int) -> dict[str, Tensor]:
    """Weights and two moments of `num_layers` blocks of a square and two wide matrices each."""
    shapes = {"attention": (width, width), "up": (4 * width, width), "down": (width, 4 * width), "norm": (width,)}
    return {
        f"{kind}.{layer}.{name}": torch.rand(shape)
        for kind in ("model", "optim.exp_avg", "optim.exp_avg_sq")
        for layer in range(num_layers)
        for name, shape in shapes.items()
    }


def seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def measure(tensors: dict[str, Tensor], folder: Path, rounds: int) -> dict[str, float]:
    """The median over the rounds, of the second and later ones, in seconds."""
    beside, at_once = Saver(keep_last=1), Saver(asynchronous=False, keep_last=1)
    buffers = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    found: dict[str, list[float]] = {"beside": [], "at once": [], "copy": [], "writing": []}

    def take() -> Snapshot:
        return store.snapshot(tensors, {}, {}, {})

    def copy() -> None:
        for name, tensor in tensors.items():
            buffers[name].copy_(tensor)

    for step in range(rounds + 1):
        found["copy"].append(seconds(copy))
        found["beside"].append(seconds(lambda step=step: beside.save(folder / "beside", step, take)))
        found["writing"].append(seconds(beside.wait))
        found["at once"].append(seconds(lambda step=step: at_once.save(folder / "at once", step, take)))
    return {name: statistics.median(values[1:]) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    tensors = make_tensors(arguments.num_layers, arguments.width)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(tensors, Path(folder), arguments.rounds)
    waits, limit = found["beside"], FACTOR * found["copy"] + EXTRA
    bound = f"at most {FACTOR} x the copy alone + {EXTRA * 1000:.0f} ms"
    size = sum(tensor.nbytes for tensor in tensors.values()) / 2**20
    rows = [
        Row("state", size, "MiB"),
        Row("copy alone", found["copy"] * 1000, "ms"),
        Row("a step waits, written beside training", waits * 1000, "ms", bound, waits <= limit),
        Row("a step waits, written at once", found["at once"] * 1000, "ms"),
        Row("writing, hashing and committing beside training", found["writing"] * 1000, "ms"),
    ]
    results_file.write("checkpoint_wait", rows)
    if waits > limit:
        raise SystemExit(f"checkpoint_wait: a step waits {waits * 1000:.0f} ms, {bound} are {limit * 1000:.0f} ms")


if __name__ == "__main__":
    main()
