"""What an encoder's tokens see: all of the sequence, or of their document, before and after them."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megagrow.config import ModelConfig
from megagrow.model import Transformer
from megagrow.model.transformer import initialize
from tests.models import as_bert, as_roberta

LLAMA = ModelConfig(vocab_size=31, hidden_size=16, num_layers=2, num_heads=4, ffn_size=24, max_seq_length=8)
BERT, ROBERTA = as_bert(LLAMA), as_roberta(LLAMA)
ROTARY = replace(as_bert(LLAMA), positions="rope", norm_place="before", activation="swiglu", norm="rms_norm")
IDS_BS = torch.tensor([[3, 14, 15, 9, 26, 5, 3, 5]])
DOCUMENTS_BS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2]])


def make(model: ModelConfig) -> Transformer:
    transformer = Transformer(model).double()
    initialize(dict(transformer.named_parameters()), model, 0)
    return transformer


def changed_by(compute: Callable[[Tensor], Tensor], place: int) -> list[bool]:
    """Which places' results change with the token at one of them."""
    other_BS = IDS_BS.clone()
    other_BS[0, place] += 1
    with torch.no_grad():
        differences_S = (compute(IDS_BS) - compute(other_BS))[0].abs().amax(-1)
    return [float(x) > 1e-9 for x in differences_S]


@pytest.mark.parametrize("model", [BERT, ROBERTA, ROTARY], ids=["bert", "roberta", "rotary"])
def test_every_token_sees_every_other(model: ModelConfig) -> None:
    transformer = make(model)
    for place in range(8):
        assert all(changed_by(transformer, place))


def test_a_decoders_tokens_see_those_before_them() -> None:
    assert changed_by(make(replace(BERT, objective="clm")), 5) == [False] * 5 + [True] * 3


def test_tokens_see_their_own_document_only() -> None:
    transformer = make(BERT)
    for place, document in enumerate(DOCUMENTS_BS[0].tolist()):
        seen = changed_by(lambda ids_BS: transformer(ids_BS, documents=DOCUMENTS_BS), place)
        assert seen == [other == document for other in DOCUMENTS_BS[0].tolist()]


def test_tokens_without_a_type_are_of_type_zero() -> None:
    transformer, types_BS = make(BERT), torch.zeros_like(IDS_BS)
    with torch.no_grad():
        plain_BSV = transformer.logits(IDS_BS)
        torch.testing.assert_close(transformer.logits(IDS_BS, types_BS), plain_BSV, rtol=0, atol=1e-12)
        assert (transformer.logits(IDS_BS, types_BS + 1) - plain_BSV).abs().max() > 1e-3


def test_rows_before_the_offset_belong_to_no_token() -> None:
    transformer = make(ROBERTA)
    assert transformer.embedding.positions.shape == (2 + 8, 16)
    transformer.logits(IDS_BS).square().sum().backward()
    used = transformer.embedding.positions.grad.abs().sum(-1) > 0
    assert used.tolist() == [False] * 2 + [True] * 8
