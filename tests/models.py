"""The families of models, each as a change of a Llama."""

from dataclasses import replace
from typing import Any

from megagrow.config import ModelConfig


def as_gpt2(llama: ModelConfig, **sizes: Any) -> ModelConfig:
    """GPT-2 in the sizes of `llama`, or in those given."""
    kind: dict[str, Any] = {
        "family": "gpt2",
        "num_kv_heads": llama.num_heads,
        "norm": "layer_norm",
        "positions": "learned",
        "activation": "gelu",
        "attention_bias": "all",
        "mlp_bias": True,
        "tied_embeddings": True,
    }
    return replace(llama, **(kind | sizes))
