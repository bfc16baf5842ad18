"""Tests ../megagrow/flops.py against published figures, torch's own counter and the code that spends the FLOPs."""

import dataclasses
from typing import get_args

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megagrow import flops
from megagrow.config import ModelConfig
from megagrow.errors import ConfigError
from megagrow.growth.ligo import Ligo
from megagrow.growth.ligo_maps import Variant
from megagrow.growth.methods import make_recipe
from megagrow.model.transformer import Transformer
from megagrow.roles import parameter_shapes
from tests.models import as_bert, as_gpt2, as_gpt_neox

LLAMA_3_8B = ModelConfig(
    vocab_size=128_256, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, ffn_size=14_336
)
SMALL = ModelConfig(vocab_size=96, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=56)
GPT2 = as_gpt2(SMALL, num_layers=3, head_dim=8, ffn_size=128, max_seq_length=64)
BERT = as_bert(GPT2)


@pytest.mark.parametrize(("convention", "published"), [("full", 5.791e10), ("causal", 5.147e10)])
def test_llama_3_8b_costs_what_torchtitan_and_megatron_say(convention: flops.Convention, published: float) -> None:
    counted = flops.training_flops(LLAMA_3_8B, 1, 8192, convention)
    assert counted == pytest.approx(published, rel=1e-4)


@pytest.mark.parametrize(
    "model", [SMALL, GPT2, BERT, as_gpt_neox(SMALL), dataclasses.replace(SMALL, tied_embeddings=True)]
)
def test_the_count_is_that_of_torchs_counter(model: ModelConfig) -> None:
    batch, seq_length = 2, 48
    transformer = Transformer(model)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    ids_BS = torch.randint(model.vocab_size, (batch, seq_length))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        transformer.logits(ids_BS).sum()
    counted = flops.forward_flops(model, batch * seq_length, seq_length)
    assert counted == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_training_is_three_times_a_forward_pass() -> None:
    assert flops.training_flops(SMALL, 1000, 64) == 3 * flops.forward_flops(SMALL, 1000, 64)


def test_causal_halves_attention_and_nothing_else() -> None:
    full, causal = (flops.forward_flops_per_token(SMALL, 64, c) for c in ("full", "causal"))
    assert full - causal == 2 * 64 * SMALL.num_heads * SMALL.head_dim * SMALL.num_layers


def test_an_encoder_attends_to_all_pairs_under_either_convention() -> None:
    full, causal = (flops.forward_flops_per_token(BERT, 64, c) for c in ("full", "causal"))
    assert full == causal == flops.forward_flops_per_token(GPT2, 64) + 2 * BERT.hidden_size**2


@pytest.mark.parametrize("variant", get_args(Variant))
@pytest.mark.parametrize(
    "wider",
    [
        {},
        {"hidden_size": 48, "num_heads": 8, "num_kv_heads": 4, "ffn_size": 80},
        {"hidden_size": 48, "vocab_size": 192},
        {"vocab_size": 192},
    ],
)
def test_generating_costs_what_ligo_spends(wider: dict[str, int], variant: Variant) -> None:
    """But for mixing on the large side, which is no matrix product."""
    target = dataclasses.replace(SMALL, num_layers=4, **wider)
    ligo = Ligo(make_recipe("ligo", SMALL, target), noise=0.1, variant=variant)
    source = {name: torch.randn(shape) for name, shape in parameter_shapes(SMALL).items()}
    grown = {name: torch.empty(shape) for name, shape in parameter_shapes(target).items()}
    with FlopCounterMode(display=False) as counter:
        ligo.generate(source.__getitem__, grown)
    counted = counter.get_total_flops()
    if variant == "source_layer" and "ffn_size" in wider:
        sizes = [t.numel() for name, t in grown.items() if name.startswith("layers.")]
        counted += 2 * SMALL.num_layers * sum(sizes)
    assert flops.ligo_generation_flops(SMALL, target, variant) == pytest.approx(counted, rel=0.02)


