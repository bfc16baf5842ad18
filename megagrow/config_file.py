"""Configurations as plain data and as files: strict reading, in which an unknown key names the nearest known one."""

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal

from megagrow.config import Config
from megagrow.errors import ConfigError, named, shown
from megagrow.yaml_text import read_yaml

MAX_BYTES = 1 << 18  # of a file; a whole configuration takes 5,000
RENAMED = {"bias": ("attention_bias", "mlp_bias")}  # fields of old files -> what says it today


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain data, as it stands in files (`from_` is written `from`)."""
    return {f.name.rstrip("_"): _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


def from_dict(data: Any, kind: type | None = None, where: str = "configuration", path: str = "") -> Any:
    """Builds a dataclass tree from plain data.

    Args:
        data: nested mappings; fields left out keep their defaults.
        kind: dataclass to build; `Config` when None.
        where: file or source named in errors.
        path: dotted path of `data` inside the file, for errors.

    Raises:
        ConfigError: unknown key (the nearest one is named), wrong type, or a broken rule.
    """
    kind = kind or Config
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: {path or 'the top level'} must be a mapping, got {type(data).__name__}")
    hints = typing.get_type_hints(kind)
    names = {f.name.rstrip("_"): f.name for f in dataclasses.fields(kind)}
    values = {}
    for key, value in data.items():
        if not isinstance(key, str) or key not in names:
            name = named(key) if isinstance(key, str) else shown(key)
            full = f"{path}.{name}" if path else name
            raise ConfigError(f"{where}: unknown key {full}{nearest(full, option_names())}")
        values[names[key]] = _typed(value, hints[names[key]], where, f"{path}.{key}" if path else key)
    for f in dataclasses.fields(kind):
        if f.name not in values and f.default is f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: {path}.{f.name} is missing; add it")
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def check_value(value: Any, path: str, where: str) -> None:
    """Raises ConfigError unless `value` may stand at a dotted path of `option_names`."""
    kind: Any = Config
    for name in path.split("."):
        hints = {n.rstrip("_"): h for n, h in typing.get_type_hints(kind).items()}
        hint = hints[name]
        kind = next((h for h in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(h)), hint)
    _typed(value, hint, where, path)


def _typed(value: Any, hint: Any, where: str, path: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(option, type) and value is not None:
            return from_dict(value, option, where, path)
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
            return tuple(
                _typed(item, typing.get_args(option)[0], where, f"{path}[{i}]") for i, item in enumerate(value)
            )
        if option is float and isinstance(value, int | float | str) and not isinstance(value, bool):
            number = _finite(value)
            if number is None:
                continue
            return number
        if isinstance(option, type) and isinstance(value, option) and isinstance(value, bool) == (option is bool):
            return _storable(value, where, path)
    allowed = " or ".join(_type_name(option) for option in options)
    raise ConfigError(f"{where}: {path}={shown(value)} must be {allowed}")


def _storable(value: Any, where: str, path: str) -> Any:
    """The value; ConfigError for a number or text that files and tensors do not take."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{where}: {path}={shown(value)} does not fit 64 bits; use a smaller number")
    if isinstance(value, str) and not _is_plain(value):
        raise ConfigError(f"{where}: {path}={shown(value)} holds a character that is no text; leave it out")
    return value


def _finite(value: int | float | str) -> float | None:
    """The number, also from text (YAML reads 1e-3 as that); None if it is none, or not finite."""
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _is_plain(text: str) -> bool:
    """Whether it can be a path or a name: files and messages take neither NUL nor half of a surrogate pair."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"a list of {_type_name(typing.get_args(hint)[0])}"
    if isinstance(hint, types.UnionType):
        return " or ".join(map(_type_name, typing.get_args(hint)))
    if hint is float:
        return "a finite number"
    return "null" if hint is type(None) else hint.__name__


def option_names(kind: type | None = None, path: str = "") -> list[str]:
    """Every dotted field name of the tree, e.g. `model.hidden_size`, `growth.source.num_layers`."""
    kind = kind or Config
    names: list[str] = []
    for name, hint in typing.get_type_hints(kind).items():
        full = f"{path}.{name.rstrip('_')}" if path else name.rstrip("_")
        nested = [h for h in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(h)]
        names += [full] + [n for h in nested if isinstance(h, type) for n in option_names(h, full)]
    return names


def nearest(name: str, known: list[str]) -> str:
    """A hint for an error message: "; did you mean X?", or nothing when no name is close."""
    section, _, leaf = name.rpartition(".")
    today = [f"{section}.{field}" for field in RENAMED.get(leaf, ())]
    if today and set(today) <= set(known):
        return f"; did you mean {' and '.join(today)}?"
    by_leaf = [k for k in known if k.rsplit(".", 1)[-1] == leaf]
    close = by_leaf or difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else ""


def load_file(path: Path) -> Config:
    """Reads a YAML or JSON file that may leave fields at their defaults but may not name unknown ones.

    Raises:
        ConfigError: missing or malformed file, unknown key, wrong type, broken rule.
    """
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a preset name or a YAML file") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: is larger than {MAX_BYTES} bytes; give a file that holds a configuration only")
    data = read_yaml(raw, str(path))
    return from_dict(data if data is not None else {}, Config, str(path))


def dump(config: Config) -> str:
    """The resolved configuration as JSON text (which is YAML too, so a dump can be run again)."""
    text = json.dumps(to_dict(config), indent=1, ensure_ascii=False)
    # YAML takes no pairs of surrogates, and no raw control characters: only what is beyond 16 bits stays as it is.
    return re.sub(r"[\x7f-\uffff]", lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"
