"""Tests megagrow/data/dataset.py: which tokens are in which sample, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.data.dataset import PackedDataset
from megagrow.data.indexed import IndexedWriter
from megagrow.errors import ConfigError, DataError

MakeDataset = Callable[..., Path]


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    seq_length=st.integers(1, 12),
)
def test_samples_are_windows_over_documents_end_to_end(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_length: int
) -> None:
    prefix = tmp_path_factory.getbasetemp() / "packed"
    stream = list(range(100, 100 + sum(lengths)))
    with IndexedWriter(prefix, "<u2") as writer:
        for i, length in enumerate(lengths):
            start = sum(lengths[:i])
            writer.add_document(stream[start : start + length])
    if len(stream) < seq_length + 1:
        with pytest.raises(DataError):
            PackedDataset(prefix, seq_length)
        return
    dataset = PackedDataset(prefix, seq_length)
    assert len(dataset) == dataset.num_samples == (len(stream) - 1) // seq_length
    for i in range(dataset.num_samples):
        expected = stream[i * seq_length : i * seq_length + seq_length + 1]
        assert dataset.sample(i).tolist() == expected
    ids = [dataset.num_samples - 1, 0, 0]
    batch = dataset.batch(ids)
    assert batch.dtype == np.int64 and batch.shape == (3, seq_length + 1)
    assert batch.tolist() == [dataset.sample(i).tolist() for i in ids]


def test_each_token_but_the_first_and_the_tail_is_a_label_once(make_dataset: MakeDataset) -> None:
    dataset = PackedDataset(make_dataset([list(range(10)), list(range(10, 24))]), 5)
    samples = dataset.batch(np.arange(dataset.num_samples))
    assert samples[:, 1:].ravel().tolist() == list(range(1, 21))
    assert samples[:, :-1].ravel().tolist() == list(range(20))


def test_empty_corpus_is_refused(make_dataset: MakeDataset) -> None:
    with pytest.raises(DataError, match="corpus: the corpus is empty"):
        PackedDataset(make_dataset([]), 4)


def test_corpus_shorter_than_a_sample_is_refused(make_dataset: MakeDataset) -> None:
    with pytest.raises(DataError, match=r"4 tokens are too few .* seq_length \+ 1 = 5"):
        PackedDataset(make_dataset([[1, 2], [3, 4]]), 4)


def test_seq_length_must_be_positive(make_dataset: MakeDataset) -> None:
    with pytest.raises(ConfigError, match="seq_length=0"):
        PackedDataset(make_dataset([[1, 2]]), 0)


@pytest.mark.parametrize("index", [-1, 2])
def test_sample_outside_is_refused_not_wrapped(make_dataset: MakeDataset, index: int) -> None:
    dataset = PackedDataset(make_dataset([[1, 2, 3, 4, 5]]), 2)
    with pytest.raises(DataError, match=f"sample {index} does not exist, there are 2"):
        dataset.batch([0, index])


def test_token_outside_the_vocabulary_is_named(make_dataset: MakeDataset) -> None:
    prefix = make_dataset([[1, 2, 3, 4, 9]])
    assert PackedDataset(prefix, 2, vocab_size=10).sample(1).tolist() == [3, 4, 9]
    with pytest.raises(DataError, match="sample 1 holds token 9, the model's vocab_size is 9"):
        PackedDataset(prefix, 2, vocab_size=9).batch([0, 1])
    negative = make_dataset([[1, -2, 3]], "<i4", name="negative")
    with pytest.raises(DataError, match="holds token -2"):
        PackedDataset(negative, 2, vocab_size=9).sample(0)


def test_every_input_knows_its_document(make_dataset: MakeDataset) -> None:
    dataset = PackedDataset(make_dataset([[1, 2, 3], [4], [], [5, 6, 7, 8, 9]]), 4)
    assert dataset.documents([1, 0]).tolist() == [[3, 3, 3, 3], [0, 0, 0, 1]]
