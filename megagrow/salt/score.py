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

import numpy as np
import torch
from torch import Tensor

from megagrow.checkpoint.source import Source, share_identity
from megagrow.config import require
from megagrow.data.dataset import PackedDataset
from megagrow.errors import DataError
from megagrow.model.transformer import Transformer
from megagrow.parallel.mesh import Mesh
from megagrow.salt.records import MANIFEST_FILE, Arrays, Cost, Training, share_fingerprint
from megagrow.salt.score_files import (
    DTYPES,
    SCORES_FILE,
    Identity,
    ShardFolder,
    identity_of,
    is_complete,
    read_scores,
    write_scores,
)
from megagrow.salt.sharded import Progress, ReadSettings, Shards, check_reader, checked_model, read_samples
from megagrow.salt.work_folder import remove_unfinished

__all__ = ["Progress", "ScoreSettings", "read_scores", "sample_scores", "score_corpus"]


@dataclass(frozen=True)
class ScoreSettings(ReadSettings):
    """How a corpus is scored.

    Attributes:
        top_k: a label is in the top k if fewer than k logits are greater than its own.
    """

    top_k: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.top_k > 0, f"top_k={self.top_k} must be positive")


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
    output = Path(output)
    check_reader(source, dataset, mesh, "score")
    share_fingerprint(dataset, mesh)
    share_identity(source, mesh)
    identity = identity_of(dataset, source.identity, settings.top_k, **settings.identity)
    shards = _Shards(output, identity, settings, mesh)

    def work(pending: list[int]) -> None:
        model = checked_model(source, dataset, mesh, settings, progress)
        shards.begin()
        _score_shards(model, dataset, shards, pending, source, progress)

    shards.carry_out(
        lambda: is_complete(output, identity), work, lambda: shards.merge(flops, source.ledger), shards.clean_up
    )
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


class _Shards(Shards):
    """The shards of a scoring, and how they become the scores."""

    folder: ShardFolder

    def __init__(self, output: Path, identity: Identity, settings: ScoreSettings, mesh: Mesh) -> None:
        sizes = identity.num_samples, settings.batch_size, settings.shard_size
        super().__init__(ShardFolder(output), identity, *sizes, mesh)
        self.output, self.settings = output, settings

    def merge(self, flops: float | None, training: Training) -> None:
        """Puts the shards together and writes the manifest."""
        parts, seconds = [], 0.0
        for shard in range(self.count):
            arrays, shard_seconds = self.folder.read(shard, len(self.samples(shard)))
            parts.append(arrays)
            seconds += shard_seconds
        whole = {name: np.concatenate([part[name] for part in parts]) for name in DTYPES}
        cost = Cost(seconds, flops, int(whole["num_tokens"].sum(dtype=np.int64)))
        write_scores(self.output, whole, self.identity, cost, training)

    def clean_up(self) -> None:
        """Removes what only unfinished work needs, and what a kill left half written."""
        self.folder.remove(".safetensors")
        remove_unfinished(self.output, MANIFEST_FILE, SCORES_FILE)


def _score_shards(
    model: Transformer,
    dataset: PackedDataset,
    shards: _Shards,
    pending: list[int],
    source: Source,
    progress: Progress | None,
) -> None:
    report = shards.reporter(progress, pending, "scoring", dataset.seq_length)
    for shard in shards.mine(pending):
        start = time.monotonic()
        arrays = _score_shard(model, dataset, shards, shard, source, report)
        if shards.mesh.tp.is_first:
            shards.folder.write(shard, arrays, (time.monotonic() - start) / shards.num_workers)


def _score_shard(
    model: Transformer,
    dataset: PackedDataset,
    shards: _Shards,
    shard: int,
    source: Source,
    report: Callable[[int], None],
) -> Arrays:
    parts = []
    for ids in shards.batches(shard):
        inputs_BS, labels_BS, told = read_samples(dataset, ids, shards.settings, shards.mesh.device)
        nll_BS, rank_BS = (x.view_as(labels_BS) for x in model.token_scores(inputs_BS, labels_BS, **told))
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
