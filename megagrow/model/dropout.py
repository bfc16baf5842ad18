"""Dropout whose mask depends on (seed, step, sample, position, place, feature) only, never on the layout.

Each token carries a 64-bit key; every element's random bits are a hash of its token's key, the place in the model and
the feature (`torch_ops.kept`). So any cut of batch, sequence or layers drops the same elements, and recomputing needs
no state.
"""

# Shape suffix legend: B = batch, S = sequence, H = hidden.

import torch
from torch import Tensor

from megagrow import ops, torch_ops
from megagrow.torch_ops import mix


def token_keys(seed: int, step: int, samples_B: Tensor, positions_S: Tensor) -> Tensor:
    """Keys [B, S] of the tokens at `positions_S` of the samples at places `samples_B` of the step's global batch."""
    key = mix(mix(torch.tensor(seed, device=positions_S.device)) + step)
    return mix(mix(key + samples_B[:, None]) + positions_S)


def dropout(x_BSH: Tensor, rate: float, keys_BS: Tensor | None, place: int) -> Tensor:
    """Zeroes a share `rate` of the elements and scales the others to keep the mean; without keys nothing happens.

    Args:
        x_BSH: activations.
        rate: the share; in effect its nearest multiple of 2^-16.
        keys_BS: from `token_keys`; None outside of training.
        place: a number of its own for each place in the model that drops.
    """
    if keys_BS is None or rate == 0:
        return x_BSH
    return torch_ops.dropout(x_BSH, rate, keys_BS, place)


def add_dropped(
    x_BSH: Tensor, y_BSH: Tensor, bias_H: Tensor | None, rate: float, keys_BS: Tensor | None, place: int
) -> Tensor:
    """x + dropout(y + bias), as a branch joins the residual stream.

    Args:
        x_BSH: the residual stream.
        y_BSH: what a branch adds to it.
        bias_H: of the branch's last projection, or None.
        rate, keys_BS, place: as in `dropout`.
    """
    if keys_BS is None or rate == 0:
        return x_BSH + y_BSH if bias_H is None else ops.bias_add(x_BSH, y_BSH, bias_H)
    return ops.dropout_add(x_BSH, y_BSH, bias_H, rate, keys_BS, place)
