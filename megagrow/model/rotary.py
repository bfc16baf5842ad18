"""The angles by which rotary positions turn queries and keys, as they are and stretched for longer contexts.

Everything is computed in float32 and in transformers' order of operations, so that logits agree.
"""

# Shape suffix legend: S = this context rank's tokens, R = rotated dimensions of a head, E = R / 2, pairs of them.

import math
from functools import lru_cache

import torch
from torch import Tensor

from megagrow.config import ModelConfig, RopeScaling
from megagrow.parallel import context


@lru_cache(maxsize=8)
def rotary_table(
    model: ModelConfig, seq_length: int, rank: int, size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, R] of a context rank's tokens, in the half-rotation layout of Hugging Face's Llama.

    Source: Su et al., 2021 (RoFormer), equation 34.

    Args:
        model: whose positions they are; of each head its first `rotary_dim` dimensions turn.
        seq_length: of whole sequences.
        rank, size: place on the context axis, and its size.
    """
    frequencies_E, scale = rotary_frequencies(model, device)
    positions_S = context.local_positions(seq_length, rank, size, device).float()
    angles_SE = torch.outer(positions_S, frequencies_E)
    angles_SR = torch.cat([angles_SE, angles_SE], dim=-1)
    return (angles_SR.cos() * scale).to(dtype), (angles_SR.sin() * scale).to(dtype)


def rotary_frequencies(model: ModelConfig, device: torch.device | None = None) -> tuple[Tensor, float]:
    """Radians per position [E], and what cosines and sines are multiplied by."""
    exponents_E = torch.arange(0, model.rotary_dim, 2, dtype=torch.float32, device=device) / model.rotary_dim
    inverses_E = model.rope_theta**exponents_E
    scaling = model.rope_scaling
    if scaling is None:
        return 1.0 / inverses_E, 1.0
    if scaling.kind == "linear":
        return 1.0 / inverses_E / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(1.0 / inverses_E, scaling), 1.0
    return _yarn(inverses_E, model.rope_theta, scaling), attention_factor(scaling)


def attention_factor(scaling: RopeScaling) -> float:
    """YaRN's scale of cosines and sines, whose square divides the softmax' temperature (Peng et al., equation 22)."""
    return scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0


def _llama3(frequencies_E: Tensor, scaling: RopeScaling) -> Tensor:
    """Long periods are divided, short ones kept, and what lies between is mixed.

    Source: Llama 3 (2024), section 3.4.2; the rule is that of the models' published code.
    """
    context_length = scaling.original_max_positions
    periods_E = 2 * math.pi / frequencies_E
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept_E = (context_length / periods_E - low) / (high - low)
    mixed_E = (1 - kept_E) * frequencies_E / scaling.factor + kept_E * frequencies_E
    is_long_E, is_short_E = periods_E > context_length / low, periods_E < context_length / high
    return torch.where(is_long_E, frequencies_E / scaling.factor, torch.where(is_short_E, frequencies_E, mixed_E))


def _yarn(inverses_E: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """Pairs that turn often in the original context are kept, those that hardly turn divided, a ramp between them.

    Source: Peng et al., 2023 (YaRN), equations 17 to 20.
    """
    num_pairs = len(inverses_E)

    def pair_that_turns(turns: float) -> float:
        ratio = scaling.original_max_positions / (turns * 2 * math.pi)
        return 2 * num_pairs * math.log(ratio) / (2 * math.log(theta))

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * num_pairs - 1)
    span = last - first if last != first else 0.001
    ramp_E = torch.arange(num_pairs, dtype=torch.float32, device=inverses_E.device).sub(first).div(span).clamp(0, 1)
    kept_E = 1 - ramp_E
    return 1.0 / (scaling.factor * inverses_E) * (1 - kept_E) + 1.0 / inverses_E * kept_E
