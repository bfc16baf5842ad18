"""The small model scores a corpus: which packed samples are hard for it, but within its reach.

Source: SALT (Rawat et al., 2024, arXiv 2410.18779), selection by the median of per-token losses
with a top-k mask. Both readings of the mask are stored: `median_in_top_k` leaves the other tokens
out, `median_zero` counts them as 0.

Samples are dealt to the data-parallel ranks in shards; a finished shard is a file, so that a killed
scoring goes on where it was. Batches begin at fixed samples, so the scores do not depend on how
many ranks share the work.
"""

# Shape suffix legend: B = samples of a batch, S = sequence, T = B·S tokens, H = hidden.

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megagrow.checkpoint.source import Source, check_source, load_model
from megagrow.checks import check_causal, check_model
from megagrow.config import ParallelConfig, require
from megagrow.data.dataset import PackedDataset
from megagrow.errors import DataError
from megagrow.model.transformer import Transformer
from megagrow.parallel.collectives import broadcast_from, sum_over
from megagrow.parallel.mesh import Mesh
from megagrow.salt.score_files import (
    DTYPES,
    Arrays,
    Cost,
    Identity,
    ShardFolder,
    identity_of,
    is_complete,
    read_scores,
    write_scores,
)

__all__ = ["Progress", "ScoreSettings", "read_scores", "sample_scores", "score_corpus"]


