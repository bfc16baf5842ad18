"""From `PRESET_OR_FILE [--section.field VALUE …]` to a configuration, with errors that fit on one line."""

import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from megagrow import presets
from megagrow.config import Config, GrowthConfig
from megagrow.config_file import check_value, from_dict, load_file, nearest, option_names, to_dict
from megagrow.earlier_growth import EarlierGrowth
from megagrow.errors import ConfigError
from megagrow.yaml_text import read_yaml

USAGE = "usage: python -m megagrow PRESET_OR_FILE [--init.from CKPT] [--section.field VALUE ...] [--dry-run]"
DRY_RUN = "--dry-run"
EARLIER = "growth.earlier"
OF_MEGATRON = {  # what its users reach for
    "tensor-model-parallel-size": "parallel.tensor",
    "pipeline-model-parallel-size": "parallel.pipeline",
    "context-parallel-size": "parallel.context",
    "sequence-parallel": "parallel.sequence_parallel true",
    "micro-batch-size": "train.microbatch_size",
    "global-batch-size": "train.global_batch_size",
    "train-iters": "train.steps",
    "seq-length": "data.seq_length",
    "data-path": "data.train",
    "split": "data.split",
    "num-layers": "model.num_layers",
    "hidden-size": "model.hidden_size",
    "ffn-hidden-size": "model.ffn_size",
    "num-attention-heads": "model.num_heads",
    "num-query-groups": "model.num_kv_heads",
    "max-position-embeddings": "model.max_seq_length",
    "lr": "optim.lr",
    "min-lr": "optim.min_lr_ratio, a share of optim.lr",
    "lr-warmup-iters": "optim.warmup_steps",
    "weight-decay": "optim.weight_decay",
    "clip-grad": "optim.clip_norm",
    "bf16": "train.precision bf16",
    "seed": "train.seed",
    "save": "checkpoint.dir",
    "load": "init.from",
    "save-interval": "checkpoint.interval",
    "eval-interval": "train.eval_interval",
    "eval-iters": "train.eval_batches",
}
OF_ONE_GROWTH = re.compile(rf"(?<={re.escape(EARLIER)})[.][0-9]{{1,4}}(?=[.])")  # its place in the list, inside a name


def parse(arguments: list[str]) -> Config:
    """The configuration that the arguments describe.

    Raises:
        ConfigError: no such preset or file, unknown option (the nearest one is named), wrong value, broken rule.
    """
    if not arguments:
        raise ConfigError(f"{USAGE}; presets: {', '.join(presets.names())}")
    if arguments[0] in ("-h", "--help"):
        return _show_help("PRESET_OR_FILE")
    base, rest = load(arguments[0]), arguments[1:]
    if "-h" in rest or "--help" in rest:
        kinds = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
        return _show_help(arguments[0], default=base, config=kinds)
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


def _show_help(what: str, **how: Any) -> Config:
    """Prints all options, and exits."""
    registry = ConstructorRegistry()
    registry.primitive_rule(_as_list)
    prog = f"python -m megagrow {what}"
    return cast(Config, tyro.cli(Config, args=["--help"], prog=prog, registry=registry, **how))


def _as_list(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """A list of growths is one option; tyro itself would show a growth's fields where there is one, else nothing."""
    if info.type != tuple[EarlierGrowth, ...]:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f'"[{{{", ".join(field.name for field in fields(EarlierGrowth))}}}, ...]"',
        instance_from_str=lambda texts: from_dict({"earlier": _value(EARLIER, texts[0])}, GrowthConfig).earlier,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda growths: [f"[{', '.join(map(_settings, growths))}]"],
    )


def _settings(growth: EarlierGrowth) -> str:
    """What a growth sets, as it stands in the list."""
    given = {f.name: getattr(growth, f.name) for f in fields(growth) if getattr(growth, f.name) != f.default}
    return f"{{{', '.join(f'{name}: {value}' for name, value in given.items())}}}"


def _checked(base: Config, arguments: list[str]) -> dict[str, Any]:
    """Dotted field name -> value as it would stand in a file, after each name and value has been looked at."""
    known, pending, checked = option_names(), list(arguments), dict[str, Any]()
    while pending:
        option, has_value, value = pending.pop(0).partition("=")
        name = option.removeprefix("--").replace("-", "_")
        field = OF_ONE_GROWTH.sub("", name)
        if not option.startswith("--"):
            raise ConfigError(
                f'command line: {option} is no option; a value with spaces stands in quotes, as in --data.train "a b"'
            )
        if field not in known:
            raise ConfigError(f"command line: unknown option {option}{_meant(option, known)}")
        if name.startswith("growth.source") and (name == "growth.source" or base.growth.source is None):
            raise ConfigError(f"command line: {option}: growth.source is a whole model; write it into a YAML file")
        if field == name and name.startswith(f"{EARLIER}."):
            raise _not_whole(option, f"is a list; say of which growth, as in --{EARLIER}.0.at-step")
        if not has_value and (not pending or _is_option(pending[0], known)):
            raise ConfigError(f"command line: {option} needs a value, as in {option} {_example(base, field)}")
        checked[name] = _value(field, value if has_value else pending.pop(0))
    return checked


def _is_option(text: str, known: Collection[str]) -> bool:
    """Whether this begins the next option, and is no value."""
    name = text.partition("=")[0].removeprefix("--").replace("-", "_")
    return text.startswith("--") and OF_ONE_GROWTH.sub("", name) in known


def _example(base: Config, field: str) -> str:
    """A value that the option takes."""
    value: Any = to_dict(base)
    for part in field.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return "true" if isinstance(value, bool) else "VALUE"


def _meant(option: str, known: Collection[str]) -> str:
    """What an unknown option may stand for, in words."""
    name = option.removeprefix("--").replace("_", "-")
    if name in OF_MEGATRON:
        return f"; here it is --{OF_MEGATRON[name]}"
    if name == "parallel.data":
        return "; the data axis is what the other axes leave of the ranks"
    return nearest(name.replace("-", "_"), list(known))


def _not_whole(option: str, problem: str) -> ConfigError:
    example = f'--{EARLIER} "[{{num_layers: 6, at_step: 100}}]"'
    return ConfigError(f"command line: {option}: {EARLIER} {problem}, or give it whole, as in {example}")


def _changed(base: Config, values: dict[str, Any]) -> Config:
    """The configuration with these fields changed, and those that follow from them."""
    data = to_dict(base)
    for name, value in {**values, **_derived_again(base, values)}.items():
        *path, last = name.split(".")
        section: Any = data
        for part in path:
            section = _inside(section, part, name)
        section[last] = value
    return cast(Config, from_dict(data, Config, "command line"))


def _inside(section: Any, part: str, name: str) -> Any:
    """A section of a section, where there was none an empty one; or a growth of a list."""
    if isinstance(section, dict):
        section[part] = {} if section[part] is None else section[part]
        return section[part]
    if int(part) >= len(section):
        raise _not_whole(f"--{name}", f"has no growth number {part}, counted from 0; set a field of one that is there")
    return section[int(part)]


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
