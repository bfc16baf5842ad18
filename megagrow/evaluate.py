"""Validation loss on fixed batches of held-out samples."""

# Shape suffix legend: B = this data rank's samples, S = sequence.

from dataclasses import dataclass

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
        batches = self._ids()
        total = 0.0
        for ids in batches:
            share = len(ids) // mesh.dp.size
            mine = ids[mesh.dp.rank * share : (mesh.dp.rank + 1) * share]
            batch = make_batch(torch.from_numpy(self.dataset.batch(mine)), self.batch_size, mesh)
            total += engine.evaluate(batch)[1].item()
        return total / len(batches)

    @property
    def num_tokens(self) -> int:
        """Labels that one call of `loss` scores."""
        return len(self._ids()) * self.batch_size * self.dataset.seq_length

    def _ids(self) -> np.ndarray:
        """Sample ids [batches, batch_size], spread evenly over the dataset; a small dataset is repeated."""
        count = self.num_batches * self.batch_size
        spread = np.linspace(0, self.dataset.num_samples, count, endpoint=False).astype(np.int64)
        return spread.reshape(self.num_batches, self.batch_size)


def make_batch(
    tokens: Tensor, global_batch_size: int, mesh: Mesh, teacher_hidden: Tensor | None = None
) -> Batch:
    """One data rank's batch from packed samples [B, S + 1]; every token weighs 1 / (tokens of the global batch)."""
    tokens = tokens.to(mesh.device, non_blocking=True)
    ids_BS, labels_BS = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    weights_BS = torch.full(labels_BS.shape, 1.0 / (global_batch_size * ids_BS.shape[1]), device=mesh.device)
    return Batch(ids_BS, labels_BS, weights_BS, teacher_hidden)
