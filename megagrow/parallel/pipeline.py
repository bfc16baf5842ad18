"""Runs one batch through the model in microbatches: a plain loop on one stage, torch's schedules on several.

Each token's weight already holds the division by the global number of tokens, so that losses and gradients are plain
sums over microbatches and data ranks: any split of the batch gives the same update.
"""

# Shape suffix legend: B = this data rank's samples, S = sequence, H = hidden.

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import Schedule1F1B

from megagrow.parallel.collectives import broadcast_from, sum_over
from megagrow.parallel.fsdp import reshard, sync_gradients
from megagrow.parallel.mesh import Axis, Mesh
from megagrow.parallel.shards import local
from megagrow.roles import TIED_EMBEDDING


@dataclass(frozen=True)
class Batch:
    """One data rank's share of a step.

    Attributes:
        ids: [B, S] token ids.
        labels: [B, S] the tokens that follow them.
        weights: [B, S] float; each token's weight in the loss, 1 / (global number of tokens that count).
        teacher_hidden: [B, S, H_teacher] on the last stage while a teacher teaches, else None.
    """

    ids: Tensor
    labels: Tensor
    weights: Tensor
    teacher_hidden: Tensor | None = None

    def loss_inputs(self) -> dict[str, Tensor]:
        """What the last stage needs beside its input."""
        inputs = {"labels": self.labels, "weights": self.weights}
        return inputs if self.teacher_hidden is None else {**inputs, "teacher_hidden": self.teacher_hidden}


class Engine:
    """Forward and backward passes of one model part over a batch.

    Args:
        model: this rank's stage: a module whose `forward(x, **loss_inputs)` returns activations [b, S, H] or, on the
            last stage with labels, the loss sum, and that appends [loss, CE, KD] per microbatch to `loss_sums`.
        mesh: where the rank stands.
        num_microbatches: into how many pieces a batch is cut; divides the batch.
        activation: example activations of one microbatch [b, S, H] that travel between stages (meta device).
    """

    def __init__(self, model: nn.Module, mesh: Mesh, num_microbatches: int, activation: Tensor) -> None:
        self.model, self.mesh, self.num_microbatches = model, mesh, num_microbatches
        self.schedule = _make_schedule(model, mesh, num_microbatches, activation) if mesh.pp.size > 1 else None
        self.shares_embedding = mesh.pp.size > 1 and _holds_tied_copy(model, mesh.pp)

    def train_step(self, batch: Batch) -> Tensor:
        """Accumulates gradients of the batch's loss.

        Returns:
            The global sums [loss, CE, KD], the same on every rank.
        """
        if self.schedule is None:
            self._loop(batch)
        else:
            self._run_schedule(self.schedule.step, batch)
        if self.shares_embedding:
            self._sum_tied_gradients()
        return self._global_sums()

    def evaluate(self, batch: Batch) -> Tensor:
        """The global sums [loss, CE, KD] of a batch, without gradients."""
        with torch.no_grad():
            if self.schedule is None:
                for part in self._microbatches(batch):
                    self.model(part.ids, **part.loss_inputs())
            else:
                self._run_schedule(self.schedule.eval, batch)
        reshard(self.model)
        return self._global_sums()

    def _loop(self, batch: Batch) -> None:
        for i, part in enumerate(self._microbatches(batch)):
            sync_gradients(self.model, enabled=i == self.num_microbatches - 1)
            self.model(part.ids, **part.loss_inputs()).sum().backward()

    def _microbatches(self, batch: Batch) -> list[Batch]:
        pieces = {"ids": batch.ids, **batch.loss_inputs()}
        chunks = {name: tensor.chunk(self.num_microbatches) for name, tensor in pieces.items()}
        return [Batch(**{name: chunk[i] for name, chunk in chunks.items()}) for i in range(self.num_microbatches)]

    def _run_schedule(self, run: Any, batch: Batch) -> None:
        args = (batch.ids,) if self.mesh.pp.is_first else ()
        if self.mesh.pp.is_last:
            run(*args, target=batch.labels, losses=[], **batch.loss_inputs())
        else:
            run(*args)

    def _sum_tied_gradients(self) -> None:
        parameter = self.model.get_parameter(TIED_EMBEDDING)
        assert parameter.grad is not None, "both ends of the pipeline use the embedding"
        peer = self.mesh.pp.size - 1 if self.mesh.pp.is_first else 0
        _exchange_sum(local(parameter.grad), peer, self.mesh.pp)

    def _global_sums(self) -> Tensor:
        recorded = cast(list[Tensor], self.model.loss_sums)
        device = self.mesh.device
        sums = torch.stack(recorded).sum(0).double() if recorded else torch.zeros(3, dtype=torch.double, device=device)
        recorded.clear()
        return broadcast_from(sum_over(sums, self.mesh.dp), self.mesh.pp.size - 1, self.mesh.pp)


def _make_schedule(model: nn.Module, mesh: Mesh, num_microbatches: int, activation: Tensor) -> Schedule1F1B:
    ids = torch.empty(activation.shape[:2], dtype=torch.long, device="meta")
    loss = torch.empty(1, dtype=torch.float32, device="meta")
    stage = PipelineStage(
        model,
        mesh.pp.rank,
        mesh.pp.size,
        mesh.device,
        input_args=ids if mesh.pp.is_first else activation,
        output_args=loss if mesh.pp.is_last else activation,
        group=mesh.pp.group,
    )
    return Schedule1F1B(stage, num_microbatches, loss_fn=lambda output, _: output.sum(), scale_grads=False)


def _holds_tied_copy(model: nn.Module, pp: Axis) -> bool:
    """Whether this stage is an end of the pipeline and the last stage holds the embedding too."""
    return (pp.is_first or pp.is_last) and cast(Any, model).config.tied_embeddings


def _exchange_sum(x: Tensor, peer: int, pp: Axis) -> None:
    """Adds the peer's tensor to x on both ends; addition commutes, so both get the same bits."""
    received = torch.empty_like(x)
    work = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, x, group=pp.group, group_peer=peer),
            dist.P2POp(dist.irecv, received, group=pp.group, group_peer=peer),
        ]
    )
    for request in work:
        request.wait()
    x.add_(received)
