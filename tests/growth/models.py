"""Small models of every kind that growth must handle, and training steps on them, in float64."""

# Shape suffix legend: B = batch, S = sequence.

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megagrow.config import ModelConfig, RopeScaling
from megagrow.growth.grow import grow_into
from megagrow.growth.recipe import Recipe
from megagrow.model import Transformer
from megagrow.model.transformer import initialize
from tests.models import as_bert, as_gpt2, as_gpt_neox, as_qwen2, as_roberta

LLAMA = ModelConfig(
    vocab_size=29,
    hidden_size=12,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    ffn_size=10,
    max_seq_length=8,
)
GPT2 = as_gpt2(LLAMA)
MHA = dataclasses.replace(LLAMA, num_kv_heads=4)
MQA = dataclasses.replace(LLAMA, num_kv_heads=1)
TIED = dataclasses.replace(LLAMA, tied_embeddings=True)
EVERYTHING = dataclasses.replace(  # GQA, biases, fused gate/up, learned positions, tied
    GPT2, family="llama", num_kv_heads=2, activation="swiglu"
)
BERT = as_bert(LLAMA)
UNTIED_ROBERTA = as_roberta(LLAMA, tied_embeddings=False)
QK_NORM = dataclasses.replace(LLAMA, family="qwen3", qk_norm=True)
GPT_NEOX = as_gpt_neox(LLAMA, rope_fraction=0.5)
QWEN2 = as_qwen2(LLAMA, tied_embeddings=True, rope_scaling=RopeScaling("yarn", 2.0, original_max_positions=4))
UNTIED_BIAS = dataclasses.replace(EVERYTHING, tied_embeddings=False, norm="rms_norm", activation="geglu")

FAMILIES = {
    "llama": LLAMA,
    "llama-mha": MHA,
    "llama-mqa": MQA,
    "llama-tied": TIED,
    "gpt2": GPT2,
    "everything": EVERYTHING,
    "qk-norm": QK_NORM,
    "untied-bias": UNTIED_BIAS,
    "bert": BERT,
    "roberta-untied": UNTIED_ROBERTA,
    "gpt-neox": GPT_NEOX,
    "qwen2": QWEN2,
}


def widened(
    model: ModelConfig,
    hidden: int = 1,
    query: int = 1,
    kv: int = 1,
    ffn: int = 1,
    layers: int | None = None,
) -> ModelConfig:
    """The model with each axis multiplied."""
    return dataclasses.replace(
        model,
        hidden_size=model.hidden_size * hidden,
        num_heads=model.num_heads * query,
        num_kv_heads=model.num_kv_heads * kv,
        ffn_size=model.ffn_size * ffn,
        num_layers=layers or model.num_layers,
    )


def make(model: ModelConfig, seed: int = 0) -> Transformer:
    """A model whose parameters are all random: no gain is 1 and no bias 0, so that every one counts."""
    transformer = Transformer(model).double()
    initialize(dict(transformer.named_parameters()), transformer.config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in transformer.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.double)
            parameter.add_(0.3 * noise)
    return transformer


def grown(recipe: Recipe, small: Transformer) -> Transformer:
    """The target model, every entry of which growth has written."""
    model = Transformer(recipe.target).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    grow_into(recipe, tensors_of(small).__getitem__, tensors_of(model))
    return model


def make_ids(model: ModelConfig, seed: int = 0, batch: int = 3) -> Tensor:
    """Random tokens [B, S + 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.vocab_size, (batch, 8), generator=generator)


def loss_of(model: Transformer, ids_BS: Tensor) -> Tensor:
    """Mean cross-entropy of next tokens."""
    logits_BSV = model.logits(ids_BS[:, :-1])
    return nn.functional.cross_entropy(logits_BSV.flatten(0, 1), ids_BS[:, 1:].flatten())


def gradients_of(model: Transformer, ids_BS: Tensor) -> dict[str, Tensor]:
    """Gradients of the loss by parameter name."""
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss_of(model, ids_BS), list(parameters.values()))
    return dict(zip(parameters, gradients, strict=True))


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters, detached, by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Largest difference over all tensors, relative to the largest entry of each."""
    assert found.keys() == expected.keys()
    return max(
        ((found[name] - expected[name]).abs().max() / expected[name].abs().max().clamp(1e-30)).item()
        for name in expected
    )
