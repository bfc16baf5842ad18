"""Configurations as plain data and as files: strict reading, in which an unknown key names the nearest known one."""

import dataclasses
import difflib
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from megagrow.config import Config
from megagrow.errors import ConfigError


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain data, as it stands in files (`from_` is written `from`)."""
    return {
        f.name.rstrip("_"): to_dict(value) if dataclasses.is_dataclass(value) else value
        for f in dataclasses.fields(config)
        for value in [getattr(config, f.name)]
    }


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
        full = f"{path}.{key}" if path else str(key)
        if key not in names:
            raise ConfigError(f"{where}: unknown key {full}{nearest(full, option_names())}")
        values[names[key]] = _typed(value, hints[names[key]], where, full)
    return kind(**values)


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
            try:  # YAML reads 1e-3 as a string
                return float(value)
            except ValueError:
                continue
        if isinstance(option, type) and isinstance(value, option) and isinstance(value, bool) == (option is bool):
            return value
    allowed = " or ".join(_type_name(option) for option in options)
    raise ConfigError(f"{where}: {path}={value!r} must be {allowed}")


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"a list of {_type_name(typing.get_args(hint)[0])}"
    if isinstance(hint, types.UnionType):
        return " or ".join(map(_type_name, typing.get_args(hint)))
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
    by_leaf = [k for k in known if k.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    close = by_leaf or difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else ""


def load_file(path: Path) -> Config:
    """Reads a YAML or JSON file that may leave fields at their defaults but may not name unknown ones.

    Raises:
        ConfigError: missing or malformed file, unknown key, wrong type, broken rule.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a preset name or a YAML file") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    return from_dict(data if data is not None else {}, Config, str(path))


def dump(config: Config) -> str:
    """The resolved configuration as JSON text (which is YAML too, so a dump can be run again)."""
    return json.dumps(to_dict(config), indent=1) + "\n"
