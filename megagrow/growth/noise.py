"""Random entries that depend on (seed, parameter name, global index) only: any box of them can be made alone."""

# Shape suffix legend: R, C = rows and columns of a box.

import math

import torch
from torch import Tensor

from megagrow.model.transformer import name_seed
from megagrow.torch_ops import mix, mix_

FIELD = 1 << 16
FIELDS = (1 << 32) * (FIELD - 1) + FIELD - 1  # the first and third of a hash
STD = math.sqrt(4 * (FIELD**2 - 1) / 12)  # of a sum of four uniform numbers 0 … FIELD - 1


def normal(seed: int, name: str, rows_R: Tensor, columns_C: Tensor, num_columns: int) -> Tensor:
    """Numbers of mean 0 and standard deviation 1, [R, C] float32: row r, column c of a matrix as wide as `num_columns`.

    Each is a sum of four uniform numbers, the fields of one hash, which is normal but for its tails (none beyond 3.47).
    Whole numbers and one division: the same bits on every device and for every box.

    Args:
        seed, name: of the matrix.
        rows_R, columns_C: global indices.
        num_columns: of the whole matrix.
    """
    key = mix(torch.tensor(name_seed(seed, f"growth.{name}"), device=rows_R.device))
    hashes_RC = mix_(mix(key + rows_R[:, None] * num_columns) + columns_C)
    sums_RC = (hashes_RC & FIELDS).add_((hashes_RC >> 16).bitwise_and_(FIELDS))  # of two fields in each half
    sums_RC = (sums_RC >> 32).add_(sums_RC).bitwise_and_((1 << 32) - 1)
    return sums_RC.sub_(2 * (FIELD - 1)).double().div_(STD).float()


def mean(x: Tensor, dim: int) -> Tensor:
    """The mean over a dim, kept with size 1, in x's dtype; the order of additions depends on that dim's size alone."""
    terms, size = x.movedim(dim, 0).to(torch.double, copy=True), x.shape[dim]
    left = size
    while left > 1:
        half = left // 2
        terms[:half] += terms[half : 2 * half]
        if left % 2:
            terms[half] = terms[left - 1]
        left = half + left % 2
    return (terms[:1] / size).to(x.dtype).movedim(0, dim)


def root_mean_square(x: Tensor, chunk: int = 1 << 20) -> float:
    """√(mean of squares) of all entries; the order of additions depends on their number alone."""
    sums = [float(mean(part.double().square(), 0)) * len(part) for part in x.detach().flatten().split(chunk)]
    return math.sqrt(math.fsum(sums) / x.numel())
