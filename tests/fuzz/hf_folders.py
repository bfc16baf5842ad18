"""Hugging Face folders: every entry of config.json that is read, for every family, and the index of the weights."""

import json
import math
from collections.abc import Callable, Iterator
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
from megagrow.config import ModelConfig
from megagrow.model.rotary import rotary_frequencies
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
MAX_SIZE = 2**31 - 1
SCALED = ("llama3", "yarn in full", "yarn, DeepSeek's")  # of the samples
# Kind and entry of a scaled rotation -> least and largest number, beside the others of the samples.
BOUNDS = {
    ("llama3", "factor"): (1, 2**53),
    ("llama3", "low_freq_factor"): (5e-324, 4 - 1e-9),
    ("llama3", "high_freq_factor"): (1 + 1e-9, 2**53),
    ("yarn", "factor"): (1, 2**53),
    ("yarn", "beta_fast"): (0.5, 1e6),
    ("yarn", "beta_slow"): (1e-6, 8.0),
    ("yarn", "rope_theta"): (1 + 1e-9, 2**53),
}
EXTREME = st.sampled_from([5e-324, 1e-320, 1e-7, 1e7, 1e300, 0.0, 1.0, -1.0, 0.5])
KINDS_OF_SCALING = ("default", "linear", "llama3", "yarn")
Rules = dict[str, tuple[Callable[[Any], bool], bool]]  # entry -> which values it may hold, whether it must be there


def fields(folder: Path) -> Iterator[Field]:
    assert MODELS.keys() == FAMILIES.keys()
    for name, model in MODELS.items():
        yield from _config_fields(folder / name, FAMILIES[name], model)
    for name in SCALED:
        yield from _scaling_fields(folder / name, samples.ROPE_SCALINGS[name] | {"rope_theta": 5e5})
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


def _scaling_fields(folder: Path, settings: dict[str, Any]) -> Iterator[Field]:
    """The settings of a scaled rotation, in `rope_parameters` alone; what is accepted has to be computed as well."""
    folder.mkdir()
    file = folder / "config.json"
    record = hf_config_from_model(samples.OWN_LLAMA) | {"rope_parameters": settings, "rope_theta": None}

    def read() -> Any:
        frequencies, scale = rotary_frequencies(model_config_from_hf(folder))
        assert frequencies.isfinite().all() and math.isfinite(scale)

    file.write_text(json.dumps(record))
    read()
    for key in settings:
        wrong = rejecting(_may_be_setting(key, settings["rope_type"]), TEXTS, EXTREME)
        texts = texts_with(record, ("rope_parameters", key), wrong, required=False)
        yield Field("config.json (rope)", key, file, texts, read, f"{key}|rope_parameters|rope_scaling")


def _may_be_setting(key: str, kind: str) -> Callable[[Any], bool]:
    """Whether a setting may hold a value by itself."""
    if key == "rope_type":
        return lambda value: value in KINDS_OF_SCALING if isinstance(value, str) else value is None
    if key == "truncate":
        return _may_be_switch
    least, most = BOUNDS.get((kind, key), (5e-324, 2**53))
    unset = (None, False, 0) if key.startswith("mscale") else (None,)
    return lambda value: value in unset or (is_number(value) and least <= value <= most)


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
