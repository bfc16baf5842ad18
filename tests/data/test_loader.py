"""Tests megagrow/data/loader.py: one global order for any layout, none lost, none twice."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megagrow.data.dataset import PackedDataset
from megagrow.data.loader import SampleOrder, Stream, epoch_permutation, shuffled
from megagrow.errors import ConfigError, DataError

MakeDataset = Callable[..., Path]


@given(n=st.integers(1, 40), seed=st.integers(0, 2**70), epochs=st.integers(1, 4))
def test_every_epoch_holds_each_sample_once(n: int, seed: int, epochs: int) -> None:
    ids = SampleOrder(n, seed).ids(0, n * epochs).reshape(epochs, n)
    assert (np.sort(ids, axis=1) == np.arange(n)).all()


@given(
    n=st.integers(1, 30),
    cuts=st.lists(st.integers(1, 50), min_size=1, max_size=8),
    seed=st.integers(0, 9),
)
def test_any_cuts_give_the_same_sequence(n: int, cuts: list[int], seed: int) -> None:
    """Stopping anywhere and going on in a new process (a new object) changes nothing."""
    whole = SampleOrder(n, seed).ids(0, sum(cuts))
    pieces, start = [], 0
    for count in cuts:
        pieces.append(SampleOrder(n, seed).ids(start, count))
        start += count
    assert np.concatenate(pieces).tolist() == whole.tolist()
    order = SampleOrder(n, seed)
    backwards = [order.ids(i, 1)[0] for i in reversed(range(sum(cuts)))]
    assert backwards[::-1] == whole.tolist()


def test_order_depends_on_seed_and_epoch() -> None:
    """Also for seeds past 32 bits, where concatenated entropy words would run together."""
    keys = [(0, 0), (0, 1), (1, 0), (5, 1), (2**32 + 5, 0), (2**32 + 5, 1), (2**64, 0)]
    orders = {tuple(epoch_permutation(50, seed, epoch)) for seed, epoch in keys}
    assert len(orders) == len(keys)


def test_the_order_itself_is_pinned() -> None:
    """If this fails, a resumed run would see other data: change the order only with a reason."""
    epochs = [[6, 9, 1, 8, 0, 4, 5, 7, 2, 3], [3, 6, 8, 2, 1, 5, 4, 9, 0, 7]]
    assert SampleOrder(10, 1234).ids(0, 20).tolist() == epochs[0] + epochs[1]


def test_orders_are_uniform() -> None:
    """Each of the 24 orders of 4 samples: 2400 draws, 100 expected; chi-square far below 60."""
    drawn = [tuple(epoch_permutation(4, seed, 3)) for seed in range(2400)]
    counts = np.array([drawn.count(order) for order in set(drawn)])
    assert len(counts) == 24 and ((counts - 100) ** 2 / 100).sum() < 60


def test_explicit_ids_are_shuffled_like_the_whole() -> None:
    chosen = np.array([3, 50, 7, 12])
    order = SampleOrder(chosen, 5)
    assert order.ids(0, 12).tolist() == chosen[SampleOrder(4, 5).ids(0, 12)].tolist()


@pytest.fixture
def dataset(make_dataset: MakeDataset) -> PackedDataset:
    return PackedDataset(make_dataset([list(range(25 * 3 + 1))]), 3)


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_ranks_together_take_the_global_batch(dataset: PackedDataset, world: int) -> None:
    stream = Stream([shuffled(dataset, 7)])
    for cursor in (0, 12, 24, 61):  # 24 and 61 cross the end of an epoch of 25
        shares = [stream.batch(cursor, 12, rank, world) for rank in range(world)]
        ids = np.concatenate([share.ids for share in shares])
        assert ids.tolist() == SampleOrder(25, 7).ids(cursor, 12).tolist()
        tokens = torch.cat([share.tokens for share in shares])
        assert tokens.dtype == torch.int64 and tokens.shape == (12, 4)
        assert tokens.tolist() == dataset.batch(ids).tolist()


def test_documents_come_with_a_batch_on_demand(dataset: PackedDataset) -> None:
    assert Stream([shuffled(dataset, 7)]).batch(0, 4).documents is None
    drawn = Stream([shuffled(dataset, 7)], with_documents=True).batch(0, 4)
    assert drawn.documents is not None and drawn.documents.tolist() == dataset.documents(drawn.ids).tolist()


def test_words_that_come_twice_are_sorted_stably(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among 64-bit words that is too rare to wait for; without a stable sort the order would depend on the machine."""
    words = np.array([5, 1, 5, 0, 1] * 40, np.uint64)

    class Generator:
        def __init__(self, seed: object) -> None: ...

        def random_raw(self, count: int) -> np.ndarray:
            return words[:count]

    monkeypatch.setattr(np.random, "PCG64", Generator)
    assert epoch_permutation(200, 0, 0).tolist() == sorted(range(200), key=lambda i: (words[i], i))


def test_wrong_inputs(dataset: PackedDataset) -> None:
    stream = Stream([shuffled(dataset, 0)])
    with pytest.raises(ConfigError, match="4 is not divisible by the data-parallel size 3"):
        stream.batch(0, 4, 0, 3)
    with pytest.raises(ConfigError, match="seed=-1"):
        SampleOrder(4, -1)
    with pytest.raises(DataError, match="no samples"):
        SampleOrder([], 0)
    with pytest.raises(DataError, match="twice"):
        SampleOrder([1, 2, 1], 0)
    for samples, bad in (([0, 25], 25), ([-3, 1], -3)):
        with pytest.raises(DataError, match=f"names sample {bad}, there are 25"):
            shuffled(dataset, 0, samples)
