"""Datasets against megatron-core: equal bytes, and the same samples in the same order.

Compared: IndexedDatasetBuilder (documents of one and of several sequences, merging), GPTDataset over sizes, seeds,
sequence lengths, epochs and splits (order and content), and what BlendedMegatronDatasetBuilder makes of several
datasets, with weights and without. Megatron's indices are built by its compiled helpers.
Not compared: validation samples that are padded (drop_last_partial_validation_sequence=False) and blends without a
number of samples, which no training run has.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from megagrow.config import Config, DataConfig, ModelConfig, TrainConfig
from megagrow.data.indexed import IndexedWriter
from megagrow.data.megatron import SPLITS, MegatronDataset, split_shares
from megagrow.data.megatron_blend import MegatronDraws
from megagrow.data.merge import merge_datasets
from megagrow.train.streams import blend_weights, continue_blend, open_stream, open_training_data
from tests.peers.megatron_data import IndexedDatasetBuilder, build_splits, helpers, make_config

VOCAB_SIZE = 60_000


def documents(seed: int, count: int, longest: int = 40) -> list[list[int]]:
    """Random documents; some are empty, as in Megatron's files."""
    random = np.random.default_rng(seed)
    return [random.integers(0, VOCAB_SIZE, random.integers(0, longest)).tolist() for _ in range(count)]


def write(prefix: Path, documents: Sequence[Sequence[int]]) -> Path:
    with IndexedWriter(prefix, "<u2") as writer:
        for tokens in documents:
            writer.add_document(np.asarray(tokens, np.int64))
    return prefix


def theirs(prefix: Path, documents: Sequence[Sequence[Sequence[int]]], dtype: type) -> Path:
    """Documents of several sequences, written by Megatron."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        tokens = np.array(list(itertools.chain.from_iterable(sequences)), np.int64)  # a tensor makes numpy warn there
        builder.add_document(tokens, [len(sequence) for sequence in sequences])
    builder.finalize(f"{prefix}.idx")
    return prefix


def assert_equal_files(ours: Path, peer: Path) -> None:
    for suffix in ("bin", "idx"):
        assert Path(f"{ours}.{suffix}").read_bytes() == Path(f"{peer}.{suffix}").read_bytes(), suffix


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint8, np.int64])
def test_files_are_equal_to_the_byte(tmp_path: Path, dtype: type) -> None:
    random = np.random.default_rng(0)
    given = [
        [random.integers(0, 200, random.integers(0, 9)).tolist() for _ in range(random.integers(0, 4))]
        for _ in range(50)
    ]
    peer = theirs(tmp_path / "theirs", given, dtype)
    with IndexedWriter(tmp_path / "ours", dtype) as writer:
        for sequences in given:
            for tokens in sequences:
                writer.add_sequence(np.asarray(tokens, np.int64))
            writer.end_document()
    assert_equal_files(tmp_path / "ours", peer)


def test_merged_files_are_equal_to_the_byte(tmp_path: Path) -> None:
    given = [[[[1, 2], [3]], [], [[4]]], [[[9, 8, 7]]], [[], [[5], [6, 6]]]]
    parts = [theirs(tmp_path / f"part{i}", part, np.uint16) for i, part in enumerate(given)]
    builder = IndexedDatasetBuilder(f"{tmp_path}/theirs.bin", dtype=np.uint16)
    for part in parts:
        builder.add_index(str(part))
    builder.finalize(f"{tmp_path}/theirs.idx")
    merge_datasets(parts, tmp_path / "ours")
    assert_equal_files(tmp_path / "ours", tmp_path / "theirs")


def contents(dataset: Any, count: int) -> NDArray[np.int64]:
    """[count, S + 1] the tokens of Megatron's samples 0, 1, …; nothing is padded or masked here."""
    samples = [dataset[i] for i in range(count)]
    return np.stack([np.append(sample["tokens"], sample["labels"][-1]) for sample in samples])


CASES = [(60, "100,0,0"), (60, "9,1,0"), (60, "8,1,1"), (60, "1,1,1"), (900, "0.7,0.2,0.1"), (900, "969,20,11")]


