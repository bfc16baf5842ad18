"""Tests ../../megagrow/plan/targets.py: what is named can be grown, trained and laid out, and nothing else is named."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from megagrow.__main__ import main as megagrow_main
from megagrow.checkpoint import hf
from megagrow.checkpoint.source import open_source
from megagrow.checks import problems
from megagrow.command_line import parse
from megagrow.config import Config, DataConfig, InitConfig, ModelConfig, OptimConfig, SaltConfig, TrainConfig
from megagrow.errors import ConfigError, UnknownToken
from megagrow.growth.methods import make_recipe
from megagrow.plan import Machine, find_targets
from megagrow.plan.targets import Target
from megagrow.presets import bert_model
from megagrow.roles import num_parameters
from tests.growth.test_offline import make, tensors_of
from tests.tools import run_tool

SMALL = ModelConfig(
    family="qwen3",
    vocab_size=64, hidden_size=256, num_layers=2, num_heads=8, num_kv_heads=2, head_dim=32, ffn_size=512,
    max_seq_length=32, qk_norm=True,
)  # fmt: skip
RUN = Config(
    data=DataConfig(seq_length=32),
    train=TrainConfig(steps=100, global_batch_size=8),
    optim=OptimConfig(lr=1e-3),
)
ASKED = 2e6, 2e7
ASKING = "--source", "HERE", "--target-params"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("small") / "hf"
    hf.write_hf_folder(path, SMALL, tensors_of(make(SMALL)).__getitem__)
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> list[Target]:
    return find_targets(replace(RUN, init=InitConfig(str(folder))), SMALL, ASKED, 4, Machine(), count=40)


def test_every_target_can_be_grown_and_trained(found: list[Target], folder: Path) -> None:
    assert len(found) > 10
    for target in found:
        model = target.config.model
        assert ASKED[0] <= num_parameters(model) <= ASKED[1]
        assert model.num_layers == SMALL.num_layers * target.depth
        for name in ("hidden_size", "num_heads", "num_kv_heads", "ffn_size"):
            assert getattr(model, name) == getattr(SMALL, name) * target.width
        assert (model.head_dim, model.qk_norm, model.max_seq_length) == (32, True, 32)
        assert make_recipe(target.config.growth.method, SMALL, model).target == model
        assert target.suggestion is not None and target.problem == "" and not problems(target.config, 4)
        assert target.config.init.from_ == str(folder)


def test_depth_comes_first_and_the_nearest_to_the_middle_before_others(found: list[Target]) -> None:
    methods = list(dict.fromkeys(target.config.growth.method for target in found))
    assert methods == ["stack", "rms_random+stack", "rms_random"]
    middle = (ASKED[0] * ASKED[1]) ** 0.5
    for method in methods:
        sizes = [num_parameters(target.config.model) for target in found if target.config.growth.method == method]
        distances = [max(size / middle, middle / size) for size in sizes]
        assert distances == sorted(distances)


def test_the_rate_falls_with_the_width_alone(found: list[Target]) -> None:
    for target in found:
        assert target.config.optim.lr == pytest.approx(1e-3 / float(target.width), rel=1e-2)
    assert {target.width for target in found} >= {Fraction(1), Fraction(3, 2), Fraction(2)}


def test_whole_numbers_of_heads_only() -> None:
    """Of 8 query and 2 key/value heads there is no 5/4 and no 4/3; of 6 and 3 there is 4/3, but no 3/2."""
    path = InitConfig("")

    def widths(model: ModelConfig) -> set[Fraction]:
        asked = 1e5, 1e9
        targets = find_targets(replace(RUN, init=path), model, asked, 1, Machine(memory=1.0), count=99)
        return {target.width for target in targets}

    assert widths(SMALL) == {Fraction(1), Fraction(3, 2), Fraction(2), Fraction(3), Fraction(4)}
    six = replace(SMALL, num_heads=6, num_kv_heads=3, hidden_size=192, ffn_size=384)
    assert widths(six) == {Fraction(1), Fraction(4, 3), Fraction(2), Fraction(3), Fraction(4)}


def test_encoders_grow_as_was_published_for_encoders() -> None:
    model = replace(bert_model(2, 128), vocab_size=64, max_seq_length=32)
    run = replace(RUN, data=DataConfig(seq_length=32, mask_token=3))
    targets = find_targets(run, model, (5e5, 1e7), 1, Machine(memory=1.0), count=99)
    assert {target.config.growth.method for target in targets} == {"stack", "aki+stack", "aki"}


def test_what_does_not_fit_says_why(folder: Path) -> None:
    run = replace(RUN, init=InitConfig(str(folder)))
    (target,) = find_targets(run, SMALL, ASKED, 4, Machine(memory=1e6), count=1)
    assert target.suggestion is None and target.problem.startswith("none needs less than")
    taught = replace(run, salt=SaltConfig(teacher=str(folder), cache="answers", steps=10))
    (target,) = find_targets(taught, SMALL, ASKED, 4, Machine(), count=1)
    assert target.suggestion is None and "both teach" in target.problem


def test_sizes_that_no_growth_reaches_are_refused() -> None:
    with pytest.raises(ConfigError, match="no model of 1e\\+03 to 2e\\+03 parameters"):
        find_targets(RUN, SMALL, (1e3, 2e3), 1, Machine())


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    return lambda *arguments: (run_tool("plan", *arguments), *capsys.readouterr())


def test_the_first_target_is_written_as_a_run(
    tool: Callable[..., tuple[int, str, str]], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yaml = tmp_path / "run.yaml"
    yaml.write_text("data: {seq_length: 32}\ntrain: {global_batch_size: 8, steps: 100}\noptim: {lr: 0.001}\n")
    asked = "--source", folder, "--target-params", "2e6..2e7", "--budget-tokens", "1e5", "--count", "2"
    code, out, err = tool(yaml, "--world-size", "2", *asked, "--write", tmp_path / "large.json")
    assert (code, err) == (0, "")
    for words in ("stack", "G_stack", "does not reach down", "warmup_steps", "Time rests on assumptions"):
        assert words in out
    config = parse([str(tmp_path / "large.json")])
    assert config.init.from_ == str(folder) and config.growth.method == "stack"
    assert config.train.steps == 391  # 100,000 tokens in steps of 8 x 32
    assert json.loads((tmp_path / "large.json").read_text())["model"]["num_layers"] == config.model.num_layers
    make_recipe("stack", open_source(folder).model, config.model)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert megagrow_main([str(tmp_path / "large.json"), "--dry-run"]) == 0
    assert "growing" in capsys.readouterr().out


def test_what_is_written_fits_and_programs_can_read_all_of_it(
    tool: Callable[..., tuple[int, str, str]], folder: Path, tmp_path: Path
) -> None:
    asked = "--world-size", "2", "--source", folder, "--target-params", "2e6..2e7", "--count", "2"
    small = "--data.seq_length", "32", "--train.global_batch_size", "8"
    files = "--json", tmp_path / "all.json", "--write", tmp_path / "large.json"
    code, _, err = tool("llama_125m", *asked, *small, *files, "--gpu-memory", "0.0001")
    assert code == 2 and "none of them fits" in err and not (tmp_path / "large.json").exists()
    told = json.loads((tmp_path / "all.json").read_text())
    assert [each["method"] for each in told] == ["stack", "stack"] and told[0]["layout"] is None
    assert told[0]["model"]["num_layers"] == 2 * told[0]["depth"] and "GiB" in told[0]["problem"]


def test_why_growth_is_refused_is_told() -> None:
    odd = replace(SMALL, family="gpt2")
    with pytest.raises(ConfigError, match="cannot be exported"):
        find_targets(RUN, odd, (1e5, 1e9), 1, Machine())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--source", "HERE"), "wants --target-params"),
        ((*ASKING, "2e7..2e6"), "invalid parameters value"),
        ((*ASKING, "many"), "invalid parameters value"),
        ((*ASKING, "2e6..2e7", "--budget-tokens", "0"), "invalid amount value"),
        ((*ASKING, "2e6..2e7", "--budget-tokens", "inf"), "invalid amount value"),
        ((*ASKING, "2e6..2e7", "--count", "0"), "--count 0 must be positive"),
        ((*ASKING, "2e6..2e7", "--write", "missing/x"), "its folder does not exist"),
        ((*ASKING, "2e6..2e7", "--write", "large.json", "--run.dir", "HERE"), "holds the source; give the run another"),
        ((*ASKING, "2e6..2e7", "--suggest"), "--suggest has no effect with --source"),
        (
            ("--source", "HERE", "--target-params", "2e6..2e7", "--growth.method", "stack"),
            "is what --source is to choose",
        ),
        (("--budget-tokens", "1e9"), "--budget-tokens has no effect without --source"),
    ],
)
def test_bad_requests_are_refused(
    options: tuple[str, ...], words: str, tool: Callable[..., tuple[int, str, str]], folder: Path
) -> None:
    given = [folder if option == "HERE" else option for option in options]
    code, _, err = tool("quickstart_small", "--world-size", "1", *given)
    assert code == 2 and words in err and len(err.strip().splitlines()) == 1


def test_a_source_that_is_not_there_is_told(tool: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = tool("quickstart_small", "--world-size", "1", "--source", "nowhere", "--target-params", "1e6")
    assert code == 4 and "no such folder" in err


def test_an_unknown_token_can_be_copied() -> None:
    """By the protocol with which a process sends errors to another one."""
    error = copy.copy(UnknownToken("token 9", 9))
    assert (str(error), error.token) == ("token 9", 9)
