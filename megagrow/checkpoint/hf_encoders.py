"""The tables of BERT and RoBERTa; hf_family.py says what the entries mean."""

from dataclasses import replace

from megagrow.checkpoint.hf_family import Block, Entry, Family

BERT = Family(
    model_type="bert",
    architecture="BertForMaskedLM",
    entries={
        "vocab_size": Entry("vocab_size"),
        "hidden_size": Entry("hidden_size"),
        "num_layers": Entry("num_hidden_layers"),
        "num_heads": Entry("num_attention_heads"),
        "ffn_size": Entry("intermediate_size"),
        "max_seq_length": Entry("max_position_embeddings", 512),
        "num_token_types": Entry("type_vocab_size", 2),
        "norm_eps": Entry("layer_norm_eps", 1e-12),
        "tied_embeddings": Entry("tie_word_embeddings", True),
    },
    kind={
        "objective": "mlm",
        "norm": "layer_norm",
        "norm_place": "after",
        "parallel_residual": False,
        "positions": "learned",
        "position_offset": 0,
        "rope_fraction": 1.0,
        "rope_scaling": None,
        "attention_bias": "all",
        "mlp_bias": True,
        "qk_norm": False,
        "num_kv_heads": lambda model: model.num_heads,
        "head_dim": lambda model: model.hidden_size // model.num_heads,
    },
    switches={},
    activation=("hidden_act", {"gelu_erf": ("gelu", "gelu_python"), "gelu": ("gelu_new", "gelu_pytorch_tanh")}),
    only={"is_decoder": (False,), "position_embedding_type": ("absolute",)},
    constants={
        "attention_probs_dropout_prob": 0.1,
        "classifier_dropout": None,
        "hidden_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "use_cache": True,
    },
    body="bert.",
    layers="bert.encoder.layer.",
    outside={
        "embedding.tokens": "bert.embeddings.word_embeddings",
        "embedding.positions": "bert.embeddings.position_embeddings",
        "embedding.token_types": "bert.embeddings.token_type_embeddings",
        "embedding_norm": "bert.embeddings.LayerNorm",
        "mlm_head.dense": "cls.predictions.transform.dense",
        "mlm_head.norm": "cls.predictions.transform.LayerNorm",
        "head": "cls.predictions.decoder",
    },
    inside={
        "attention_norm": (Block("attention.output.LayerNorm"),),
        "attention.query": (Block("attention.self.query"),),
        "attention.key_value": (Block("attention.self.key"), Block("attention.self.value")),
        "attention.output": (Block("attention.output.dense"),),
        "mlp_norm": (Block("output.LayerNorm"),),
        "mlp.up": (Block("intermediate.dense"),),
        "mlp.down": (Block("output.dense"),),
    },
    transposed=False,
    ignored=r"bert\.embeddings\.(position_ids|token_type_ids)",
    names={"head.bias": "cls.predictions.bias"},
    copies={"cls.predictions.decoder.bias": "cls.predictions.bias"},
    extras=r"bert\.pooler\.dense\.(weight|bias)|cls\.seq_relationship\.(weight|bias)",
    renamed={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
)

ROBERTA = replace(
    BERT,
    model_type="roberta",
    architecture="RobertaForMaskedLM",
    entries={
        # The first token has the row of the table of positions that follows the one numbered as the padding token.
        "position_offset": Entry("pad_token_id", 1, lambda fields: -1),
        **BERT.entries,
        "max_seq_length": Entry("max_position_embeddings", 512, lambda fields: fields["position_offset"]),
    },
    kind={name: value for name, value in BERT.kind.items() if name != "position_offset"},
    activation=("hidden_act", {"gelu_erf": ("gelu", "gelu_python")}),  # its head's is exact in any case
    body="roberta.",
    layers="roberta.encoder.layer.",
    outside={
        "embedding.tokens": "roberta.embeddings.word_embeddings",
        "embedding.positions": "roberta.embeddings.position_embeddings",
        "embedding.token_types": "roberta.embeddings.token_type_embeddings",
        "embedding_norm": "roberta.embeddings.LayerNorm",
        "mlm_head.dense": "lm_head.dense",
        "mlm_head.norm": "lm_head.layer_norm",
        "head": "lm_head.decoder",
    },
    ignored=r"roberta\.embeddings\.(position_ids|token_type_ids)",
    names={"head.bias": "lm_head.bias"},
    copies={"lm_head.decoder.bias": "lm_head.bias"},
    extras=r"roberta\.pooler\.dense\.(weight|bias)",
)
