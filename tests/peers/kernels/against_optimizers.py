"""AdamW against torch's: weights and both moments after several steps, on tensors of several sizes and rates.

Compared: torch.optim.AdamW as a loop, by foreach and fused. The loop is also what megatron-core falls back on without
Transformer Engine and Apex, whose FusedAdam could not run: both are CUDA only. Liger has no optimizer.
"""

import pytest
import torch
from torch import Tensor

from megagrow_kernels.adamw import adamw_
from tests.peers.kernels import theirs
from tests.peers.kernels.agreement import BF16, DTYPES, F32, Tensors, assert_agree, normal

SHAPES = [(7, 33), (1,), (1500,), (4, 3, 5)]
LRS, DECAYS = (1e-3, 1e-2, 3e-3, 1e-2), (0.1, 0.0, 0.1, 0.5)
BETAS, EPS, STEPS = (0.9, 0.95), 1e-8, 3


def weights() -> list[Tensor]:
    return [normal(seed, *shape) for seed, shape in enumerate(SHAPES)]


def gradients(step: int, dtype: torch.dtype) -> list[Tensor]:
    return [normal(100 * step + seed, *shape, dtype=dtype) for seed, shape in enumerate(SHAPES)]


def by_kernel(dtype: torch.dtype) -> Tensors:
    params, averages, squares = weights(), *([torch.zeros(shape) for shape in SHAPES] for _ in range(2))
    copies = [torch.zeros(shape, dtype=BF16) for shape in SHAPES]
    for step in range(1, STEPS + 1):
        rates = LRS, [EPS] * len(SHAPES), DECAYS, *BETAS
        adamw_(params, gradients(step, dtype), averages, squares, copies, *rates, step)
    assert all(torch.equal(copy, param.to(BF16)) for copy, param in zip(copies, params, strict=True))
    return named(params, averages, squares)


def by_torch(dtype: torch.dtype, wide: torch.dtype, **options: bool) -> Tensors:
    params = [param.to(wide).requires_grad_() for param in weights()]
    rates = zip(params, LRS, DECAYS, strict=True)
    groups = [{"params": [param], "lr": lr, "weight_decay": decay} for param, lr, decay in rates]
    optimizer = theirs.MegatronAdam(groups, betas=BETAS, eps=EPS, **options)
    for step in range(1, STEPS + 1):
        for param, grad in zip(params, gradients(step, dtype), strict=True):
            param.grad = grad.to(wide)
        optimizer.step()
    states = [optimizer.state[param] for param in params]
    moments = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
    return named([param.detach() for param in params], *moments)


def named(*lists: list[Tensor]) -> Tensors:
    """Each list as one tensor: all are of a size."""
    names = "weights", "exp_avg", "exp_avg_sq"
    return {name: torch.cat([x.flatten() for x in tensors]) for name, tensors in zip(names, lists, strict=True)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option, value", [("foreach", False), ("foreach", True), ("fused", True)])
def test_adamw(option: str, value: bool, dtype: torch.dtype) -> None:
    assert theirs.MegatronAdam is torch.optim.AdamW
    ours, truth = by_kernel(dtype), by_torch(dtype, torch.float64)
    peer = by_torch(dtype, F32, **{option: value})
    name = f"torch AdamW {option}={value}, gradients {str(dtype).removeprefix('torch.')}, weights"
    assert_agree(name, F32, ours, peer, truth)
