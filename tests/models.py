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


def as_bert(llama: ModelConfig, **changes: Any) -> ModelConfig:
    """BERT in the sizes of `llama`, or with these changes."""
    kind: dict[str, Any] = {
        "family": "bert",
        "objective": "mlm",
        "num_kv_heads": llama.num_heads,
        "norm": "layer_norm",
        "norm_eps": 1e-12,
        "norm_place": "after",
        "positions": "learned",
        "num_token_types": 2,
        "activation": "gelu_erf",
        "attention_bias": "all",
        "mlp_bias": True,
        "tied_embeddings": True,
    }
    return replace(llama, **(kind | changes))


def as_roberta(llama: ModelConfig, **changes: Any) -> ModelConfig:
    """RoBERTa likewise: one type of tokens, and positions that begin after that of the padding token, 1."""
    kind = {"family": "roberta", "norm_eps": 1e-5, "num_token_types": 1, "position_offset": 2}
    return as_bert(llama, **(kind | changes))
