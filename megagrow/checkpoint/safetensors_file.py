"""Writes one safetensors file tensor by tensor, so that no more than one of them is in memory.

The format puts a header with all names, dtypes, shapes and offsets before the data, and lets blanks
follow it: its room is reserved from the shapes, and filled after the last tensor.
"""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_LARGEST_OFFSET = 2**63 - 1
_LENGTH = struct.Struct("<Q")  # of the header, which follows it
_ALIGNMENT = 8  # of the data's start, as the format's own library has it


class SafetensorsFile:
    """A safetensors file being written; complete and synced once the last tensor has been added.

    Args:
        path: the file; must not exist.
        shapes: name and shape of every tensor that will be added.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._missing = dict(shapes)
        self._entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._end = 0
        longest_offsets = (_LARGEST_OFFSET, _LARGEST_OFFSET)
        longest = {name: _entry("BF16", shape, longest_offsets) for name, shape in shapes.items()}
        size = len(json.dumps(self._entries | longest).encode())
        self._header_size = -(-size // _ALIGNMENT) * _ALIGNMENT
        self._stream = path.open("xb")
        self._stream.seek(_LENGTH.size + self._header_size)

    def add(self, name: str, tensor: Tensor) -> None:
        """Appends a tensor: float64, float32, float16 or bfloat16, in the announced shape."""
        shape = self._missing.pop(name)
        assert tuple(tensor.shape) == shape, f"{name}: {tuple(tensor.shape)}, announced {shape}"
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        self._stream.write(raw.data)
        offsets = (self._end, self._end + raw.nbytes)
        self._entries[name] = _entry(DTYPE_NAMES[tensor.dtype], shape, offsets)
        self._end += raw.nbytes
        if not self._missing:
            self._finish()

    def close(self) -> None:
        """Lets go of the file, finished or not."""
        self._stream.close()

    def _finish(self) -> None:
        header = json.dumps(self._entries).encode().ljust(self._header_size)
        self._stream.seek(0)
        self._stream.write(_LENGTH.pack(len(header)) + header)
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()


def _entry(dtype: str, shape: tuple[int, ...], offsets: tuple[int, int]) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}
