"""config.json of a Hugging Face folder <-> `ModelConfig`, in both directions and without loss.

Whatever would change the logits and cannot be kept is refused by name, never dropped. Besides the
model, config.json holds special token ids, which `special_token_ids` reads.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megagrow.checkpoint.hf_families import (
    FAMILIES,
    ONLY_ANYWHERE,
    Entry,
    Family,
    fixed_fields,
)
from megagrow.config import MAX_SIZE, ModelConfig
from megagrow.errors import CheckpointError, ConfigError, shown
from megagrow.json_file import parse_object

CONFIG_FILE = "config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
DEFAULT_ROPE_THETA = 10_000.0
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file is missing, or does not hold a JSON object.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); give a complete Hugging Face folder"
        ) from None
    return parse_object(raw, path, CheckpointError, "restore the file")


def model_config_from_hf(source: Path | Mapping[str, Any]) -> ModelConfig:
    """The model that config.json describes.

    Args:
        source: a Hugging Face folder, its config.json, or the file's content.

    Raises:
        CheckpointError: unreadable file, unsupported family, missing or malformed entry, or an
            entry that megagrow cannot honour; the message names file, entry, value and remedy.
    """
    if isinstance(source, Mapping):
        entries, where = source, CONFIG_FILE
    else:
        path = source / CONFIG_FILE if source.is_dir() else source
        entries, where = read_json(path), str(path)
    family = _family_of(entries, where)
    _refuse_unsupported(entries, family, where)
    fields: dict[str, Any] = {name: value for name, value in family.kind.items() if not callable(value)}
    for name, entry in family.entries.items():
        fields[name] = _read(entries, name, entry, fields, where)
    fields["activation"] = _activation(entries, family, where)
    for key, (name, *values) in family.switches.items():
        fields[name] = values[_switch(False if entries.get(key) is None else entries[key], key, where)]
    if fields["positions"] == "rope":
        fields["rope_theta"] = _rope_theta(entries, where)
    try:
        return ModelConfig(family=family.model_type, **fields)  # type: ignore[arg-type]
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None


def hf_config_from_model(
    model: ModelConfig,
    *,
    dtype: torch.dtype = torch.float32,
    token_ids: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The complete content of config.json for a model.

    Args:
        dtype: of the stored weights; transformers computes in it unless told otherwise.
        token_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`; null where left out, since
            transformers would otherwise assume ids of the family's first tokenizer.

    Raises:
        ConfigError: the family has no way to express the model; the message names the field.
    """
    check_exportable(model)
    family = FAMILIES[model.family]
    activation_key, activations = family.activation
    entries = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "dtype": str(dtype).removeprefix("torch."),
        **{key: value(model) if callable(value) else value for key, value in family.constants.items()},
        **{key: allowed[0] for key, allowed in family.only.items()},
        activation_key: activations[model.activation][0],
        **{entry.key: getattr(model, name) for name, entry in family.entries.items()},
        **{key: getattr(model, name) == on for key, (name, _, on) in family.switches.items()},
        **{name: (token_ids or {}).get(name) for name in TOKEN_IDS},
    }
    if model.positions == "rope":
        # transformers 5 reads the first, every earlier version and most other tools the second.
        entries["rope_parameters"] = {"rope_theta": model.rope_theta, "rope_type": "default"}
        entries["rope_theta"] = model.rope_theta
    return dict(sorted(entries.items()))


def check_exportable(model: ModelConfig) -> None:
    """Raises ConfigError, naming the field, when the model's family cannot express the model."""
    family = FAMILIES[model.family]
    if model.hidden_size % model.num_heads:
        raise ConfigError(
            f"model.hidden_size={model.hidden_size} is not a multiple of "
            f"num_heads={model.num_heads}, which transformers demands of every "
            f"{family.architecture}; change one of them"
        )
    _, activations = family.activation
    if model.activation not in activations:
        raise ConfigError(
            f"model.activation={model.activation} cannot be exported: {family.architecture} has "
            f"{' or '.join(activations)}; use that, or another model.family"
        )
    for name, value in fixed_fields(family, model).items():
        if getattr(model, name) != value:
            raise ConfigError(
                f"model.{name}={getattr(model, name)} cannot be exported: {family.architecture} "
                f"has {name}={value}; use that, or another model.family"
            )


