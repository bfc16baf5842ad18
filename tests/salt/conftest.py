"""A checkpoint of a small model and a corpus that it fits, for the tools."""

from pathlib import Path

import pytest
import torch

from megagrow import checkpoint
from megagrow.config_file import to_dict
from tests.salt.samples import SMALL, make_model, write_corpus

SEQ_LENGTH = 8


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint of the small model, as training writes it."""
    tensors = {f"model.{name}": p for name, p in make_model(SMALL).float().named_parameters()}
    state = {"model": to_dict(SMALL)}
    return checkpoint.save(tmp_path / "model", 1, tensors, state, config={}, provenance={})


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """The one token repeated that the model predicts best after itself, so that it fits its
    data.
    """
    small = make_model(SMALL)
    rows = torch.arange(SMALL.vocab_size)[:, None].expand(-1, SEQ_LENGTH)
    nll = -small.logits(rows).log_softmax(-1).gather(-1, rows[..., None]).mean((1, 2))
    return write_corpus(tmp_path / "corpus", [int(nll.argmin())] * (20 * SEQ_LENGTH + 1))
