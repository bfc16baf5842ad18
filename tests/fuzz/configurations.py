"""Configuration files: every option with values that its type or its own rule forbids."""

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from hypothesis import strategies as st

from megagrow.config import Config, ModelConfig
from megagrow.config_file import load_file, to_dict
from megagrow.earlier_growth import SIZES as GROWN_SIZES
from tests.fuzz.fields import Field, texts_with
from tests.fuzz.literals import BROKEN_ANYWHERE_IN_YAML, BROKEN_YAML, INTEGERS, TEXTS, is_number, rejecting

MAX_SIZE = 2**31 - 1
SIZES = {  # whole numbers from 1 on
    "growth.plateau_window",
    "salt.top_k",
    *("model.vocab_size", "model.hidden_size", "model.num_layers", "model.num_heads", "model.ffn_size"),
    *("model.max_seq_length", "data.seq_length", "parallel.tensor", "parallel.pipeline", "parallel.context"),
    *("parallel.replicate", "train.steps", "train.global_batch_size", "optim.max_bad_steps", "optim.spike_window"),
}
COUNTS = {  # from 0 on
    *("model.num_kv_heads", "model.head_dim", "model.position_offset", "model.num_token_types", "model.norm_eps"),
    *("parallel.stages_per_rank", "train.microbatch_size", "train.loss_chunk", "train.eval_interval"),
    *("train.eval_batches", "train.threads", "optim.lr", "optim.eps", "optim.weight_decay", "optim.clip_norm"),
    "train.z_loss",
    *("optim.warmup_steps", "optim.spike_sigma", "optim.min_lr_ratio", "growth.at_step", "growth.rewarmup_steps"),
    "growth.rewarmup_factor",
    *("growth.ligo_steps", "growth.ligo_lr", "growth.ligo_noise", "salt.steps", "checkpoint.interval"),
    "salt.online_buffer",
    *("growth.rewarmup_factor", "growth.breaker_scale", "growth.at_tokens", "growth.freeze_steps"),
    *(f"growth.earlier.{name}" for name in ("at_step", "at_tokens", "freeze_steps", "norm_eps", *GROWN_SIZES)),
    *("checkpoint.keep_last", "model.rope_scaling.original_max_positions", "model.rope_scaling.attention_factor"),
}
RANGES: dict[str, Callable[[float], bool]] = {
    "model.rope_theta": lambda x: x > 0,
    "model.rope_fraction": lambda x: 0 < x <= 1,
    "model.rope_scaling.factor": lambda x: x >= 1,
    "model.rope_scaling.low_freq_factor": lambda x: 0 < x < 4,
    "model.rope_scaling.high_freq_factor": lambda x: x > 1,
    "model.rope_scaling.beta_fast": lambda x: x >= 1,
    "model.rope_scaling.beta_slow": lambda x: 0 < x <= 32,
    "train.dropout": lambda x: x == 0 or 2**-16 <= x <= 1 - 2**-16,
    "train.label_smoothing": lambda x: 0 <= x < 1,
    "optim.beta1": lambda x: 0 <= x < 1,
    "optim.beta2": lambda x: 0 <= x < 1,
    "optim.decay_fraction": lambda x: 0 <= x <= 1,
    "growth.at_plateau": lambda x: 0 <= x < 1,
    "growth.earlier.at_plateau": lambda x: 0 <= x < 1,
    "growth.earlier.rewarmup_steps": lambda x: x >= -1,
    "salt.weight": lambda x: 0 <= x <= 1,
    "salt.temperature": lambda x: x > 0,
    "salt.keep_fraction": lambda x: 0 < x <= 1,
    "salt.share": lambda x: 0 <= x <= 1,
    "salt.band_low": lambda x: 0 <= x < 0.75,
    "salt.band_high": lambda x: 0.25 < x <= 1,
    "init.source_flops": lambda x: x >= 0 or x == -1,
    "run.log_interval": lambda x: x > 0,
    "run.timeout": lambda x: x > 0,
    "run.profile_at": lambda x: x >= -1,
    "run.memory_snapshot_at": lambda x: x >= -1,
}
UPPER_LIMITS = SIZES | {"model.num_kv_heads", "model.head_dim", "model.position_offset", "model.num_token_types"}
UPPER_LIMITS |= {f"growth.earlier.{name}" for name in GROWN_SIZES}
WORDS = ("0b_", "0x_")  # numbers of YAML 1.1, but not of 1.2
NESTED = {"rope_scaling": {"kind": "linear", "factor": 2.0}, "source": to_dict(ModelConfig())}


