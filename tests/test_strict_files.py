"""JSON and YAML from outside: what other readers take in silence, or die of, is refused in one line that names it."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from megagrow.command_line import parse
from megagrow.config_file import MAX_BYTES, dump, load_file
from megagrow.errors import CheckpointError, ConfigError, DataError, shown
from megagrow.growth.ligo_file import load_maps
from megagrow.json_file import parse_object

BAD_JSON = {
    "a key twice": (b'{"a": {"b": 1, "b": 2}}', "key 'b' stands twice"),
    "NaN": (b'{"a": {"b": [1, NaN]}}', r"a\.b\[1\] is not a finite number"),
    "beyond floats": (b'{"a": -1e999}', "a is not a finite number"),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", "a is not a finite number"),
    "half a pair": (b'{"a": ["\\ud800"]}', r"a\[0\] holds half a surrogate pair"),
    "half a pair as a key": (b'{"\\ud800": 1}', "holds half a surrogate pair"),
    "nested": (
        b'{"a": {"b": [{"c": ' + b"[" * 250 + b"]" * 250 + b"}]}}",
        r"a\.b\[0\]\.c is nested more than 200 deep",
    ),
    "nested beyond the parser": (b'{"a":' * 10_000, "nested more than 200 deep"),
    "a list": (b"[]", "must hold a JSON object, has list"),
    "cut": (b'{"a": 1', "not valid JSON: .*line 1 column"),
    "another encoding": ('{"a": 1}'.encode("utf-16"), "not valid JSON: 'utf-8' codec"),
    "a long name": (b'{"' + b"a" * 500 + b'": NaN}', r"'a+\.\.\.a+' is not a finite number"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_json_is_read_strictly(case: str) -> None:
    content, message = BAD_JSON[case]
    with pytest.raises(DataError, match=f"^f.json: .*{message}.*; restore it$"):
        parse_object(content, "f.json", DataError, "restore it")


def test_json_that_keeps_the_rules_is_read_whole() -> None:
    record = {"a": [1, -2.5, None, True, "é\n", 10**40], "b": {"c": {}}}
    assert parse_object(json.dumps(record).encode(), "f.json", DataError, "") == record


BOMB = "data: {train: &a [x, x], validation: &b [*a, *a], tokenizer: [*b, *b]}"
BAD_YAML: dict[str, tuple[Any, str]] = {
    "an alias bomb": (BOMB, "anchors and aliases are refused.*line 1"),
    "an endless alias": ("model: &a [*a]", "anchors and aliases"),
    "a tag": ("model: !!python/object/apply:os.mkdir ['x']", "the tag .* is refused.*line 1"),
    "a tag that its value does not fit": ("model: {num_layers: !!int x}", "the tag .* is refused"),
    "a key twice": ("train: {steps: 1}\ntrain: {steps: 2}", "key 'train' stands twice.*line 2"),
    "a list as a key": ("{[a]: 2}", "not valid YAML: .*unhashable key.*line 1"),
    "a list as the key of a section": ("model: {? [1] : 2}", "not valid YAML: .*unhashable key.*line 1"),
    "no character of Unicode": ('run: {dir: "\\UFFFFFFFF"}', "not valid YAML"),
    "a merged section": ("train: {steps: 1, <<: {steps: 2}}", "unknown key train.<<"),
    "a default value": ("train: {=: 1}", "unknown key train.="),
    "a number without digits": ("model: {num_layers: 0x_}", "model.num_layers='0x_' must be int"),
    "minutes and seconds": ("train: {steps: 1:30}", "train.steps='1:30' must be int"),
    "minutes and seconds with a fraction": ("optim: {lr: 1:30.5}", "optim.lr='1:30.5' must be a finite number"),
    "5,000 digits": ("train: {steps: " + "9" * 5000 + "}", "not valid YAML"),
    "a large hexadecimal": ("train: {steps: 0x" + "f" * 9000 + "}", "train.steps=an integer of more than 80 digits"),
    "more than 64 bits": ("data: {seed: 9223372036854775808}", "data.seed=9223372036854775808 does not fit 64 bits"),
    "nested": ("model: " + "[" * 9000, "nested more than 20 deep"),
    "another encoding": (b"model: {family: \xff}", "not valid YAML: 'utf-8' codec"),
    "no number": ("optim: {lr: .nan}", "optim.lr=nan must be a finite number"),
    "no number as text": ("optim: {beta1: 'inf'}", "optim.beta1='inf' must be a finite number"),
    "a number that overflows": (f"optim: {{lr: 1{'0' * 400}}}", "optim.lr=.* must be a finite number"),
    "NUL in a path": ('data: {train: "a\\0b"}', "data.train=.* holds a character that is no text"),
    "a key of two lines": ('"a\\nb": 1', r"unknown key 'a\\nb'"),
    "a broken rule": ("data: {seq_length: 0}", "data.seq_length=0 must be positive"),
    "a size that takes for ever to divide": ("model: {hidden_size: 1000000000000000003}", "must be at most 2147483647"),
    "a negative number of heads": ("model: {num_kv_heads: -1}", "model.num_kv_heads=-1 must not be negative"),
    "a momentum of 1": ("optim: {beta2: 1}", r"optim.beta2=1.0 must be in \[0, 1\)"),
    "a part of a section": ("model: {rope_scaling: {factor: 2}}", "model.rope_scaling.kind is missing"),
    "another kind of file": (b"x" * (MAX_BYTES + 1), "is larger than"),
}


@pytest.mark.parametrize("case", BAD_YAML)
def test_configurations_are_read_strictly(tmp_path: Path, case: str) -> None:
    content, message = BAD_YAML[case]
    file = tmp_path / "run.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message) as raised:
        load_file(file)
    text = str(raised.value)
    assert isinstance(raised.value, ValueError) and str(file) in text and "\n" not in text and len(text) < 500


def test_a_date_is_text(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("run: {dir: 2026-01-31}")
    assert load_file(tmp_path / "run.yaml").run.dir == "2026-01-31"


def test_numbers_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("train: {steps: 0012, seed: 0x1F}\ndata: {seed: 0o17}\noptim: {lr: 1e-05}")
    config = load_file(tmp_path / "run.yaml")
    assert (config.train.steps, config.train.seed, config.data.seed, config.optim.lr) == (12, 31, 15, 1e-05)


@pytest.mark.parametrize("text", ["runs/a #1", "'x'", '"x"', "0012", "1:30", "null", "yes", "[a]", "a: b", " a "])
def test_options_keep_the_text_where_text_is_wanted(text: str) -> None:
    assert parse(["quickstart_small", "--run.dir", text]).run.dir == text


def test_options_read_numbers_and_lists_where_those_are_wanted() -> None:
    config = parse(["quickstart_small", "--train.steps", "0012", "--data.train", "[0.7, A, 0.3, B]"])
    assert config.train.steps == 12 and config.data.train == (0.7, "A", 0.3, "B")
    with pytest.raises(ConfigError, match="train.steps='1:30' must be int"):
        parse(["quickstart_small", "--train.steps", "1:30"])


def test_a_dump_holds_every_character(tmp_path: Path) -> None:
    """JSON's escapes are pairs of surrogates beyond 16 bits, which YAML does not put together."""
    config = parse(["quickstart_small", "--run.dir", "runs/\U0001f600 é \x7f \u2028"])
    (tmp_path / "run.json").write_text(dump(config), encoding="utf-8")
    assert load_file(tmp_path / "run.json") == config


