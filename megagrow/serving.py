"""Which kernels serve on a GPU; where none does, their PyTorch twins do."""

import functools
import importlib.util
import warnings
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from megagrow.errors import ConfigError

# Files of kernels. On a GPU those of MEASURED serve by default: those that beat their twins, eager and compiled, in the
# figures that `make gpu` writes. There are none before it has run. `train.kernels=all` asks for the others.
KERNELS = frozenset(
    {
        *("norm", "glu", "gelu", "dropout_add", "rope", "vocab_loss", "distill_loss", "adamw"),
        *("layer_mix", "sparse_map", "dense_map"),
    }
)
MEASURED: frozenset[str] = frozenset()
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def _installed_kernels() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        import megagrow_kernels
    except (ImportError, OSError, RuntimeError) as error:
        warnings.warn(f"Triton does not load ({error}): PyTorch replaces kernels", stacklevel=2)
        return None
    return megagrow_kernels


Which = Literal["measured", "all", "none"]
_serving: frozenset[str] = MEASURED
_module: ModuleType | None = None  # found once: torch.compile warns of a cached function that it traces


def let_kernels_serve(which: Which) -> None:
    """Which kernels serve from now on in this process: those of MEASURED do so from the start."""
    global _serving, _module
    _serving = chosen(which)
    _module = _installed_kernels() if _serving else None


def chosen(which: Which) -> frozenset[str]:
    """The files of kernels that a choice means."""
    return {"measured": MEASURED, "all": KERNELS, "none": frozenset[str]()}[which]


def check_kernels(which: Which, device: torch.device) -> None:
    """Makes sure that the kernels asked for can serve before anything is built.

    Raises:
        ConfigError: all are asked for, where there is no GPU or no Triton.
    """
    if which != "all":
        return
    if device.type != "cuda":
        raise ConfigError(f"train.kernels=all runs on GPUs, not on the {device.type}; use train.kernels=measured")
    if _installed_kernels() is None:
        raise ConfigError(
            "train.kernels=all needs Triton, which does not load here; pip install triton in the version that "
            "constraints.txt names, or use train.kernels=measured"
        )


def kernels_for(name: str, x: Tensor) -> ModuleType | None:
    """`megagrow_kernels` if its kernels of that name are to serve `x`; None where the twin has to."""
    wanted = name in _serving and x.is_cuda and x.dtype in KERNEL_DTYPES
    return _module or _installed_kernels() if wanted else None
