"""Batches of packed samples, and the validation loss on fixed ones of them that are held out."""

# Shape suffix legend: B = this data rank's samples, S = this context rank's tokens, T = tokens of a sample.

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megagrow.data.dataset import Samples
from megagrow.data.mlm import Masking
from megagrow.parallel import heartbeat
from megagrow.parallel.collectives import sum_over
from megagrow.parallel.context import cut, of_documents
from megagrow.parallel.mesh import Mesh
from megagrow.parallel.pipeline import Batch

EVALUATION_SEED = 0  # of masks, whatever that of the run is: losses of different runs can be compared


class Evaluates(Protocol):
    """What losses are asked of: an `Engine`, or a teacher."""

    def evaluate(self, batch: Batch) -> Tensor:
        """The global sums [loss, CE, KD, teacher's entropy] of a batch, without gradients, the same on every rank."""


@dataclass(frozen=True)
class Evaluator:
    """Held-out batches, the same at every call, in every layout and for every run on this data.

    Attributes:
        dataset: held-out samples.
        batch_size: samples per batch, over all data ranks.
        num_batches: batches; a small dataset is repeated.
        mask_documents: attention stays inside a document.
        reset_positions: positions begin anew at each document.
        masking: of an encoder's samples; None: next tokens are predicted.
    """

    dataset: Samples
    batch_size: int
    num_batches: int
    mask_documents: bool = False
    reset_positions: bool = False
    masking: Masking | None = None

    def loss(self, engine: Evaluates, mesh: Mesh) -> float:
        """Mean cross-entropy in nats per token that is predicted, the same number on every rank."""
        ids = self._ids()
        given = self.mask_documents or self.reset_positions
        documents = torch.from_numpy(self.dataset.documents(ids)) if given else None
        tokens, how = torch.from_numpy(self.dataset.batch(ids)), (self.mask_documents, self.reset_positions)
        return mean_loss(engine, tokens, self.batch_size, mesh, documents, *how, masking=self.masking)

    @cached_property
    def largest_token(self) -> int:
        """The largest token that a model sees in one call of `loss`."""
        hidden = -1 if self.masking is None else max(self.masking.mask_id, self.masking.vocab_size - 1)
        return max(int(self.dataset.batch(self._ids()).max()), hidden)

    @property
    def num_tokens(self) -> int:
        """Tokens that one call of `loss` reads."""
        return self.num_batches * self.batch_size * self.dataset.seq_length

    def _ids(self) -> np.ndarray:
        """Sample ids, spread evenly over the dataset; a small dataset is repeated."""
        count = self.num_batches * self.batch_size
        return np.linspace(0, self.dataset.num_samples, count, endpoint=False).astype(np.int64)


def mean_loss(
    engine: Evaluates,
    tokens: Tensor,
    batch_size: int,
    mesh: Mesh,
    documents: Tensor | None = None,
    mask_documents: bool = True,
    reset_positions: bool = False,
    masking: Masking | None = None,
) -> float:
    """Mean cross-entropy of packed samples in nats per token that is predicted, the same number on every rank.

    Args:
        engine: of the model.
        tokens: [N, S + 1], the same on every rank; any number of samples.
        batch_size: samples that the engine takes at a time, over all data ranks.
        mesh: where the rank stands.
        documents: [N, S] the document of every input, or None: nothing depends on documents.
        mask_documents, reset_positions: see `make_batch`.
        masking: of an encoder's samples, the same masks at every call; None: next tokens are predicted.
    """
    total, share = 0.0, batch_size // mesh.dp.size
    samples, how = torch.arange(len(tokens)), (mask_documents, reset_positions)
    if masking is not None:
        masking = replace(masking, seed=EVALUATION_SEED)
        num_chosen = masking(tokens[:, :-1], samples)[1].sum().to(mesh.device)
    for places in samples.split(batch_size):
        padded = torch.arange(batch_size).clamp(max=len(places) - 1)  # the last sample fills up, unweighted
        counts = (torch.arange(batch_size) < len(places)).to(torch.float32)
        mine = slice(mesh.dp.rank * share, (mesh.dp.rank + 1) * share)
        rows = places[padded][mine]
        held = None if documents is None else documents[rows]
        if masking is None:
            counts *= batch_size / len(tokens)
            batch = make_batch(tokens[rows], batch_size, mesh, held, *how)
        else:
            batch = make_masked_batch(tokens[rows], rows, masking, mesh, held, *how, num_chosen=num_chosen)
        weights = batch.weights * counts[mine, None].to(mesh.device)
        total += engine.evaluate(replace(batch, weights=weights))[1].item()
        heartbeat.progress()
    return total


def make_batch(
    tokens: Tensor,
    global_batch_size: int,
    mesh: Mesh,
    documents: Tensor | None = None,
    mask_documents: bool = True,
    reset_positions: bool = False,
) -> Batch:
    """This rank's batch from its data rank's packed samples; every token weighs 1 / (tokens of the global batch).

    Args:
        tokens: [B, T + 1]; a context rank takes its part of each sample.
        global_batch_size: samples over all data ranks.
        mesh: where the rank stands.
        documents: [B, T] the document of every input, or None: nothing depends on documents.
        mask_documents: attention stays inside a document.
        reset_positions: positions begin anew at each document.
    """
    tokens = tokens.to(mesh.device, non_blocking=True)
    weight = 1.0 / (global_batch_size * (tokens.shape[1] - 1))
    ids_BS, labels_BS = (cut(part, mesh.cp).contiguous() for part in (tokens[:, :-1], tokens[:, 1:]))
    weights_BS = torch.full(labels_BS.shape, weight, device=mesh.device)
    given = of_documents(_on(mesh, documents), mesh.cp, mask_documents, reset_positions)
    return Batch(ids_BS, labels_BS, weights_BS, **given)


def make_masked_batch(
    tokens: Tensor,
    visits: Tensor,
    masking: Masking,
    mesh: Mesh,
    documents: Tensor | None = None,
    mask_documents: bool = True,
    reset_positions: bool = False,
    num_chosen: Tensor | None = None,
) -> Batch:
    """This rank's batch for an encoder: tokens are hidden and predicted where they stand.

    Every chosen token weighs 1 / (chosen tokens of the global batch), whichever rank and microbatch it falls to.

    Args:
        tokens: [B, T + 1] of this data rank; the last one of a sample is the first of the next, and left out.
        visits: [B] see `Masking`.
        masking: how.
        mesh, documents, mask_documents, reset_positions: as in `make_batch`.
        num_chosen: what to divide by instead, a whole number.
    """
    tokens_BT = tokens[:, :-1].to(mesh.device, non_blocking=True)
    seen_BT, chosen_BT = masking(tokens_BT, visits)
    if num_chosen is None:
        num_chosen = sum_over(chosen_BT.sum(), mesh.dp)
    weights_BT = chosen_BT.to(torch.float32) / num_chosen.clamp(min=1)
    ids_BS, labels_BS, weights_BS = (cut(part, mesh.cp).contiguous() for part in (seen_BT, tokens_BT, weights_BT))
    given = of_documents(_on(mesh, documents), mesh.cp, mask_documents, reset_positions)
    return Batch(ids_BS, labels_BS, weights_BS, **given)


def _on(mesh: Mesh, documents: Tensor | None) -> Tensor | None:
    return None if documents is None else documents.to(mesh.device)