def special_token_ids(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The special token ids that config.json states (an id, a list of ids, or nothing)."""
    return {name: entries[name] for name in TOKEN_IDS if entries.get(name) is not None}


def _family_of(entries: Mapping[str, Any], where: str) -> Family:
    name = entries.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise CheckpointError(f"{where}: model_type={shown(name)} is not supported; use one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _refuse_unsupported(entries: Mapping[str, Any], family: Family, where: str) -> None:
    for key, allowed in {**ONLY_ANYWHERE, **family.only}.items():
        value = entries.get(key)
        if value is not None and not any(_same(value, one) for one in allowed):
            raise CheckpointError(
                f"{where}: {key}={shown(value)} is not supported, and without it the logits would "
                f"change; use a model with {' or '.join(f'{key}={one!r}' for one in allowed)}"
            )


def _same(value: Any, allowed: Any) -> bool:
    """Equality that tells True from 1."""
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def _read(entries: Mapping[str, Any], name: str, entry: Entry, fields: Mapping[str, Any], where: str) -> Any:
    value = entries.get(entry.key)
    if value is None:
        if entry.default is None:
            raise CheckpointError(f"{where}: {entry.key} is missing; add it to the file")
        return entry.default(fields) if callable(entry.default) else entry.default
    wanted = type(getattr(ModelConfig, name))
    if wanted is bool:
        return _switch(value, entry.key, where)
    return _positive(value, wanted, entry.key, where)


def _positive(value: Any, wanted: type, key: str, where: str) -> Any:
    """A positive number of the wanted type, small enough for a float to hold exactly."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    largest = MAX_SIZE if wanted is int else 2**53
    if not is_number or not 0 < value <= largest or wanted(value) != value:
        kind = "whole number" if wanted is int else "number"
        raise CheckpointError(f"{where}: {key}={shown(value)} must be a positive {kind}, at most {largest}; correct it")
    return wanted(value)


def _switch(value: Any, key: str, where: str) -> bool:
    if not isinstance(value, bool):
        raise CheckpointError(f"{where}: {key}={shown(value)} must be true or false; correct it")
    return value


def _activation(entries: Mapping[str, Any], family: Family, where: str) -> str:
    """Ours, by the name that the file has for it."""
    key, activations = family.activation
    value = entries.get(key)
    if value is None:
        return next(iter(activations))
    for ours, theirs in activations.items():
        if value in theirs:
            return ours
    allowed = " or ".join(f"{key}={one!r}" for theirs in activations.values() for one in theirs)
    raise CheckpointError(
        f"{where}: {key}={shown(value)} is not supported, and without it the logits would change; "
        f"use a model with {allowed}"
    )


def _rope_theta(entries: Mapping[str, Any], where: str) -> float:
    """The base of the rotary frequencies, from either place that versions of transformers use."""
    stated = {}
    for key in ("rope_parameters", "rope_scaling"):
        rope = entries.get(key)
        if rope is None:
            continue
        _refuse_scaling(rope, key, where)
        if rope.get("rope_theta") is not None:
            path = f"{key}.rope_theta"
            stated[path] = _positive(rope["rope_theta"], float, path, where)
    if entries.get("rope_theta") is not None:
        stated["rope_theta"] = _positive(entries["rope_theta"], float, "rope_theta", where)
    if len(set(stated.values())) > 1:
        conflict = ", ".join(f"{key}={value}" for key, value in stated.items())
        raise CheckpointError(f"{where}: {conflict} contradict each other; make them equal")
    return next(iter(stated.values()), DEFAULT_ROPE_THETA)


def _refuse_scaling(rope: Any, key: str, where: str) -> None:
    if not isinstance(rope, dict):
        raise CheckpointError(f"{where}: {key}={shown(rope)} must be an object or null; correct it")
    kinds = [rope[name] for name in ("rope_type", "type") if rope.get(name) is not None]
    unknown = sorted(set(rope) - ROPE_KEYS)
    partial = rope.get("partial_rotary_factor")
    if any(kind != "default" for kind in kinds) or unknown or partial not in (None, 1):
        raise CheckpointError(
            f"{where}: {key}={shown(rope)} is not supported, and without it the logits would change; "
            f"use a model with unscaled rotary positions ({key}=null or rope_type=default)"
        )