def test_a_learning_step_is_a_training_step_and_four_generations() -> None:
    target = dataclasses.replace(SMALL, num_layers=4, hidden_size=64, num_heads=8, num_kv_heads=4, ffn_size=112)
    extra = flops.ligo_step_flops(SMALL, target, 512, 64) - flops.training_flops(target, 512, 64)
    assert extra == pytest.approx(4 * flops.ligo_generation_flops(SMALL, target))
    assert extra > 0


def test_mfu_has_no_denominator_where_the_peak_is_unknown() -> None:
    assert flops.peak_flops_per_second("NVIDIA H100 PCIe", "bf16") == 756e12
    assert flops.peak_flops_per_second("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert flops.peak_flops_per_second("NVIDIA H200", "fp32") is None
    names = ("NVIDIA GB200", "NVIDIA B200", "NVIDIA H200 NVL", "NVIDIA H200", "NVIDIA H800 PCIe", "NVIDIA H800")
    peaks = [flops.peak_flops_per_second(name, "bf16") for name in names]
    assert peaks == [2500e12, 2250e12, 835e12, 989e12, 756e12, 989e12]
    assert flops.peak_flops_per_second("AMD Instinct MI250X / MI250", "bf16") == 191.5e12, "one die of the card's two"
    assert flops.peak_flops_per_second("AMD EPYC", "bf16") is None


def bert(num_layers: int, hidden: int, heads: int, vocab: int = 30_522) -> ModelConfig:
    sizes = {"hidden_size": hidden, "head_dim": hidden // heads, "ffn_size": 4 * hidden, "max_seq_length": 512}
    return as_bert(GPT2, vocab_size=vocab, num_layers=num_layers, num_heads=heads, num_kv_heads=heads, **sizes)


@pytest.mark.parametrize(
    ("model", "published"), [(bert(12, 768, 12), 15.07), (bert(6, 512, 8), 4.977)], ids=["base", "small"]
)
def test_a_step_of_bert_costs_what_ligo_says(model: ModelConfig, published: float) -> None:
    counted = flops.training_flops(model, 256 * 128, 128, "electra") / 1e12
    assert float(f"{counted:.4g}") == published


def test_electras_count_of_a_tiny_encoder_by_hand() -> None:
    """Two tokens of one layer of width 2, one head, FFN 8, vocabulary 32, two types of tokens."""
    products = 2 * (2 * 2 + 4 * 2 + 2 * 2 + 8 * 2 + 2 * 8)  # query, key and value, output, up, down
    biases = 2 + 4 + 2 + 8 + 2
    attention = 2 * 2 * 2 + 2 * 2 * 2  # scores and values: of two tokens by products of two elements
    scores = 2 * (5 + 4 + 1)  # softmax, dropout, scale
    others = 2 * (4 * 2 + 2) + 8 * 8 + 5 + 5 * 2  # dropout and residual twice, GELU, the two norms
    look_up = 2 * 2 * 32 + 2 * 2 * (2 + 2) + 2 * 2 + 5 * 2 + 4 * 2
    logits = 2 * 2 * 32 + 5 * 32 + 2 * 32 + 2 * 2 * 2 + 2 + 8 * 2 + 5 * 2
    per_token = products + biases + attention + scores + others + look_up + 0.15625 * logits
    assert per_token == 96 + 18 + 16 + 20 + 99 + 166 + 60.625
    model = bert(1, 2, 1, vocab=32)
    assert flops.forward_flops(model, 2, 2, "electra") == 2 * per_token
    assert flops.training_flops(model, 2, 2, "electra") == 4 * per_token


def test_electras_count_is_one_of_encoders() -> None:
    with pytest.raises(ConfigError, match="electra is one of encoders, not of gpt2; use full"):
        flops.training_flops(GPT2, 1, 8, "electra")
