"""Whole runs whose maps live on the stages of their layers."""

import dataclasses
import math
from pathlib import Path

from megagrow.checkpoint import store
from megagrow.config import Config
from megagrow.growth.ligo_file import load_maps
from megagrow.growth.ligo_maps import map_shapes
from megagrow.train import run
from tests.ranks import run_ranks
from tests.train.runs import final_loss, make_config, make_corpus, run_on_ranks
from tests.train.test_run import cut_back, grown


def test_maps_move_to_the_stages_of_another_layout(tmp_path: Path) -> None:
    """Two stages of two ranks, then two ranks with two stages each, then one process; and the file holds all maps."""
    corpus = make_corpus(tmp_path)

    def config(name: str) -> Config:
        plain = grown(make_config(corpus, tmp_path / name), "ligo")
        return dataclasses.replace(plain, growth=dataclasses.replace(plain.growth, ligo_variant="target_layer"))

    assert run(config("one")) == 0
    moved = config("moved")
    assert run_ranks(run_on_ranks, 2, moved, 1, 2) == [0] * 2
    cut_back(tmp_path / "moved", 4)
    assert run_ranks(run_on_ranks, 2, moved, 1, 2, schedule="DualPipeV") == [0] * 2
    shapes = map_shapes(load_maps(tmp_path / "moved/maps.safetensors").start, "target_layer")
    cut_back(tmp_path / "moved", 6)
    saved = store.read_manifest(store.candidates(tmp_path / "moved/checkpoints")[0])
    for kind in ("map", "exp_avg", "exp_avg_sq"):
        assert {n.removeprefix(f"ligo.{kind}.") for n in saved.tensors if n.startswith(f"ligo.{kind}.")} == set(shapes)
    assert run(moved) == 0
    assert abs(final_loss(tmp_path / "moved") - final_loss(tmp_path / "one")) < 1e-4
    left, right = (load_maps(tmp_path / f"{name}/maps.safetensors").state_dict() for name in ("one", "moved"))
    assert left.keys() == right.keys() == shapes.keys()
    assert all((left[name] - right[name]).norm() <= 1e-3 * left[name].norm() for name in left)


def test_maps_learn_for_a_larger_vocabulary_on_shards(tmp_path: Path) -> None:
    """A run whose last model has more tokens than the one whose maps grow it; half-way it moves to one process."""
    corpus = make_corpus(tmp_path)
    config = grown(make_config(corpus, tmp_path / "run"), "ligo")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=259))
    assert run_ranks(run_on_ranks, 4, config, 2, 1) == [0] * 4
    cut_back(tmp_path / "run", 4)
    assert run(config) == 0
    assert load_maps(tmp_path / "run/maps.safetensors").start.target.vocab_size == 259
    assert final_loss(tmp_path / "run") < math.log(259)
    newest = store.candidates(tmp_path / "run/checkpoints")[0]
    assert store.read_manifest(newest).tensors["model.embedding.tokens"].shape == (259, config.model.hidden_size)
