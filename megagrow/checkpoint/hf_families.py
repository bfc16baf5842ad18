"""One table per Hugging Face model family: what config.json and the tensors mean in our terms.

A family is added by adding a `Family` to `FAMILIES`; hf_config.py and hf_tensors.py read the tables
in both directions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megagrow.config import ModelConfig


@dataclass(frozen=True)
class Entry:
    """Where config.json holds a field of `ModelConfig`.

    Attributes:
        key: name in config.json.
        default: what transformers assumes when the key is absent or null; a function of the fields
            above it where it depends on them; None: the key is required.
        added: what config.json's number is larger by than ours, a function of the fields above it; None: nothing.
    """

    key: str
    default: int | float | Callable[[Mapping[str, Any]], int] | None = None
    added: Callable[[Mapping[str, Any]], int] | None = None

    def difference(self, fields: Mapping[str, Any]) -> int:
        """What config.json's number is larger by than ours."""
        return self.added(fields) if self.added else 0


@dataclass(frozen=True)
class Block:
    """Where one part of a parameter lies: block `index` of `of` equal ones along the out dim."""

    module: str
    index: int = 0
    of: int = 1


@dataclass(frozen=True)
class Family:
    """A model type of transformers.

    Attributes:
        model_type: `model_type` in config.json, `family` in `ModelConfig`.
        architecture: the class that transformers builds.
        entries: field of `ModelConfig` -> entry of config.json.
        kind: fields of `ModelConfig` that the family fixes, functions of the model where they
            follow from other fields.
        switches: entries that are true or false -> field of `ModelConfig` and its value for each; empty: `kind` fixes
            the field.
        activation: the entry that names the MLP's activation, and its values for each of ours; the first is written,
            and that of the first activation assumed where the key is absent or null.
        only: entries of which no other values are understood. The first is written, and assumed
            where the key is absent or null.
        constants: entries that are written and not read, because they leave the logits alone;
            functions of the model where they follow from it.
            Dropout is one of them: it acts in training only.
        body: prefix that the tensors of a folder saved without its head do not have.
        layers: prefix of a layer's modules, before its number.
        outside: module of ours -> full name of theirs, outside the layers.
        inside: module of ours -> where its parts (`Role.parts`) lie in theirs, in every layer.
        transposed: whether the matrices inside the layers are stored in x out.
        ignored: pattern of tensor names that hold no parameters.
        names: parameter of ours -> full name of their tensor, where it does not follow from the module's.
        copies: tensor -> the one that it repeats. It is written where the head is untied: transformers then computes
            with it.
        extras: pattern of parameters that the logits do not depend on; they are dropped, and named.
        renamed: ends of tensor names in old folders -> what they are now.
    """

    model_type: str
    architecture: str
    entries: Mapping[str, Entry]
    kind: Mapping[str, Any]
    switches: Mapping[str, tuple[str, Any, Any]]
    activation: tuple[str, Mapping[str, tuple[str, ...]]]
    only: Mapping[str, tuple[Any, ...]]
    constants: Mapping[str, Any]
    body: str
    layers: str
    outside: Mapping[str, str]
    inside: Mapping[str, tuple[Block, ...]]
    transposed: bool
    ignored: str
    names: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    extras: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)


# Entries that change the logits in some family and have no counterpart here, with what they may be.
ONLY_ANYWHERE: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": (None, {}),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False,),
}