@dataclass(frozen=True)
class ScoreSettings:
    """How a corpus is scored.

    Attributes:
        top_k: a label is in the top k if fewer than k logits are greater than its own.
        dtype: of the model's parameters and activations.
        batch_size: samples per forward pass; in float32 another size may change the last bit of a
            score, because matrix products may then sum in another order.
        shard_size: samples that are done again at most after an interruption; rounded up to whole
            batches.
        skip_source_check: score although the model does not fit the data.
    """

    top_k: int = 10
    dtype: torch.dtype = torch.float32
    batch_size: int = 16
    shard_size: int = 256
    skip_source_check: bool = False

    def __post_init__(self) -> None:
        for name in ("top_k", "batch_size", "shard_size"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")


class Progress(Protocol):
    """What the scoring tells while it runs; `metrics.Progress` is one."""

    def message(self, text: str) -> None: ...

    def update(self, step: int, *, phase: str, loss: float | None, tokens_per_second: float | None) -> None: ...


def score_corpus(
    source: Source,
    dataset: PackedDataset,
    output: Path | str,
    mesh: Mesh,
    settings: ScoreSettings,
    flops: float | None = None,
    progress: Progress | None = None,
) -> Path:
    """Scores every sample of `dataset` into the folder `output`; all ranks call it.

    Finished scores of the same corpus, model and settings are left as they are, unfinished ones are
    continued.

    Args:
        source: the small model.
        dataset: packed training samples.
        output: folder of `scores.safetensors` and `manifest.json`, made if need be.
        mesh: its tensor axis shards the model; the other axes share the samples.
        settings: see `ScoreSettings`.
        flops: what scoring the whole corpus takes, for the manifest; None: not counted.
        progress: where to report, given on one rank.

    Returns:
        `output`, once the scores are complete.

    Raises:
        ConfigError: the model is an encoder or cannot be laid out on the mesh, or the samples are longer than its
            position table.
        DataError: the model does not fit the data (see `check_source`) or gives a loss that is not
            finite, or `output` holds something else.
    """
    output, model_config = Path(output), source.model
    check_causal(model_config, str(source.path), "to score samples")
    check_model(model_config, ParallelConfig(tensor=mesh.tp.size), str(source.path))
    require(
        model_config.positions != "learned" or dataset.seq_length <= model_config.max_seq_length,
        f"seq_length={dataset.seq_length} exceeds max_seq_length={model_config.max_seq_length} of "
        f"{source.path}, the rows of its position table; score shorter samples",
    )
    dtype = str(settings.dtype).removeprefix("torch.")
    identity = identity_of(dataset, source.identity, settings.top_k, dtype)
    shards = _Shards(output, identity, settings, mesh)
    if not is_complete(output, identity):
        if pending := shards.pending():
            model = _checked_model(source, dataset, mesh, settings, progress)
            shards.begin()
            _score_shards(model, dataset, shards, pending, source, progress)
        _wait_for_all(mesh)
        if mesh.is_main:
            shards.merge(flops)
    _wait_for_all(mesh)
    if mesh.is_main:
        shards.folder.remove()
    return output


def sample_scores(nll_BS: Tensor, rank_BS: Tensor, top_k: int) -> Arrays:
    """The scores of samples from their tokens' negative log-likelihoods and ranks.

    Medians take the lower middle element of an even count, and 0 for an empty set.

    Args:
        nll_BS: nats.
        rank_BS: number of logits greater than the label's.
        top_k: a token counts as known in part if its rank is below it.

    Returns:
        float32 arrays [B] by the names of SCORE_NAMES, and `num_tokens`, int32 [B].
    """
    inside_BS = rank_BS < top_k
    count_B = inside_BS.sum(-1)
    lower_middle_B1 = ((count_B - 1).clamp(min=0) // 2).unsqueeze(-1)
    inside_sorted_BS = nll_BS.masked_fill(~inside_BS, torch.inf).sort(-1).values
    median_B = inside_sorted_BS.gather(-1, lower_middle_B1).squeeze(-1)
    seq_length = nll_BS.shape[1]
    zeroed_BS = nll_BS.masked_fill(~inside_BS, 0).sort(-1).values
    scores = {
        "median_in_top_k": torch.where(count_B > 0, median_B, 0.0),
        "median_zero": zeroed_BS[:, (seq_length - 1) // 2],
        "mean_nll": nll_BS.double().mean(-1),
        "in_top_k_fraction": count_B.double() / seq_length,
        "num_tokens": torch.full_like(count_B, seq_length),
    }
    return {name: x.cpu().numpy().astype(DTYPES[name]) for name, x in scores.items()}


class _Shards:
    """The division of a corpus into shards, and which of them are done.

    The finished ones are looked up once, by one rank, before any is written: all ranks of a tensor
    group must agree.
    """

    def __init__(self, output: Path, identity: Identity, settings: ScoreSettings, mesh: Mesh) -> None:
        batch = settings.batch_size
        self.size = -(-settings.shard_size // batch) * batch
        self.output, self.identity, self.settings, self.mesh = output, identity, settings, mesh
        self.num_samples = identity.num_samples
        self.count = -(-self.num_samples // self.size)
        self.folder = ShardFolder(output)

    def samples(self, shard: int) -> range:
        return range(shard * self.size, min((shard + 1) * self.size, self.num_samples))

    def pending(self) -> list[int]:
        """The shards to do, the same on every rank.

        Raises:
            DataError: the folder holds the shards of another scoring.
        """
        self.folder.check(self.identity, self.size)
        done = torch.zeros(self.count, dtype=torch.uint8)
        if self.mesh.is_main:
            done = torch.tensor([self.folder.has(i) for i in range(self.count)], dtype=torch.uint8)
        done = broadcast_from(done.to(self.mesh.device), 0, self.mesh.world).cpu()
        return torch.nonzero(done == 0).flatten().tolist()

    def begin(self) -> None:
        """Makes the folder; no rank writes into it before it says what the shards belong to."""
        if self.mesh.is_main:
            self.folder.begin(self.identity, self.size)
        _wait_for_all(self.mesh)

    def merge(self, flops: float | None) -> None:
        """Puts the shards together and writes the manifest."""
        parts, seconds = [], 0.0
        for shard in range(self.count):
            arrays, shard_seconds = self.folder.read(shard, len(self.samples(shard)))
            parts.append(arrays)
            seconds += shard_seconds
        whole = {name: np.concatenate([part[name] for part in parts]) for name in DTYPES}
        cost = Cost(seconds, flops, int(whole["num_tokens"].sum(dtype=np.int64)))
        write_scores(self.output, whole, self.identity, cost)


def _wait_for_all(mesh: Mesh) -> None:
    sum_over(torch.zeros(1, device=mesh.device), mesh.world)


def _checked_model(
    source: Source,
    dataset: PackedDataset,
    mesh: Mesh,
    settings: ScoreSettings,
    progress: Progress | None,
) -> Transformer:
    model = load_model(source, mesh.tensor_only(), settings.dtype)
    loss = check_source(model, dataset, mesh, str(source.path), settings.skip_source_check)
    if progress is not None:
        progress.message(f"{source.path}: loss {loss:.3f} nats per token on the first samples")
    return model


def _score_shards(
    model: Transformer,
    dataset: PackedDataset,
    shards: _Shards,
    pending: list[int],
    source: Source,
    progress: Progress | None,
) -> None:
    mesh = shards.mesh
    worker, num_workers = mesh.pp.rank * mesh.tokens.size + mesh.tokens.rank, mesh.pp.size * mesh.tokens.size
    mine = pending[worker::num_workers]
    report = _reporter(progress, shards, pending, mine)
    for shard in mine:
        start = time.monotonic()
        arrays = _score_shard(model, dataset, shards, shard, source, report)
        if mesh.tp.is_first:
            shards.folder.write(shard, arrays, (time.monotonic() - start) / num_workers)


def _score_shard(
    model: Transformer,
    dataset: PackedDataset,
    shards: _Shards,
    shard: int,
    source: Source,
    report: Callable[[int], None],
) -> Arrays:
    samples, batch_size = shards.samples(shard), shards.settings.batch_size
    parts = []
    for start in range(samples.start, samples.stop, batch_size):
        ids = range(start, min(start + batch_size, samples.stop))
        tokens_BS1 = torch.from_numpy(dataset.batch(ids)).to(shards.mesh.device)
        labels_BS = tokens_BS1[:, 1:]
        nll_BS, rank_BS = (x.view_as(labels_BS) for x in model.token_scores(tokens_BS1[:, :-1], labels_BS))
        finite_B = nll_BS.isfinite().all(-1)
        if not finite_B.all():
            bad = ids[int(finite_B.int().argmin())]
            raise DataError(
                f"{dataset.prefix}: sample {bad} has a loss that is not finite under "
                f"{source.path}: its weights are damaged or overflow in {shards.identity.dtype}; "
                "use another checkpoint or a wider dtype"
            )
        parts.append(sample_scores(nll_BS, rank_BS, shards.settings.top_k))
        report(len(ids))
    return {name: np.concatenate([part[name] for part in parts]) for name in DTYPES}


def _reporter(progress: Progress | None, shards: _Shards, pending: list[int], mine: list[int]) -> Callable[[int], None]:
    """Takes the number of samples just scored here, and reports as if the others kept pace."""
    todo, own_todo = (sum(len(shards.samples(i)) for i in part) for part in (pending, mine))
    begin, own = time.monotonic(), 0

    def report(num_samples: int) -> None:
        nonlocal own
        own += num_samples
        if progress is None:
            return
        scored = todo * own // own_todo
        speed = scored * shards.identity.seq_length / max(time.monotonic() - begin, 1e-9)
        done = shards.num_samples - todo + scored
        progress.update(done, phase="scoring", loss=None, tokens_per_second=speed)

    return report
