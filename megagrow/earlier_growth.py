"""One growth of several: a section of the configuration that stands in a list."""

from dataclasses import dataclass
from typing import Literal

from megagrow.rules import MAX_SIZE, require, require_not_negative

# Sizes of a model that growth changes.
SIZES = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "ffn_size")
CHANGES = (*SIZES, "norm_eps")


@dataclass(frozen=True)
class EarlierGrowth:
    """A growth before the one to `model`, in a run whose model grows several times.

    Sizes and norm_eps left at 0 are those of the model that grows, and settings left out those of the last growth.
    """

    num_layers: int = 0
    hidden_size: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0
    ffn_size: int = 0
    norm_eps: float = 0.0  # which zero_pad changes with hidden_size
    method: str = ""  # empty: growth.method
    optimizer: Literal["", "exact", "asymmetric", "reset", "zero_pad"] = ""  # empty: growth.optimizer
    at_step: int = 0
    at_tokens: int = 0
    at_plateau: float = 0.0
    rewarmup_steps: int = -1  # -1: growth.rewarmup_steps
    freeze_steps: int = 0

    def __post_init__(self) -> None:
        require_not_negative(self, "growth.earlier", "at_step", "at_tokens", "freeze_steps", *CHANGES)
        require(0 <= self.at_plateau < 1, f"growth.earlier.at_plateau={self.at_plateau} must be in [0, 1)")
        require(
            self.rewarmup_steps >= -1,
            f"growth.earlier.rewarmup_steps={self.rewarmup_steps} must not be negative; -1 stands for that of growth",
        )
        for name in SIZES:
            require(getattr(self, name) <= MAX_SIZE, f"growth.earlier.{name} must be at most {MAX_SIZE}")