# What decoders have in common, unless their table says otherwise.
DECODER: dict[str, Any] = {
    "objective": "clm",
    "norm_place": "before",
    "parallel_residual": False,
    "position_offset": 0,
    "rope_fraction": 1.0,
    "rope_scaling": None,
    "num_token_types": 0,
}

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    entries={
        "vocab_size": Entry("vocab_size"),
        "hidden_size": Entry("hidden_size"),
        "num_layers": Entry("num_hidden_layers"),
        "num_heads": Entry("num_attention_heads"),
        "num_kv_heads": Entry("num_key_value_heads", lambda fields: fields["num_heads"]),
        "head_dim": Entry("head_dim", lambda f: f["hidden_size"] // f["num_heads"]),
        "ffn_size": Entry("intermediate_size"),
        "max_seq_length": Entry("max_position_embeddings", 2048),
        "norm_eps": Entry("rms_norm_eps", 1e-6),
        "tied_embeddings": Entry("tie_word_embeddings", False),
    },
    kind={**DECODER, "norm": "rms_norm", "positions": "rope", "qk_norm": False},
    switches={"attention_bias": ("attention_bias", "none", "all"), "mlp_bias": ("mlp_bias", False, True)},
    activation=("hidden_act", {"swiglu": ("silu", "swish"), "geglu": ("gelu_pytorch_tanh", "gelu_new")}),
    only={},
    constants={
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "use_cache": True,
    },
    body="model.",
    layers="model.layers.",
    outside={
        "embedding.tokens": "model.embed_tokens",
        "final_norm": "model.norm",
        "head": "lm_head",
    },
    inside={
        "attention_norm": (Block("input_layernorm"),),
        "attention.query": (Block("self_attn.q_proj"),),
        "attention.key_value": (Block("self_attn.k_proj"), Block("self_attn.v_proj")),
        "attention.output": (Block("self_attn.o_proj"),),
        "mlp_norm": (Block("post_attention_layernorm"),),
        "mlp.gate_up": (Block("mlp.gate_proj"), Block("mlp.up_proj")),
        "mlp.down": (Block("mlp.down_proj"),),
    },
    transposed=False,
    ignored=r".*\.rotary_emb\.inv_freq",
)

QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    entries={
        **LLAMA.entries,
        "num_kv_heads": Entry("num_key_value_heads"),
        "head_dim": Entry("head_dim", 128),
        "max_seq_length": Entry("max_position_embeddings", 32_768),
    },
    kind={**LLAMA.kind, "attention_bias": "none", "mlp_bias": False, "qk_norm": True},
    switches={},
    only={**LLAMA.only, "attention_bias": (False,), "use_sliding_window": (False,), "sliding_window": (None,)},
    constants={
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "layer_types": lambda model: ["full_attention"] * model.num_layers,
        "max_window_layers": lambda model: model.num_layers,
        "use_cache": True,
    },
    inside={
        **LLAMA.inside,
        "attention.query_norm": (Block("self_attn.q_norm"),),
        "attention.key_norm": (Block("self_attn.k_norm"),),
    },
)

GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    entries={
        "vocab_size": Entry("vocab_size"),
        "hidden_size": Entry("n_embd"),
        "num_layers": Entry("n_layer"),
        "num_heads": Entry("n_head"),
        "ffn_size": Entry("n_inner", lambda fields: 4 * fields["hidden_size"]),
        "max_seq_length": Entry("n_positions", 1024),
        "norm_eps": Entry("layer_norm_epsilon", 1e-5),
        "tied_embeddings": Entry("tie_word_embeddings", True),
    },
    kind={
        **DECODER,
        "norm": "layer_norm",
        "positions": "learned",
        "attention_bias": "all",
        "mlp_bias": True,
        "qk_norm": False,
        "num_kv_heads": lambda model: model.num_heads,
        "head_dim": lambda model: model.hidden_size // model.num_heads,
    },
    switches={},
    activation=("activation_function", {"gelu": ("gelu_new", "gelu_pytorch_tanh")}),
    only={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
    },
    constants={
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    },
    body="transformer.",
    layers="transformer.h.",
    outside={
        "embedding.tokens": "transformer.wte",
        "embedding.positions": "transformer.wpe",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    },
    inside={
        "attention_norm": (Block("ln_1"),),
        "attention.query": (Block("attn.c_attn", 0, 3),),
        "attention.key_value": (Block("attn.c_attn", 1, 3), Block("attn.c_attn", 2, 3)),
        "attention.output": (Block("attn.c_proj"),),
        "mlp_norm": (Block("ln_2"),),
        "mlp.up": (Block("mlp.c_fc"),),
        "mlp.down": (Block("mlp.c_proj"),),
    },
    transposed=True,
    ignored=r".*\.attn\.(bias|masked_bias)",
)

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, QWEN3, GPT2)}


def fixed_fields(family: Family, model: ModelConfig) -> dict[str, Any]:
    """The values that the family's models have in the fields of `Family.kind`."""
    return {name: value(model) if callable(value) else value for name, value in family.kind.items()}
