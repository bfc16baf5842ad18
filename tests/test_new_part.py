"""New entries beside old ones: each goes where an optimizer of its own would take it."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from megagrow import new_part
from megagrow.config import OptimConfig
from megagrow.new_part import Kept, NewPart, Schedule, correct_
from megagrow.optim import MOMENTS, Multipliers, Optimizer
from tests.test_optim_backends import apex

CONFIG = OptimConfig(lr=0.01, beta2=0.999, eps=1e-3, weight_decay=0.3)
SHAPES = {"layers.0.mlp.down.weight": (6, 5), "final_norm.weight": (6,), "head.weight": (3, 5)}
SLOW = {"head.weight": Multipliers(lr=0.5, eps=2.0, weight_decay=2.0)}
ROWS, COLUMNS = torch.tensor([1, 0, 1, 0, 0, 1]).bool(), torch.tensor([1, 1, 0, 1, 0]).bool()
KEPT = {"layers.0.mlp.down.weight": Kept(ROWS, COLUMNS), "final_norm.weight": Kept(ROWS, torch.ones(1).bool())}
OLD = 2_000  # updates that the old entries have seen


def values(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=generator, dtype=torch.double).to(dtype) for n, shape in SHAPES.items()}


def is_new(name: str) -> Tensor:
    if name not in KEPT:
        return torch.zeros(SHAPES[name], dtype=torch.bool)
    return KEPT[name].new_entries(slice(None), torch.device("cpu")).view(SHAPES[name])


def make(config: OptimConfig, part: NewPart | None, step: int, dtype: torch.dtype, history: bool) -> Optimizer:
    """An optimizer whose moments have a history, except those of the new part where that starts at zero."""
    parameters = {name: nn.Parameter(value) for name, value in values(0, dtype).items()}
    optimizer = Optimizer(parameters, config, SLOW, step, part)
    for i, moment in enumerate(MOMENTS):
        for name, tensor in optimizer.moments()[moment].items():
            tensor.copy_(values(1 + i, dtype)[name].abs() * history)
            if part is not None and part.schedule.starts_at_zero:
                tensor.masked_fill_(is_new(name), 0)
    return optimizer


def train(optimizer: Optimizer, rates: list[float]) -> dict[str, Tensor]:
    for step, rate in enumerate(rates):
        for name, parameter in optimizer.parameters.items():
            parameter.grad = values(100 + step, parameter.dtype)[name]
        optimizer.step(CONFIG.lr * rate)
    return {name: parameter.detach().clone() for name, parameter in optimizer.parameters.items()}


def distance(schedule: Schedule, config: OptimConfig = CONFIG, steps: int = 12, exact: bool = True) -> float:
    """From what two optimizers do, one that is as old as the old entries and one for the new ones alone."""
    dtype, zero = (torch.double if exact else torch.float32), schedule.starts_at_zero
    found = train(make(config, NewPart(schedule, KEPT, {}), OLD, dtype, True), [1.0] * steps)
    old = train(make(config, None, OLD, dtype, True), [1.0] * steps)
    rates = [schedule.rate(OLD + step + 1) for step in range(steps)]
    new = train(make(config, None, 0 if zero else OLD, dtype, not zero), rates)
    return max((found[n] - torch.where(is_new(n), new[n], old[n])).abs().max().item() for n in SHAPES)


SCHEDULES = {
    "own count": Schedule(OLD, True),
    "re-warm-up": Schedule(OLD, False, 5, 1.3),
    "both": Schedule(OLD, True, 5, 1.3),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_new_entries_are_updated_as_by_their_own_optimizer(schedule: Schedule) -> None:
    assert distance(schedule) < 1e-13
    assert distance(schedule, dataclasses.replace(CONFIG, offload=True)) < 1e-13
    with apex():
        assert distance(schedule, dataclasses.replace(CONFIG, backend="apex"), exact=False) < 1e-5


def first_updates(part: NewPart | None) -> dict[str, Tensor]:
    """What the first step adds to each new entry, in units of the learning rate, without weight decay."""
    config = dataclasses.replace(CONFIG, weight_decay=0.0, eps=1e-12)
    zeros = NewPart(Schedule(OLD, True), KEPT, {})
    optimizer = make(config, zeros, OLD, torch.double, True)
    optimizer.new_part = part
    before, after = values(0, torch.double), train(optimizer, [1.0])
    return {name: ((after[name] - before[name]) / CONFIG.lr)[is_new(name)] for name in KEPT}


def test_the_first_update_is_no_larger_than_that_of_a_fresh_adam() -> None:
    for update in first_updates(NewPart(Schedule(OLD, True), KEPT, {})).values():
        assert update.abs().max() == pytest.approx(1, abs=1e-6)
    for update in first_updates(None).values():  # the trap: (1 - beta1) / sqrt(1 - beta2)
        assert update.abs().max() > 2.9


def test_the_learning_rate_rises_to_its_factor_then_is_the_others() -> None:
    schedule = Schedule(10, False, 4, 1.2)
    assert [schedule.rate(step) for step in range(11, 17)] == pytest.approx([0.3, 0.6, 0.9, 1.2, 1.0, 1.0])
    assert {Schedule(10, True).rate(step) for step in range(11, 17)} == {1.0}


def test_it_ends_when_nothing_differs_any_more() -> None:
    ramp, count = Schedule(10, False, 4), Schedule(10, True)
    assert [ramp.is_over(step, 0.9, 0.95) for step in (14, 15)] == [False, True]
    last = next(step for step in range(11, 999) if count.is_over(step, 0.9, 0.95))
    assert 0.95 ** (last - 10) < new_part.SETTLED <= 0.95 ** (last - 11)
    assert Schedule(0, True).is_over(1, 0.9, 0.999)  # all moments are new: one count for all
    assert not Schedule(0, True, 1).is_over(1, 0.9, 0.999)


def test_the_state_has_it_until_then() -> None:
    part = NewPart(Schedule(OLD, False, 3, 1.3), KEPT, {"method": "clone"})
    optimizer = make(CONFIG, part, OLD, torch.double, True)
    assert optimizer.state()["new_part"] == {**dataclasses.asdict(part.schedule), "method": "clone"}
    train(optimizer, [1.0] * 2)
    assert "new_part" in optimizer.state()
    train(optimizer, [1.0])
    assert "new_part" not in optimizer.state()


def test_the_size_of_the_pieces_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    part = NewPart(SCHEDULES["both"], KEPT, {})
    whole = train(make(CONFIG, part, OLD, torch.double, True), [1.0] * 3)
    monkeypatch.setattr(new_part, "HOST_CHUNK", 7)
    pieces = train(make(CONFIG, part, OLD, torch.double, True), [1.0] * 3)
    assert all(torch.equal(pieces[name], whole[name]) for name in whole)


def test_a_step_that_the_device_skips_leaves_everything_as_it_was() -> None:
    name, rates = "layers.0.mlp.down.weight", new_part.Rates(0.01, 1e-3, 0.3, 0.9, 0.999)
    for skip in (True, False):
        tensor = values(0, torch.double)[name]
        moments = (values(seed, torch.double)[name].abs() for seed in (1, 2))
        correct_(tensor, *moments, KEPT[name], SCHEDULES["both"], rates, OLD + 1, torch.tensor(skip))
        assert torch.equal(tensor, values(0, torch.double)[name]) == skip


def test_a_tensor_without_a_gradient_is_left_alone() -> None:
    optimizer = make(CONFIG, NewPart(SCHEDULES["both"], KEPT, {}), OLD, torch.double, True)
    names = list(SHAPES)
    optimizer.parameters[names[2]].grad = torch.ones(SHAPES[names[2]], dtype=torch.double)
    optimizer.step(CONFIG.lr)
    for name in names[:2]:
        assert torch.equal(optimizer.parameters[name].detach(), values(0, torch.double)[name])
