"""Validation loss on fixed batches of held-out samples."""

# Shape suffix legend: B = this data rank's samples, S = this context rank's tokens, T = tokens of a sample.

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megagrow.data.dataset import PackedDataset
from megagrow.parallel import heartbeat
from megagrow.parallel.context import cut
from megagrow.parallel.mesh import Mesh
from megagrow.parallel.pipeline import Batch, Engine


@dataclass(frozen=True)
class Evaluator:
    """Held-out batches, the same at every call, in every layout and for every run on this data.

    Attributes:
        dataset: held-out samples.
        batch_size: samples per batch, over all data ranks.
        num_batches: batches; a small dataset is repeated.
        mask_documents: attention stays inside a document.
    """

    dataset: PackedDataset
    batch_size: int
    num_batches: int
    mask_documents: bool = False

    def loss(self, engine: Engine, mesh: Mesh) -> float:
        """Mean cross-entropy in nats per token, the same number on every rank."""
        ids = self._ids()
        documents = torch.from_numpy(self.dataset.documents(ids)) if self.mask_documents else None
        return mean_loss(engine, torch.from_numpy(self.dataset.batch(ids)), self.batch_size, mesh, documents)

    @property
    def num_tokens(self) -> int:
        """Labels that one call of `loss` scores."""
        return self.num_batches * self.batch_size * self.dataset.seq_length

    def _ids(self) -> np.ndarray:
        """Sample ids, spread evenly over the dataset; a small dataset is repeated."""
        count = self.num_batches * self.batch_size
        return np.linspace(0, self.dataset.num_samples, count, endpoint=False).astype(np.int64)


def mean_loss(engine: Engine, tokens: Tensor, batch_size: int, mesh: Mesh, documents: Tensor | None = None) -> float:
    """Mean cross-entropy of packed samples in nats per token, the same number on every rank.

    Args:
        engine: of the model.
        tokens: [N, S + 1], the same on every rank; any number of samples.
        batch_size: samples that the engine takes at a time, over all data ranks.
        mesh: where the rank stands.
        documents: [N, S] the document of every input, or None: attention crosses documents.
    """
    total, share = 0.0, batch_size // mesh.dp.size
    for places in torch.arange(len(tokens)).split(batch_size):
        padded = torch.arange(batch_size).clamp(max=len(places) - 1)  # the last sample fills up, unweighted
        counts = (torch.arange(batch_size) < len(places)).to(torch.float32) * (batch_size / len(tokens))
        mine = slice(mesh.dp.rank * share, (mesh.dp.rank + 1) * share)
        rows = places[padded][mine]
        batch = make_batch(tokens[rows], batch_size, mesh, None if documents is None else documents[rows])
        weights = batch.weights * counts[mine, None].to(mesh.device)
        total += engine.evaluate(replace(batch, weights=weights))[1].item()
        heartbeat.progress()
    return total


def make_batch(tokens: Tensor, global_batch_size: int, mesh: Mesh, documents: Tensor | None = None) -> Batch:
    """This rank's batch from its data rank's packed samples; every token weighs 1 / (tokens of the global batch).

    Args:
        tokens: [B, T + 1]; a context rank takes its part of each sample.
        global_batch_size: samples over all data ranks.
        mesh: where the rank stands.
        documents: [B, T] the document of every input, or None: attention crosses documents.
    """
    tokens = tokens.to(mesh.device, non_blocking=True)
    weight = 1.0 / (global_batch_size * (tokens.shape[1] - 1))
    ids_BS, labels_BS = (cut(part, mesh.cp).contiguous() for part in (tokens[:, :-1], tokens[:, 1:]))
    weights_BS = torch.full(labels_BS.shape, weight, device=mesh.device)
    return Batch(ids_BS, labels_BS, weights_BS, documents=None if documents is None else documents.to(mesh.device))
