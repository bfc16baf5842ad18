"""Random entries that depend on (seed, parameter name, global index) only: any box of them can be made alone."""

# Shape suffix legend: R, C = rows and columns of a box, or of a matrix.

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from megagrow.model.transformer import name_seed
from megagrow.parallel.collectives import max_over, sum_over
from megagrow.parallel.mesh import Axis
from megagrow.torch_ops import mix, mix_

FIELD = 1 << 16
FIELDS = (1 << 32) * (FIELD - 1) + FIELD - 1  # the first and third of a hash
CHUNK = 1 << 20  # entries that are in float64 at a time
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
    """The mean over a dim of [R, C] or [R], kept with size 1; the order of additions depends on its size alone."""
    moved = x.movedim(dim, 0)
    columns = moved if x.ndim == 2 else moved[:, None]
    means = [_mean_of_rows(part) for part in columns.split(max(1, CHUNK // len(moved)), dim=1)]
    return torch.cat(means).view(1, *moved.shape[1:]).movedim(0, dim)


def _mean_of_rows(x_RC: Tensor) -> Tensor:
    """[C] in x's dtype, by way of a copy in float64."""
    terms, size = x_RC.to(torch.double, copy=True), len(x_RC)
    left = size
    while left > 1:
        half = left // 2
        terms[:half] += terms[half : 2 * half]
        if left % 2:
            terms[half] = terms[left - 1]
        left = half + left % 2
    return (terms[0] / size).to(x_RC.dtype)


def root_mean_square(x: Tensor) -> float:
    """√(mean of squares) of all entries; not a number where one is not finite."""
    bound, size = largest(x), x.numel()
    return joined_root_mean_square(sum_of_squares(x, bound, size), bound, size)


def root_mean_squares_over(
    pieces: Mapping[str, Tensor], sizes: Mapping[str, int], axis: Axis, device: torch.device
) -> dict[str, float]:
    """`root_mean_square` of whole tensors that several ranks hold, the same bits however they are cut; a collective.

    Args:
        pieces: those that this rank counts: over all ranks, each entry of a tensor once.
        sizes: entries of every whole tensor, on all ranks in the same order.
        axis: over which the tensors are spread.
        device: of what is sent.
    """
    here = torch.tensor([largest(pieces[n]) if n in pieces else 0.0 for n in sizes], dtype=torch.double, device=device)
    here.nan_to_num_(nan=math.inf, posinf=math.inf)  # a maximum may lose what is not a number
    bounds = dict(zip(sizes, max_over(here, axis).tolist(), strict=True))
    own = [sum_of_squares(pieces[n], bounds[n], size) if n in pieces else 0 for n, size in sizes.items()]
    sums = sum_over(torch.tensor(own, device=device), axis).tolist()
    return {n: joined_root_mean_square(total, bounds[n], sizes[n]) for n, total in zip(sizes, sums, strict=True)}


def largest(x: Tensor) -> float:
    """The largest magnitude, not finite where x is not."""
    return float(torch.stack([part.abs().max() for part in x.detach().flatten().split(CHUNK)]).max())


def sum_of_squares(x: Tensor, bound: float, size: int) -> int:
    """Σ x² of a piece of a tensor, in whole numbers, whose sums over pieces do not depend on how the tensor is cut.

    Args:
        x: the piece.
        bound: `largest` of the whole tensor.
        size: entries of the whole tensor.
    """
    if bound == 0 or not math.isfinite(bound):
        return 0
    parts = ((part.double() / bound).square_() for part in x.detach().flatten().split(CHUNK))
    return sum(int(part.mul_(_steps(size)).round_().long().sum()) for part in parts)


def joined_root_mean_square(total: int, bound: float, size: int) -> float:
    """√(mean of squares) of a tensor, from the sum over its pieces."""
    return bound * math.sqrt(total / _steps(size) / size)


def _steps(size: int) -> int:
    """In which 1 is divided, so that a sum of `size` numbers up to 1 fits 63 bits."""
    return 1 << (62 - size.bit_length())
