"""Counts the bytes that kernels read and write in memory, in the interpreter.

Of each launch every address counts once in each direction: what a program reads again, or another one reads too (a
weight), comes from a cache. Two launches share nothing.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from tests.kernels.floor import FLOOR


class Traffic(AbstractContextManager["Traffic"]):
    """While entered, adds up what all launches move.

    Attributes:
        read, written: bytes.
        asked: bytes that programs have asked for, whether memory or a cache gave them.
    """

    def __init__(self) -> None:
        self.read = self.written = self.asked = 0
        self._loads: list[np.ndarray] = []
        self._stores: list[np.ndarray] = []
        self._patches = [
            mock.patch.object(InterpreterBuilder, "create_masked_load", self._watched("create_masked_load")),
            mock.patch.object(InterpreterBuilder, "create_masked_store", self._watched("create_masked_store")),
            mock.patch.object(GridExecutor, "__call__", self._launching(GridExecutor.__call__)),
        ]

    def __enter__(self) -> "Traffic":
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *error: object) -> None:
        for patch in self._patches:
            patch.stop()

    def _watched(self, name: str) -> Callable[..., Any]:
        original = getattr(InterpreterBuilder, name)
        seen, at = (self._loads, 1) if name.endswith("load") else (self._stores, 2)

        def watched(builder: InterpreterBuilder, ptrs: Any, *rest: Any) -> Any:
            mask = rest[at - 1].data.astype(bool)  # what `&` gives holds numbers
            size = max(ptrs.get_element_ty().primitive_bitwidth // 8, 1)
            addresses = np.broadcast_to(ptrs.data, mask.shape)[mask]
            self.asked += size * len(addresses) if seen is self._loads else 0
            seen.append((addresses[:, None] + np.arange(size, dtype=np.uint64)).ravel())
            return original(builder, ptrs, *rest)

        return watched

    def _launching(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def launch(executor: GridExecutor, *args: Any, **kwargs: Any) -> Any:
            result = original(executor, *args, **kwargs)
            self.read += _num_different(self._loads)
            self.written += _num_different(self._stores)
            return result

        return launch


@dataclass(frozen=True)
class Measured:
    """Bytes per element of an operation's forward and backward pass: moved, and asked of caches."""

    moved: tuple[float, float]
    cached: tuple[float, float]


def measured(name: str) -> Measured:
    """Runs the case of `floor.FLOOR`."""
    floor, at = FLOOR[name], []
    with Traffic() as traffic:
        outputs = floor.run()
        at.append((traffic.read + traffic.written, traffic.asked - traffic.read))
        if outputs:
            torch.autograd.backward(outputs, [torch.randn_like(y) for y in outputs])
        at.append((traffic.read + traffic.written, traffic.asked - traffic.read))
    (moved, cached), (moved_after, cached_after) = at
    per = floor.elements
    return Measured((moved / per, (moved_after - moved) / per), (cached / per, (cached_after - cached) / per))


def _num_different(addresses: list[np.ndarray]) -> int:
    found = len(np.unique(np.concatenate(addresses))) if addresses else 0
    addresses.clear()
    return found
