"""Learning LiGO's maps outside a run, for growing folders."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from megagrow import flops
from megagrow.checkpoint.agreement import Ranks
from megagrow.checkpoint.convert import tokenizer_of
from megagrow.checkpoint.source import Source, judge_fit, known_samples
from megagrow.checks import check
from megagrow.config import Config, DataConfig, GrowthConfig, ModelConfig, ParallelConfig, TrainConfig, require
from megagrow.data.dataset import Samples
from megagrow.data.description import check_one_tokenizer
from megagrow.data.loader import Stream, shuffled
from megagrow.data.mlm import Masking, make_masking
from megagrow.errors import NonFiniteError
from megagrow.evaluate import make_batch, make_masked_batch, mean_loss
from megagrow.growth.ligo import Ligo
from megagrow.growth.ligo_file import load_maps, save_maps
from megagrow.growth.ligo_maps import start_recipe
from megagrow.ledger import Ledger, Phase
from megagrow.optim import StepGuard
from megagrow.parallel.mesh import Mesh
from megagrow.parallel.pipeline import Batch
from megagrow.train.growing import map_learner
from megagrow.train.learner import map_lr
from megagrow.train.part import Part, build_part, load_part
from megagrow.train.streams import open_dataset
from megagrow.train.trainer import describe_model
from megagrow.train.vocabulary import masking_for


@dataclass(frozen=True)
class MapLearning:
    """How maps are learned.

    Attributes:
        data: prefix of the training tokens.
        growth: the settings of LiGO, fields `ligo_…` of `GrowthConfig`.
        seq_length, batch_size: of the samples, over all ranks.
        seed: of the initial maps and the order of samples.
        mask_token: what hides tokens from an encoder; -1: the mask token of the source's tokenizer.
        skip_source_check: learn although the source does not fit the data.
    """

    data: str
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    seq_length: int = 128
    batch_size: int = 16
    seed: int = 1234
    mask_token: int = -1
    skip_source_check: bool = False


def learn_maps(
    source: Source,
    target: ModelConfig,
    how: MapLearning,
    mesh: Mesh,
    tell: Callable[..., None],
    ledger: Ledger | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Ligo:
    """Learns the maps that grow `source` into `target` on the ordinary loss; a collective over the mesh.

    Args:
        source: the small model.
        target: the large one.
        how: data, steps and rates.
        mesh: data and tensor axes; both models are sharded over them.
        tell: called after each step as `tell(number, loss=loss)`.
        ledger: takes what the learning costs; None: nobody asks.
        say: takes a line that says how well the source fits the data.

    Returns:
        The learned maps: of all layers, since no pipeline axis shares them out; the same on every rank.

    Raises:
        ConfigError, DataError: settings or data that do not fit (see `checks.check`, `source.check_source`).
        NonFiniteError: the loss did not stay finite.
    """
    config = _config(source, target, how, mesh)
    check(config, mesh.world.size)
    start_recipe(config.growth.maps_start, source.model, target)  # refuses before anything is read
    dataset = open_dataset(how.data, target, config)
    check_one_tokenizer(config.data)
    masking = None if target.is_causal else make_masking(config.data, target)
    small = build_part(source.model, config, mesh)
    load_part(small, source.fetch)
    _check_fits(source, small, dataset, masking, how, say)
    learner = map_learner(small, config)
    learner.generate()
    stream, guard = Stream([shuffled(dataset, how.seed)]), StepGuard()
    num_tokens, ledger = how.batch_size * how.seq_length, ledger or Ledger()
    spent = flops.ligo_step_flops(source.model, target, num_tokens, how.seq_length, variant=config.growth.ligo_variant)
    for step in range(config.growth.ligo_steps):
        began = time.perf_counter()
        batch = _batch(stream, step * how.batch_size, masking, how, mesh)
        result = learner.step(batch, map_lr(step, config), guard)
        if not result.accepted:
            raise NonFiniteError(f"the loss was {result.loss} at learning step {step + 1}; lower --lr")
        seconds = time.perf_counter() - began
        ledger.add("ligo", flops=spent, tokens=num_tokens, seconds=seconds, model=describe_model(target))
        tell(step + 1, loss=result.loss)
    return learner.ligo


def _check_fits(
    source: Source,
    small: Part,
    dataset: Samples,
    masking: Masking | None,
    how: MapLearning,
    say: Callable[[str], None],
) -> None:
    """Tells the source's loss on a few samples; DataError when it is that of a model which never saw such data."""
    name, vocab_size = str(source.path), source.model.vocab_size
    tokens = known_samples(dataset, vocab_size, dataset.vocab_size != vocab_size, name)
    if not len(tokens):
        say(f"source {name}: its loss is not known, since all samples looked at have tokens that only the target has")
        return
    masking = masking_for(masking, source.model)
    loss = mean_loss(small.engine, tokens, how.batch_size, small.mesh, masking=masking)
    judge_fit(loss, vocab_size, name, how.skip_source_check)
    say(f"source {name}: loss {loss:.3f} on the data")


def _batch(stream: Stream, first: int, masking: Masking | None, how: MapLearning, mesh: Mesh) -> Batch:
    """This rank's samples, from number `first` on."""
    tokens = stream.batch(first, how.batch_size, mesh.dp.rank, mesh.dp.size).tokens
    if masking is None:
        return make_batch(tokens, how.batch_size, mesh)
    visits = first + mesh.dp.rank * len(tokens) + torch.arange(len(tokens))
    return make_masked_batch(tokens, visits, masking, mesh)


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


def keep_maps(ligo: Ligo, path: Path, mesh: Mesh) -> None:
    """Writes learned maps to a file, which `apply_maps` reads; a collective.

    Raises:
        CheckpointError: it cannot be written.
    """
    Ranks(mesh.checkpoint_group).first(f"cannot save the maps to {path}", lambda: save_maps(ligo, path))


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


def charged(ledger: Ledger | None, ligo: Ligo | None, target: ModelConfig, seconds: float) -> dict[str, Any] | None:
    """The ledger with what applying the operator cost: by learned maps, or by copies.

    Args:
        ledger: from `grown_ledger`.
        ligo: the maps; None: copies, which take no arithmetic.
        target: the grown model.
        seconds: that growing took.
    """
    if ledger is None:
        return None
    spent = flops.ligo_generation_flops(ligo.start.source, target, ligo.variant) if ligo else 0.0
    ledger.add("growth", flops=spent, tokens=0, seconds=seconds, model=describe_model(target))
    return ledger.to_dict()


def _config(source: Source, target: ModelConfig, how: MapLearning, mesh: Mesh) -> Config:
    tokenizer = None if target.is_causal else tokenizer_of(source)
    return replace(
        Config(),
        model=target,
        data=DataConfig(
            train=how.data,
            seq_length=how.seq_length,
            seed=how.seed,
            tokenizer="" if tokenizer is None else str(tokenizer),
            mask_token=how.mask_token,
        ),
        parallel=ParallelConfig(tensor=mesh.tp.size),
        train=TrainConfig(global_batch_size=how.batch_size, seed=how.seed),
        growth=replace(how.growth, method="ligo", source=source.model, at_step=1, optimizer="reset"),
    )
