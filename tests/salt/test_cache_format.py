"""What a sample's targets become as bytes, and how near the stored probabilities are."""

import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.salt import cache_format
from megagrow.salt.bits import pack_bits, packed_size, unpack_bits
from megagrow.salt.cache_format import (
    CODE_ERROR,
    NOTHING,
    STEP,
    Entries,
    Kind,
    Shape,
    compress,
    decode,
    decompress,
    encode,
    masses,
    to_codes,
    to_nats,
)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 32), st.data())
def test_integers_of_any_width_come_back(width: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, 2**width - 1), max_size=40))
    packed = pack_bits(np.array(values, np.uint64), width)
    assert len(packed) == packed_size(len(values), width) == -(-len(values) // 8) * width
    assert unpack_bits(packed, width, len(values)).tolist() == values


def test_the_lowest_bit_comes_first() -> None:
    """The layout is part of the format: 0b101, 0b011 … as a stream of bits."""
    assert pack_bits(np.array([0b101, 0b011, 0b111]), 3) == bytes([0b11_011_101, 0b1, 0])


def test_a_step_bounds_the_error_of_a_log_probability() -> None:
    nats = np.concatenate([np.linspace(0, 31.99, 100_001), [0.0, STEP / 2, 31.98]])
    error = np.abs(to_nats(to_codes(nats)) - nats)
    assert error.max() <= CODE_ERROR == 2.0**-12
    assert to_codes(np.array([32.5, 1e9, np.inf])).tolist() == [NOTHING] * 3
    assert np.isinf(to_nats(np.array([NOTHING], np.uint16))).all()


@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0])
@pytest.mark.parametrize("k", [1, 7, 30])
def test_stored_probabilities_are_a_distribution_near_the_true_one(k: int, scale: float) -> None:
    """Rounding is taken out of the sum, which costs at most as much again."""
    logits = np.random.default_rng(0).normal(size=(50, 30)) * scale
    logs = -np.sort(-(logits - np.log(np.exp(logits).sum(-1, keepdims=True))), axis=1)
    tail = np.exp(logs[:, k:]).sum(-1)
    with np.errstate(divide="ignore"):
        entries = Entries(np.zeros((50, k), np.int32), to_codes(-logs[:, :k]), to_codes(-np.log(tail)))
    found, truth = masses(entries, Shape("top_k", 50, k, 30)), np.concatenate([np.exp(logs[:, :k]), tail[:, None]], 1)
    np.testing.assert_allclose(found.sum(-1), 1.0, rtol=0, atol=1e-6)
    assert (np.abs(found - truth) <= 2 * CODE_ERROR * truth + 1e-7).all()
    assert np.abs(np.float16(-logs[logs < -8]) + logs[logs < -8]).max(initial=1.0) > CODE_ERROR, "fp16 is coarser"


def test_draws_are_counted_where_a_token_comes_first() -> None:
    ids = np.array([[3, 3, 3, 5], [0, 1, 1, 2], [7, 7, 7, 7]], np.int32)
    found = masses(Entries(ids, None, to_codes(np.array([0.5, 1.0, 0.0]))), Shape("sampled", 3, 4, 9))
    assert found.tolist() == [[0.75, 0, 0, 0.25, 0.5], [0.25, 0.5, 0, 0.25, 1.0], [1, 0, 0, 0, 0]]


def test_a_position_without_mass_is_refused() -> None:
    entries = Entries(np.zeros((1, 2), np.int32), np.full((1, 2), NOTHING, np.uint16), np.full(1, NOTHING, np.uint16))
    with pytest.raises(ValueError, match="without any mass"):
        masses(entries, Shape("top_k", 1, 2, 9))


@pytest.mark.parametrize("kind", cache_format.KINDS)
@pytest.mark.parametrize("vocab", [1, 2, 29, 131_072, 200_000])
def test_entries_come_back(kind: Kind, vocab: int) -> None:
    generator, shape = np.random.default_rng(vocab), Shape(kind, 5, 3, vocab)
    ids = np.sort(generator.integers(0, vocab, (5, 3)), axis=1)
    codes = np.sort(generator.integers(0, 2**16, (5, 3)), axis=1).astype(np.uint16) if kind == "top_k" else None
    entries = Entries(ids, codes, generator.integers(0, 2**16, 5).astype(np.uint16))
    content = encode(entries, shape)
    assert len(content) == shape.num_bytes
    found = decode(content, shape)
    assert np.array_equal(found.ids_SK, ids) and np.array_equal(found.rest_S, entries.rest_S)
    assert (found.codes_SK is None) == (codes is None)
    assert codes is None or np.array_equal(found.codes_SK, codes)


@pytest.mark.parametrize("compression", cache_format.COMPRESSIONS)
def test_compressed_bytes_come_back_or_are_refused(compression: str) -> None:
    content = bytes(range(200)) * 3
    packed = compress(content, compression)
    assert len(packed) < len(content) and decompress(packed, compression, 600) == content
    for damaged, size in ((packed[:-4], 600), (b"nothing", 600), (packed, 599), (packed, 601), (b"", 600)):
        with pytest.raises(ValueError):
            decompress(damaged, compression, size)


def test_no_more_is_inflated_than_was_asked_for() -> None:
    bomb = zlib.compress(bytes(1 << 24))
    with pytest.raises(ValueError, match=r"100 bytes|instead of"):
        decompress(bomb, "zlib", 100)


def test_without_zstd_there_is_zlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert cache_format.best_compression() == "zlib"
    assert cache_format.can_compress("zlib") and not cache_format.can_compress("zstd")
