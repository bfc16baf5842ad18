"""What is compiled, by file of kernels: `pinned` must pass the gate, `bad` must not."""

from collections.abc import Iterator

from tests.kernels.build import Build
from tests.kernels.builds import adamw, distill_loss, dropout_add, gelu, glu, narrow, norm, rope, vocab_loss

FILES = (norm, vocab_loss, distill_loss, glu, gelu, dropout_add, rope, adamw)


def pinned() -> Iterator[Build]:
    """Every pinned configuration."""
    for file in FILES:
        yield from file.pinned()


def bad() -> Iterator[Build]:
    """What the gate must catch: a spill, scalar loads, 32-bit offsets."""
    yield from norm.bad()
    yield from narrow.bad()
