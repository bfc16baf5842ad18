"""Tests megagrow/train/map_learning.py and the tool that uses it: LiGO from folder to folder."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megagrow.checkpoint.source import check_fits, open_source
from megagrow.config import GrowthConfig, InitConfig, ParallelConfig
from megagrow.config_file import dump
from megagrow.data.dataset import PackedDataset
from megagrow.data.indexed import IndexedWriter
from megagrow.errors import ConfigError, DataError
from megagrow.flops import ligo_generation_flops, ligo_step_flops
from megagrow.growth.grow import Fetch, grow_whole
from megagrow.growth.ligo import Ligo
from megagrow.growth.ligo_file import load_maps
from megagrow.ledger import Ledger
from megagrow.parallel.mesh import Mesh, make_mesh
from megagrow.train import run
from megagrow.train.map_learning import MapLearning, learn_maps
from tests.ranks import run_ranks
from tests.train.runs import LARGE, SMALL, make_config

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "grow_checkpoint.py"


def learn(
    source: Path, corpus: Path, steps: int, mesh: Mesh | None = None, lr: float = 1e-2
) -> tuple[list[float], dict[str, torch.Tensor]]:
    losses: list[float] = []
    growth = GrowthConfig(ligo_steps=steps, ligo_lr=lr)
    how = MapLearning(str(corpus / "train"), growth, seq_length=16, batch_size=8)
    ligo = learn_maps(open_source(source), LARGE, how, mesh or Mesh.single(), lambda _, loss: losses.append(loss))
    return losses, ligo.state_dict()


def test_gradients_of_weights_are_gone_before_weights_are_generated(
    trained: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, seen = Ligo.generate, list[bool]()

    def watched(ligo: Ligo, fetch: Fetch, targets: Mapping[str, Tensor]) -> None:
        seen.append(any(parameter.grad is not None for parameter in targets.values()))
        generate(ligo, fetch, targets)

    monkeypatch.setattr(Ligo, "generate", watched)
    learn(trained, corpus, steps=1)
    assert seen == [False, False]


def learn_on_ranks(source: Path, corpus: Path, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    return learn(source, corpus, steps, make_mesh(ParallelConfig(tensor=2)))


def test_learning_lowers_the_loss(trained: Path, corpus: Path) -> None:
    """On the same batches, maps that learn do better than maps that stand still."""
    learned, _ = learn(trained, corpus, steps=30)
    unlearned, _ = learn(trained, corpus, steps=30, lr=0.0)
    assert learned[0] == unlearned[0]
    assert sum(learned[-5:]) < sum(unlearned[-5:]) - 0.2


def test_learning_on_shards_gives_the_same_maps(trained: Path, corpus: Path) -> None:
    expected_losses, expected = learn(trained, corpus, steps=3)
    for losses, maps in run_ranks(learn_on_ranks, 4, trained, corpus, 3):
        assert losses == pytest.approx(expected_losses, abs=1e-5)
        for name in expected:
            # Entries whose gradient is nearly zero move by its sign in Adam's first steps, so single ones may differ.
            assert (maps[name] - expected[name]).norm() < 1e-3 * expected[name].norm(), name


def test_a_run_leaves_its_maps_for_other_growths(trained: Path, corpus: Path, tmp_path: Path) -> None:
    growth = GrowthConfig(method="ligo", optimizer="reset", ligo_steps=2)
    init = InitConfig(from_=str(trained))
    assert run(make_config(corpus, tmp_path, steps=1, model=LARGE, growth=growth, init=init)) == 0
    assert load_maps(tmp_path / "maps.safetensors").start.target == LARGE


def test_the_tool_learns_and_grows(trained: Path, corpus: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.json"
    target.write_text(dump(make_config(corpus, tmp_path, model=LARGE)))
    command = [sys.executable, str(TOOL), str(trained), str(tmp_path / "grown"), "--target", str(target)]
    options = ["--method", "ligo", "--data", str(corpus / "train"), "--steps", "10", "--lr", "1e-2"]
    options += ["--seq-length", "16", "--batch-size", "8"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run([*command, *options], check=True, capture_output=True, env=environment, text=True)
    assert re.search(rf"source {re.escape(str(open_source(trained).path))}: loss \d\.\d+ on the data", done.stderr)
    grown = open_source(tmp_path / "grown")
    assert grown.model == LARGE
    held_out = PackedDataset(corpus / "validation", 16)
    losses = [check_fits(source, held_out, Mesh.single()) for source in (open_source(trained), grown)]
    assert losses[1] < losses[0] + 0.5
    ledger = Ledger.from_dict(grown.ledger)
    learning = 10 * ligo_step_flops(SMALL, LARGE, 8 * 16, 16) + ligo_generation_flops(SMALL, LARGE)
    before = Ledger.from_dict(open_source(trained).ledger).totals()["all_in"]
    assert ledger.totals()["papers_convention"]["flops"] == pytest.approx(learning)
    assert ledger.totals()["all_in"]["flops"] == pytest.approx(learning + before["flops"])
    assert [phase.phase for phase in ledger.phases] == ["ligo", "growth"]
    name = "layers.2.mlp.down.weight"
    by_maps = grow_whole(load_maps(tmp_path / "grown.maps.safetensors").recipe(), open_source(trained).fetch, name)
    torch.testing.assert_close(grown.fetch(name), by_maps)
    assert json.loads(target.read_text())["model"]["hidden_size"] == 32


def test_a_source_that_does_not_fit_is_refused_unless_told(trained: Path, corpus: Path, tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "other", np.uint16) as writer:
        writer.add_document(np.arange(2000) * 97 % 256)
        writer.close()
    how = MapLearning(str(tmp_path / "other"), GrowthConfig(ligo_steps=1), seq_length=16, batch_size=2)
    with pytest.raises(DataError, match="--skip-source-check"):
        learn_maps(open_source(trained), LARGE, how, Mesh.single(), lambda _, loss: None)
    how = dataclasses.replace(how, skip_source_check=True)
    learn_maps(open_source(trained), LARGE, how, Mesh.single(), lambda _, loss: None)


def test_a_target_that_the_mesh_cannot_hold_is_refused(trained: Path, corpus: Path) -> None:
    how = MapLearning(str(corpus / "train"), seq_length=16, batch_size=0)
    with pytest.raises(ConfigError, match="global_batch_size=0"):
        learn_maps(open_source(trained), dataclasses.replace(SMALL), how, Mesh.single(), lambda _, loss: None)
