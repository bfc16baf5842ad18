"""Learning LiGO's maps of tiny models on real text, in one process and on shards: what the tests of learning judge."""

# Shape suffix legend: B = batch, S = sequence, N = samples.

import argparse
import functools
import inspect
import textwrap
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from megagrow.config import Config, DataConfig, GrowthConfig, ModelConfig, ParallelConfig, TrainConfig
from megagrow.evaluate import make_batch, mean_loss
from megagrow.growth.ligo import Ligo
from megagrow.model import Transformer
from megagrow.model.transformer import initialize
from megagrow.optim import StepGuard
from megagrow.parallel.mesh import Mesh, make_mesh
from megagrow.train.growing import map_learner
from megagrow.train.learner import map_lr
from megagrow.train.part import build_part, load_part
from tests.growth.models import loss_of, tensors_of

SOURCE = ModelConfig(vocab_size=128, hidden_size=32, num_layers=2, num_heads=2, ffn_size=64, max_seq_length=48)
TARGET = replace(SOURCE, hidden_size=48, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=16, ffn_size=96)
SOURCE_STEPS, BATCH, SEQ = 100, 16, 47
LEARNED = 0.05  # nats by which learned maps must beat their initial ones

# One of each variant, which starts where a user would have it start: full_rank with new units, whose factors learn too.
WAYS = {
    "tied": GrowthConfig(ligo_steps=15, ligo_lr=3e-3, ligo_variant="tied"),
    "source_layer": GrowthConfig(ligo_steps=15, ligo_lr=3e-3, ligo_variant="source_layer"),
    "target_layer": GrowthConfig(ligo_steps=15, ligo_lr=1e-2, ligo_variant="target_layer", ligo_init="authors"),
    "full_rank": GrowthConfig(ligo_steps=15, ligo_lr=3e-3, ligo_variant="full_rank"),
}


@dataclass(frozen=True)
class Learned:
    """Held-out losses of the target with the initial and with the learned maps, and how far each map has moved."""

    before: float
    after: float
    moved: dict[str, float]


def assert_learned(result: Learned) -> None:
    """What the tests ask for: every map has moved, and the loss has fallen."""
    still = [name for name, distance in result.moved.items() if distance == 0]
    assert not still, f"not moved: {', '.join(still)}"
    assert result.after < result.before - LEARNED, (result.before, result.after)


def learn(
    seed: int,
    growth: GrowthConfig,
    parallel: ParallelConfig | None = None,
    change: Callable[[Ligo], None] = lambda ligo: None,
    source: dict[str, Tensor] | None = None,
) -> Learned:
    """Trains a small model, or takes a trained one, and learns the maps that grow it.

    Args:
        seed: of everything.
        growth: the settings of LiGO.
        parallel: the layout of this process group; None: one process.
        change: is applied to the maps before they learn.
        source: a trained source.
    """
    mesh = Mesh.single() if parallel is None else make_mesh(parallel)
    config = _config(seed, growth, mesh.parallel)
    small = build_part(SOURCE, config, mesh)
    load_part(small, (source or trained_source(seed)).__getitem__)
    learner = map_learner(small, config)
    change(learner.ligo)
    learner.generate()
    initial = {name: tensor.clone() for name, tensor in learner.ligo.state_dict().items()}
    before = mean_loss(learner.part.engine, held_out(), BATCH, mesh)
    guard, batches = StepGuard(), windows(seed + 1)
    for step in range(growth.ligo_steps):
        share = next(batches).chunk(mesh.dp.size)[mesh.dp.rank]
        assert learner.step(make_batch(share, BATCH, mesh), map_lr(step, config), guard).accepted
    after = mean_loss(learner.part.engine, held_out(), BATCH, mesh)
    moved = {n: (t - initial[n]).abs().max().item() for n, t in learner.ligo.state_dict().items()}
    return Learned(before, after, moved)


@functools.cache
def trained_source(seed: int) -> dict[str, Tensor]:
    """A small model that has learned some Python."""
    model, batches = Transformer(SOURCE), windows(seed)
    initialize(dict(model.named_parameters()), model.config, seed)
    adamw = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(SOURCE_STEPS):
        adamw.zero_grad()
        loss_of(model, next(batches)).backward()
        adamw.step()
    return tensors_of(model)


def windows(seed: int) -> Iterator[Tensor]:
    """Batches [B, S + 1] of the training text."""
    text, generator = _bytes_of(argparse, typing), torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(text) - SEQ - 1, (BATCH, 1), generator=generator)
        yield text[starts + torch.arange(SEQ + 1)]


def held_out() -> Tensor:
    """[N, S + 1] of another text."""
    return _bytes_of(textwrap)[: 4 * BATCH * (SEQ + 1)].view(-1, SEQ + 1)


def _bytes_of(*modules: ModuleType) -> Tensor:
    text = "".join(inspect.getsource(module) for module in modules)
    return torch.tensor([byte for byte in text.encode() if byte < 128])


def _config(seed: int, growth: GrowthConfig, parallel: ParallelConfig) -> Config:
    return Config(
        model=TARGET,
        data=DataConfig(seq_length=SEQ),
        parallel=parallel,
        train=TrainConfig(global_batch_size=BATCH, seed=seed),
        growth=replace(growth, method="ligo", source=SOURCE, at_step=1, optimizer="reset"),
    )
