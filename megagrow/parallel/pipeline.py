"""Runs one batch through the model in microbatches: a plain loop on one stage, torch's schedules on several.

Each token's weight already holds the division by the global number of tokens, so that losses and gradients are plain
sums over microbatches and data ranks: any split of the batch gives the same update.
"""

# Shape suffix legend: B = this data rank's samples, S = this context rank's tokens, T = tokens of the whole sequence,
# H = hidden.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    FORWARD,
    RECV_F,
    RESHARD,
    SEND_F,
    UNSHARD,
    _PipelineScheduleRuntime,
    get_schedule_class,
)

from megagrow.config import ModelConfig
from megagrow.parallel import heartbeat
from megagrow.parallel.collectives import broadcast_from, sum_over
from megagrow.parallel.fsdp import reshard, sync_gradients
from megagrow.parallel.gradients import sum_partial_gradients, sum_tied_gradients
from megagrow.parallel.loss import NUM_SUMS
from megagrow.parallel.mesh import Mesh
from megagrow.parallel.shards import local
from megagrow.parallel.stages import pipeline_stages
from megagrow.roles import TIED_EMBEDDING

FORWARD_ACTIONS = (FORWARD, SEND_F, RECV_F, UNSHARD, RESHARD)


@dataclass(frozen=True)
class Batch:
    """One data rank's share of a step.

    Attributes:
        ids: [B, S] token ids.
        labels: [B, S] the tokens that follow them.
        weights: [B, S] float; each token's weight in the loss, 1 / (global number of tokens that count).
        teacher_hidden: [B, S, H_teacher] on the last stage while a teacher teaches, else None.
        target_ids: [B, S, K] tokens, on the last stage while a cache teaches, else None.
        target_masses: [B, S, K + 1] what they and the rest weigh, see `cached_loss.CachedTargets`.
        documents: [B, T] the document of every token of the whole sequences, or None: attention crosses documents.
        positions: [B, S] the position of every token, or None: counted from each sample's first token on.
        dropout_keys: [B, S] from `model.dropout.token_keys`, or None: nothing is dropped.
    """

    ids: Tensor
    labels: Tensor
    weights: Tensor
    teacher_hidden: Tensor | None = None
    documents: Tensor | None = None
    positions: Tensor | None = None
    dropout_keys: Tensor | None = None
    target_ids: Tensor | None = None
    target_masses: Tensor | None = None

    def inputs(self, is_last: bool = True) -> dict[str, Tensor]:
        """What a stage gets beside its input; the last one needs more."""
        given = {"documents": self.documents, "positions": self.positions, "dropout_keys": self.dropout_keys}
        if is_last:
            given |= {"labels": self.labels, "weights": self.weights, "teacher_hidden": self.teacher_hidden}
            given |= {"target_ids": self.target_ids, "target_masses": self.target_masses}
        return {name: tensor for name, tensor in given.items() if tensor is not None}


