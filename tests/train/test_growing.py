"""Growth of what a run really has: master weights in float32 under bf16, and an optimizer in any memory."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megagrow.config import Config, GrowthConfig, OptimConfig, ParallelConfig, TrainConfig
from megagrow.evaluate import make_batch
from megagrow.growth.grow import Fetch, grow_whole
from megagrow.growth.methods import make_recipe
from megagrow.growth.moments import QUANTITIES
from megagrow.growth.recipe import Recipe
from megagrow.optim import StepGuard
from megagrow.parallel.mesh import Mesh, make_mesh
from megagrow.parallel.shards import full
from megagrow.train import growing
from megagrow.train.learner import Learner
from megagrow.train.part import build_part, initialize_part
from megagrow.train.state import RunState
from tests.ranks import run_ranks
from tests.train.runs import LARGE, SMALL

CONFIG = Config(
    model=LARGE,
    train=TrainConfig(steps=9, global_batch_size=4, precision="bf16"),
    data=dataclasses.replace(Config().data, seq_length=16),
    optim=OptimConfig(lr=1e-2),
    growth=GrowthConfig("clone", source=SMALL, at_step=2),
)


def train(learner: Learner, steps: range, mesh: Mesh) -> None:
    for step in steps:
        tokens = torch.randint(256, (4, 17), generator=torch.Generator().manual_seed(step))
        share = tokens.chunk(mesh.dp.size)[mesh.dp.rank]
        assert learner.step(make_batch(share, 4, mesh), 1e-2, StepGuard()).accepted


def stored(learner: Learner) -> dict[str, Tensor]:
    return {name: full(tensor).clone() for name, tensor in learner.tensors().items()}


def grow_masters(mesh: Mesh, config: Config = CONFIG) -> None:
    """Weights and moments are those of the small model's float32, bit for bit, and no rounded copies of them."""
    small = build_part(SMALL, config, mesh)
    initialize_part(small, 1)
    learner = growing.new_learner(small, config)
    train(learner, range(2), mesh)
    masters = stored(learner)
    grown = growing.begin(learner, RunState(SMALL, "small", train_step=2), config, mesh)
    recipe, found = make_recipe("clone", SMALL, LARGE), stored(grown)
    for name in grown.part.parameters:
        for kind, quantity in {"model": "value", **{f"optim.{m}": q for m, q in QUANTITIES.items()}}.items():
            expected = grow_whole(recipe, lambda n, kind=kind: masters[f"{kind}.{n}"], name, quantity)
            assert found[f"{kind}.{name}"].dtype == torch.float32
            assert torch.equal(found[f"{kind}.{name}"], expected), name
        assert not torch.equal(expected, expected.bfloat16().float()), "rounded copies would pass, too"
    train(grown, range(2, 4), mesh)
    assert all(not torch.equal(tensor, found[name]) for name, tensor in stored(grown).items() if "weight" in name)


def grow_masters_here() -> None:
    grow_masters(make_mesh(ParallelConfig()))


@pytest.mark.parametrize("offload", [False, True])
def test_master_weights_grow_not_their_16_bit_copies(offload: bool) -> None:
    grow_masters(Mesh.single(), dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, offload=offload)))


def test_shards_of_master_weights_grow() -> None:
    run_ranks(grow_masters_here, 2)


def test_growing_from_16_bit_copies_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    grow_into = growing.grow_into

    def rounding(recipe: Recipe, fetch: Fetch, *where: Any) -> None:
        grow_into(recipe, lambda name: fetch(name).bfloat16().float(), *where)

    monkeypatch.setattr(growing, "grow_into", rounding)
    with pytest.raises(AssertionError):
        grow_masters(Mesh.single())
