"""Folders of BERT and RoBERTa as they are found: old names, parts that a masked language model does without, copies."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from megagrow.checkpoint.convert import _random_tokens, convert
from megagrow.checkpoint.hf import (
    HFReader,
    check_exportable,
    hf_config_from_model,
    model_config_from_hf,
    write_hf_folder,
)
from megagrow.checkpoint.source import open_source
from megagrow.config import ModelConfig
from megagrow.data.tokenizer import load_tokenizer
from megagrow.errors import CheckpointError, ConfigError
from megagrow.roles import parameter_names, parameter_shapes
from tests.checkpoint.hf_folders import (
    OWN_BERT,
    OWN_ROBERTA,
    logits_of,
    random_ids,
    save_folder,
    save_tokenizer,
    tensors_of,
)

BIAS = {"bert": "cls.predictions.bias", "roberta": "lm_head.bias"}
COPY = {"bert": "cls.predictions.decoder.bias", "roberta": "lm_head.decoder.bias"}
HIDDEN, VOCAB = 24, 61
PAD = 37  # the first id after a small tokenizer's own, see `save_tokenizer`


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Changes the tensors of a folder; returns them as they were."""
    before = tensors_of(folder)
    save_file(
        {name: x.clone() for name, x in change(dict(before)).items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return before


def parameters(folder: Path) -> dict[str, Tensor]:
    reader = HFReader(folder)
    return {name: reader.fetch(name) for name in parameter_names(reader.model)}


def old_name(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def test_old_names_of_norms_are_read(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, "bert")
    expected = parameters(folder)
    rewrite(folder, lambda tensors: {old_name(name): x for name, x in tensors.items()})
    assert any(name.endswith("gamma") for name in tensors_of(folder))
    found = parameters(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_old_name_beside_todays_is_refused(tmp_path: Path) -> None:
    folder, old = save_folder(tmp_path, "bert"), "bert.embeddings.LayerNorm.gamma"
    rewrite(folder, lambda tensors: tensors | {old: torch.ones(HIDDEN)})
    with pytest.raises(CheckpointError, match=r"LayerNorm\.(gamma|weight) and .* are the same tensor; remove one"):
        HFReader(folder)


def test_names_are_cut_to_a_short_line(tmp_path: Path) -> None:
    folder, name = save_folder(tmp_path, "bert"), "x\n" * 500 + "LayerNorm."
    rewrite(folder, lambda tensors: tensors | {name + "gamma": torch.ones(HIDDEN), name + "weight": torch.ones(HIDDEN)})
    with pytest.raises(CheckpointError, match="are the same tensor") as refused:
        HFReader(folder)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400 + len(str(folder))


EXTRAS = {
    "bert": {
        "bert.pooler.dense.weight": (HIDDEN, HIDDEN),
        "bert.pooler.dense.bias": (HIDDEN,),
        "cls.seq_relationship.weight": (2, HIDDEN),
        "cls.seq_relationship.bias": (2,),
    },
    "roberta": {"roberta.pooler.dense.weight": (HIDDEN, HIDDEN), "roberta.pooler.dense.bias": (HIDDEN,)},
}


@pytest.mark.parametrize("family", EXTRAS)
def test_what_is_dropped_is_named(tmp_path: Path, family: str) -> None:
    folder, ids_BS = save_folder(tmp_path / "before", family), random_ids(first=3)
    expected = logits_of(folder, ids_BS)
    rewrite(folder, lambda tensors: tensors | {name: torch.ones(shape) for name, shape in EXTRAS[family].items()})
    said: list[str] = []
    convert(folder, tmp_path / "own", "megagrow", tell=said.append)
    assert len(said) == 1 and "dropped" in said[0] and str(folder) in said[0] and "\n" not in said[0]
    assert all(name in said[0] for name in EXTRAS[family])
    convert(tmp_path / "own", tmp_path / "after", "hf", tell=said.append)
    assert len(said) == 1, "nothing is dropped on the way back"
    torch.testing.assert_close(logits_of(tmp_path / "after", ids_BS), expected, atol=0, rtol=0)


@pytest.mark.parametrize(
    "name", ["classifier.weight", "bert.pooler.other.weight", "bert.encoder.layer.3.output.dense.bias"]
)
def test_other_tensors_are_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = save_folder(tmp_path, "bert")
    rewrite(folder, lambda tensors: tensors | {name: torch.ones(HIDDEN)})
    with pytest.raises(CheckpointError, match=f"tensor {name} has no place"):
        HFReader(folder)


def test_a_body_without_its_head_says_what_is_missing(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, "bert")
    rewrite(folder, lambda ts: {name.removeprefix("bert."): x for name, x in ts.items() if name.startswith("bert.")})
    with pytest.raises(CheckpointError, match=r"tensor cls\.predictions\.transform\.dense\.weight is missing"):
        HFReader(folder)


@pytest.mark.parametrize("family", BIAS)
def test_a_tied_models_copies_must_be_equal(tmp_path: Path, family: str) -> None:
    folder = save_folder(tmp_path, family)
    expected = parameters(folder)
    rewrite(folder, lambda tensors: tensors | {COPY[family]: tensors[BIAS[family]]})
    assert HFReader(folder).dropped == []
    assert all(torch.equal(x, expected[name]) for name, x in parameters(folder).items())
    only_copy = lambda tensors: {name: x for name, x in tensors.items() if name != BIAS[family]}  # noqa: E731
    rewrite(folder, only_copy)
    assert torch.equal(parameters(folder)["head.bias"], expected["head.bias"])
    rewrite(folder, lambda tensors: tensors | {BIAS[family]: tensors[COPY[family]] + 1})
    with pytest.raises(CheckpointError, match=f"{COPY[family]} differs from {BIAS[family]}"):
        HFReader(folder)


@pytest.mark.parametrize("family", BIAS)
@pytest.mark.parametrize("values", [(1.0, 1.0), (1.0, 2.0)])
def test_copies_without_dims_are_of_the_wrong_shape(tmp_path: Path, family: str, values: tuple[float, float]) -> None:
    folder = save_folder(tmp_path, family)
    numbers = {BIAS[family]: torch.tensor(values[0]), COPY[family]: torch.tensor(values[1])}
    rewrite(folder, lambda tensors: tensors | numbers)
    with pytest.raises(CheckpointError, match=r"has shape \[\]"):
        HFReader(folder)


@pytest.mark.parametrize("family", BIAS)
def test_with_a_head_of_its_own_the_bias_is_the_one_that_transformers_adds(tmp_path: Path, family: str) -> None:
    folder = save_folder(tmp_path, family, tie_word_embeddings=False)
    stored = tensors_of(folder)
    assert not torch.equal(stored[COPY[family]], stored[BIAS[family]]), "nothing is tested"
    source = open_source(folder)
    assert torch.equal(source.fetch("head.bias"), stored[COPY[family]])
    assert source.dropped == (BIAS[family],) and BIAS[family] in source.note


CHANGED: list[tuple[str, str, Any, str]] = [
    ("bert", "is_decoder", True, "is_decoder=True is not supported"),
    ("bert", "position_embedding_type", "relative_key", "position_embedding_type='relative_key'"),
    ("bert", "hidden_act", "relu", "hidden_act='relu'"),
    ("bert", "type_vocab_size", 0, "type_vocab_size=0 must be a positive whole number"),
    ("roberta", "hidden_act", "gelu_new", "hidden_act='gelu_new'"),
    ("roberta", "pad_token_id", -1, "pad_token_id=-1 must be a whole number greater than -1"),
    ("roberta", "max_position_embeddings", 3, "max_position_embeddings=3 must be a whole number greater than 3"),
]


@pytest.mark.parametrize(("family", "key", "value", "words"), CHANGED)
def test_what_would_change_the_logits_is_refused_by_name(family: str, key: str, value: Any, words: str) -> None:
    entries = hf_config_from_model({"bert": OWN_BERT, "roberta": OWN_ROBERTA}[family])
    assert model_config_from_hf(entries).family == family
    with pytest.raises(CheckpointError) as refused:
        model_config_from_hf(entries | {key: value})
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (replace(OWN_BERT, num_token_types=0), "model.num_token_types=0"),
        (replace(OWN_BERT, position_offset=2), "model.position_offset=2"),
        (replace(OWN_BERT, norm_place="before"), "model.norm_place=before"),
        (replace(OWN_BERT, objective="clm"), "model.objective=clm"),
        (replace(OWN_ROBERTA, position_offset=0), "model.position_offset=0 .* needs at least 1"),
        (replace(OWN_BERT, norm_eps=0.0), r"model.norm_eps=0.0 .* needs a positive number \(layer_norm_eps\)"),
        (replace(OWN_ROBERTA, activation="gelu"), "model.activation=gelu"),
    ],
)
def test_what_a_family_cannot_express_is_not_exported(model: ModelConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_exportable(model)


def test_roberta_states_its_table_with_the_rows_of_padding() -> None:
    entries = hf_config_from_model(OWN_ROBERTA, token_ids={"pad_token_id": None, "bos_token_id": 0})
    assert (entries["pad_token_id"], entries["max_position_embeddings"]) == (2, 32 + 3)
    assert entries["bos_token_id"] == 0
    assert model_config_from_hf(entries) == OWN_ROBERTA


def test_logits_are_compared_without_padding_tokens() -> None:
    """RoBERTa's count of positions leaves them out; here they are tokens like others."""
    ids = set(_random_tokens(OWN_ROBERTA, (20, 64)).flatten().tolist())
    assert ids == set(range(VOCAB)) - {OWN_ROBERTA.position_offset - 1}
    assert set(_random_tokens(OWN_BERT, (20, 64)).flatten().tolist()) == set(range(VOCAB))


@pytest.mark.parametrize(("offset", "accepted"), [(38, True), (39, True), (1, True), (2, False), (3, False)])
def test_the_token_before_the_first_position_must_be_a_special_one(tmp_path: Path, offset: int, accepted: bool) -> None:
    """transformers counts no tokens of that id as positions, which would change the logits of ordinary text."""
    tokenizer = save_tokenizer(tmp_path / "tokenizer", "[PAD]", "[MASK]")
    assert (load_tokenizer(tokenizer).pad_id, load_tokenizer(tokenizer).special_ids) == (PAD, (0, PAD, PAD + 1))
    model = replace(OWN_ROBERTA, position_offset=offset)
    weights = {name: torch.randn(shape) for name, shape in parameter_shapes(model).items()}
    if accepted:
        return write_hf_folder(tmp_path / "out", model, weights.__getitem__, tokenizer)
    with pytest.raises(ConfigError, match=f"model.position_offset={offset} .* set model.position_offset={PAD + 1}"):
        write_hf_folder(tmp_path / "out", model, weights.__getitem__, tokenizer)
    assert not (tmp_path / "out").exists()


def test_an_export_is_complete(tmp_path: Path) -> None:
    """Its tokenizer knows what the special tokens are for, though the one that it was made from did not say."""
    special = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
    tokenizer = save_tokenizer(tmp_path / "tokenizer", *special)
    weights = {name: torch.randn(shape) for name, shape in parameter_shapes(OWN_BERT).items()}
    write_hf_folder(tmp_path / "out", OWN_BERT, weights.__getitem__, tokenizer)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (fast.pad_token, fast.cls_token, fast.sep_token, fast.mask_token) == special
    entries = json.loads((tmp_path / "out/config.json").read_text())
    assert entries["pad_token_id"] == fast.pad_token_id
    assert entries["architectures"] == ["BertForMaskedLM"]
