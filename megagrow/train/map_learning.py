"""Learning LiGO's maps outside a run, for growing folders."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from megagrow import flops
from megagrow.checkpoint.source import Source, check_fits
from megagrow.checks import check, check_causal
from megagrow.config import Config, DataConfig, GrowthConfig, ModelConfig, ParallelConfig, TrainConfig, require
from megagrow.data.loader import Stream, shuffled
from megagrow.errors import NonFiniteError
from megagrow.evaluate import make_batch
from megagrow.growth.ligo import Ligo, load_maps
from megagrow.ledger import Ledger, Phase
from megagrow.optim import StepGuard
from megagrow.parallel.mesh import Mesh
from megagrow.train.growing import map_learner
from megagrow.train.learner import map_lr
from megagrow.train.part import build_part, load_part
from megagrow.train.streams import open_dataset
from megagrow.train.trainer import describe_model


@dataclass(frozen=True)
class MapLearning:
    """How maps are learned.

    Attributes:
        data: prefix of the training tokens.
        steps, lr: of the maps' AdamW; the learning rate decays to zero.
        seq_length, batch_size: of the samples, over all ranks.
        seed: of the initial maps and the order of samples.
        skip_source_check: learn although the source does not fit the data.
    """

    data: str
    steps: int = 100
    lr: float = 3e-3
    seq_length: int = 128
    batch_size: int = 16
    seed: int = 1234
    skip_source_check: bool = False


def learn_maps(
    source: Source,
    target: ModelConfig,
    how: MapLearning,
    mesh: Mesh,
    tell: Callable[..., None],
    ledger: Ledger | None = None,
) -> Ligo:
    """Learns the maps that grow `source` into `target` on the ordinary loss; a collective over the mesh.

    Args:
        source: the small model.
        target: the large one.
        how: data, steps and rates.
        mesh: data and tensor axes; both models are sharded over them.
        tell: called after each step as `tell(number, loss=loss)`.
        ledger: takes what the learning costs; None: nobody asks.

    Returns:
        The learned maps, the same on every rank.

    Raises:
        ConfigError, DataError: settings or data that do not fit (see `checks.check`, `source.check_source`).
        NonFiniteError: the loss did not stay finite.
    """
    check_causal(source.model, str(source.path), "to learn maps outside of a run")
    config = _config(source.model, target, how, mesh)
    check(config, mesh.world.size)
    dataset = open_dataset(how.data, source.model, config)
    check_fits(source, dataset, mesh, how.skip_source_check)
    small = build_part(source.model, config, mesh)
    load_part(small, source.fetch)
    learner = map_learner(small, config)
    learner.generate()
    stream, guard = Stream([shuffled(dataset, how.seed)]), StepGuard()
    num_tokens, ledger = how.batch_size * how.seq_length, ledger or Ledger()
    spent = flops.ligo_step_flops(source.model, target, num_tokens, how.seq_length)
    for step in range(how.steps):
        began = time.perf_counter()
        drawn = stream.batch(step * how.batch_size, how.batch_size, mesh.dp.rank, mesh.dp.size)
        result = learner.step(make_batch(drawn.tokens, how.batch_size, mesh), map_lr(step, config), guard)
        if not result.accepted:
            raise NonFiniteError(f"the loss was {result.loss} at learning step {step + 1}; lower --lr")
        seconds = time.perf_counter() - began
        ledger.add("ligo", flops=spent, tokens=num_tokens, seconds=seconds, model=describe_model(target))
        tell(step + 1, loss=result.loss)
    return learner.ligo


def apply_maps(path: Path, source: Source, target: ModelConfig, ledger: Ledger) -> Ligo:
    """Reads maps that were learned before; what that cost is not in their file, and unknown in the ledger.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something else.
        ConfigError: the maps belong to another pair of models.
    """
    ligo = load_maps(path)
    require(
        (ligo.start.source, ligo.start.target) == (source.model, target),
        f"{path} was learned for another pair of models; give maps of this growth, or learn some with --data",
    )
    ledger.phases.append(Phase("ligo", describe_model(target), tokens=None, flops=None, seconds=None))
    return ligo


def grown_ledger(source: Source) -> Ledger | None:
    """The ledger of a model that is grown from a source, whose cost it inherits; None: nobody knows that cost.

    Raises:
        CheckpointError: the source's ledger is malformed.
    """
    if source.ledger is None:
        return None
    ledger = Ledger()
    ledger.inherit("source", source.identity, Ledger.from_dict(source.ledger, f"{source.path}: ledger"))
    return ledger


def _config(source: ModelConfig, target: ModelConfig, how: MapLearning, mesh: Mesh) -> Config:
    growth = GrowthConfig(
        method="ligo", source=source, at_step=1, optimizer="reset", ligo_steps=how.steps, ligo_lr=how.lr
    )
    return replace(
        Config(),
        model=target,
        data=DataConfig(train=how.data, seq_length=how.seq_length, seed=how.seed),
        parallel=ParallelConfig(tensor=mesh.tp.size),
        train=TrainConfig(global_batch_size=how.batch_size, seed=how.seed),
        growth=growth,
    )
