"""Validation loss on fixed batches of held-out samples."""

# Shape suffix legend: B = this data rank's samples, S = sequence.

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megagrow.data.dataset import PackedDataset
from megagrow.parallel.mesh import Mesh
from megagrow.parallel.pipeline import Batch, Engine


@dataclass(frozen=True)
class Evaluator:
    """Held-out batches, the same at every call, in every layout and for every run on this data.

    Attributes:
        dataset: held-out samples.
        batch_size: samples per batch, over all data ranks.
        num_batches: batches; a small dataset is repeated.
    """

    dataset: PackedDataset
    batch_size: int
    num_batches: int

    def loss(self, engine: Engine, mesh: Mesh) -> float:
        """Mean cross-entropy in nats per token, the same number on every rank."""
        tokens = torch.from_numpy(self.dataset.batch(self._ids()))
        return mean_loss(engine, tokens, self.batch_size, mesh)

    @property
    def num_tokens(self) -> int:
        """Labels that one call of `loss` scores."""
        return self.num_batches * self.batch_size * self.dataset.seq_length

    def _ids(self) -> np.ndarray:
        """Sample ids, spread evenly over the dataset; a small dataset is repeated."""
        count = self.num_batches * self.batch_size
        return np.linspace(0, self.dataset.num_samples, count, endpoint=False).astype(np.int64)


def mean_loss(engine: Engine, tokens: Tensor, batch_size: int, mesh: Mesh) -> float:
    """Mean cross-entropy of packed samples in nats per token, the same number on every rank.

    Args:
        engine: of the model.
        tokens: [N, S + 1], the same on every rank; any number of samples.
        batch_size: samples that the engine takes at a time, over all data ranks.
        mesh: where the rank stands.
    """
    total, share = 0.0, batch_size // mesh.dp.size
    for part in tokens.split(batch_size):
        padded = torch.arange(batch_size).clamp(max=len(part) - 1)  # the last sample fills a short batch up, unweighted
        counts = (torch.arange(batch_size) < len(part)).to(torch.float32) * (batch_size / len(tokens))
        mine = slice(mesh.dp.rank * share, (mesh.dp.rank + 1) * share)
        batch = make_batch(part[padded][mine], batch_size, mesh)
        weights = batch.weights * counts[mine, None].to(mesh.device)
        total += engine.evaluate(replace(batch, weights=weights))[1].item()
    return total


def make_batch(tokens: Tensor, global_batch_size: int, mesh: Mesh, teacher_hidden: Tensor | None = None) -> Batch:
    """One data rank's batch from packed samples [B, S + 1]; every token weighs 1 / (tokens of the global batch)."""
    tokens = tokens.to(mesh.device, non_blocking=True)
    ids_BS, labels_BS = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    weights_BS = torch.full(labels_BS.shape, 1.0 / (global_batch_size * ids_BS.shape[1]), device=mesh.device)
    return Batch(ids_BS, labels_BS, weights_BS, teacher_hidden)