def test_options_may_add_a_section_and_lists() -> None:
    names = "--model.rope_scaling.kind", "--model.rope_scaling.factor", "--parallel.layers_per_stage"
    config = parse(["quickstart_small", names[0], "linear", names[1], "4", names[2], "[2, 2]"])
    assert (config.model.rope_scaling.kind, config.model.rope_scaling.factor) == ("linear", 4.0)
    assert config.parallel.layers_per_stage == (2, 2)
    with pytest.raises(ConfigError, match=r"^command line: model.rope_scaling.kind is missing"):
        parse(["quickstart_small", names[1], "4"])


def test_maps_that_claim_more_than_the_file_holds_are_refused(tmp_path: Path) -> None:
    models = {name: json.dumps({"hidden_size": size}) for name, size in (("source", 512), ("target", 1 << 30))}
    safetensors.torch.save_file({"width.hidden": torch.zeros(2, 2)}, tmp_path / "m.safetensors", models)
    with pytest.raises(CheckpointError, match="num_layers grows from 8 to 8, but the file holds 4 numbers"):
        load_maps(tmp_path / "m.safetensors")


def test_values_are_shown_in_one_short_line() -> None:
    values = ["a\n" * 10_000, 10**5000, [[[[1]]]] * 100, {"b": 1, "a": {"c": {"d": {}}}}, float("nan"), b"x" * 999]
    assert all(len(shown(value)) <= 120 and "\n" not in shown(value) for value in values)
    assert shown({"type": "linear", "factor": 2.0}) == "{'type': 'linear', 'factor': 2.0}"
