"""config.json of a Hugging Face folder <-> `ModelConfig`, in both directions and without loss.

Whatever would change the logits and cannot be kept is refused by name, never dropped. Besides the
model, config.json holds special token ids, which `special_token_ids` reads.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megagrow.checkpoint.hf_entries import positive, switch, unsupported
from megagrow.checkpoint.hf_families import FAMILIES
from megagrow.checkpoint.hf_family import Entry, Family, fixed_fields
from megagrow.checkpoint.hf_rope import read_rope, write_rope
from megagrow.checkpoint.hf_windows import check_windows
from megagrow.config import ModelConfig
from megagrow.errors import CheckpointError, ConfigError, shown
from megagrow.json_file import parse_object

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Entries that change the logits in some family and have no counterpart here, with what they may be.
ONLY_ANYWHERE: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": (None, {}),
    "rope_interleaved": (False,),
}


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
    for key, says in family.switches.items():
        is_on = says.default if entries.get(key) is None else switch(entries[key], key, where)
        fields[says.field] = says.on if is_on else says.off
    check_windows(entries, family, fields["num_layers"], fields["max_seq_length"], where)
    try:
        if family.rope is not None:
            fields |= read_rope(entries, family.rope, fields["max_seq_length"], where)
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
        **{name: (token_ids or {}).get(name) for name in TOKEN_IDS},
        **{entry.key: _written(name, entry, model) for name, entry in family.entries.items()},
        **{key: getattr(model, says.field) == says.on for key, says in family.switches.items()},
        **({} if family.rope is None else write_rope(model, family.rope)),
    }
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
    for name, entry in family.entries.items():
        value = getattr(model, name)
        if value == 0 and not isinstance(value, bool):
            needed = "a positive number" if isinstance(getattr(ModelConfig, name), float) else "at least 1"
            raise ConfigError(
                f"model.{name}={value} cannot be exported: {family.architecture} needs {needed} ({entry.key}); use "
                "that, or another model.family"
            )
    for name, value in fixed_fields(family, model).items():
        if getattr(model, name) != value:
            raise ConfigError(
                f"model.{name}={getattr(model, name)} cannot be exported: {family.architecture} "
                f"has {name}={value}; use that, or another model.family"
            )
    for says in family.switches.values():
        value = getattr(model, says.field)
        if value not in (says.off, says.on):
            raise ConfigError(
                f"model.{says.field}={value} cannot be exported: {family.architecture} has {says.off} or {says.on}; "
                "use one of them, or another model.family"
            )


def special_token_ids(entries: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The special token ids that config.json states (an id, a list of ids, or nothing).

    Raises:
        CheckpointError: one of them is something else.
    """
    found = {name: entries[name] for name in TOKEN_IDS if entries.get(name) is not None}
    for name, value in found.items():
        if not are_token_ids({name: value}):
            raise CheckpointError(f"{where}: {name}={shown(value)} must be a token id, or a list of them; correct it")
    return found


def are_token_ids(data: Any) -> bool:
    """Whether this is what `special_token_ids` gives, or None, where nobody states any."""
    if not isinstance(data, dict) or not set(data) <= set(TOKEN_IDS):
        return data is None
    ids = [one for value in data.values() for one in (value if isinstance(value, list) else [value])]
    return all(type(one) is int and -1 <= one < 2**31 for one in ids)  # -1: none, in some old folders


def _family_of(entries: Mapping[str, Any], where: str) -> Family:
    name = entries.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise CheckpointError(f"{where}: model_type={shown(name)} is not supported; use one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _refuse_unsupported(entries: Mapping[str, Any], family: Family, where: str) -> None:
    for key, allowed in {**ONLY_ANYWHERE, **family.only}.items():
        value = entries.get(key)
        if value is not None and not any(_same(value, one) for one in allowed):
            remedy = f"use a model with {' or '.join(f'{key}={one!r}' for one in allowed)}"
            raise unsupported(key, value, remedy, where)


def _same(value: Any, allowed: Any) -> bool:
    """Equality that tells True from 1."""
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def _read(entries: Mapping[str, Any], name: str, entry: Entry, fields: Mapping[str, Any], where: str) -> Any:
    value = entries.get(entry.key)
    if value is None:
        if entry.default is None:
            raise CheckpointError(f"{where}: {entry.key} is missing; add it to the file")
        value = entry.default(fields) if callable(entry.default) else entry.default
    wanted = type(getattr(ModelConfig, name))
    if wanted is bool:
        return switch(value, entry.key, where)
    difference = entry.difference(fields)
    return positive(value, wanted, entry.key, where, above=difference) - difference


def _written(name: str, entry: Entry, model: ModelConfig) -> Any:
    """What config.json holds for a field."""
    value = getattr(model, name)
    return value if entry.added is None else value + entry.added(vars(model))


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
    raise unsupported(key, value, f"use a model with {allowed}", where)
