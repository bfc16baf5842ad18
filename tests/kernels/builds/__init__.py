"""What is compiled, by file of kernels: `pinned` must pass the gate, `bad` must not."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace

from megagrow_kernels.launch import Launch, wide_warps
from tests.kernels.build import TARGETS, Build
from tests.kernels.builds import (
    adamw,
    dense_map,
    distill_loss,
    dropout_add,
    gelu,
    glu,
    layer_mix,
    narrow,
    norm,
    product,
    rope,
    sparse_map,
    vocab_loss,
)

FILES = (norm, vocab_loss, distill_loss, glu, gelu, dropout_add, rope, adamw, layer_mix, sparse_map, dense_map)


def pinned(targets: Iterable[str] = TARGETS) -> Iterator[Build]:
    """Every pinned configuration, for every one of these targets."""
    for target, file in itertools.product(targets, FILES):
        for build in file.pinned(target):
            yield build if TARGETS[target].backend == "cuda" else _with_wide_warps(build)


def _with_wide_warps(build: Build) -> Build:
    return replace(build, num_warps=wide_warps(Launch(0, build.num_warps)).num_warps)


def bad() -> Iterator[Build]:
    """What the gate must catch: a spill, scalar loads, 32-bit offsets, a product without Hopper's instructions."""
    yield from norm.bad()
    yield from narrow.bad()
    yield from product.examples()
