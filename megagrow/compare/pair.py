"""The two models of a comparison, and what every recipe knows of them."""

from dataclasses import dataclass, replace
from functools import cached_property

from megagrow.config import ModelConfig


@dataclass(frozen=True)
class Pair:
    """A small model and the large one that all arms end with.

    Attributes:
        source, target: their shapes.
        small: run directory of the small model, which all arms of a seed share.
        ligo_steps: steps that learn maps where a recipe does not say otherwise.
    """

    source: ModelConfig
    target: ModelConfig
    small: str = "small"
    ligo_steps: int = 100

    @cached_property
    def widens(self) -> bool:
        """Whether anything but the number of layers grows."""
        return replace(self.source, num_layers=self.target.num_layers) != self.target

    @cached_property
    def deepens(self) -> bool:
        """Whether the number of layers grows."""
        return self.source.num_layers < self.target.num_layers

    def method(self, width: str, depth: str = "stack") -> str:
        """A width and a depth method as one, of which only what the pair needs is named."""
        return "+".join([width] * self.widens + [depth] * self.deepens)

    def between(self) -> ModelConfig:
        """A model halfway: layers, heads and neurons rounded down, heads of the size that they have."""
        source, target = self.source, self.target
        layers, heads, kv_heads, ffn = (
            (getattr(source, size) + getattr(target, size)) // 2
            for size in ("num_layers", "num_heads", "num_kv_heads", "ffn_size")
        )
        if heads % kv_heads:
            kv_heads = source.num_kv_heads
        hidden = (source.hidden_size + target.hidden_size) // 2 // target.head_dim * target.head_dim
        sizes = {"num_layers": layers, "num_heads": heads, "num_kv_heads": kv_heads, "hidden_size": hidden}
        return replace(target, ffn_size=ffn, **sizes)
