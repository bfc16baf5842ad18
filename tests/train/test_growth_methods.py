"""Methods of growth inside a run: the loss goes on, and being cut off before or after growing changes nothing."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from megagrow.config import Config, GrowthConfig, InitConfig, ModelConfig
from megagrow.train import run
from tests.train.runs import LARGE, SMALL, make_config, metrics
from tests.train.test_run import assert_same_run, cut_back, ledger

PADDED = dataclasses.replace(LARGE, hidden_size=20, head_dim=8, norm_eps=SMALL.norm_eps * (16 / 20), num_layers=2)

GROWTHS = [
    (LARGE, GrowthConfig("net2net+insert_identity", breaker="noise", optimizer="asymmetric")),
    (PADDED, GrowthConfig("zero_pad", optimizer="zero_pad")),
]


def growing(corpus: Path, directory: Path, model: ModelConfig, growth: GrowthConfig) -> Config:
    growth = dataclasses.replace(growth, source=SMALL, at_step=3)
    return dataclasses.replace(make_config(corpus, directory), model=model, growth=growth)


@pytest.mark.parametrize(("model", "growth"), GROWTHS, ids=[growth.method for _, growth in GROWTHS])
def test_exact_methods_go_on_in_a_run(corpus: Path, tmp_path: Path, model: ModelConfig, growth: GrowthConfig) -> None:
    assert run(growing(corpus, tmp_path / "whole", model, growth)) == 0
    (event,) = ledger(tmp_path / "whole")["events"]
    assert (event["event"], event["method"]) == ("growth", growth.method)
    assert event["loss_after"] == event["loss_initial"] == pytest.approx(event["loss_before"], rel=1e-5)
    evaluations = [phase["steps"] for phase in ledger(tmp_path / "whole")["phases"] if phase["phase"] == "evaluation"]
    assert evaluations == [2, 2], "before growth and at step 3, after growth and at step 6"
    for step in (2, 4):
        shutil.copytree(tmp_path / "whole", tmp_path / "broken")
        cut_back(tmp_path / "broken", step)
        assert run(growing(corpus, tmp_path / "broken", model, growth)) == 0
        assert_same_run(tmp_path / "broken", tmp_path / "whole")
        shutil.rmtree(tmp_path / "broken")


def test_dropout_is_off_while_maps_learn(corpus: Path, trained: Path, tmp_path: Path) -> None:
    """So a run learns the maps that tools/grow_checkpoint.py learns; afterwards it drops."""
    losses = []
    for dropout in (0.0, 0.5):
        config = make_config(corpus, tmp_path / str(dropout), steps=2, init=InitConfig(str(trained)))
        growth = GrowthConfig("ligo", optimizer="reset", ligo_steps=3)
        train = dataclasses.replace(config.train, dropout=dropout)
        assert run(dataclasses.replace(config, model=LARGE, growth=growth, train=train)) == 0
        losses.append([(line["phase"], line["loss"]) for line in metrics(tmp_path / str(dropout))])
    without, dropped = losses
    assert [phase for phase, _ in dropped] == ["ligo"] * 3 + ["train"] * 2
    assert dropped[:3] == without[:3]
    assert dropped[3][1] > without[3][1] + 0.01
