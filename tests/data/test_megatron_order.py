"""Tests megagrow/data/megatron.py and megatron_blend.py: frozen samples of Megatron's own order, and what is refused.

`tests/peers/against_megatron_data.py` compares with Megatron itself over many sizes, seeds, lengths and splits.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagrow.config import Config, DataConfig, ModelConfig, TrainConfig
from megagrow.data.megatron import MegatronDataset, split_shares
from megagrow.data.megatron_blend import MegatronDraws
from megagrow.errors import ConfigError, DataError
from megagrow.train.streams import blend_weights, continue_blend, open_stream, open_training_data
from tests.data.freeze_megatron_order import CASES, FROZEN, VOCAB_SIZE, checksums, corpus, prefixes_of

MakeDataset = Callable[..., Path]
KNOWN = json.loads(FROZEN.read_text())


def test_every_case_is_frozen() -> None:
    assert [{key: case[key] for key in asked} for case, asked in zip(KNOWN, CASES, strict=True)] == CASES


@pytest.mark.parametrize("case", KNOWN, ids=lambda case: f"{case['split']}-{case['size']}")
def test_samples_come_in_megatrons_order(case: dict[str, Any], tmp_path: Path) -> None:
    weights, prefixes = case.get("weights"), prefixes_of(case, tmp_path)
    words = prefixes if not weights else [x for pair in zip(weights, prefixes, strict=True) for x in pair]
    data = DataConfig(
        train=tuple(words), seq_length=case["seq_length"], seed=case["seed"], order="megatron", split=case["split"]
    )
    train = TrainConfig(steps=case["size"] // 2, global_batch_size=2)
    config = Config(model=ModelConfig(vocab_size=VOCAB_SIZE), data=data, train=train)
    datasets = open_training_data(config)
    stream = open_stream(datasets, continue_blend(None, blend_weights(config, datasets), {}, 0, False), config)
    drawn = stream.batch(0, len(case["sums"]))
    assert checksums(drawn.tokens.numpy()) == case["sums"]
    if "which" in case:
        assert (drawn.which.tolist(), drawn.ids.tolist()) == (case["which"], case["ids"])
    else:
        assert datasets[0].windows.tolist() == case["windows"]  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"data\.num_samples"):
        stream.batch(len(case["sums"]), 1)


def test_inputs_know_their_documents(tmp_path: Path) -> None:
    """The tokens of a document come in file order, and another document begins where the number changes."""
    dataset = MegatronDataset(corpus(tmp_path, 0), 30, 60, 5)
    documents_BS, tokens_BT = dataset.documents(np.arange(60)), dataset.batch(np.arange(60))
    for documents_S, tokens_T in zip(documents_BS, tokens_BT, strict=True):
        for number in np.unique(documents_S):
            piece = tokens_T[:-1][documents_S == number]
            whole = dataset.indexed[int(dataset.sequences_N[number])]
            assert piece.tobytes() in whole.astype(np.int64).tobytes()
    lengths = [len(dataset.indexed[int(i)]) for i in dataset.sequences_N[np.unique(documents_BS)]]
    assert min(lengths) > 0 and len(np.unique(documents_BS)) > 60


@given(
    weights=st.lists(st.floats(1e-3, 1.0) | st.integers(1, 4).map(float), min_size=1, max_size=6),
    size=st.integers(1, 700),
    at=st.integers(0, 700),
)
def test_draws_follow_the_rule_one_by_one(weights: list[float], size: int, at: int) -> None:
    normalized = (np.array(weights) / np.array(weights).sum()).tolist()
    counts, which, nth = [0] * len(weights), [], []
    for draw in range(size):
        errors = [weight * max(draw, 1) - count for weight, count in zip(normalized, counts, strict=True)]
        which.append(errors.index(max(errors)))
        nth.append(counts[which[-1]])
        counts[which[-1]] += 1
    draws = MegatronDraws(weights, size)
    assert [part.tolist() for part in draws.at(0, size)] == [which, nth]
    assert [part.tolist() for part in draws.at(at % size, 1)] == [[which[at % size]], [nth[at % size]]]
    assert draws.counts(size).tolist() == counts


def test_wrong_guesses_are_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = MegatronDraws([0.6, 0.3, 0.1], 5000).at(0, 5000)
    guess = MegatronDraws._guess
    monkeypatch.setattr(MegatronDraws, "_guess", lambda draws: _shifted(guess(draws)))
    found = MegatronDraws([0.6, 0.3, 0.1], 5000).at(0, 5000)
    assert [part.tolist() for part in found] == [part.tolist() for part in expected]


def _shifted(counts_DJ: np.ndarray) -> np.ndarray:
    counts_DJ[:, 1:] += np.array([[12.0], [-8.0], [-4.0]])
    return counts_DJ


def test_split_strings() -> None:
    assert split_shares("99,1,0") == {"train": (0.0, 0.99), "validation": (0.99, 1.0)}
    assert split_shares("1") == {"train": (0.0, 1.0)}
    assert split_shares("0,1") == {"validation": (0.0, 1.0)}
    for wrong in ("", "a", "1,2,3,4", "-1,2", "0,0,0", "1;2", "nan"):
        with pytest.raises(ConfigError, match=r"data\.split.*as in"):
            split_shares(wrong)


def test_what_megatron_could_not_do_is_refused(make_dataset: MakeDataset) -> None:
    prefix = make_dataset([[1, 2, 3], [4, 5, 6, 7]])
    with pytest.raises(ConfigError, match="must lie between 0 and"):
        MegatronDataset(prefix, 2, None, 2**32)
    with pytest.raises(DataError, match=r"sequences 1 to 2 of 2, which data\.split gives, have 4 tokens, too few"):
        MegatronDataset(prefix, 4, None, 1, (0.5, 1.0))
