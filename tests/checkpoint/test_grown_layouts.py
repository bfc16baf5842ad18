"""A grown run's checkpoint, moments included, is loaded by every layout from every layout, bit for bit."""

import dataclasses
from pathlib import Path

import pytest
import torch

from megagrow import checkpoint
from megagrow.checkpoint.shards import local_shards
from megagrow.config import CheckpointConfig, Config, GrowthConfig, ParallelConfig
from megagrow.parallel.mesh import Mesh, make_mesh
from megagrow.train import growing, saving
from tests.ranks import run_ranks
from tests.train.runs import LARGE, SMALL, make_config, make_corpus, run_on_ranks

LAYOUTS = {"2 tensor": (2, 2, 1), "2 stages": (2, 1, 2), "2 data": (2, 1, 1), "2 tensor, 2 stages": (4, 2, 2)}
STEPS = 3


def config_of(corpus: Path, directory: Path) -> Config:
    """Grows by copies before the second of three steps."""
    growth = GrowthConfig(method="clone", source=SMALL, at_step=1)
    options = CheckpointConfig(interval=0)
    return dataclasses.replace(
        make_config(corpus, directory, steps=STEPS, checkpoint=options), model=LARGE, growth=growth
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """A grown run of each layout."""
    folder = tmp_path_factory.mktemp("grown")
    corpus = make_corpus(folder)
    configs = {name: config_of(corpus, folder / name) for name in LAYOUTS}
    for name, (ranks, tensor, pipeline) in LAYOUTS.items():
        assert run_ranks(run_on_ranks, ranks, configs[name], tensor, pipeline) == [0] * ranks
    return configs


def load_all(configs: list[Config], tensor: int, pipeline: int) -> list[int]:
    """Loads each run's checkpoint into this layout; compares with the whole tensors, read by one process."""
    parallel = ParallelConfig(tensor, pipeline)
    mesh = make_mesh(parallel)
    return [load_and_compare(dataclasses.replace(config, parallel=parallel), mesh) for config in configs]


def load_and_compare(config: Config, mesh: Mesh) -> int:
    path = saving.root_of(config) / f"step-{STEPS}"
    manifest = checkpoint.read_manifest(path)
    state = saving.read_state(manifest, path, config, lambda text: None)
    learner = growing.learner_for(state, config, mesh)
    for tensor in learner.tensors().values():
        tensor.zero_()
    saving.load(manifest, path, learner, mesh)
    shards = local_shards(learner.tensors())
    whole = checkpoint.read_full(path, shards)
    for name, shard in shards.items():
        box = tuple(slice(o, o + s) for o, s in zip(shard.offsets, shard.data.shape, strict=True))
        assert torch.equal(shard.data, whole[name][box] if shard.data.numel() else shard.data), name
    assert any(name.startswith("optim.exp_avg_sq.") and whole[name].any() for name in shards)
    return len(shards)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_loads_every_grown_layout(saved: dict[str, Config], name: str) -> None:
    ranks, tensor, pipeline = LAYOUTS[name]
    for counts in run_ranks(load_all, ranks, list(saved.values()), tensor, pipeline):
        assert len(counts) == len(LAYOUTS) and min(counts) > 10
