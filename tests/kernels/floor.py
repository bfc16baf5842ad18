"""What every operation has to move: bytes per element of bfloat16, forward and backward, and a case to count them in.

`FLOOR` is the least: inputs read once, outputs written once, nothing kept that can be computed again. The cases are
large enough that what a row or a launch adds (statistics, weights, partial sums) is a small part.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import megagrow_kernels as kernels

BF16 = torch.bfloat16
T, H = 64, 2048
LEAF = 256 * 256  # elements of a leaf whose layers are mixed


@dataclass(frozen=True)
class Floor:
    """An operation's least traffic.

    Attributes:
        run: makes the inputs and gives the differentiable outputs, or does everything by itself.
        elements: that the bytes are counted per.
        forward, backward: bytes per element.
        num_sums: gradients of weights and biases, of which every program writes a float32 row of partial sums.
        cached: bytes per element that caches give by design, forward and backward.
    """

    run: Callable[[], tuple[Tensor, ...]]
    elements: int
    forward: float
    backward: float
    num_sums: int = 0
    cached: tuple[float, float] = (0.0, 0.0)


def normal(*shape: int, dtype: torch.dtype = BF16, leaf: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_(leaf)


def _rms_norm(residual: bool) -> tuple[Tensor, ...]:
    x, weight = normal(T, H), normal(H)
    return kernels.rms_norm(x, weight, 1e-5, normal(T, H)) if residual else (kernels.rms_norm(x, weight, 1e-5),)


def _layer_norm(residual: bool) -> tuple[Tensor, ...]:
    x, weight, bias = normal(T, H), normal(H), normal(H)
    if residual:
        return kernels.layer_norm(x, weight, bias, 1e-5, normal(T, H))
    return (kernels.layer_norm(x, weight, bias, 1e-5),)


def _dropout_add() -> tuple[Tensor, ...]:
    keys = torch.arange(T)
    return (kernels.dropout_add(normal(T, H), normal(T, H), normal(H), 0.1, keys, 1),)


def _rope() -> tuple[Tensor, ...]:
    """Keys alone, as after a norm of theirs: values packed beside them would be copied by the backward pass."""
    q, kv = normal(1, T, 24, 64) * 1, normal(1, T, 8, 1, 64) * 1
    angles = torch.rand(T, 64)
    return kernels.rope_(q, kv, angles.cos(), angles.sin())


def _vocab_stats() -> tuple[Tensor, ...]:
    kernels.vocab_stats(normal(8, 8192, leaf=False), torch.zeros(8, dtype=torch.int64), None, torch.zeros(8))
    return ()


def _vocab_grad() -> tuple[Tensor, ...]:
    ones = torch.ones(8)
    kernels.vocab_grad_(normal(8, 8192, leaf=False), torch.zeros(8, dtype=torch.int64), ones, ones)
    return ()


def _vocab_scores() -> tuple[Tensor, ...]:
    labels, tens = torch.zeros(8, dtype=torch.int64), torch.full((8,), 10.0)
    kernels.vocab_scores(normal(8, 8192, leaf=False), labels, tens, tens, 30)
    return ()


def _distill_stats() -> tuple[Tensor, ...]:
    student, teacher = normal(8, 8192, leaf=False), normal(8, 8192, leaf=False)
    kernels.distill_stats(student, teacher, torch.zeros(8, dtype=torch.int64), 2.0, 2.0, None, torch.zeros(8))
    return ()


def _distill_grad() -> tuple[Tensor, ...]:
    student, teacher, ones = normal(8, 8192, leaf=False), normal(8, 8192, leaf=False), torch.ones(8)
    labels = torch.zeros(8, dtype=torch.int64)
    kernels.distill_grad_(student, teacher, labels, torch.ones(8, 3) * 9, ones, ones, 2.0, 2.0)
    return ()


def _adamw() -> tuple[Tensor, ...]:
    shapes = [(64, 1024), (1000, 33), (7,)]
    params, m = ([normal(*s, dtype=torch.float32, leaf=False) for s in shapes] for _ in range(2))
    grads, copies = ([normal(*s, leaf=False) for s in shapes] for _ in range(2))
    v = [x.square() for x in m]
    rates = [[rate] * len(shapes) for rate in (1e-3, 1e-8, 0.1)]
    kernels.adamw_(params, grads, m, v, copies, *rates, 0.9, 0.95, 1)
    return ()


def _layer_mix() -> tuple[Tensor, ...]:
    return (kernels.layer_mix(normal(6, LEAF, leaf=False), normal(12, 6)),)


def _sparse_map(num_tensors: int) -> tuple[Tensor, ...]:
    """Twice as many rows and columns, replicas side by side; float32 tensors."""
    R, C = 2 * T, 1024
    targets = [torch.empty(R, C) for _ in range(num_tensors)]
    sources = [normal(T, C // 2, dtype=torch.float32, leaf=False) for _ in range(num_tensors)]
    scales = normal(2, R, dtype=torch.float32, leaf=False), normal(2, C, dtype=torch.float32, leaf=False)
    kernels.sparse_map_(targets, sources, torch.arange(R) // 2, torch.arange(C) // 2, *scales)
    return ()


FLOOR = {
    "rms_norm": Floor(lambda: _rms_norm(False), T * H, 4, 6, num_sums=1),
    "rms_norm with residual": Floor(lambda: _rms_norm(True), T * H, 8, 8, num_sums=1),
    "layer_norm": Floor(lambda: _layer_norm(False), T * H, 4, 6, num_sums=2),
    "layer_norm with residual": Floor(lambda: _layer_norm(True), T * H, 8, 8, num_sums=2),
    "swiglu": Floor(lambda: (kernels.swiglu(normal(T, 2 * H)),), T * H, 6, 10),
    "geglu": Floor(lambda: (kernels.geglu(normal(T, 2 * H)),), T * H, 6, 10),
    "bias_gelu": Floor(lambda: (kernels.bias_gelu(normal(T, H), normal(H)),), T * H, 4, 6, num_sums=1),
    "dropout_add": Floor(_dropout_add, T * H, 6, 4, num_sums=1),
    "rope_": Floor(_rope, T * 32 * 64, 4, 4),
    "vocab_stats with rank": Floor(_vocab_stats, 8 * 8192, 2, 0),
    "vocab_grad_": Floor(_vocab_grad, 8 * 8192, 4, 0),
    "vocab_scores": Floor(_vocab_scores, 8 * 8192, 2, 0),
    "distill_stats with rank": Floor(_distill_stats, 8 * 8192, 4, 0),
    "distill_grad_": Floor(_distill_grad, 8 * 8192, 6, 0),
    "layer_mix": Floor(_layer_mix, 18 * LEAF, 2, 2),
    # An entry is asked for four times, three of them of a cache; index and scales of a column once for eight rows.
    "sparse_map_ of one tensor": Floor(lambda: _sparse_map(1), 2 * T * 1024, 5, 0, cached=(4 - 1 + 1, 0)),
    "sparse_map_ of three": Floor(lambda: _sparse_map(3), 2 * T * 1024, 15, 0, cached=(12 - 3 + 1.5, 0)),
    "adamw_": Floor(_adamw, 64 * 1024 + 33_000 + 7, 28, 0),
}
