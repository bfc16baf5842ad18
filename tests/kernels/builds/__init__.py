"""What is compiled, by file of kernels: `pinned` must pass the gate, `bad` must not."""

from collections.abc import Iterator

from tests.kernels.build import Build
from tests.kernels.builds import narrow, rms_norm, vocab_loss

FILES = (rms_norm, vocab_loss)


def pinned() -> Iterator[Build]:
    """Every pinned configuration."""
    for file in FILES:
        yield from file.pinned()


def bad() -> Iterator[Build]:
    """What the gate must catch: a spill, scalar loads, 32-bit offsets."""
    yield from rms_norm.bad()
    yield from narrow.bad()
