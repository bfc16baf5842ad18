"""A run that makes copies which can never part says so, and no other does."""

import dataclasses
from pathlib import Path

import pytest
import torch

from megagrow.checkpoint import hf
from megagrow.checkpoint.source import open_source
from megagrow.config import Config, GrowthConfig, InitConfig
from megagrow.config_file import dump
from megagrow.growth.methods import make_recipe
from megagrow.growth.verify import replica_distances
from megagrow.train import run
from tests.tools import run_tool
from tests.train.runs import LARGE, SMALL, make_config
from tests.train.test_run import weights

WARNING = "nothing tells copies apart"
WIDE = dataclasses.replace(LARGE, num_layers=SMALL.num_layers)
WARMS = {"rewarmup_part": "new", "rewarmup_steps": 2}
CASES = [
    ("own", GrowthConfig("clone"), 0.0, True),
    ("own", GrowthConfig("clone", optimizer="reset"), 0.0, True),
    ("own", GrowthConfig("clone", optimizer="asymmetric"), 0.0, False),
    ("own", GrowthConfig("clone", breaker="noise"), 0.0, False),
    ("own", GrowthConfig("clone", breaker="split", optimizer="reset"), 0.0, False),
    ("hf", GrowthConfig("clone", optimizer="asymmetric"), 0.0, True),
    ("hf", GrowthConfig("clone", optimizer="asymmetric", **WARMS), 0.0, False),
    ("hf", GrowthConfig("clone", optimizer="asymmetric", at_step=1), 0.0, False),
    ("own", GrowthConfig("clone"), 0.5, True),
]


@pytest.mark.parametrize(("kind", "growth", "dropout", "warned"), CASES)
def test_copies_that_never_part_are_told(
    kind: str,
    growth: GrowthConfig,
    dropout: float,
    warned: bool,
    corpus: Path,
    trained: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """With dropout it is the copies of neurons and heads that do not part."""
    source = trained
    if kind == "hf":
        source = tmp_path / "hf"
        hf.write_hf_folder(source, SMALL, open_source(trained).fetch)
    config = make_config(corpus, tmp_path / "run", steps=3, init=InitConfig(str(source)), growth=growth)
    train = dataclasses.replace(config.train, dropout=dropout)
    assert run(dataclasses.replace(config, model=WIDE, train=train)) == 0
    said = capfd.readouterr().err
    assert said.count(WARNING) == warned
    found = weights(tmp_path / "run")
    if dropout:
        assert "copies units of ffn and heads" in said
        first, second = found["layers.0.mlp.down.weight"].unflatten(1, (SMALL.ffn_size, 2)).unbind(2)
        assert torch.equal(first, second)
    distances = replica_distances(make_recipe("clone", SMALL, WIDE), found)
    assert (max(distances.values()) <= 1e-6) == (warned and not dropout)


def test_methods_without_copies_and_depth_alone_are_silent(
    corpus: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    deep = dataclasses.replace(SMALL, num_layers=4)
    padded = GrowthConfig("rms_random", optimizer="zero_pad")
    for number, (model, growth) in enumerate(((WIDE, padded), (deep, GrowthConfig("clone")))):
        config = make_config(corpus, tmp_path / str(number), steps=1, init=InitConfig(str(trained)), growth=growth)
        assert run(dataclasses.replace(config, model=model)) == 0
    assert WARNING not in capfd.readouterr().err


def test_growing_a_folder_tells_it_too(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "large.yaml").write_text(dump(Config(model=WIDE)))
    how = "--target", tmp_path / "large.yaml", "--method", "clone"
    for number, options in enumerate(((), ("--optimizer", "asymmetric"), ("--breaker", "noise"))):
        warned = not options
        assert run_tool("grow_checkpoint", trained, tmp_path / str(number), *how, *options) == 0
        assert (
            capsys.readouterr().out.count(f"{WARNING}: they learn the same and stay equal for ever; set --bre")
            == warned
        )
