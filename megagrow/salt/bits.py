"""Unsigned integers of any width up to 32 bits, one after the other, the lowest bit first.

Eight of them fill `width` whole bytes, so each of the eight places (lanes) is shifted by an amount of its own and all
groups go forward side by side.
"""

# Shape suffix legend: G = groups of eight integers, W = width.

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

LANES = 8


def packed_size(count: int, width: int) -> int:
    """Bytes that `pack_bits` takes for `count` integers."""
    return -(-count // LANES) * width


def pack_bits(values: NDArray[np.integer], width: int) -> bytes:
    """The values, each in [0, 2^width), in whole groups of eight."""
    lanes_G8 = np.zeros((-(-values.size // LANES), LANES), np.uint64)
    lanes_G8.reshape(-1)[: values.size] = values.reshape(-1)
    packed_GW = np.zeros((len(lanes_G8), width), np.uint8)
    for lane, first, shift, num_bytes in _places(width):
        shifted_G = lanes_G8[:, lane] << np.uint64(shift)
        for byte in range(num_bytes):
            packed_GW[:, first + byte] |= (shifted_G >> np.uint64(8 * byte)).astype(np.uint8)
    return packed_GW.tobytes()


def unpack_bits(packed: bytes, width: int, count: int) -> NDArray[np.uint32]:
    """The first `count` integers of what `pack_bits` gave."""
    packed_GW = np.frombuffer(packed, np.uint8).reshape(-1, width)
    lanes_G8 = np.empty((len(packed_GW), LANES), np.uint32)
    mask = np.uint64(2**width - 1)
    for lane, first, shift, num_bytes in _places(width):
        shifted_G = np.zeros(len(packed_GW), np.uint64)
        for byte in range(num_bytes):
            shifted_G |= packed_GW[:, first + byte].astype(np.uint64) << np.uint64(8 * byte)
        lanes_G8[:, lane] = (shifted_G >> np.uint64(shift)) & mask
    return lanes_G8.reshape(-1)[:count]


def _places(width: int) -> Iterator[tuple[int, int, int, int]]:
    """Lane, first byte, shift inside of it and number of bytes touched."""
    for lane in range(LANES):
        first, shift = divmod(lane * width, 8)
        yield lane, first, shift, -(-(shift + width) // 8)
