"""Where the parts of a parameter go: on examples checked by eye, and for every table."""

from collections import Counter, defaultdict
from dataclasses import replace

import pytest
import torch

from megagrow.checkpoint.hf_families import FAMILIES
from megagrow.checkpoint.hf_tensors import (
    FamilyTensors,
    expected_tensors,
    fuse,
    place_shape,
    places,
    split,
    unexpected_tensors,
)
from megagrow.config import ModelConfig
from megagrow.roles import parameter_names, parameter_shapes, role_of
from tests.checkpoint.hf_folders import (
    OWN_BERT,
    OWN_GPT2,
    OWN_GPT_NEOX,
    OWN_LLAMA,
    OWN_MISTRAL,
    OWN_QWEN2,
    OWN_QWEN3,
    OWN_ROBERTA,
)

MODELS = {
    "llama": replace(OWN_LLAMA, attention_bias="all", mlp_bias=True),
    "mistral": OWN_MISTRAL,
    "qwen2": OWN_QWEN2,
    "qwen3": OWN_QWEN3,
    "gpt_neox": OWN_GPT_NEOX,
    "gpt2": replace(OWN_GPT2, tied_embeddings=False),
    "bert": OWN_BERT,
    "roberta": OWN_ROBERTA,
}


def rows(first: int, count: int) -> torch.Tensor:
    """Rows that hold their own number."""
    return torch.arange(first, first + count).unsqueeze(1).expand(-1, 3)


def test_keys_and_values_alternate_by_head() -> None:
    model = ModelConfig(hidden_size=3, num_heads=2, head_dim=2)
    role = role_of("layers.0.attention.key_value.weight")
    fused = fuse([rows(0, 4), rows(10, 4)], role, model)
    assert fused[:, 0].tolist() == [0, 1, 10, 11, 2, 3, 12, 13]


def test_gates_and_ups_alternate_by_neuron() -> None:
    model = ModelConfig(hidden_size=8, num_heads=4, ffn_size=3)
    role = role_of("layers.0.mlp.gate_up.weight")
    assert fuse([rows(0, 3), rows(10, 3)], role, model)[:, 0].tolist() == [0, 10, 1, 11, 2, 12]


def test_biases_follow_their_rows() -> None:
    role = role_of("layers.0.attention.key_value.bias")
    model = ModelConfig(hidden_size=3, num_heads=2, head_dim=2)
    fused = fuse([torch.arange(4), torch.arange(10, 14)], role, model)
    assert fused.tolist() == [0, 1, 10, 11, 2, 3, 12, 13]


@pytest.mark.parametrize("family", FAMILIES)
def test_splitting_undoes_fusing(family: str) -> None:
    model = MODELS[family]
    for name, shape in parameter_shapes(model).items():
        whole = torch.randn(shape)
        assert torch.equal(fuse(split(whole, role_of(name), model), role_of(name), model), whole)


def test_the_fused_projection_of_gpt2_is_query_key_value_in_columns() -> None:
    place_of = {name: places(FAMILIES["gpt2"], f"layers.1.attention.{name}.weight") for name in ("query", "key_value")}
    blocks = [(p.tensor, p.index, p.of, p.out_dim) for ps in place_of.values() for p in ps]
    assert blocks == [("transformer.h.1.attn.c_attn.weight", index, 3, 1) for index in range(3)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_of_every_tensor_belongs_to_one_parameter(family: str) -> None:
    """What a new table must satisfy: nothing is left out, nothing stands twice, shapes agree."""
    model = MODELS[family]
    blocks: dict[str, Counter[int]] = defaultdict(Counter)
    sizes, shapes = {}, {}
    for name in parameter_names(model):
        assert len(places(FAMILIES[family], name)) == len(role_of(name).parts), name
        for place in places(FAMILIES[family], name):
            blocks[place.tensor][place.index] += 1
            assert sizes.setdefault(place.tensor, place.of) == place.of
            shape = place_shape(place, name, model)
            assert shapes.setdefault(place.tensor, shape) == shape
    assert blocks == {tensor: Counter(range(of)) for tensor, of in sizes.items()}
    assert shapes == dict(expected_tensors(FAMILIES[family], model))


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_come_out_as_expected_and_none_waits_for_ever(family: str) -> None:
    model = MODELS[family]
    tensors = FamilyTensors(FAMILIES[family], model)
    shapes = {
        tensor: tuple(value.shape)
        for name, shape in parameter_shapes(model).items()
        for tensor, value in tensors.completed_by(name, torch.zeros(shape))
    }
    assert shapes == dict(expected_tensors(FAMILIES[family], model))


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_belongs_to_the_model_is_expected(family: str) -> None:
    model, table = MODELS[family], FAMILIES[family]
    names = dict(expected_tensors(table, model))
    assert unexpected_tensors(names, table, model) == []
    strange = [
        next(name for name in names if name.startswith(f"{table.layers}2.")).replace(".2.", end)
        for end in (".3.", ".02.", ".-1.", ".999999999999.")
    ]
    strange += [f"{table.layers}0.attn.strange.weight", "strange", "", f"{table.outside['head']}.strange"]
    assert unexpected_tensors([*names, *strange], table, model) == strange


def test_buffers_that_old_folders_hold_are_known() -> None:
    buffers = ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"]
    assert unexpected_tensors(buffers, FAMILIES["gpt2"], MODELS["gpt2"]) == []
    frequencies = ["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert unexpected_tensors(frequencies, FAMILIES["llama"], MODELS["llama"]) == []
    of_neox = [f"gpt_neox.layers.0.attention.{name}" for name in ("bias", "masked_bias", "rotary_emb.inv_freq")]
    assert unexpected_tensors(of_neox, FAMILIES["gpt_neox"], MODELS["gpt_neox"]) == []


def test_heads_of_gpt_neox_hold_their_query_key_and_value() -> None:
    model = replace(OWN_GPT_NEOX, hidden_size=4, num_heads=2, num_kv_heads=2, head_dim=2, rope_fraction=1.0)
    tensors = FamilyTensors(FAMILIES["gpt_neox"], model)
    assert not list(tensors.completed_by("layers.0.attention.query.bias", torch.arange(4)))
    key_value = torch.tensor([10, 11, 20, 21, 12, 13, 22, 23])
    ((name, fused),) = tensors.completed_by("layers.0.attention.key_value.bias", key_value)
    assert name == "gpt_neox.layers.0.attention.query_key_value.bias"
    assert fused.tolist() == [0, 1, 10, 11, 20, 21, 2, 3, 12, 13, 22, 23]
