"""Writes megatron_order.json: orders as Megatron's own classes give them (`make peers` has to have run).

    PYTHONPATH=.peers:.:kernels python -m tests.data.freeze_megatron_order

Of each case, over the corpora of `corpus`, it holds the training samples' order and a checksum of their tokens.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from megagrow.data.indexed import IndexedWriter

VOCAB_SIZE = 1000
FROZEN = Path(__file__).with_name("megatron_order.json")
CASES: list[dict[str, Any]] = [
    {"seq_length": 8, "seed": 1234, "size": 20, "split": "9,1,0"},
    {"seq_length": 8, "seed": 1, "size": 90, "split": "1"},
    {"seq_length": 5, "seed": 7, "size": 310, "split": "8,1,1"},
    {"seq_length": 16, "seed": 2, "size": 40, "split": "1", "weights": [0.7, 0.3]},
    {"seq_length": 8, "seed": 3, "size": 60, "split": "9,1,0", "weights": [5, 3, 3]},
    {"seq_length": 8, "seed": 3, "size": 60, "split": "1", "weights": None},
]


def corpus(folder: Path, number: int) -> Path:
    """A small dataset of 40 documents, the same on every machine."""
    words = np.random.PCG64(number).random_raw(4000)
    with IndexedWriter(folder / f"corpus{number}", "<u2") as writer:
        for i in range(40):
            length = int(words[i] % 23)
            writer.add_document((words[100 + 23 * i : 100 + 23 * i + length] % VOCAB_SIZE).astype(np.int64))
    return folder / f"corpus{number}"


def checksums(tokens_BT: np.ndarray) -> list[int]:
    """One number for each sample that depends on every token and its place."""
    return (tokens_BT @ np.arange(1, tokens_BT.shape[1] + 1)).tolist()


def prefixes_of(case: dict[str, Any], folder: Path) -> list[str]:
    """The corpora of a case."""
    count = len(case["weights"] or "ab") if "weights" in case else 1
    return [str(corpus(folder, number)) for number in range(count)]


def frozen(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The case with what Megatron makes of it."""
    from tests.peers.megatron_data import build_splits, make_config

    prefixes, weights = prefixes_of(case, folder), case.get("weights")
    blend = (prefixes, [float(weight) for weight in weights] if weights else None)
    config = make_config(case["seq_length"], case["seed"], VOCAB_SIZE, blend=blend, split=case["split"])
    rest = 1 if weights else None
    dataset = build_splits([case["size"], rest, rest], config)[0]
    samples = [dataset[i] for i in range(len(dataset))]
    sums = checksums(np.stack([np.append(sample["tokens"], sample["labels"][-1]) for sample in samples]))
    if "weights" in case:
        order = {"which": dataset.dataset_index.tolist(), "ids": dataset.dataset_sample_index.tolist()}
    else:
        order = {"windows": dataset.shuffle_index.tolist()}
    return {**case, **order, "sums": sums}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        lines = ",\n".join(json.dumps(frozen(case, Path(name))) for case in CASES)
        FROZEN.write_text(f"[\n{lines}\n]\n")
