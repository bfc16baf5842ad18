"""Building the order of samples for ten million documents, beside Megatron's compiled helpers in the same run.

    PYTHONPATH=.peers python benchmarks/data_index.py [--documents 10000000] [--runs 5]

Megatron's helpers build where every sample begins (build_sample_idx) and a blend's draws (build_blending_indices).
They are compared alone with what does their work here, and with the shuffles around them, as the two orders come
whole; ours includes opening and checking the files, Megatron's does not. Both are timed in turn, and the medians of
the ratios of neighbours must not pass 1. The token file is sparse: nothing of it is read. `make peers` installs
megatron-core.
"""

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from results_file import Row, write

from megagrow.data.blend import EvenDraws
from megagrow.data.dataset import PackedDataset
from megagrow.data.indexed import IndexedWriter, tokens_path
from megagrow.data.loader import epoch_permutation
from megagrow.data.megatron import MegatronDataset, running_total
from megagrow.data.megatron_blend import MegatronDraws

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.datasets import gpt_dataset, helpers

SEQ_LENGTH, SEED = 2048, 1234
BLENDS = {"2": [0.7, 0.3], "5": [0.5, 0.2, 0.15, 0.1, 0.05], "20": [1.0 / (i + 1) for i in range(20)]}


def make_files(prefix: Path, num_documents: int) -> NDArray[np.int32]:
    """An index of documents of 50 to 1500 tokens, and a sparse token file of the right size; the lengths."""
    lengths = np.random.default_rng(0).integers(50, 1500, num_documents).astype(np.int32)
    with IndexedWriter(prefix, "u1") as writer:
        writer._lengths.frombytes(lengths.tobytes())
        writer._document_indices.extend(range(1, num_documents + 1))
    os.truncate(tokens_path(prefix), int(lengths.sum(dtype=np.int64)))
    return lengths


def megatrons_order(lengths: NDArray[np.int32]) -> int:
    """Document, sample and shuffle index of one epoch, as GPTDataset builds them; the number of samples."""
    random = np.random.RandomState(SEED)
    num_tokens = int(lengths.sum(dtype=np.int64))
    documents = gpt_dataset._build_document_index(np.arange(len(lengths), dtype=np.int32), 1, random, False)
    samples = helpers.build_sample_idx(lengths, documents, SEQ_LENGTH, 1, num_tokens)
    gpt_dataset._build_shuffle_index(len(samples) - 1, len(samples) - 1, random)
    return len(samples) - 1


def own_order(prefix: Path) -> None:
    """Megagrow's: the files opened and checked, and the permutation of an epoch."""
    epoch_permutation(PackedDataset(prefix, SEQ_LENGTH).num_samples, SEED, 0)


def seconds(build: Callable[[], object]) -> float:
    began = time.perf_counter()
    build()
    return time.perf_counter() - began


def compare(name: str, peer: Callable[[], object], ours: Callable[[], object], runs: int) -> list[Row]:
    pairs = [(seconds(peer), seconds(ours)) for _ in range(runs)]
    ratio = statistics.median(own / theirs for theirs, own in pairs)
    theirs, own = (statistics.median(values) for values in zip(*pairs, strict=True))
    return [
        Row(f"{name}: Megatron", theirs, "s"),
        Row(f"{name}: megagrow", own, "s"),
        Row(f"{name}: ratio", ratio, "x", "<= 1", ratio <= 1),
    ]


def blends(num_samples: int, runs: int) -> list[Row]:
    rows = []
    for name, weights in BLENDS.items():
        normalized = (np.array(weights) / np.sum(weights)).tolist()

        def compiled(weights: list[float] = normalized) -> None:
            which, nth = np.zeros(num_samples, np.int16), np.zeros(num_samples, np.int64)
            helpers.build_blending_indices(which, nth, weights, len(weights), num_samples, False)

        def same(weights: list[float] = weights) -> None:
            MegatronDraws(weights, num_samples)

        def even(weights: list[float] = weights) -> None:
            EvenDraws(weights).at(num_samples - 4096, 4096)

        rows += compare(f"blend of {name}, megatron order", compiled, same, runs)
        rows += compare(f"blend of {name}, megagrow order, a batch of 4,096", compiled, even, runs)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "corpus"
        lengths = make_files(prefix, options.documents)
        num_samples = megatrons_order(lengths)
        documents = gpt_dataset._build_document_index(
            np.arange(len(lengths), dtype=np.int32), 1, np.random.RandomState(SEED), False
        )
        num_tokens, runs = int(lengths.sum(dtype=np.int64)), options.runs

        def helper() -> None:
            helpers.build_sample_idx(lengths, documents, SEQ_LENGTH, 1, num_tokens)

        def whole() -> None:
            megatrons_order(lengths)

        rows = [
            Row("documents", options.documents, ""),
            Row("samples", num_samples, ""),
            *compare("where samples begin", helper, lambda: running_total(lengths, documents), runs),
            *compare("megatron order", whole, lambda: MegatronDataset(prefix, SEQ_LENGTH, None, SEED), runs),
            *compare("megagrow order", whole, lambda: own_order(prefix), runs),
            *blends(num_samples, runs),
        ]
    write("data_index", rows)


if __name__ == "__main__":
    main()
