"""Perplexity against a direct computation in float64, token by token, and the same in every layout."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from megagrow.config import ModelConfig
from megagrow.data.indexed import IndexedDataset
from megagrow.data.tokenizer import ByteTokenizer
from megagrow.errors import ConfigError, DataError
from megagrow.evaluate import Perplexity, PerplexitySettings, SharedModel, evaluate_perplexity, num_labels
from tests.evaluate.samples import BYTES, BYTES_GPT2, TEXTS, shared_model, write_texts
from tests.growth.models import make
from tests.ranks import run_ranks

END = 256
LAYOUTS = {"tensor 2": (2, 2), "data 2": (2, 1), "tensor 2 x data 2": (4, 2)}
SETTINGS = {
    "whole documents": PerplexitySettings(),
    "documents in short windows": PerplexitySettings(length=5),
    "documents with stride": PerplexitySettings(length=7, stride=3),
    "packed": PerplexitySettings(packed=True),
    "packed with stride": PerplexitySettings(packed=True, length=9, stride=2),
    "packed and masked": PerplexitySettings(packed=True, mask_documents=True, length=10, stride=4),
    "some documents": PerplexitySettings(max_documents=3),
    "another prefix": PerplexitySettings(prefix=7),
}


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "corpus", TEXTS)


def directly(
    config: ModelConfig, documents: list[list[int]], settings: PerplexitySettings, prefix: int | None
) -> float:
    """The sum over labels, each with a forward pass of its own over just the context that it should see."""
    model, total = make(config), 0.0
    documents = documents[: settings.max_documents or None]
    owners = [[i] * len(ids) for i, ids in enumerate(documents)]
    if settings.packed:
        documents, owners = [sum(documents, [])], [sum(owners, [])]
    length = settings.length or config.max_seq_length
    stride = settings.stride or length
    for ids, owner in zip(documents, owners, strict=True):
        tokens = ids if prefix is None else [prefix, *ids]
        owner = owner if prefix is None else [owner[0], *owner] if owner else []
        for label in range(1, len(tokens)):
            stop = length if label <= length else length + stride * math.ceil((label - length) / stride)
            stop = min(stop, len(tokens) - 1)
            ids_1S = torch.tensor([tokens[max(0, stop - length) : label]])
            owners_1S = torch.tensor([owner[max(0, stop - length) : label]]) if settings.mask_documents else None
            logits_V = model(ids_1S, documents=owners_1S)[0, -1] @ model.head_VH.T
            total -= logits_V.log_softmax(-1)[tokens[label]].item()
    return total


def documents_of(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    return [dataset.document(i).tolist() for i in range(dataset.num_documents)]


def evaluate(config: ModelConfig, prefix: Path, settings: PerplexitySettings, tensor: int = 1) -> Perplexity:
    return evaluate_perplexity(shared_model(config, tensor), IndexedDataset(prefix), settings, ByteTokenizer())


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_it_is_the_direct_computation(prefix: Path, settings: PerplexitySettings) -> None:
    found = evaluate(BYTES, prefix, settings)
    documents = documents_of(prefix)[: settings.max_documents or None]
    expected = directly(BYTES, documents, settings, END if settings.prefix is None else settings.prefix)
    assert found.nll == pytest.approx(expected, rel=1e-12)
    assert found.num_tokens == sum(map(len, documents)) == num_labels(IndexedDataset(prefix), settings)
    assert found.loss == found.nll / found.num_tokens and found.perplexity == math.exp(found.loss)
    assert found.num_bytes == sum(len(text.encode()) for text in TEXTS[: settings.max_documents or None])
    assert found.bits_per_byte == pytest.approx(expected / math.log(2) / found.num_bytes, rel=1e-12)


@pytest.mark.parametrize("settings", [SETTINGS[name] for name in ("documents with stride", "packed and masked")])
@pytest.mark.parametrize("config", [BYTES, BYTES_GPT2], ids=["llama", "gpt2"])
def test_it_is_the_same_in_every_layout(prefix: Path, config: ModelConfig, settings: PerplexitySettings) -> None:
    alone = evaluate(config, prefix, settings)
    for name, (world, tensor) in LAYOUTS.items():
        for found in run_ranks(evaluate, world, config, prefix, settings, tensor):
            assert found.nll == pytest.approx(alone.nll, rel=1e-12), name
            assert dataclasses.replace(found, nll=alone.nll) == alone


@pytest.mark.parametrize("packed", [False, True])
def test_first_tokens_are_left_out_where_nothing_stands_before_them(tmp_path: Path, packed: bool) -> None:
    prefix = write_texts(tmp_path / "foreign", TEXTS, described=False)
    settings = PerplexitySettings(packed=packed)
    found = evaluate(BYTES, prefix, settings)
    documents = documents_of(prefix)
    num_firsts = 1 if packed else len(documents)
    assert found.num_tokens == sum(map(len, documents)) - num_firsts == num_labels(IndexedDataset(prefix), settings)
    assert found.nll == pytest.approx(directly(BYTES, documents, settings, None), rel=1e-12)
    assert found.bits_per_byte is None and "which tokenizer made the dataset" in found.why_no_bytes


class Lossy(ByteTokenizer):
    """Gives text back in capitals."""

    def decode(self, ids: list[int]) -> str:
        return super().decode(ids).upper()


def test_bytes_are_counted_only_where_they_are_known(prefix: Path) -> None:
    dataset, shared = IndexedDataset(prefix), shared_model(BYTES)
    other = ByteTokenizer()
    other.fingerprint = "other"
    for tokenizer, reason in [(None, "no tokenizer"), (other, "another tokenizer"), (Lossy(), "does not give back")]:
        found = evaluate_perplexity(shared, dataset, PerplexitySettings(), tokenizer)
        assert found.num_bytes is None and reason in found.why_no_bytes and reason in found.summary


def test_what_does_not_fit_is_refused(tmp_path: Path, prefix: Path) -> None:
    dataset = IndexedDataset(prefix)
    small = shared_model(dataclasses.replace(BYTES, vocab_size=200))
    with pytest.raises(DataError, match="corpus: token 256 is outside of the model's vocab_size=200"):
        evaluate_perplexity(small, dataset, PerplexitySettings())
    with pytest.raises(ConfigError, match="length=13 exceeds max_seq_length=12"):
        evaluate_perplexity(shared_model(BYTES_GPT2), dataset, PerplexitySettings(length=13))
    with pytest.raises(ConfigError, match="stride=9 exceeds length=8"):
        evaluate_perplexity(small, dataset, PerplexitySettings(length=8, stride=9))
    for token in (-1, 257):
        with pytest.raises(ConfigError, match=f"prefix={token} is no token of the model, whose vocab_size is 257"):
            evaluate_perplexity(shared_model(BYTES), dataset, PerplexitySettings(prefix=token))
    with pytest.raises(ConfigError, match="set packed too"):
        PerplexitySettings(mask_documents=True)
    empty = IndexedDataset(write_texts(tmp_path / "empty", [""], described=False))
    with pytest.raises(DataError, match="no token can be scored"):
        evaluate_perplexity(shared_model(BYTES), empty, PerplexitySettings())


def test_a_damaged_model_is_told(prefix: Path) -> None:
    shared = shared_model(BYTES)
    shared.model.head_VH.fill_(torch.inf)
    with pytest.raises(DataError, match="log-likelihoods are not finite"):
        evaluate_perplexity(shared, IndexedDataset(prefix), PerplexitySettings())


def test_encoders_are_refused() -> None:
    encoder = make(dataclasses.replace(BYTES, objective="mlm"))
    with pytest.raises(ConfigError, match="is an encoder .* to evaluate texts"):
        SharedModel(encoder, shared_model(BYTES).mesh)
