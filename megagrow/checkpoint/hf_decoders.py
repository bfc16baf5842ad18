"""The tables of the decoder families."""

from dataclasses import replace
from typing import Any

from megagrow.checkpoint.hf_family import Block, Entry, Family, Rope, Switch

# What decoders have in common, unless their table says otherwise.
DECODER: dict[str, Any] = {
    "objective": "clm",
    "norm_place": "before",
    "position_offset": 0,
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
    kind={
        **DECODER,
        "norm": "rms_norm",
        "parallel_residual": False,
        "positions": "rope",
        "rope_fraction": 1.0,
        "qk_norm": False,
    },
    switches={
        "attention_bias": Switch("attention_bias", "none", "all"),
        "mlp_bias": Switch("mlp_bias", False, True),
    },
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
    rope=Rope(),
)

MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    entries={
        **LLAMA.entries,
        "num_kv_heads": Entry("num_key_value_heads"),
        "max_seq_length": Entry("max_position_embeddings", 131_072),
    },
    kind={**LLAMA.kind, "attention_bias": "none", "mlp_bias": False},
    switches={},
    constants={"attention_dropout": 0.0, "initializer_range": 0.02, "sliding_window": None, "use_cache": True},
    window="all_layers",
)

QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    entries={
        **LLAMA.entries,
        "num_kv_heads": Entry("num_key_value_heads"),
        "max_seq_length": Entry("max_position_embeddings", 32_768),
    },
    kind={**LLAMA.kind, "attention_bias": "qkv", "mlp_bias": False},
    switches={},
    constants={
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "layer_types": lambda model: ["full_attention"] * model.num_layers,
        "max_window_layers": lambda model: model.num_layers,
        "sliding_window": None,
        "use_cache": True,
        "use_sliding_window": False,
    },
    window="some_layers",
)

QWEN3 = replace(
    QWEN2,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    entries={**QWEN2.entries, "head_dim": Entry("head_dim", 128)},
    kind={**QWEN2.kind, "attention_bias": "none", "qk_norm": True},
    only={"attention_bias": (False,)},
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
        "parallel_residual": False,
        "positions": "learned",
        "rope_fraction": 1.0,
        "rope_scaling": None,
        "attention_bias": "all",
        "mlp_bias": True,
        "qk_norm": False,
        "num_kv_heads": lambda model: model.num_heads,
        "head_dim": lambda model: model.hidden_size // model.num_heads,
    },
    switches={},
    activation=(
        "activation_function",
        {"gelu": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_erf": ("gelu",)},
    ),
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

GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    entries={
        "vocab_size": Entry("vocab_size"),
        "hidden_size": Entry("hidden_size"),
        "num_layers": Entry("num_hidden_layers"),
        "num_heads": Entry("num_attention_heads"),
        "ffn_size": Entry("intermediate_size"),
        "max_seq_length": Entry("max_position_embeddings", 2048),
        "norm_eps": Entry("layer_norm_eps", 1e-5),
        "tied_embeddings": Entry("tie_word_embeddings", False),
    },
    kind={
        **DECODER,
        "norm": "layer_norm",
        "positions": "rope",
        "mlp_bias": True,
        "qk_norm": False,
        "num_kv_heads": lambda model: model.num_heads,
        "head_dim": lambda model: model.hidden_size // model.num_heads,
    },
    switches={
        "attention_bias": Switch("attention_bias", "none", "all", default=True),
        "use_parallel_residual": Switch("parallel_residual", False, True, default=True),
    },
    activation=("hidden_act", {"gelu_erf": ("gelu",), "gelu": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")}),
    only={},
    constants={
        "attention_dropout": 0.0,
        "classifier_dropout": 0.1,
        "hidden_dropout": 0.0,
        "initializer_range": 0.02,
        "is_decoder": False,
        "use_cache": True,
    },
    body="gpt_neox.",
    layers="gpt_neox.layers.",
    outside={
        "embedding.tokens": "gpt_neox.embed_in",
        "final_norm": "gpt_neox.final_layer_norm",
        "head": "embed_out",
    },
    inside={
        "attention_norm": (Block("input_layernorm"),),
        "attention.query": (Block("attention.query_key_value", 0, 3, by_head=True),),
        "attention.key_value": (
            Block("attention.query_key_value", 1, 3, by_head=True),
            Block("attention.query_key_value", 2, 3, by_head=True),
        ),
        "attention.output": (Block("attention.dense"),),
        "mlp_norm": (Block("post_attention_layernorm"),),
        "mlp.up": (Block("mlp.dense_h_to_4h"),),
        "mlp.down": (Block("mlp.dense_4h_to_h"),),
    },
    transposed=False,
    ignored=r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    rope=Rope("rotary_emb_base", "rotary_pct", 0.25),
)
