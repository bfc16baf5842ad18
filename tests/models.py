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


def as_gpt_neox(llama: ModelConfig, **sizes: Any) -> ModelConfig:
    """GPT-NeoX, as Pythia is, in the sizes of `llama`, or in those given."""
    kind: dict[str, Any] = {
        "family": "gpt_neox",
        "num_kv_heads": llama.num_heads,
        "norm": "layer_norm",
        "parallel_residual": True,
        "rope_fraction": 0.25,
        "activation": "gelu_erf",
        "attention_bias": "all",
        "mlp_bias": True,
    }
    return replace(llama, **(kind | sizes))


def as_qwen2(llama: ModelConfig, **sizes: Any) -> ModelConfig:
    """Qwen2 in the sizes of `llama`, or in those given."""
    return replace(llama, **({"family": "qwen2", "attention_bias": "qkv"} | sizes))
