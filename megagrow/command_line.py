"""From `PRESET_OR_FILE [--section.field VALUE …]` to a configuration, with errors that fit on one line."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import tyro

from megagrow import presets
from megagrow.config import Config
from megagrow.config_file import check_value, from_dict, load_file, nearest, option_names, to_dict
from megagrow.errors import ConfigError
from megagrow.yaml_text import read_yaml

USAGE = "usage: python -m megagrow PRESET_OR_FILE [--init.from CKPT] [--section.field VALUE ...] [--dry-run]"
DRY_RUN = "--dry-run"


def parse(arguments: list[str]) -> Config:
    """The configuration that the arguments describe.

    Raises:
        ConfigError: no such preset or file, unknown option (the nearest one is named), wrong value, broken rule.
    """
    if not arguments:
        raise ConfigError(f"{USAGE}; presets: {', '.join(presets.names())}")
    if arguments[0] in ("-h", "--help"):
        return tyro.cli(Config, args=["--help"], prog="python -m megagrow PRESET_OR_FILE")
    base, rest = load(arguments[0]), arguments[1:]
    if "-h" in rest or "--help" in rest:
        kinds = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
        tyro.cli(Config, default=base, args=["--help"], prog=f"python -m megagrow {arguments[0]}", config=kinds)
    return _changed(base, _checked(base, rest))


def without_dry_run(arguments: list[str]) -> list[str]:
    """The arguments that describe the run."""
    return [argument for argument in arguments if argument != DRY_RUN]


def load(name: str) -> Config:
    """The preset of this name, or the configuration in the file of this path.

    Raises:
        ConfigError: neither exists.
    """
    if name in presets.names():
        return presets.get(name)
    path = Path(name)
    if not path.exists():
        known = presets.names()
        raise ConfigError(
            f"{name}: neither a preset nor a file{nearest(name, known)}; presets: {', '.join(known)}; "
            "or give the path of a YAML file"
        )
    return load_file(path)


def _checked(base: Config, arguments: list[str]) -> dict[str, Any]:
    """Dotted field name -> value as it would stand in a file, after each name and value has been looked at."""
    known, pending, checked = option_names(), list(arguments), dict[str, Any]()
    while pending:
        option, has_value, value = pending.pop(0).partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--") or name not in known:
            raise ConfigError(f"command line: unknown option {option}{nearest(name, known)}")
        if name.startswith("growth.source") and (name == "growth.source" or base.growth.source is None):
            raise ConfigError(f"command line: {option}: growth.source is a whole model; write it into a YAML file")
        if name.startswith("growth.earlier."):
            example = '--growth.earlier "[{num_layers: 6, at_step: 100}]"'
            raise ConfigError(f"command line: {option}: growth.earlier is a list; give it whole, e.g. {example}")
        if not has_value and not pending:
            raise ConfigError(f"command line: {option} needs a value")
        checked[name] = _value(name, value if has_value else pending.pop(0))
    return checked


def _changed(base: Config, values: dict[str, Any]) -> Config:
    """The configuration with these fields changed, and those that follow from them."""
    data = to_dict(base)
    for name, value in {**values, **_derived_again(base, values)}.items():
        *path, last = name.split(".")
        section = data
        for part in path:
            section[part] = section[part] or {}
            section = section[part]
        section[last] = value
    return cast(Config, from_dict(data, Config, "command line"))


def _derived_again(base: Config, changed: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the model that follow others that were changed, where they followed them before."""
    model, heads_changed = base.model, "model.num_heads" in changed
    again: dict[str, Any] = {}
    if heads_changed and "model.num_kv_heads" not in changed and model.num_kv_heads == model.num_heads:
        again["model.num_kv_heads"] = 0
    size_changed = heads_changed or "model.hidden_size" in changed
    if size_changed and "model.head_dim" not in changed and model.head_dim * model.num_heads == model.hidden_size:
        again["model.head_dim"] = 0
    return again


def _value(name: str, text: str) -> Any:
    """What the text stands for: itself where text may stand (2024, 'x', runs/a #1), a list where one may, or YAML."""
    try:
        value = read_yaml(text, "command line")
    except ConfigError:
        value = text
    for candidate in (value, text) if isinstance(value, list) else (text, value):
        with suppress(ConfigError):
            check_value(candidate, name, "command line")
            return candidate
    check_value(value, name, "command line")  # which tells what is wrong
    return value