@pytest.mark.parametrize("seq_length", [1, 7, 64])
@pytest.mark.parametrize(("count", "split"), CASES)
def test_samples_and_their_order_are_equal(tmp_path: Path, count: int, split: str, seq_length: int) -> None:
    """Less than an epoch, an epoch and some, many; little and much of the last one; another seed for each.

    Every split has a sample: without tokens Megatron would count epochs for ever.
    """
    prefix, shares = write(tmp_path / "corpus", documents(count, count)), split_shares(split)
    epochs = {name: MegatronDataset(prefix, seq_length, None, 0, share).num_samples for name, share in shares.items()}
    for seed, share in enumerate((0.3, 1.0, 1.1, 1.9, 5.5, 11.95)):
        sizes = [max(1, int(share * epochs.get(name, 0))) for name in SPLITS]
        config = make_config(seq_length, seed, VOCAB_SIZE, blend=([str(prefix)], None), split=split)
        peers = dict(zip(SPLITS, build_splits(sizes, config), strict=True))
        for name, size in zip(SPLITS, sizes, strict=True):
            assert (name in shares) == (peers[name] is not None)
            if name in shares:
                ours = MegatronDataset(prefix, seq_length, size, seed, shares[name])
                assert len(ours) == len(peers[name])
                assert ours.windows.tolist() == peers[name].shuffle_index.tolist()
                assert ours.sequences_N.tolist() == peers[name].document_index.tolist()
                chosen = min(len(ours), 50)
                assert (ours.batch(np.arange(chosen)) == contents(peers[name], chosen)).all(), (name, size, seed)


def test_the_last_epoch_is_apart_exactly_where_megatron_has_it_apart(tmp_path: Path) -> None:
    prefix = write(tmp_path / "corpus", documents(5, 60))
    for size in range(1, 700, 13):
        config = make_config(9, 3, VOCAB_SIZE, blend=([str(prefix)], None), split="1")
        peer = build_splits([size, 0, 0], config)[0]
        assert MegatronDataset(prefix, 9, size, 3).windows.tolist() == peer.shuffle_index.tolist(), size


def run_config(train: str, seq_length: int, seed: int, steps: int, split: str) -> Config:
    data = DataConfig(train=train, seq_length=seq_length, seed=seed, order="megatron", split=split)
    return Config(model=ModelConfig(vocab_size=VOCAB_SIZE), data=data, train=TrainConfig(steps=steps))


def stream_of(config: Config) -> Any:
    datasets = open_training_data(config)
    return open_stream(datasets, continue_blend(None, blend_weights(config, datasets), {}, 0, False), config)


BLENDS = ((0.7, 0.3), (1.0, 1.0), (5.0, 2.0, 2.0), (0.98, 0.01, 0.01), None)


@pytest.mark.parametrize("split", ["", "9,1,0"])
@pytest.mark.parametrize("weights", BLENDS, ids=str)
def test_blends_are_equal(tmp_path: Path, weights: tuple[float, ...] | None, split: str) -> None:
    """Without a split Megatron gets its data per split, as from --train-data-path."""
    prefixes = [
        write(tmp_path / name, documents(i, 30 + 40 * i)) for i, name in enumerate("abc"[: len(weights or "ab")])
    ]
    words = [str(prefix) for prefix in prefixes]
    pairs = words if weights is None else [str(x) for pair in zip(weights, words, strict=True) for x in pair]
    for seed, steps in ((1, 3), (2, 9), (3, 40)):
        config = run_config(" ".join(pairs), 12, seed, steps, split)
        blend, rest = (words, None if weights is None else list(weights)), None if weights is None else 1
        given = {"blend": blend, "split": split} if split else {"blend_per_split": [blend, None, None]}
        size = steps * config.train.global_batch_size
        peer = build_splits([size, rest, rest], make_config(12, seed, VOCAB_SIZE, **given))[0]
        stream = stream_of(config)
        count = len(peer)
        which, ids = stream.samples(0, count)
        assert which.tolist() == peer.dataset_index.tolist()
        assert ids.tolist() == peer.dataset_sample_index.tolist()
        shown = min(count, 50)
        assert (stream.batch(0, shown).tokens.numpy() == contents(peer, shown)).all()


def test_draws_are_equal_for_many_weights() -> None:
    random = np.random.default_rng(0)
    kinds: list[Callable[[int], Any]] = [
        lambda n: random.random(n) + 1e-3,
        lambda n: random.integers(1, 5, n),
        lambda n: np.ones(n),
        lambda n: random.random(n) ** 6 + 1e-9,
    ]
    for number in range(120):
        weights = kinds[number % 4](int(random.integers(1, 70)))
        size = int(random.integers(1, 200_000)) if number % 10 == 0 else int(random.integers(1, 3000))
        which, nth = np.zeros(size, np.int16), np.zeros(size, np.int64)
        normalized = (np.asarray(weights, float) / np.sum(np.asarray(weights, float))).tolist()
        helpers.build_blending_indices(which, nth, normalized, len(weights), size, False)
        ours = MegatronDraws(weights.tolist(), size).at(0, size)
        assert ours[0].tolist() == which.tolist() and ours[1].tolist() == nth.tolist(), (weights, size)
