"""LiGO learns: on real text, learned maps give a lower held-out loss than the maps they start from."""

# Shape suffix legend: B = batch, S = sequence.

import argparse
import inspect
import textwrap
import typing

import pytest
import torch
from torch import Tensor

from megagrow.config import ModelConfig
from megagrow.growth.ligo import Ligo
from megagrow.growth.methods import make_recipe
from megagrow.model import Transformer
from megagrow.model.transformer import initialize
from megagrow.parallel.mesh import Mesh
from tests.growth.models import gradients_of, loss_of, tensors_of

SOURCE = ModelConfig(vocab_size=128, hidden_size=32, num_layers=2, num_heads=2, ffn_size=64, max_seq_length=48)
TARGET = ModelConfig(vocab_size=128, hidden_size=48, num_layers=3, num_heads=3, ffn_size=96, max_seq_length=48)
SOURCE_STEPS, LIGO_STEPS, BATCH, SEQ = 100, 15, 12, 48


def bytes_of(*modules: object) -> Tensor:
    text = "".join(inspect.getsource(module) for module in modules)  # type: ignore[arg-type]
    return torch.tensor([byte for byte in text.encode() if byte < 128])


def batch(text: Tensor, generator: torch.Generator) -> Tensor:
    """[B, S + 1] random windows."""
    starts = torch.randint(0, len(text) - SEQ - 1, (BATCH, 1), generator=generator)
    return text[starts + torch.arange(SEQ + 1)]


def trained_source(text: Tensor, seed: int) -> dict[str, Tensor]:
    model, generator = Transformer(SOURCE), torch.Generator().manual_seed(seed)
    initialize(dict(model.named_parameters()), model.config, seed)
    adamw = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(SOURCE_STEPS):
        adamw.zero_grad()
        loss_of(model, batch(text, generator)).backward()
        adamw.step()
    return tensors_of(model)


def held_out_losses(seed: int, lr: float) -> tuple[float, float]:
    """Losses of the grown model on other text: with the initial maps, and with the learned ones."""
    train_text, held_out = bytes_of(argparse, typing), bytes_of(textwrap)
    source = trained_source(train_text, seed)
    ligo = Ligo(make_recipe("ligo", SOURCE, TARGET), noise=0.3, seed=seed)
    large, generator = Transformer(TARGET), torch.Generator().manual_seed(seed + 1)
    adamw = torch.optim.AdamW(ligo.parameters().values(), lr=lr, weight_decay=0.0)

    def evaluate() -> float:
        ligo.generate(source.__getitem__, tensors_of(large))
        with torch.no_grad():
            windows = held_out[: len(held_out) // 64 * 64].view(-1, 64)[:64, : SEQ + 1]
            return loss_of(large, windows).item()

    before = evaluate()
    for _ in range(LIGO_STEPS):
        ligo.generate(source.__getitem__, tensors_of(large))
        of_weights = gradients_of(large, batch(train_text, generator))
        ligo.pull_back(source.__getitem__, tensors_of(large), of_weights, Mesh.single())
        adamw.step()
    return before, evaluate()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_learned_maps_beat_the_initial_ones(seed: int) -> None:
    before, after = held_out_losses(seed, lr=3e-3)
    assert after < before - 0.1


def test_nothing_is_learned_at_learning_rate_zero() -> None:
    before, after = held_out_losses(1, lr=0.0)
    assert after == before
