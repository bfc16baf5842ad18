"""A process in which Triton interprets kernels on CPU tensors, for the tests marked `interpreted`.

`TRITON_INTERPRET` is read when Triton's own library is decorated, so it has to be set before Triton
is imported for the first time; torch's distributed packages import it, which is too late here.
"""

import importlib
import multiprocessing
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def start(more: Callable[[], None] | None = None) -> ProcessPoolExecutor:
    """The process; `more` is called in it once the interpreter is ready."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(max_workers=1, mp_context=spawn, initializer=_prepare, initargs=(more,))


def run(module: str, name: str, arguments: dict[str, Any]) -> None:
    """Calls a test in this process; by name, since a test is told apart by where it stands."""
    test: Callable[..., None] = getattr(importlib.import_module(module), name)
    test(**arguments)


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `ranks.run_ranks` gives, with ranks that interpret too, since they are started by the process that does.

    That process ends without a word to ranks and without removing their files: here it is done.
    """
    from tests import ranks

    try:
        return ranks.run_ranks(function, world_size, *arguments, timeout=300.0)
    finally:
        ranks.shutdown()
        ranks._all_folders().cleanup()
        ranks._all_folders.cache_clear()


def _prepare(more: Callable[[], None] | None) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from tests.kernels import interpreter_fix

    interpreter_fix.install()
    torch.set_num_threads(1)
    torch.empty = _filled_with_nan(torch.empty)
    torch.empty_like = _filled_with_nan(torch.empty_like)
    torch.Tensor.new_empty = _filled_with_nan(torch.Tensor.new_empty)
    warnings.simplefilter("error")
    if more is not None:
        more()


def _filled_with_nan(allocate: Callable[..., Any]) -> Callable[..., Any]:
    """What a kernel leaves unwritten, or reads before it is written, shows."""

    def allocate_filled(*args: Any, **kwargs: Any) -> Any:
        tensor = allocate(*args, **kwargs)
        tensor.detach().fill_(float("nan") if tensor.is_floating_point() else -(2**31) + 1)
        return tensor

    return allocate_filled
