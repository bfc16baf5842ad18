"""Same inputs, same values: ours and theirs against float64 made from the rounded inputs, and against each other."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = (F32, BF16)

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Bound:
    """How far from float64 an element may be: half an eps of its own dtype and size for each rounding, and `row` eps of
    the dtype that the arithmetic was done in, times the largest element of its row."""

    roundings: int = 1
    row: float = 4.0
    arithmetic: torch.dtype = F32

    def of(self, x: Tensor, truth: Tensor) -> Tensor:
        own = 0.5 * self.roundings * torch.finfo(x.dtype).eps * truth.abs()
        return own + self.row * torch.finfo(self.arithmetic).eps * largest(truth)


ONCE = Bound()  # computed in float32, rounded once

Bounds = Bound | dict[str, Bound]  # for all tensors, or by name


def coarse(dtype: torch.dtype, row: float) -> Bound:
    """Where the arithmetic itself was done in 16 bits, if the inputs have 16."""
    return ONCE if dtype == F32 else Bound(row=row, arithmetic=dtype)


@dataclass(frozen=True)
class Figures:
    """Of one comparison, the largest errors of ours, of theirs, and of one against the other, in eps of the inputs'
    dtype times the largest element of a row."""

    name: str
    ours: float
    theirs: float
    apart: float


FIGURES: list[Figures] = []
WHICH = "ours is off", "theirs is off", "they differ"


def assert_agree(
    name: str,
    dtype: torch.dtype,
    ours: Tensors,
    theirs: Tensors,
    truth: Tensors,
    our_bounds: Bounds = ONCE,
    their_bounds: Bounds = ONCE,
) -> None:
    """Output by output and gradient by gradient: each is as near to float64 as it may be, and both to each other.

    Args:
        dtype: of the inputs.
    """
    assert ours.keys() == theirs.keys() == truth.keys()
    name = f"{name}, {str(dtype).removeprefix('torch.')}"
    worst = [0.0, 0.0, 0.0]
    for key, exact in truth.items():
        assert ours[key].shape == theirs[key].shape == exact.shape, f"{name}: {key}"
        assert exact.dtype == torch.float64 and exact.isfinite().all(), f"{name}: {key}"
        our_limit, their_limit = (
            (bounds[key] if isinstance(bounds, dict) else bounds).of(found[key], exact)
            for bounds, found in ((our_bounds, ours), (their_bounds, theirs))
        )
        errors = ours[key] - exact, theirs[key] - exact, ours[key].double() - theirs[key].double()
        for i, limit in enumerate((our_limit, their_limit, our_limit + their_limit)):
            worst[i] = max(worst[i], _ratio(errors[i], torch.finfo(dtype).eps * largest(exact)))
            ratio = _ratio(errors[i], limit)
            assert ratio <= 1, f"{name}: {key}: {WHICH[i]} by {ratio:.3g} times what is allowed"
    FIGURES.append(Figures(name, *worst))


def largest(x: Tensor) -> Tensor:
    """Of every row, which is the last dimension; of a scalar, itself."""
    return x.abs() if x.dim() == 0 else x.abs().amax(-1, keepdim=True)


def _ratio(error: Tensor, unit: Tensor) -> float:
    """The largest; NaN counts as infinite, and no error as none, whatever the unit."""
    return float((error.abs() / unit).nan_to_num(torch.inf, torch.inf).where(error != 0, 0.0).max())


def normal(seed: int, *shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def outputs_and_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Tensors, upstream: Tensors
) -> Tensors:
    """What the function gives by name, and the gradient of every input, given those of the outputs.

    It gets copies of the inputs, and its backward pass copies of the gradients: some overwrite them.
    """
    leaves = {key: x.clone().requires_grad_() for key, x in inputs.items()}
    outputs = function(**{key: leaf.clone() for key, leaf in leaves.items()})
    found = dict(zip(upstream, outputs if isinstance(outputs, tuple) else (outputs,), strict=True))
    kept = {key: output.detach().clone() for key, output in found.items()}
    torch.autograd.backward(list(found.values()), [upstream[key].to(found[key].dtype, copy=True) for key in found])
    return kept | {f"d{key}": leaf.grad for key, leaf in leaves.items()}


def double(tensors: Tensors) -> Tensors:
    return {key: x.double() for key, x in tensors.items()}