class Engine:
    """Forward and backward passes of one model over a batch.

    Args:
        modules: this rank's stages, in order: modules whose `forward(x, **inputs)` returns activations [b, L, H] or, on
            the last stage with labels, the loss sum, and that append the loss's sums per microbatch to `loss_sums`.
        model: the whole model's configuration.
        mesh: where the rank stands.
        num_microbatches: into how many pieces a batch is cut; divides the batch.
        activation: example activations of one microbatch [b, L, H] that travel between stages (meta device).
        ids: example token ids of one microbatch [b, S] (meta device).
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        model: ModelConfig,
        mesh: Mesh,
        num_microbatches: int,
        activation: Tensor,
        ids: Tensor,
    ) -> None:
        self.modules, self.model, self.mesh, self.num_microbatches = list(modules), model, mesh, num_microbatches
        for module in self.modules:
            module.register_forward_hook(_mark)
        all_stages = pipeline_stages(model.num_layers, mesh.parallel)
        self.stages = [stage for stage in all_stages if stage.rank == mesh.pp.rank]
        # Each with stages of its own: torch would set them up anew at every change between training and evaluation.
        self.schedule, self.forward_schedule = None, None
        if mesh.pp.size > 1:
            self.schedule = self._make_schedule(self._make_stages(activation, ids))
            self._forward_stages = self._make_stages(activation, ids)
            self.forward_schedule = _forward_only(self._make_schedule(self._forward_stages))
        tied_ends = model.tied_embeddings and mesh.pp.size > 1
        self.ties_here = tied_ends and self.has_first and self.has_last
        self.ties_across = tied_ends and self.has_first != self.has_last

    @property
    def has_first(self) -> bool:
        """Whether this rank embeds the tokens."""
        return self.stages[0].is_first

    @property
    def has_last(self) -> bool:
        """Whether this rank computes the loss."""
        return self.stages[-1].is_last

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """This rank's parameters by global name; of a tied embedding that both ends hold here, the first."""
        named: dict[str, nn.Parameter] = {}
        for module in self.modules:
            named = {**dict(module.named_parameters()), **named}
        return named

    def train_step(self, batch: Batch) -> Tensor:
        """Accumulates gradients of the batch's loss.

        Returns:
            The global sums [loss, CE, KD, the teacher's entropy], the same on every rank.
        """
        self._refresh_tied_copy()
        if self.schedule is None:
            self._loop(batch)
        else:
            self._run_schedule(self.schedule.step, batch)
        self._complete_gradients()
        return self._global_sums()

    def evaluate(self, batch: Batch) -> Tensor:
        """The global sums [loss, CE, KD, the teacher's entropy] of a batch, without gradients."""
        self._refresh_tied_copy()
        with torch.no_grad():
            if self.forward_schedule is None:
                for part in self._microbatches(batch):
                    self.modules[0](part.ids, **part.inputs())
            else:
                self._run_schedule(self.forward_schedule.eval, batch)
                for stage in self._forward_stages:
                    stage.clear_runtime_states()  # results of all microbatches
        for module in self.modules:
            reshard(module)
        return self._global_sums()

    def _loop(self, batch: Batch) -> None:
        (module,) = self.modules
        for i, part in enumerate(self._microbatches(batch)):
            sync_gradients(module, enabled=i == self.num_microbatches - 1)
            module(part.ids, **part.inputs()).sum().backward()
            heartbeat.progress()

    def _microbatches(self, batch: Batch) -> list[Batch]:
        chunks = {name: x.chunk(self.num_microbatches) for name, x in {"ids": batch.ids, **batch.inputs()}.items()}
        return [Batch(**{name: chunk[i] for name, chunk in chunks.items()}) for i in range(self.num_microbatches)]

    def _run_schedule(self, run: Any, batch: Batch) -> None:
        args = (batch.ids,) if self.has_first else ()
        ends = {"target": batch.labels, "losses": []} if self.has_last else {}
        run(*args, **ends, **batch.inputs(self.has_last), return_outputs=False)

    def _complete_gradients(self) -> None:
        parameters = self.parameters
        if self.ties_here:
            first, last = self._tied_copies()
            local(cast(Tensor, first.grad)).add_(local(cast(Tensor, last.grad)))
            last.grad = None
        sum_partial_gradients(parameters, self.model, self.mesh)
        if self.ties_across:
            sum_tied_gradients(parameters, self.mesh.pp)

    def _refresh_tied_copy(self) -> None:
        """Where one rank holds both ends, the output matrix follows the embedding, whoever has changed that."""
        if self.ties_here:
            first, last = self._tied_copies()
            with torch.no_grad():
                local(last).copy_(local(first))

    def _tied_copies(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.modules[0].get_parameter(TIED_EMBEDDING), self.modules[-1].get_parameter(TIED_EMBEDDING)

    def _global_sums(self) -> Tensor:
        recorded = cast(list[Tensor], self.modules[-1].loss_sums)
        device = self.mesh.device
        nothing = torch.zeros(NUM_SUMS, dtype=torch.double, device=device)
        sums = torch.stack(recorded).sum(0).double() if recorded else nothing
        recorded.clear()
        return broadcast_from(sum_over(sums, self.mesh.tokens), self.mesh.loss_rank, self.mesh.pp)

    def _make_stages(self, activation: Tensor, ids: Tensor) -> list[PipelineStage]:
        loss = torch.empty(1, dtype=torch.promote_types(activation.dtype, torch.float32), device="meta")
        return [
            PipelineStage(
                module,
                stage.index,
                stage.num_stages,
                self.mesh.device,
                input_args=ids if stage.is_first else activation,
                output_args=loss if stage.is_last else activation,
                group=self.mesh.pp.group,
            )
            for module, stage in zip(self.modules, self.stages, strict=True)
        ]

    def _make_schedule(self, stages: list[PipelineStage]) -> Any:
        kind = get_schedule_class(self.mesh.parallel.schedule)
        takes_one = self.mesh.parallel.schedule == "1F1B"
        given: Any = stages[0] if takes_one else stages
        return kind(given, self.num_microbatches, loss_fn=_loss_of, scale_grads=False)


def _forward_only(schedule: Any) -> Any:
    """The schedule without its backward half; torch's own `eval` leaves that in and fails in V-shaped schedules."""
    if isinstance(schedule, _PipelineScheduleRuntime):
        for rank, actions in schedule.pipeline_order_with_comms.items():
            parts = [part for action in actions for part in action.sub_actions or (action,)]  # F and B may overlap
            schedule.pipeline_order_with_comms[rank] = [p for p in parts if p.computation_type in FORWARD_ACTIONS]
    return schedule


def _mark(*_: Any) -> None:
    heartbeat.progress()


def _loss_of(output: Tensor, _: Tensor) -> Tensor:
    return output.sum()
