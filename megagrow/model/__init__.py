"""One transformer for all families, configured; it reads like the mathematics and knows the mesh only through its layers."""

from megagrow.model.transformer import LossOptions, Transformer

__all__ = ["LossOptions", "Transformer"]
