"""Launch configurations, pinned: the launchers and the compile gate of the tests read these.

Every entry compiles without register spills for sm_80, sm_90a, sm_100a and gfx942; none has been
chosen by timing on a GPU yet (kernels/README.md has the figures).
"""

import functools
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Launch:
    """How one program of a kernel is sized."""

    block: int  # columns that a program holds at once; a power of two
    num_warps: int


RMS_NORM_FORWARD = (
    Launch(512, 1),
    Launch(1024, 2),
    Launch(4096, 4),
    Launch(16384, 8),
    Launch(32768, 16),
)
RMS_NORM_BACKWARD = (Launch(512, 1), Launch(1024, 2), Launch(4096, 8), Launch(8192, 8))
VOCAB = (Launch(512, 1), Launch(1024, 2), Launch(2048, 4), Launch(4096, 8))

# Enough programs to hide latency, and few: each writes a row of partial weight gradients.
RMS_NORM_BACKWARD_PROGRAMS_PER_SM = 2


def pick(table: tuple[Launch, ...], num_columns: int) -> Launch:
    """The first entry of `table` that holds `num_columns` in one block, no wider than they need;
    else the widest, for a kernel that goes through the columns block by block."""
    launch = next((launch for launch in table if launch.block >= num_columns), table[-1])
    power_of_two = 1 << max(num_columns - 1, 0).bit_length()
    return replace(launch, block=min(launch.block, power_of_two))


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the CPU, where the interpreter runs programs in turn."""
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