def fields(folder: Path) -> Iterator[Field]:
    """Every option, every section, unknown keys, and files that are no YAML."""
    file = folder / "run.yaml"

    def read() -> Any:
        return load_file(file)

    for name, accepts in accepts_of("").items():
        path = _path(name)
        broken = [text for text in BROKEN_ANYWHERE_IN_YAML + BROKEN_YAML if text not in WORDS or not accepts(text)]
        likely = (INTEGERS, st.floats(-2, 2), TEXTS)
        texts = texts_with(_base(path), path, rejecting(accepts, *likely, broken=broken), required=False)
        yield Field("configuration", name, file, texts, read, path[-1])
    unknown = TEXTS.filter(lambda key: key not in to_dict(Config())).map(lambda key: json.dumps({key: {}}).encode())
    yield Field("configuration", "(unknown key)", file, unknown, read, "unknown key")
    junk = st.binary(min_size=1, max_size=60).filter(_is_no_configuration)
    yield Field("configuration", "(whole file)", file, junk, read, "mapping|unknown key|must be")


def accepts_of(section: str) -> dict[str, Callable[[Any], bool]]:
    """Option -> whether a value may stand there, from the types of the dataclasses and the tables above."""
    found = {}
    for name, hint in _hints(Config, ""):
        if name.startswith(section):
            found[name] = _accepts(hint, name.replace("growth.source.", "model."))
    return found


def _hints(kind: type, path: str) -> Iterator[tuple[str, Any]]:
    for name, hint in typing.get_type_hints(kind).items():
        full = path + name.rstrip("_")
        yield full, hint
        for option in typing.get_args(hint) or (hint,):
            if dataclasses.is_dataclass(option) and isinstance(option, type):
                yield from _hints(option, f"{full}.")


def _accepts(hint: Any, name: str) -> Callable[[Any], bool]:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return lambda value: any(_is(value, option, name) for option in options)


def _is(value: Any, option: Any, name: str) -> bool:
    if dataclasses.is_dataclass(option):
        return value == {}  # another mapping would have to be right in itself; its fields have their own turn
    if typing.get_origin(option) is Literal:
        return value in typing.get_args(option)
    if typing.get_origin(option) is tuple:
        (item,) = {*typing.get_args(option)} - {...}
        holds = _is_index if item is int else _accepts(item, name)
        return isinstance(value, list) and all(map(holds, value))
    if option is float:
        return _is_float(value) and _in_range(float(value), name)
    if option is int:
        return type(value) is int and -(2**63) <= value < 2**63 and _in_range(value, name)
    if option is str:
        return isinstance(value, str) and "\0" not in value
    return type(value) is option


def _is_index(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_SIZE


def _is_float(value: Any) -> bool:
    if isinstance(value, str):  # as YAML reads 1e-3
        try:
            value = float(value)
        except ValueError:
            return False
    return is_number(value)


def _in_range(value: float, name: str) -> bool:
    if name in UPPER_LIMITS and value > MAX_SIZE:
        return False
    if name in SIZES:
        return value >= 1
    if name in COUNTS:
        return value >= 0
    return RANGES.get(name, lambda x: True)(value)


def _path(name: str) -> tuple[str | int, ...]:
    """The keys under which an option stands; those of a list in its first entry."""
    path: list[str | int] = list(name.split("."))
    if name.startswith("growth.earlier."):
        path.insert(2, 0)
    return tuple(path)


def _base(path: tuple[str | int, ...]) -> dict[str, Any]:
    """The least that must stand around an option."""
    base: dict[str, Any] = {}
    section: Any = base
    for key, following in zip(path[:-1], path[1:], strict=True):
        if isinstance(key, str):
            section[key] = [{}] if isinstance(following, int) else dict(NESTED.get(key, {}))
        section = section[key]
    return base


def _is_no_configuration(raw: bytes) -> bool:
    """Neither empty for YAML nor the name of a section."""
    text = raw.decode("utf-8", "replace")
    stripped = [line.split("#")[0].strip(" \t\r\ufeff-.") for line in text.splitlines()]
    names = to_dict(Config())
    return any(stripped) and not any(line.startswith(("~", "null", "Null", "NULL", "%", *names)) for line in stripped)
