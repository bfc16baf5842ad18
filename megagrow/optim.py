"""AdamW on this rank's shards, learning-rate schedules, clipping over the whole mesh, the guard against bad steps."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megagrow import ops
from megagrow.adamw import MOMENTS, ApexAdamW, Group, HostWeights, KernelAdamW, LocalWeights, TorchAdamW, Weights
from megagrow.config import OptimConfig
from megagrow.new_part import NewPart, Rates, correct_
from megagrow.parallel.collectives import sum_over
from megagrow.parallel.mesh import Mesh
from megagrow.parallel.shards import counted_here, local, wrap_like
from megagrow.roles import TIED_EMBEDDING, role_of


@dataclass(frozen=True)
class Multipliers:
    """What one tensor's learning rate, eps and weight decay are multiplied by; growth changes them."""

    lr: float = 1.0
    eps: float = 1.0
    weight_decay: float = 1.0


class Optimizer:
    """AdamW (Loshchilov & Hutter, 2019) over named parameters, run on plain local tensors (see adamw.py).

    Args:
        parameters: this rank's parameters by name; plain tensors or DTensors.
        config: rates, factors, back end.
        multipliers: per-tensor factors of the whole model, the same on every rank; names left out have 1.
        step: updates that the moments have already seen.
        new_part: entries that growth added, while their updates differ; None: there are none.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: OptimConfig,
        multipliers: Mapping[str, Multipliers] | None = None,
        step: int = 0,
        new_part: NewPart | None = None,
    ) -> None:
        self.parameters, self.config, self.new_part = dict(parameters), config, new_part
        self.multipliers = dict(multipliers or {})  # of other ranks' parameters too: one rank saves them for all
        self.weights: Weights = (HostWeights if config.offload else LocalWeights)(self.parameters)
        self.adamw = self._update_of(config)(self._groups(), config, step)

    def _update_of(self, config: OptimConfig) -> type[TorchAdamW]:
        if config.backend == "apex":
            return ApexAdamW
        tensors = self.weights.tensors.values()
        return KernelAdamW if all(ops.serves("adamw", tensor) for tensor in tensors) else TorchAdamW

    def _groups(self) -> list[Group]:
        grouped: dict[tuple[Multipliers, bool], list[nn.Parameter]] = {}
        for name, tensor in self.weights.tensors.items():
            factors = self.multipliers.get(name, Multipliers())
            grouped.setdefault((factors, role_of(name).decays), []).append(tensor)
        return [
            {
                "params": tensors,
                "lr_factor": factors.lr,
                "eps": self.config.eps * factors.eps,
                "weight_decay": self.config.weight_decay * factors.weight_decay * decays,
            }
            for (factors, decays), tensors in grouped.items()
        ]

    @property
    def step_count(self) -> int:
        """Updates that the moments have seen."""
        return self.adamw.step_count

    @step_count.setter
    def step_count(self, step: int) -> None:
        self.adamw.step_count = step

    @property
    def decides_on_device(self) -> bool:
        """Whether `step` takes a scale and a flag from the device, so that nobody has to wait for them."""
        return isinstance(self.adamw, KernelAdamW)

    def step(self, lr: float, scale: Tensor | None = None, skip: Tensor | None = None) -> None:
        """Applies one update from the parameters' gradients, then drops the gradients.

        Args:
            lr: the learning rate, before the tensors' own factors.
            scale: one number that the gradients are multiplied by, where `decides_on_device`.
            skip: one flag: nothing is updated where it is set, likewise; `step_count` counts the step all the same.
        """
        for group in self.adamw.groups:
            group["lr"] = lr * group["lr_factor"]
        self.weights.fetch()
        self.adamw.step(scale, skip)
        self._correct_new_part(skip)
        self.weights.give_back()
        self.drop_gradients()

    def restart(self) -> None:
        """Makes the moments those of an optimizer that has seen no gradient."""
        for tensors in self.moments().values():
            for tensor in tensors.values():
                local(tensor).zero_()
        self.step_count, self.new_part = 0, None

    def _correct_new_part(self, skip: Tensor | None) -> None:
        part, betas = self.new_part, (self.config.beta1, self.config.beta2)
        if part is None:
            return
        step = self.step_count  # which may be on the device
        if part.schedule.is_over(step, *betas):
            return
        group_of = {id(tensor): group for group in self.adamw.groups for tensor in group["params"]}
        for name, tensor in self.weights.tensors.items():
            if name in part.kept and tensor.grad is not None:
                group = group_of[id(tensor)]
                rates = Rates(group["lr"], group["eps"], group["weight_decay"], *betas)
                exp_avg, exp_avg_sq = (self.adamw.moment(tensor, moment) for moment in MOMENTS)
                correct_(tensor, exp_avg, exp_avg_sq, part.kept[name], part.schedule, rates, step, skip)

    def drop_gradients(self) -> None:
        """Frees all gradients without using them."""
        for name, tensor in self.weights.tensors.items():
            tensor.grad = self.parameters[name].grad = None

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """{"exp_avg": {name: tensor}, "exp_avg_sq": …}, laid out like the parameters and sharing the state's memory.

        With `optim.offload` the local pieces are in host memory, wherever the parameters are.
        """
        return {
            moment: {
                name: wrap_like(self.adamw.moment(tensor, moment), self.parameters[name])
                for name, tensor in self.weights.tensors.items()
            }
            for moment in MOMENTS
        }

    def tensors(self) -> dict[str, Tensor]:
        """The state by flat names, as checkpoints store it."""
        return {f"optim.{moment}.{name}": t for moment, named in self.moments().items() for name, t in named.items()}

    def state(self) -> dict[str, Any]:
        """What is not a tensor: the step, the multipliers that differ from 1, and the new part while it differs."""
        changed = {name: asdict(m) for name, m in self.multipliers.items() if m != Multipliers()}
        state = {"step": self.step_count, "multipliers": changed}
        if self.new_part is not None and self.treats_new_part():
            state["new_part"] = self.new_part.state()
        return state

    def treats_new_part(self, steps: int = 0) -> bool:
        """Whether there is a part that still has updates of its own, so many steps from now."""
        part, step = self.new_part, self.step_count + steps + 1
        return part is not None and not part.schedule.is_over(step, self.config.beta1, self.config.beta2)


def clip_gradients(parameters: Mapping[str, nn.Parameter], max_norm: float, mesh: Mesh) -> float:
    """Scales all gradients so that their norm over the whole mesh is at most `max_norm`.

    Args:
        parameters: this rank's parameters by name.
        max_norm: bound; 0 measures without clipping.
        mesh: where the rank stands.

    Returns:
        The norm before clipping, the same number on every rank; not finite when any gradient is not.
    """
    norm = gradient_norm(parameters, mesh).item()
    scale_gradients(parameters, norm, max_norm)
    return norm


def scale_gradients(parameters: Mapping[str, nn.Parameter], norm: float, max_norm: float) -> None:
    """Scales all gradients, whose norm is given, so that it is at most `max_norm`; 0 sets no bound."""
    if max_norm and math.isfinite(norm) and norm > max_norm:
        gradients = [local(p.grad) for p in parameters.values() if p.grad is not None]
        if gradients:  # of a stage of frozen layers there are none
            torch._foreach_mul_(gradients, max_norm / norm)


def clip_scale(norm: Tensor, max_norm: float) -> Tensor:
    """The factor that makes gradients of this norm have at most `max_norm`, on the norm's device, in float32."""
    bound = max_norm or math.inf
    return torch.where(norm > bound, bound / norm, 1.0).float()


