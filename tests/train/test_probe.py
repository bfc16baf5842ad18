"""Ranking ways of growing: the tool in one process, and the same order on ranks."""

import dataclasses
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from torch import Tensor

from megagrow.checkpoint.source import open_source
from megagrow.config import Config, GrowthConfig, ParallelConfig, TrainConfig
from megagrow.config_file import dump
from megagrow.errors import ConfigError
from megagrow.parallel.mesh import Mesh, make_mesh
from megagrow.parallel.pipeline import Batch, Engine
from megagrow.train.growing import check_recipes
from megagrow.train.probe import Candidate, Outcome, _cursor, _fork_config, _with_policy, caution, probe
from megagrow.train.state import RunState
from tests.ranks import run_ranks
from tests.train.runs import LARGE, SMALL, make_config

ROOT = Path(__file__).parents[2]
WIDE = dataclasses.replace(LARGE, num_layers=SMALL.num_layers)
CANDIDATES = (Candidate("clone", "exact"), Candidate("clone", "reset"))


def planned(corpus: Path) -> Config:
    growth = GrowthConfig("clone", at_step=40)
    return dataclasses.replace(make_config(corpus, Path("unused"), 400), model=WIDE, growth=growth)


def probe_on_ranks(source: Path, config: Config) -> list[Outcome]:
    return probe(open_source(source), config, CANDIDATES, 3, make_mesh(config.parallel))


def test_candidates_are_ranked_by_the_loss_after_the_lag(trained: Path, corpus: Path, tmp_path: Path) -> None:
    config = planned(corpus)
    (tmp_path / "large.json").write_text(dump(config))
    command = [sys.executable, str(ROOT / "tools/probe_growth.py"), str(tmp_path / "large.json")]
    options = ["--source", str(trained), "--candidates", "clone", "clone:reset", "--steps", "3"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    output = subprocess.run(
        [*command, *options, "--json", str(tmp_path / "found.json"), "--train.eval-batches", "1"],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    ).stdout
    assert "clone:exact" in output and "lag: 3 steps, 0.0075 of the run's 400: short." in output
    found = json.loads((tmp_path / "found.json").read_text())
    rows = found["rows"]
    assert found["lag_steps"] == 3 and "short" in found["note"]
    assert {row["candidate"] for row in rows} == {"clone:exact", "clone:reset"}
    assert rows[0]["loss"] < rows[1]["loss"] and rows[0]["loss_initial"] == rows[1]["loss_initial"]
    assert all(row["flops"] > 0 and row["seconds"] > 0 for row in rows)
    assert not Path("unused").exists() and {p.name for p in tmp_path.iterdir()} == {"large.json", "found.json"}
    config = dataclasses.replace(
        config, parallel=ParallelConfig(tensor=2), train=dataclasses.replace(config.train, eval_batches=1)
    )
    for outcomes in run_ranks(probe_on_ranks, 4, trained, config):
        assert [each.candidate for each in outcomes] == [row["candidate"] for row in rows]
        assert [each.loss for each in outcomes] == pytest.approx([row["loss"] for row in rows], abs=1e-4)


def test_what_cannot_be_probed_is_refused_before_any_training(trained: Path, corpus: Path) -> None:
    source, config = open_source(trained), planned(corpus)
    for changed, candidate, words in [
        (config, Candidate("clon", "exact"), "growth.method=clon"),
        (config, Candidate("ligo", "exact"), "learned maps"),
        (config, Candidate("none", "exact"), "candidate none"),
        (config, Candidate("stack", "exact"), "stack grows depth only"),
        (dataclasses.replace(config, growth=GrowthConfig()), CANDIDATES[0], "growth.method=none"),
        (dataclasses.replace(config, train=TrainConfig(eval_batches=0)), CANDIDATES[0], "train.eval_batches"),
    ]:
        with pytest.raises(ConfigError, match=words):
            probe(source, changed, [CANDIDATES[0], candidate], 3, Mesh.single())


def test_a_candidate_that_diverges_is_the_last_one(
    trained: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a loss that is no number, or by refused steps; the candidates after it still have their turn.

    Samples of the lag are the same for all, those that learn maps come before.
    """
    config, lag = planned(corpus), 3
    growth = dataclasses.replace(config.growth, ligo_steps=2)
    config = dataclasses.replace(config, growth=growth, optim=dataclasses.replace(config.optim, max_bad_steps=2))
    train_step = Engine.train_step
    first: list[int] = []

    def watched(self: Engine, batch: Batch) -> Tensor:
        first.append(int(batch.ids.sum()))
        return train_step(self, batch) * (math.nan if len(first) in (2, 3) else 1.0)

    monkeypatch.setattr(Engine, "train_step", watched)
    candidates = [CANDIDATES[1], CANDIDATES[0], Candidate.parse("ligo", "")]
    outcomes = probe(open_source(trained), config, candidates, lag, Mesh.single())
    assert {each.candidate for each in outcomes[:2]} == {"clone:exact", "ligo:reset"}
    assert (outcomes[2].candidate, outcomes[2].loss) == ("clone:reset", None)
    assert first[:3] == first[3:6] == first[8:] and len(first) == 11
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    table = runpy.run_path(str(ROOT / "tools/probe_growth.py"))["table"](outcomes)
    assert list(table.columns[2].cells)[2] == "not finite"


def test_a_candidate_without_a_policy_takes_one_that_has_a_rule(trained: Path, corpus: Path) -> None:
    source, config = open_source(trained), planned(corpus)
    found = []
    for method in ("clone", "net2net", "rms_random", "aki", "ligo", "direct_copy"):
        candidate = _with_policy(Candidate.parse(method, ""), source, config)
        check_recipes(RunState(source.model, "small"), _fork_config(source, config, candidate, 3))
        found.append(candidate.optimizer)
    assert found == ["exact", "asymmetric", "zero_pad", "asymmetric", "reset", "zero_pad"]
    assert _with_policy(Candidate.parse("clone", "reset"), source, config).optimizer == "reset"
    assert _with_policy(Candidate.parse("clone:asymmetric", "reset"), source, config).optimizer == "asymmetric"


def test_samples_go_on_only_in_the_same_order(trained: Path, corpus: Path) -> None:
    source, config = open_source(trained), planned(corpus)
    assert _cursor(source, config) == 40 * 4
    for changed in ({"seq_length": 8}, {"seed": 5}):
        assert _cursor(source, dataclasses.replace(config, data=dataclasses.replace(config.data, **changed))) == 0


def test_a_long_lag_is_not_called_short(corpus: Path) -> None:
    assert "short" not in caution(40, planned(corpus))
