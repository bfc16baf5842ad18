"""Dropout whose mask depends on (seed, step, sample, position, place, feature) only, never on the layout.

Each token carries a 64-bit key; every element's random bits are a hash of its token's key, the place in the model and
the feature. So any cut of batch, sequence or layers drops the same elements, and recomputing needs no state.
"""

# Shape suffix legend: B = batch, S = sequence, H = hidden.

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed number
_MIX_1 = -0x40A7B892E31B1A47  # the multipliers of SplitMix64 (Steele et al., 2014), signed
_MIX_2 = -0x6B2FB644ECCEEE15
_BITS = 24  # of the hash that become a float32 in [0, 1)


def token_keys(seed: int, step: int, samples_B: Tensor, positions_S: Tensor) -> Tensor:
    """Keys [B, S] of the tokens at `positions_S` of the samples at places `samples_B` of the step's global batch."""
    key = _mix(_mix(torch.tensor(seed, device=positions_S.device)) + step)
    return _mix(_mix(key + samples_B[:, None]) + positions_S)


def dropout(x_BSH: Tensor, rate: float, keys_BS: Tensor | None, place: int) -> Tensor:
    """Zeroes a share `rate` of the elements and scales the others by 1 / (1 - rate); without keys nothing happens.

    Args:
        x_BSH: activations.
        rate: the share.
        keys_BS: from `token_keys`; None outside of training.
        place: a number of its own for each place in the model that drops.
    """
    if keys_BS is None or rate == 0:
        return x_BSH
    features_H = torch.arange(x_BSH.shape[-1], device=x_BSH.device) * _GOLDEN
    bits_BSH = _mix(_mix(keys_BS + place)[..., None] + features_H)
    kept_BSH = (bits_BSH >> (64 - _BITS) & (1 << _BITS) - 1) >= round(rate * (1 << _BITS))
    return x_BSH * kept_BSH.to(x_BSH.dtype) / (1 - rate)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's output function; int64 arithmetic wraps, and shifts are made logical by masking."""
    x = x + _GOLDEN
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _MIX_1
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _MIX_2
    return x ^ (x >> 31 & (1 << 33) - 1)
