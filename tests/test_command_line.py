"""Tests command_line.py: growths that stand in a list, on the command line and in --help. The rest: test_config.py."""

import dataclasses
import re

import pytest

from megagrow import presets
from megagrow.command_line import OF_MEGATRON, parse
from megagrow.config_file import option_names
from megagrow.earlier_growth import EarlierGrowth
from megagrow.errors import ConfigError

PRESET = "mslt_llama_125m"


def test_a_field_of_one_growth_of_several_is_set_by_its_number() -> None:
    (before,) = presets.get(PRESET).growth.earlier
    (after,) = parse([PRESET, "--growth.earlier.0.freeze-steps", "7"]).growth.earlier
    assert after == dataclasses.replace(before, freeze_steps=7) != before
    two = ["--growth.earlier", "[{num_layers: 4, at_step: 9}, {num_layers: 6, at_step: 50}]"]
    first, second = parse([PRESET, *two, "--growth.earlier.1.at-step=60"]).growth.earlier
    assert (first.at_step, second.at_step) == (9, 60)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([PRESET, "--growth.earlier.1.at-step", "2"], ["has no growth number 1", "give it whole"]),
        (["quickstart_small", "--growth.earlier.0.at-step", "2"], ["has no growth number 0", "give it whole"]),
        ([PRESET, "--growth.earlier.at-step", "2"], ["is a list", "--growth.earlier.0.at-step", "give it whole"]),
        ([PRESET, "--growth.earlier.0.step", "2"], ["unknown option", "did you mean growth.earlier."]),
        ([PRESET, "--growth.earlier.0.at-step", "-2"], ["growth.earlier.at_step=-2", "must not be negative"]),
        ([PRESET, f"--growth.earlier.{'9' * 5000}.at-step", "2"], ["unknown option"]),
        ([PRESET, "--growth.0.at-step", "2"], ["unknown option"]),
    ],
    ids=[
        "beyond the last",
        "no list",
        "no number",
        "no field",
        "no value",
        "no number of a list",
        "no list of growths",
    ],
)
def test_what_is_no_field_of_a_growth_gets_one_line(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(arguments)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.train", "0.7", "data/a", "0.3"], "data/a is no option; a value with spaces stands in quotes"),
        (["--parallel.sequence_parallel", "--run.dir", "x"], "needs a value, as in --parallel.sequence_parallel true"),
        (["--optim.lr", "--run.dir=x"], "needs a value, as in --optim.lr VALUE"),
        (["--growth.earlier.0.at-step", "--run.dir", "x"], "--growth.earlier.0.at-step needs a value"),
        (["--parallel.data", "8"], "unknown option --parallel.data; the data axis is what the other axes leave"),
        (
            ["--tensor-model-parallel-size", "2"],
            "unknown option --tensor-model-parallel-size; here it is --parallel.ten",
        ),
        (["--train-iters=5"], "unknown option --train-iters; here it is --train.steps"),
        (["--optim.lrr", "1"], "did you mean optim.lr?"),
    ],
)
def test_what_users_of_other_programs_type_gets_an_answer(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        parse([PRESET, *arguments])


def test_every_answer_to_a_name_of_megatrons_is_an_option() -> None:
    names = {answer.split()[0].rstrip(",") for answer in OF_MEGATRON.values()}
    assert names <= set(option_names())


@pytest.mark.parametrize("value", ["--", "-1", "--unknown"])
def test_a_value_may_begin_with_a_dash(value: str) -> None:
    assert parse([PRESET, "--run.wandb", value]).run.wandb == value


@pytest.mark.parametrize(
    ("arguments", "default"),
    [
        (["--help"], "[]"),
        (["quickstart_small", "--help"], "[]"),
        ([PRESET, "-h"], "[{num_layers: 6, at_step: 2000, freeze_steps: 1000}]"),
    ],
    ids=["no preset", "one growth", "several"],
)
def test_help_tells_how_to_grow_several_times(
    arguments: list[str], default: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse(arguments)
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert end.value.code == 0
    assert '--growth.earlier "[{num_layers, ' in printed
    _, option = printed.split("--growth.earlier ")
    option = option[: option.index("--growth.freeze-steps")]
    assert all(field.name in option for field in dataclasses.fields(EarlierGrowth))
    assert "growth.earlier.0.at_step" in option and f"(default: '{default}')" in option
