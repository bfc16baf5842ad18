"""The same weights give the same logits in transformers and here, in both directions."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megagrow.checkpoint.hf import HFReader, write_hf_folder
from megagrow.checkpoint.source import load_model, open_source
from megagrow.config import ModelConfig, RopeScaling
from megagrow.model.transformer import Transformer
from megagrow.parallel.mesh import Mesh
from tests.checkpoint.hf_folders import (
    OWN_BERT,
    OWN_GPT2,
    OWN_GPT_NEOX,
    OWN_LLAMA,
    OWN_MISTRAL,
    OWN_QWEN2,
    OWN_QWEN3,
    OWN_ROBERTA,
    ROPE_SCALINGS,
    logits_of,
    random_ids,
    save_folder,
)

LARGEST_DIFFERENCE = 1e-5
BIASES = {"attention_bias": True, "mlp_bias": True}

THEIRS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("llama", {"head_dim": 10, **BIASES}),
    ("llama", {"rope_theta": 100.0, "rms_norm_eps": 0.1}),
    ("llama", {"hidden_act": "gelu_pytorch_tanh", **BIASES}),
    *(("llama", {"rope_parameters": {**scaling, "rope_theta": 100.0}}) for scaling in ROPE_SCALINGS.values()),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 32, "head_dim": 8, "rope_parameters": ROPE_SCALINGS["llama3"]}),
    ("qwen2", {}),
    ("qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True, "rope_parameters": ROPE_SCALINGS["yarn"]}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}),
    ("gpt_neox", {}),
    ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True, "rotary_pct": 1.0}),
    ("gpt_neox", {"attention_bias": False, "rotary_pct": 0.5, "rotary_emb_base": 100, "hidden_act": "gelu_fast"}),
    ("gpt_neox", {"rope_parameters": {**ROPE_SCALINGS["yarn in full"], "partial_rotary_factor": 0.75}}),
    ("qwen3", {}),
    ("qwen3", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("gpt2", {}),
    ("gpt2", {"tie_word_embeddings": False, "n_inner": 50, "layer_norm_epsilon": 0.1}),
    ("gpt2", {"activation_function": "gelu_pytorch_tanh", "n_head": 1}),
    ("bert", {}),
    ("bert", {"tie_word_embeddings": False, "type_vocab_size": 3, "hidden_act": "gelu_new", "layer_norm_eps": 0.1}),
    ("roberta", {}),
    ("roberta", {"tie_word_embeddings": False, "type_vocab_size": 1, "pad_token_id": 0}),
]
OURS = [
    OWN_LLAMA,
    replace(OWN_LLAMA, num_kv_heads=4, attention_bias="all", mlp_bias=True, tied_embeddings=True),
    replace(OWN_LLAMA, activation="geglu"),
    replace(OWN_LLAMA, rope_scaling=RopeScaling("linear", 3.0)),
    OWN_MISTRAL,
    replace(OWN_QWEN2, rope_scaling=RopeScaling("yarn", 4.0, 8, truncate=False)),
    OWN_QWEN3,
    replace(OWN_GPT_NEOX, rope_scaling=RopeScaling("llama3", 8.0, 16)),
    replace(OWN_GPT_NEOX, parallel_residual=False, attention_bias="none", activation="gelu", tied_embeddings=True),
    OWN_GPT2,
    replace(OWN_GPT2, tied_embeddings=False),
    OWN_BERT,
    replace(OWN_BERT, tied_embeddings=False, activation="gelu"),
    OWN_ROBERTA,
    replace(OWN_ROBERTA, tied_embeddings=False),
]


@pytest.mark.parametrize(("family", "changes"), THEIRS)
def test_logits_of_their_folder(tmp_path, family: str, changes: dict) -> None:
    folder, ids_BS = save_folder(tmp_path, family, **changes), random_ids(first=3)
    theirs = logits_of(folder, ids_BS)
    ours = load_model(open_source(folder), Mesh.single()).logits(ids_BS)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=LARGEST_DIFFERENCE, rtol=0)


@pytest.mark.parametrize("model", OURS)
def test_logits_of_our_folder(tmp_path, model: ModelConfig) -> None:
    transformer, ids_BS = Transformer(model), random_ids(first=3)
    weights = dict(transformer.named_parameters())
    with torch.no_grad():
        for parameter in weights.values():
            parameter.copy_((parameter.ndim == 1) + 0.2 * torch.randn_like(parameter))
        ours = transformer.logits(ids_BS)
    write_hf_folder(tmp_path / "out", model, weights.__getitem__)
    theirs = logits_of(tmp_path / "out", ids_BS)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=LARGEST_DIFFERENCE, rtol=0)
    assert HFReader(tmp_path / "out").model == model


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_token_types_reach_the_logits(tmp_path, family: str) -> None:
    folder, ids_BS = save_folder(tmp_path, family, type_vocab_size=2), random_ids(first=3)
    types_BS = torch.arange(ids_BS.numel()).view_as(ids_BS) % 2
    theirs, plain = logits_of(folder, ids_BS, types_BS), logits_of(folder, ids_BS)
    ours = load_model(open_source(folder), Mesh.single()).logits(ids_BS, types_BS)
    assert (theirs - plain).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=LARGEST_DIFFERENCE, rtol=0)
