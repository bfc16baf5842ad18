"""One transformer for all families, configured; it knows the mesh only through its layers."""

from megagrow.model.transformer import LossOptions, Transformer

__all__ = ["LossOptions", "Transformer"]
