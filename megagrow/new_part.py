"""The entries that growth added to tensors, where they need other updates than the entries beside them.

AdamW's kernels know one learning rate and one count of updates per tensor. New entries warm up by themselves, and where
their moments began at zero they have their own count: corrected by the old entries' large one, a first update would be
lr·(1 − β1)/√(1 − β2) instead of lr at most, 3.2 times too large at β2 = 0.999. So after each update the new entries are
taken from where the kernel put them to where they belong:

    u(k)     = (m / (1 − β1^k)) / (√(v / (1 − β2^k)) + eps)
    kernel:    p = p₀ − lr·(wd·p₀ + u(t))            t: updates that the old entries have seen
    wanted:    p = p₀ − ρ·lr·(wd·p₀ + u(n))          n: those that the new ones have seen; ρ: their re-warm-up

p₀ follows from the first line and the moments are the same in both, so any kernel can go before, in any memory. It is
done some rows at a time, which takes no memory to speak of.
"""

# Shape suffix legend: R, C = rows and columns of this rank's piece of a tensor.

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from megagrow.timeline import SETTLED

CHUNK, HOST_CHUNK = 2**21, 2**16  # elements that are corrected at a time; on the host what its caches hold


@dataclass(frozen=True)
class Schedule:
    """How the new entries' updates differ, as plain data.

    Attributes:
        since: updates that the old entries had seen when the new ones came.
        starts_at_zero: whether the new entries' moments were zero then, so that they count from there.
        steps: updates over which their learning rate warms up, linearly; 0: it does not.
        factor: what it reaches, relative to that of the old entries, which it equals afterwards.
    """

    since: int
    starts_at_zero: bool
    steps: int = 0
    factor: float = 1.0

    def count(self, step: int) -> int:
        """n: updates that the new entries have seen when the old ones have seen `step`."""
        return step - self.since if self.starts_at_zero else step

    def rate(self, step: int) -> float:
        """ρ of the update that is number `step` for the old entries."""
        done = step - self.since
        return self.factor * done / self.steps if done <= self.steps else 1.0

    def is_over(self, step: int, beta1: float, beta2: float) -> bool:
        """Whether the update that is number `step` for the old entries is the same for the new ones, and all later."""
        settled = max(beta1, beta2) ** self.count(step) < SETTLED or self.count(step) == step
        return settled and step - self.since > self.steps


@dataclass(frozen=True, eq=False)
class Kept:
    """The old entries of this rank's piece of a tensor: those in these rows and in these columns.

    Attributes:
        rows: [R] bool.
        columns: [C] bool; of a vector [1].
    """

    rows: Tensor
    columns: Tensor

    def new_entries(self, rows: slice, device: torch.device) -> Tensor:
        """[R, C] bool: which entries of a range of rows are new."""
        return ~(self.rows[rows, None].to(device) & self.columns.to(device))

    @property
    def has_new(self) -> bool:
        """Whether there are new entries at all."""
        return not bool(self.rows.all() and self.columns.all())


@dataclass(frozen=True, eq=False)
class NewPart:
    """The new entries of all tensors.

    Attributes:
        schedule: how their updates differ.
        kept: parameter name -> the old entries; tensors left out have no new ones.
        origin: how the model grew, as plain data, from which the new entries can be found again.
    """

    schedule: Schedule
    kept: Mapping[str, Kept]
    origin: Mapping[str, Any]

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores."""
        return {**asdict(self.schedule), **self.origin}


@dataclass(frozen=True)
class Rates:
    """What the kernel updated a tensor with."""

    lr: float
    eps: float
    weight_decay: float
    beta1: float
    beta2: float

    def update(self, exp_avg: Tensor, root: Tensor, count: int) -> Tensor:
        """u(count), from the moments; `root` is the square root of the second one."""
        correction = math.sqrt(1 - self.beta2**count)
        denominator = root + self.eps * correction
        return torch.div(exp_avg, denominator, out=denominator).mul_(correction / (1 - self.beta1**count))


@torch.no_grad()
def correct_(
    tensor: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    kept: Kept,
    schedule: Schedule,
    rates: Rates,
    step: int,
    skip: Tensor | None = None,
) -> None:
    """Takes a tensor's new entries from where the kernel has put them to where they belong.

    Args:
        tensor: this rank's piece, [R, C] or [R], after the update.
        exp_avg, exp_avg_sq: its moments, after the update.
        kept: which entries are old.
        schedule: how the new entries' updates differ.
        rates: those of the kernel's update.
        step: updates that the old entries have seen, with this one.
        skip: one flag on the tensor's device: the kernel has done nothing where it is set, and neither does this.
    """
    p_RC, m_RC, v_RC = (x if x.ndim == 2 else x[:, None] for x in (tensor, exp_avg, exp_avg_sq))
    num_rows = max((HOST_CHUNK if tensor.device.type == "cpu" else CHUNK) // max(p_RC.shape[1], 1), 1)
    for start in range(0, p_RC.shape[0], num_rows):
        rows = slice(start, start + num_rows)
        is_new_RC = kept.new_entries(rows, tensor.device)
        if skip is not None:
            is_new_RC = is_new_RC & ~skip
        change_RC = _change(p_RC[rows], m_RC[rows], v_RC[rows], schedule, rates, step)
        p_RC[rows] += change_RC.masked_fill_(~is_new_RC, 0)


def _change(p: Tensor, m: Tensor, v: Tensor, schedule: Schedule, rates: Rates, step: int) -> Tensor:
    """From the kernel's result to the wanted one, if all entries were new."""
    rho, lr, decay, root = schedule.rate(step), rates.lr, rates.weight_decay, v.sqrt()
    done = rates.update(m, root, step)
    wanted = rates.update(m, root, schedule.count(step)) if schedule.starts_at_zero else done
    change = torch.sub(done, wanted, alpha=rho).mul_(lr)
    if decay and rho != 1:
        before = done.mul_(lr).add_(p)  # times (1 - lr * decay)
        change.add_(before, alpha=lr * decay * (1 - rho) / (1 - lr * decay))
    return change
