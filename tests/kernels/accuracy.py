"""How close a kernel must come: its error against float64 is measured by its twin's own error.

The float64 truth is computed from the inputs as rounded to the tested dtype, so what is left is the
error of the computation.
"""

import torch
from torch import Tensor

FACTOR = 1.5

# Allowed besides, relative to the largest element of a row: where the twin happens to be exact.
# Two units in the last place of float32, a quarter of one of the 16-bit types.
EPS = {torch.float32: 2**-22, torch.float16: 2**-12, torch.bfloat16: 2**-9}


def assert_as_good_as_twin(actual: Tensor, twin: Tensor, truth: Tensor, name: str) -> None:
    """Row by row (over the last dimension), largest error against largest error."""
    assert actual.dtype == twin.dtype, f"{name}: {actual.dtype} instead of {twin.dtype}"
    assert actual.shape == truth.shape, f"{name}: {actual.shape} instead of {truth.shape}"
    assert truth.dtype == torch.float64
    assert truth.isfinite().all(), f"{name}: the truth is not finite"
    error = (actual.double() - truth).abs().amax(-1)
    allowed = FACTOR * (twin.double() - truth).abs().amax(-1)
    allowed += EPS[actual.dtype] * truth.abs().amax(-1)
    worst = (error / allowed).nan_to_num(torch.inf, torch.inf).where(error != 0, 0.0).max()
    assert worst <= 1, f"{name}: error {error.max():.3g} is {worst:.3g} times what is allowed"
