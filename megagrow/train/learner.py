"""One optimizer step: of a model's weights, or of the maps that LiGO learns.

Both kinds of learner have the same face, so that the loop does not care which one it drives.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megagrow.config import Config
from megagrow.growth.ligo import Ligo
from megagrow.optim import MOMENTS, Optimizer, StepGuard, clip_scale, gradient_norm, scale_gradients
from megagrow.parallel import heartbeat
from megagrow.parallel.pipeline import Batch
from megagrow.train.part import Part, gradients


@dataclass(frozen=True)
class StepResult:
    """What one step gave: mean losses in nats per token, and whether it reached the weights.

    Attributes:
        loss: what was minimised.
        ce: cross-entropy with the labels.
        kd: the teacher's term, times what scales it; 0 without a teacher.
        teacher_entropy: of its distribution at its temperature; 0 without a teacher.
        grad_norm: before clipping.
        lr: learning rate.
        accepted: whether the guard let the step change the weights.
    """

    loss: float
    ce: float
    kd: float
    teacher_entropy: float
    grad_norm: float
    lr: float
    accepted: bool


class Learner(Protocol):
    """Something whose weights a step improves.

    Attributes:
        part: the model that the losses are those of.
    """

    part: Part

    def step(self, batch: Batch, lr: float, guard: StepGuard) -> StepResult: ...

    def tensors(self) -> dict[str, Tensor]: ...

    def state(self) -> dict[str, Any]: ...


class ModelLearner:
    """Trains a model's weights with AdamW."""

    def __init__(self, part: Part, optimizer: Optimizer, config: Config) -> None:
        self.part, self.optimizer, self.config = part, optimizer, config

    def step(self, batch: Batch, lr: float, guard: StepGuard) -> StepResult:
        """Forward, backward, clip, update; a step that the guard refuses leaves everything as it was."""
        sums_4 = self.part.engine.train_step(batch)
        heartbeat.enter("optimizer")
        parameters = self.part.parameters
        norm = gradient_norm(parameters, self.part.mesh)
        numbers, optim, optimizer = torch.cat((sums_4.double(), norm.view(1))), self.config.optim, self.optimizer
        if optimizer.decides_on_device:  # the host waits afterwards
            optimizer.step(lr, clip_scale(norm, optim.clip_norm), guard.refuses(sums_4[0], norm, optim))
        loss, ce, kd, entropy, grad_norm = numbers.tolist()
        accepted = guard.accepts(loss, grad_norm, optim)
        if optimizer.decides_on_device:
            optimizer.step_count -= not accepted
        elif accepted:
            scale_gradients(parameters, grad_norm, optim.clip_norm)
            optimizer.step(lr)
        optimizer.drop_gradients()
        return StepResult(loss, ce, kd, entropy, grad_norm, lr, accepted)

    def restart(self) -> None:
        """Forgets the moments."""
        self.optimizer.restart()

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint stores: weights and moments."""
        return {**self.part.tensors(), **self.optimizer.tensors()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores beside tensors."""
        return self.optimizer.state()


class MapLearner:
    """Learns LiGO's maps through the target model: generate, train step, pull the gradients back to the maps.

    The target's weights and gradients exist, but no moments for them: learning takes less memory than training. Each
    map of a stage is updated, and its moments are kept, by one rank of it.

    Args:
        small: the frozen source.
        part: the target; its weights are generated from the maps.
        ligo: the maps.
        fetch: reads source tensors, whole ones by a collective; see `grow.mesh_fetch`.
        config: the run's configuration.
    """

    def __init__(self, small: Part, part: Part, ligo: Ligo, fetch: Callable[[str], Tensor], config: Config) -> None:
        self.small, self.part, self.ligo, self.fetch, self.config = small, part, ligo, fetch, config
        growth, self.owned = config.growth, ligo.owned(part.mesh)
        betas, decay = (growth.ligo_beta1, growth.ligo_beta2), growth.ligo_weight_decay
        self.adamw = torch.optim.AdamW(list(self.owned.values()), betas=betas, eps=config.optim.eps, weight_decay=decay)
        for parameter in self.owned.values():
            moments = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
            self.adamw.state[parameter] = {"step": torch.tensor(0.0), **moments}

    def generate(self) -> None:
        """Writes the target's weights from the maps as they are now."""
        self.ligo.generate(self.fetch, self.part.parameters)

    def step(self, batch: Batch, lr: float, guard: StepGuard) -> StepResult:
        """One learning step of the maps on the ordinary loss (LiGO, Eq. 3); then the weights are generated anew."""
        loss, ce, kd, entropy = self.part.engine.train_step(batch).tolist()
        heartbeat.enter("optimizer")
        parameters, optim = self.part.parameters, self.config.optim
        of_weights = gradients(parameters)
        for parameter in parameters.values():
            parameter.grad = None
        self.ligo.pull_back(self.fetch, parameters, of_weights, self.part.mesh)
        norm = self.ligo.gradient_norm(self.part.mesh).item()
        accepted = guard.accepts(loss, norm, optim)
        if accepted:
            scale_gradients(self.ligo.parameters(), norm, optim.clip_norm)
            self._update(lr)
            self.generate()
        return StepResult(loss, ce, kd, entropy, norm, lr, accepted)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint stores: the small model, the maps and their moments."""
        maps = self.ligo.parameters()
        stored = {f"ligo.map.{name}": p.detach() for name, p in maps.items()}
        for moment in MOMENTS:
            stored |= {f"ligo.{moment}.{name}": self.adamw.state[p][moment] for name, p in self.owned.items()}
        return {**self.small.tensors(), **stored}

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores beside tensors."""
        return {"step": self.step_count, "multipliers": {}}

    def set_step_count(self, step: int) -> None:
        """Tells Adam how many updates the loaded moments have seen."""
        for state in self.adamw.state.values():
            state["step"].fill_(float(step))

    @property
    def step_count(self) -> int:
        """Updates of the maps so far."""
        return int(next(iter(self.adamw.state.values()))["step"])

    def _update(self, lr: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        for parameter in self.ligo.parameters().values():
            parameter.grad = None
        self.ligo.share(self.part.mesh)


def map_lr(step: int, config: Config) -> float:
    """Learning rate of LiGO's maps at a learning step: linear warm-up, then linear decay to zero at the last one."""
    growth = config.growth
    if step < growth.ligo_warmup_steps:
        return growth.ligo_lr * (step + 1) / growth.ligo_warmup_steps
    return growth.ligo_lr * (growth.ligo_steps - step) / max(growth.ligo_steps - growth.ligo_warmup_steps, 1)
