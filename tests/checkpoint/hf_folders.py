"""Small random Hugging Face folders, written by transformers itself, and models of our own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from megagrow.config import ModelConfig
from tests.models import as_bert, as_gpt_neox, as_qwen2, as_roberta

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCAB_SIZE = 61  # odd, and no multiple of anything else here
NUM_LAYERS = 3
LLAMA = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 3,
    "eos_token_id": [4, 5],
}
GPT2 = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 24,
    "n_layer": NUM_LAYERS,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 3,
    "eos_token_id": 4,
}
GPT_NEOX = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": 3,
    "eos_token_id": 4,
}
BERT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 2,
}
CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, LLAMA),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, LLAMA),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, LLAMA),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, LLAMA | {"head_dim": 8}),
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel, GPT2),
    "gpt_neox": (transformers.GPTNeoXConfig, transformers.GPTNeoXForCausalLM, GPT_NEOX),
    "bert": (transformers.BertConfig, transformers.BertForMaskedLM, BERT),
    "roberta": (transformers.RobertaConfig, transformers.RobertaForMaskedLM, BERT),
}
# By kind, as transformers' `rope_parameters`; the contexts are those of the folders here and half of it.
ROPE_SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16},
    "yarn in full": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 8.0,
        "beta_slow": 0.5,
        "attention_factor": 1.3,
        "truncate": False,
    },
    "yarn, DeepSeek's": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    },
}

OWN_LLAMA = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_size=40,
    max_seq_length=32,
    norm_eps=1e-4,
    rope_theta=5e5,
)
OWN_QWEN3 = replace(OWN_LLAMA, family="qwen3", qk_norm=True)
OWN_MISTRAL = replace(OWN_LLAMA, family="mistral")
OWN_QWEN2 = as_qwen2(OWN_LLAMA)
OWN_GPT_NEOX = as_gpt_neox(OWN_LLAMA, hidden_size=32)
OWN_GPT2 = ModelConfig(
    family="gpt2",
    vocab_size=61,
    hidden_size=24,
    num_layers=3,
    num_heads=4,
    ffn_size=50,
    max_seq_length=32,
    norm="layer_norm",
    norm_eps=1e-4,
    positions="learned",
    activation="gelu",
    attention_bias="all",
    mlp_bias=True,
    tied_embeddings=True,
)
OWN_BERT = as_bert(OWN_GPT2, norm_eps=1e-4)
OWN_ROBERTA = as_roberta(OWN_GPT2, position_offset=3)


def random_model(family: str, **changes: Any) -> Any:
    """A model of transformers in which every parameter, biases and gains included, is random."""
    config_class, model_class, fields = CLASSES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**(fields | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            offset = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(offset + 0.2 * torch.randn_like(parameter))
    return model


def save_folder(folder: Path, family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Saves such a model; returns the folder."""
    random_model(family, **changes).to(dtype).save_pretrained(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor in the folder's safetensors files."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def logits_of(folder: Path, ids_BS: Tensor, types_BS: Tensor | None = None) -> Tensor:
    """What transformers computes from a folder; no tensor of it may be missing or left over."""
    is_encoder = transformers.AutoConfig.from_pretrained(folder).model_type in ("bert", "roberta")
    auto = transformers.AutoModelForMaskedLM if is_encoder else transformers.AutoModelForCausalLM
    model, report = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        return model.eval()(ids_BS, **({} if types_BS is None else {"token_type_ids": types_BS})).logits


def random_ids(num_tokens: int = 19, first: int = 0) -> Tensor:
    """Tokens from `first` on; RoBERTa does not count those up to its padding token, 2 here, as positions."""
    return torch.randint(first, VOCAB_SIZE, (2, num_tokens), generator=torch.Generator().manual_seed(1))


def save_tokenizer(folder: Path, *special: str) -> Path:
    """A byte-pair tokenizer.json of less than `VOCAB_SIZE` tokens, with an end of document and these special tokens."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 8, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator(["grow the small model, train the large model"] * 3, trainer)
    tokenizer.add_special_tokens(list(special))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
