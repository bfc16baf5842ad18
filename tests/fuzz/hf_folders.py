"""Hugging Face folders: every entry of config.json that is read, for every family, and the index of the weights."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

from megagrow.checkpoint.hf import HFReader, hf_config_from_model, model_config_from_hf
from megagrow.checkpoint.hf_config import ONLY_ANYWHERE
from megagrow.checkpoint.hf_families import FAMILIES
from megagrow.checkpoint.hf_family import Entry, Family, Rope
from megagrow.checkpoint.hf_tensors import expected_tensors
from megagrow.config import ModelConfig, RopeScaling
from tests.checkpoint import hf_folders as samples
from tests.fuzz.fields import Field, texts_with, unparsable
from tests.fuzz.literals import TEXTS, is_number, rejecting

MODELS = {
    model.family: model
    for model in (
        samples.OWN_LLAMA,
        samples.OWN_MISTRAL,
        samples.OWN_QWEN2,
        samples.OWN_QWEN3,
        samples.OWN_GPT2,
        samples.OWN_GPT_NEOX,
        samples.OWN_BERT,
        samples.OWN_ROBERTA,
    )
}
SCALED = replace(samples.OWN_LLAMA, rope_scaling=RopeScaling("llama3", 8.0, 16))
MAX_SIZE = 2**31 - 1
KINDS_OF_SCALING = ("default", "linear", "llama3", "yarn")
Rules = dict[str, tuple[Callable[[Any], bool], bool]]  # entry -> which values it may hold, whether it must be there


def fields(folder: Path) -> Iterator[Field]:
    assert MODELS.keys() == FAMILIES.keys()
    for name, model in MODELS.items():
        yield from _config_fields(folder / name, FAMILIES[name], model)
    yield from _scaling_fields(folder / "scaled")
    yield from _index_fields(folder / "sharded", samples.OWN_LLAMA)


def _config_fields(folder: Path, family: Family, model: ModelConfig) -> Iterator[Field]:
    folder.mkdir()
    file = folder / "config.json"
    record = hf_config_from_model(model)
    file.write_text(json.dumps(record))
    assert model_config_from_hf(folder) == model
    rules: Rules = {"model_type": (lambda value: isinstance(value, str) and value in FAMILIES, True)}
    for name, entry in family.entries.items():
        rules[entry.key] = (_accepts(entry, name, model), entry.default is None)
    for key in family.switches:
        rules[key] = (_may_be_switch, False)
    for key, allowed in {**ONLY_ANYWHERE, **family.only}.items():
        rules[key] = (_is_allowed(allowed), False)
    key, activations = family.activation
    names = {name for theirs in activations.values() for name in theirs}
    rules[key] = (lambda value: value is None or value in names if not isinstance(value, list | dict) else False, False)
    rules |= _window_rules(family, model) | (_rope_rules(family.rope, model) if family.rope else {})
    for key, (accepts, required) in rules.items():
        texts = texts_with(record, (key,), rejecting(accepts, TEXTS), required)
        yield Field(f"config.json ({family.model_type})", key, file, texts, lambda: model_config_from_hf(folder), key)
    whole = unparsable(json.dumps(record).encode())
    yield Field(
        f"config.json ({family.model_type})", "(whole file)", file, whole, lambda: model_config_from_hf(folder), "JSON"
    )


def _accepts(entry: Entry, name: str, model: ModelConfig) -> Callable[[Any], bool]:
    """Whether an entry may hold a value by itself; with others it may still contradict."""
    kind = type(getattr(ModelConfig, name))
    least = entry.difference(vars(model))

    def accepts(value: Any) -> bool:
        if value is None:
            return entry.default is not None
        if kind is bool:
            return isinstance(value, bool)
        if not is_number(value) or value <= least:
            return False
        return value <= 2**53 if kind is float else value == int(value) and value <= MAX_SIZE

    return accepts


def _may_be_switch(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _may_be_size(value: Any) -> bool:
    return value is None or (is_number(value) and value == int(value) and 0 < value <= MAX_SIZE)


def _window_rules(family: Family, model: ModelConfig) -> Rules:
    if family.window == "never":
        return {
            "sliding_window": (lambda value: value is None, False),
            "use_sliding_window": (lambda value: value is None or value is False, False),
        }
    if family.window == "all_layers":
        reaches = model.max_seq_length
        return {"sliding_window": (lambda value: value is None or (_may_be_size(value) and value >= reaches), False)}
    layers = ["full_attention"] * model.num_layers
    return {
        "sliding_window": (_may_be_size, False),
        "use_sliding_window": (_may_be_switch, False),
        "layer_types": (lambda value: value is None or value == layers, False),
    }


def _rope_rules(rope: Rope, model: ModelConfig) -> Rules:
    def is_stated(number: float) -> Callable[[Any], bool]:
        return lambda value: value is None or (is_number(value) and value == number)

    rules: Rules = {
        rope.theta: (is_stated(model.rope_theta), False),
        "rope_parameters": (lambda value: value is None or isinstance(value, dict), False),
        "rope_scaling": (lambda value: value is None or isinstance(value, dict), False),
    }
    return rules | ({rope.fraction: (is_stated(model.rope_fraction), False)} if rope.fraction else {})


def _scaling_fields(folder: Path) -> Iterator[Field]:
    """The settings of a scaled rotation."""
    folder.mkdir()
    file = folder / "config.json"
    record = hf_config_from_model(SCALED)
    file.write_text(json.dumps(record))
    assert model_config_from_hf(folder) == SCALED
    settings = record["rope_parameters"]
    for key in settings:
        if key == "rope_type":
            accepts = lambda other: other in KINDS_OF_SCALING if isinstance(other, str) else other is None  # noqa: E731
        else:
            accepts = lambda other: other is None or (is_number(other) and other > 0)  # noqa: E731
        path = ("rope_parameters", key)
        texts = texts_with(record, path, rejecting(accepts, TEXTS), required=False)
        says = f"{key}|rope_parameters|rope_scaling"
        yield Field("config.json (rope)", key, file, texts, lambda: model_config_from_hf(folder), says)


def _is_allowed(allowed: tuple[Any, ...]) -> Callable[[Any], bool]:
    return lambda value: (
        value is None or any(value == x and isinstance(value, bool) == isinstance(x, bool) for x in allowed)
    )


def _index_fields(folder: Path, model: ModelConfig) -> Iterator[Field]:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config_from_model(model)))
    tensors = {name: torch.zeros(shape) for name, shape in expected_tensors(FAMILIES[model.family], model)}
    names = list(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    record = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps(record))
    HFReader(folder)

    def read() -> Any:
        return HFReader(folder)

    first = names[0]
    bad_names = (
        st.sampled_from(["../a.safetensors", "/a.safetensors", "..", "a\x00.safetensors", "b.safetensors"]) | TEXTS
    )
    file_names = rejecting(lambda value: value == weight_map[first], bad_names)
    yield Field(
        "index.json",
        "weight_map",
        file,
        texts_with(record, ("weight_map",), rejecting(lambda v: False)),
        read,
        "weight_map|tensor",
    )
    texts = texts_with(record, ("weight_map", first), file_names, required=False)
    yield Field(
        "index.json", "weight_map (file names)", folder, texts, read, "weight_map|tensor|safetensors", file.write_bytes
    )
    extra = TEXTS.filter(lambda name: name not in weight_map).map(
        lambda name: json.dumps({**record, "weight_map": {**weight_map, name: "a.safetensors"}}).encode()
    )
    yield Field("index.json", "weight_map (tensor names)", folder, extra, read, "tensor", file.write_bytes)
    yield Field("index.json", "(whole file)", file, unparsable(file.read_bytes()), read, "JSON|weight_map")
