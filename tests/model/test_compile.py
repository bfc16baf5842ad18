"""Compiled blocks: one graph for all layers, without a break."""

from functools import cache
from typing import Literal

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from megagrow import ops
from megagrow.config import ModelConfig, TrainConfig
from megagrow.model import Transformer
from megagrow.model.dropout import token_keys
from megagrow.model.transformer import initialize

NUM_LAYERS = 12  # more than torch's limit of versions per function
MODEL = ModelConfig(vocab_size=32, hidden_size=16, num_layers=NUM_LAYERS, num_heads=2, ffn_size=24)
IDS_BS = torch.arange(16).view(2, 8)


def loss_of(train: TrainConfig) -> torch.Tensor:
    model = Transformer(MODEL, train=train)
    initialize(dict(model.named_parameters()), MODEL, seed=0)
    keys_BS = token_keys(0, 0, torch.arange(2), torch.arange(8)) if train.dropout else None
    loss = model(IDS_BS, labels=IDS_BS + 1, dropout_keys=keys_BS).sum()
    loss.backward()
    return loss.detach()


# torch's own, while it traces an autograd function whose input is no leaf
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_all_layers_share_one_graph(
    monkeypatch: pytest.MonkeyPatch, recompute: Literal["none", "full", "selective"], dropout: float
) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    counted = {"backend": counter, "fullgraph": True}
    compiled = cache(lambda function: torch.compile(function, **(counted if "model" in function.__module__ else {})))
    monkeypatch.setattr(ops, "compiled", compiled)
    loss = loss_of(TrainConfig(compile=True, recompute=recompute, dropout=dropout))
    assert counter.frame_count == 1
    torch.testing.assert_close(loss, loss_of(TrainConfig(dropout=dropout)), rtol=1e-6, atol=0)
