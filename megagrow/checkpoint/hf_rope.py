"""Rotary settings in config.json <-> fields of `ModelConfig`.

Versions of transformers keep them in two ways: all in `rope_parameters` (from 5 on), or the base, and in some families
the share that is rotated, in entries of their own beside `rope_scaling`. Both are read, and must agree; both are
written. A scaling that megagrow does not compute is refused by name.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from megagrow.checkpoint.hf_entries import agreed, positive, switch, unsupported
from megagrow.checkpoint.hf_family import Rope
from megagrow.config import ModelConfig, RopeScaling
from megagrow.errors import CheckpointError, shown

DEFAULT_THETA = 10_000.0
PLACES = ("rope_scaling", "rope_parameters")  # transformers takes the first that is not empty
ORIGINAL = "original_max_position_embeddings"
ANYWHERE = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
# Kind of scaling -> key -> our field; `factor` apart, which all have.
NUMBERS: dict[str, dict[str, str]] = {
    "linear": {},
    "llama3": {"low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"},
    "yarn": {"beta_fast": "beta_fast", "beta_slow": "beta_slow", "attention_factor": "attention_factor"},
}
REQUIRED = {"llama3": ("low_freq_factor", "high_freq_factor")}
# What is read otherwise, or what transformers does not look at either (linear's ORIGINAL, "finetuned").
OTHERS = {
    "linear": {ORIGINAL},
    "llama3": {ORIGINAL},
    "yarn": {ORIGINAL, "truncate", "mscale", "mscale_all_dim", "finetuned"},
}


def read_rope(entries: Mapping[str, Any], rope: Rope, max_positions: int, where: str) -> dict[str, Any]:
    """`rope_theta`, `rope_fraction` and `rope_scaling`.

    Args:
        entries: config.json.
        rope: where the family keeps what is not in `rope_parameters`.
        max_positions: the context that config.json states.

    Raises:
        CheckpointError: an entry is malformed, contradicts another, or asks for what is not supported.
    """
    places = {place: _object(entries[place], place, where) for place in PLACES if entries.get(place) is not None}
    stated = {place: settings for place, settings in places.items() if settings}
    effective = next(iter(stated.values()), {})

    def value(name: str, key: str, default: float) -> float:
        """Of a number that stands in either place, or under a key of its own."""
        found = {f"{place}.{name}": settings.get(name) for place, settings in stated.items()}
        found |= {other: entries.get(other) for other in (key, name)}
        if effective.get(name) is None and found[key] is None:
            found[key] = default
        found = {path: number for path, number in found.items() if number is not None}
        return agreed({path: positive(number, float, path, where) for path, number in found.items()}, where)

    scalings = {place: _scaling(settings, place, max_positions, where) for place, settings in stated.items()}
    if entries.get(ORIGINAL) is not None:
        originals = {
            f"{place}.{ORIGINAL}": each.original_max_positions
            for place, each in scalings.items()
            if each and each.kind != "linear"
        }
        agreed(originals | {ORIGINAL: positive(entries[ORIGINAL], int, ORIGINAL, where)}, where)
    fraction = value("partial_rotary_factor", rope.fraction or "partial_rotary_factor", rope.default_fraction)
    if fraction != 1 and not rope.fraction:
        raise unsupported("partial_rotary_factor", fraction, "use a model that rotates whole heads", where)
    return {
        "rope_theta": value("rope_theta", rope.theta, DEFAULT_THETA),
        "rope_fraction": fraction,
        "rope_scaling": agreed(scalings, where) if scalings else None,
    }


def write_rope(model: ModelConfig, rope: Rope) -> dict[str, Any]:
    """The entries of config.json, in both ways."""
    scaling = {"rope_type": "default"} if model.rope_scaling is None else _settings(model.rope_scaling)
    fraction = {"partial_rotary_factor": model.rope_fraction} if rope.fraction else {}
    return {
        "rope_parameters": {**scaling, **fraction, "rope_theta": model.rope_theta},
        rope.theta: model.rope_theta,
        **({rope.fraction: model.rope_fraction} if rope.fraction else {}),
        **({"rope_scaling": scaling} if model.rope_scaling else {}),
    }


def _object(settings: Any, place: str, where: str) -> dict[str, Any]:
    if not isinstance(settings, dict):
        raise CheckpointError(f"{where}: {place}={shown(settings)} must be an object or null; correct it")
    return settings


def _scaling(settings: Mapping[str, Any], place: str, max_positions: int, where: str) -> RopeScaling | None:
    kinds = {f"{place}.{key}": settings[key] for key in ("rope_type", "type") if settings.get(key) is not None}
    kind = agreed(kinds, where) if kinds else "default"
    if kind != "default" and (not isinstance(kind, str) or kind not in NUMBERS):
        raise unsupported(f"{place}.rope_type", kind, f"use a model with default, {', '.join(NUMBERS)}", where)
    known = ANYWHERE if kind == "default" else ANYWHERE | {"factor", *NUMBERS[kind], *OTHERS.get(kind, ())}
    for key in sorted(set(settings) - known):
        raise unsupported(f"{place}.{key}", settings[key], f"use a model whose {kind} rotation is without it", where)
    if kind == "default":
        return None
    for key in ("factor", *REQUIRED.get(kind, ())):
        if settings.get(key) is None:
            raise CheckpointError(
                f"{where}: {place}.{key} is missing, which rope_type={kind} needs; add it to the file"
            )

    def number(key: str, wanted: type = float) -> Any:
        return positive(settings[key], wanted, f"{place}.{key}", where)

    fields = {name: number(key) for key, name in NUMBERS[kind].items() if settings.get(key) is not None}
    if kind != "linear":
        fields["original_max_positions"] = max_positions if settings.get(ORIGINAL) is None else number(ORIGINAL, int)
    if kind == "yarn":
        fields |= _of_yarn(settings, place, number, where)
    return RopeScaling(kind, number("factor"), **fields)  # type: ignore[arg-type]


def _of_yarn(settings: Mapping[str, Any], place: str, number: Callable[[str], float], where: str) -> dict[str, Any]:
    """Whether the ramp is rounded, and the scale that DeepSeek states by two factors of its logarithm."""
    fields: dict[str, Any] = {}
    if "truncate" in settings:  # transformers takes null for no
        fields["truncate"] = settings["truncate"] is not None and switch(
            settings["truncate"], f"{place}.truncate", where
        )
    scales = [number(key) for key in ("mscale", "mscale_all_dim") if settings.get(key) not in (None, 0)]
    if len(scales) == 2 and settings.get("attention_factor") is None:
        upper, lower = (0.1 * scale * math.log(number("factor")) + 1.0 for scale in scales)
        fields["attention_factor"] = upper / lower
    return fields


def _settings(scaling: RopeScaling) -> dict[str, Any]:
    """The inverse of `_scaling`."""
    settings: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    settings |= {key: getattr(scaling, name) for key, name in NUMBERS[scaling.kind].items()}
    if scaling.kind != "linear":
        settings[ORIGINAL] = scaling.original_max_positions
    if scaling.kind == "yarn" and not scaling.attention_factor:
        del settings["attention_factor"]  # transformers derives it as we do
    if scaling.kind == "yarn" and not scaling.truncate:
        settings["truncate"] = False  # versions that do not know it round
    return settings
