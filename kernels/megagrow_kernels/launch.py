"""Launch configurations, pinned per GPU: the launchers and the compile gate of the tests read these.

Every entry compiles without register spills for sm_80, sm_90a, sm_100a and gfx942. Those of ANY were chosen by what the
compilers report (docs/kernels.md); a GPU's own entries name the measurement that chose them, and replace those of ANY.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Launch:
    """How one program of a kernel is sized."""

    block: int  # columns that a program holds at once; a power of two
    num_warps: int


Table = Mapping[str, tuple[Launch, ...]]

ANY: dict[str, tuple[Launch, ...]] = {
    "norm_fwd": (Launch(4096, 4), Launch(16384, 8), Launch(32768, 16)),
    "norm_bwd": (Launch(1024, 2), Launch(2048, 4), Launch(4096, 8), Launch(8192, 16)),
    "glu": (Launch(1024, 4),),
    "bias_gelu": (Launch(512, 2), Launch(2048, 4)),
    "dropout_add": (Launch(512, 1), Launch(1024, 2), Launch(2048, 4)),
    # Heads of a token times their columns, each rounded up.
    "rope": (Launch(512, 1), Launch(1024, 2), Launch(2048, 4), Launch(4096, 4)),
    "adamw": (Launch(1024, 4), Launch(2048, 8)),
    "vocab": (Launch(512, 1), Launch(1024, 2), Launch(2048, 4), Launch(4096, 8)),
    "distill": (Launch(512, 1), Launch(1024, 2), Launch(2048, 4), Launch(4096, 8)),
    "layer_mix": (Launch(2048, 1), Launch(8192, 4)),  # all source layers' elements of a block
    "layer_mix_bwd": (Launch(32, 8),),
    "sparse_map": (Launch(256, 2), Launch(512, 4), Launch(1024, 8)),
    "dense_map": (Launch(64, 8), Launch(128, 8)),
}

# By the name that torch gives the device.
PINNED: dict[str, dict[str, tuple[Launch, ...]]] = {}

# Float32 products: three of tf32's for each on NVIDIA's tensor cores, which lose a bit or two; AMD's take float32.
DOT_PRECISION = "ieee" if torch.version.hip else "tf32x3"

# Warps per multiprocessor where programs stride over the rows: as many as run at once with 128 registers a thread. More
# would not hide more latency, and each program writes a row of partial sums.
ROW_WARPS_PER_SM = 16
ELEMENTS_PER_WARP = 512  # of narrow rows: two 128-bit loads of 16-bit elements for each thread
BLOCK_WARPS_PER_SM = 20  # the same where each holds a part of a row only, with 96 registers


def pick(kernel: str, num_columns: int, device: torch.device | None = None) -> Launch:
    """The first pinned entry that holds `num_columns` in one block, no wider than they need.

    Without one the widest, for a kernel that goes through the columns block by block.

    Args:
        kernel: a name in the table.
        num_columns: of a row.
        device: where it will run; None: any GPU.
    """
    table = PINNED.get(device_name(device), {}).get(kernel, ANY[kernel]) if device is not None else ANY[kernel]
    launch = next((launch for launch in table if launch.block >= num_columns), table[-1])
    chosen = replace(launch, block=min(launch.block, power_of_two(num_columns)))
    return wide_warps(chosen) if torch.version.hip else chosen


def power_of_two(number: int) -> int:
    """The smallest that is not below."""
    return 1 << max(number - 1, 0).bit_length()


def wide_warps(launch: Launch) -> Launch:
    """The same for AMD's GPUs, whose warps are twice as wide."""
    return replace(launch, num_warps=max(launch.num_warps // 2, 1))


@functools.cache
def device_name(device: torch.device) -> str:
    """As torch names a GPU; `cpu` for the CPU, where the interpreter runs."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the CPU, where the interpreter runs programs in turn."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def rows_at_once(launch: Launch) -> int:
    """Rows that a program holds at once where one would leave its warps with little to do."""
    return max(1, _warps_of_32(launch.num_warps) * ELEMENTS_PER_WARP // launch.block)


def row_programs(num_rows: int, device: torch.device, num_warps: int) -> int:
    """Programs of so many warps that share the rows, or blocks of them, out among themselves."""
    return min(num_rows, num_multiprocessors(device) * max(1, ROW_WARPS_PER_SM // _warps_of_32(num_warps)))


def column_programs(num_rows: int, num_blocks: int, device: torch.device, num_warps: int) -> int:
    """The same, for each of `num_blocks` blocks of a row's columns, where no program needs a whole row."""
    num_at_once = num_multiprocessors(device) * BLOCK_WARPS_PER_SM // _warps_of_32(num_warps)
    return min(num_rows, max(1, num_at_once // max(num_blocks, 1)))


def _warps_of_32(num_warps: int) -> int:
    return 2 * num_warps if torch.version.hip else num_warps
