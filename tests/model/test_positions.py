"""Positions that begin anew: a packed sample with masks and these is what its documents are alone."""

import pytest
import torch

from megagrow.config import ModelConfig
from megagrow.model.transformer import Transformer, initialize
from megagrow.parallel.context import restarted_positions
from tests.models import as_gpt2

LLAMA = ModelConfig(
    vocab_size=50, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=24, max_seq_length=16
)
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3, [3] * 12])


def test_positions_count_from_the_start_of_each_document() -> None:
    assert restarted_positions(torch.tensor([[4, 4, 7, 7, 7, 4], [1, 2, 3, 3, 3, 3]])).tolist() == [
        [0, 1, 0, 1, 2, 0],
        [0, 0, 0, 1, 2, 3],
    ]


@pytest.mark.parametrize("model", [LLAMA, as_gpt2(LLAMA)], ids=["rotary", "learned"])
def test_documents_in_a_sample_are_what_they_are_alone(model: ModelConfig) -> None:
    transformer = Transformer(model)
    initialize(dict(transformer.named_parameters()), model, 3)
    transformer.double()
    ids = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    positions = restarted_positions(DOCUMENTS)
    with torch.no_grad():
        packed = transformer(ids, documents=DOCUMENTS, positions=positions)
        alone = [transformer(ids[:1, 0:5]), transformer(ids[:1, 5:9]), transformer(ids[:1, 9:12])]
        torch.testing.assert_close(packed[:1], torch.cat(alone, dim=1), rtol=0, atol=1e-6)
        torch.testing.assert_close(packed[1:], transformer(ids[1:]), rtol=0, atol=1e-6)
        without_masks = transformer(ids, positions=positions)
        assert (without_masks[0, 5:] - packed[0, 5:]).abs().max() > 1e-2
        plain = transformer(ids)
    assert (without_masks[0, 5:] - plain[0, 5:]).abs().max() > 1e-3  # tokens see others at other distances
    assert torch.equal(without_masks[1], plain[1])
