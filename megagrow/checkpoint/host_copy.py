"""Copies of a rank's shards in host memory, in buffers that are used again from save to save."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from megagrow.checkpoint.shards import LocalShard


class HostCopy:
    """Buffers for one set of shards.

    They take as much memory as the shards. Those of a GPU's shards are pinned, so that all copies are under way at
    once; torch rounds each pinned buffer up to a power of two.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def of(self, shards: Mapping[str, LocalShard]) -> dict[str, LocalShard]:
        """The shards as they are now; valid until the next call."""
        self._buffers = {name: self._buffer(name, shard.data) for name, shard in shards.items()}
        for name, shard in shards.items():
            self._buffers[name].copy_(shard.data, non_blocking=True)
        for device in {shard.data.device for shard in shards.values() if shard.data.is_cuda}:
            torch.cuda.current_stream(device).synchronize()  # the copies, and whatever they had to wait for
        return {name: replace(shard, data=self._buffers[name]) for name, shard in shards.items()}

    def _buffer(self, name: str, data: Tensor) -> Tensor:
        old = self._buffers.get(name)
        # Strides are part of what torch stores: a copy must give the same bytes as the tensor itself.
        like = torch.empty_like(data, device="meta")
        if old is not None and (old.shape, old.stride(), old.dtype) == (like.shape, like.stride(), like.dtype):
            return old
        return torch.empty_like(data, device="cpu", pin_memory=data.is_cuda)