def gradient_norm(parameters: Mapping[str, nn.Parameter], mesh: Mesh) -> Tensor:
    """The Euclidean norm of all gradients over the whole mesh, every element counted once; one float64."""
    second_copy = not mesh.pp.is_first
    counted = [
        local(p.grad)
        for name, p in parameters.items()
        if p.grad is not None and counted_here(p) and not (second_copy and name == TIED_EMBEDDING)
    ]
    total = torch.zeros((), dtype=torch.double, device=mesh.device)
    if counted:
        total += torch.stack(torch._foreach_norm(counted)).double().square().sum()
    return sum_over(total, mesh.world).sqrt()


def lr_at(step: int, total: int, config: OptimConfig) -> float:
    """Learning rate of a step (from 0) of a run of `total` steps.

    Warm-up is linear. `wsd` stays flat, then decays linearly over the last `decay_fraction` (Hu et al., 2024, MiniCPM);
    `cosine` decays over all that follows the warm-up (Loshchilov & Hutter, 2017); both end at `min_lr_ratio`.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        decay = max(round(total * config.decay_fraction), 1)
        share = min(max((total - step) / decay, 0.0), 1.0)  # a growth that had to wait may end later than planned
    else:
        progress = (step - config.warmup_steps) / max(total - config.warmup_steps, 1)
        share = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * share)


@dataclass
class StepGuard:
    """Decides whether a step's gradients may reach the weights; its window survives a resume.

    Attributes:
        losses: the latest good losses.
        bad_steps: steps in a row that were refused.
    """

    losses: list[float] = field(default_factory=list)
    bad_steps: int = 0

    def accepts(self, loss: float, grad_norm: float, config: OptimConfig) -> bool:
        """Records the step; False when it must be skipped: not finite, or a loss spike when those are watched for.

        The spike rule is OLMo's: more than mean + `spike_sigma` standard deviations of the last `spike_window` losses.
        """
        good = math.isfinite(loss) and math.isfinite(grad_norm) and not loss > self._limit(config)
        self.bad_steps = 0 if good else self.bad_steps + 1
        if good and config.spike_sigma:
            self.losses = [*self.losses, loss][-config.spike_window :]
        return good

    def refuses(self, loss: Tensor, grad_norm: Tensor, config: OptimConfig) -> Tensor:
        """The opposite of what `accepts` will say of these numbers, as a flag on their device; records nothing."""
        return ~(loss.isfinite() & grad_norm.isfinite() & ~(loss.double() > self._limit(config)))

    def forget(self) -> None:
        """Empties the window: what follows is another loss, of another model or another objective."""
        self.losses = []

    def _limit(self, config: OptimConfig) -> float:
        """The loss above which there is a spike."""
        if not config.spike_sigma or len(self.losses) < max(config.spike_window // 4, 2):
            return math.inf
        limit = statistics.fmean(self.losses) + config.spike_sigma * statistics.stdev(self.losses)
        return max(limit, self.losses[-1])
