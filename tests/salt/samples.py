"""Small models, and corpora for them, that every rank can make for itself."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from megagrow.checkpoint.source import Source
from megagrow.config import ModelConfig, ParallelConfig
from megagrow.data.dataset import PackedDataset
from megagrow.data.indexed import IndexedWriter
from megagrow.model.transformer import Transformer, initialize
from megagrow.parallel.mesh import Mesh, make_mesh
from tests.models import as_gpt2

SMALL = ModelConfig(
    vocab_size=29,
    hidden_size=12,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    ffn_size=10,
    max_seq_length=16,
)
TIED = as_gpt2(SMALL)


def make_model(model: ModelConfig, seed: int = 0) -> Transformer:
    """A whole model, in float64, with logits of a few units."""
    transformer = Transformer(model).double().requires_grad_(False)
    initialize(dict(transformer.named_parameters()), transformer.config, seed)
    transformer.head_VH.mul_(8)
    return transformer


def make_source(model: ModelConfig, seed: int = 0) -> Source:
    """That model as if it had been read from disk."""
    return source_of(dict(make_model(model, seed).named_parameters()), model, f"seed {seed}")


def source_of(state: dict[str, Tensor], model: ModelConfig, identity: str) -> Source:
    fetch = state.__getitem__
    return Source(Path("small"), model, fetch, lambda name: state[name].dtype, lambda: identity, None, "", fetch)


def write_corpus(prefix: Path, tokens: Iterable[int]) -> Path:
    with IndexedWriter(prefix, "<u2") as writer:
        writer.add_document(list(tokens))
    return prefix


def random_corpus(prefix: Path, num_samples: int, seq_length: int, vocab: int = 29) -> Path:
    """A corpus of exactly so many samples, with a tail that belongs to none."""
    generator = torch.Generator().manual_seed(1)
    num_tokens = num_samples * seq_length + 1 + seq_length // 2
    return write_corpus(prefix, torch.randint(vocab, (num_tokens,), generator=generator).tolist())


def write_documents(prefix: Path, lengths: Iterable[int], vocab: int = 29) -> Path:
    """A corpus of documents with so many random tokens each."""
    generator = torch.Generator().manual_seed(3)
    with IndexedWriter(prefix, "<u2") as writer:
        for length in lengths:
            writer.add_document(torch.randint(vocab, (length,), generator=generator).tolist())
    return prefix


def mesh_of(tensor: int = 1, pipeline: int = 1) -> Mesh:
    """The mesh of the ranks that are running, or of this process."""
    return make_mesh(ParallelConfig(tensor=tensor, pipeline=pipeline))


def opened(prefix: Path, seq_length: int) -> PackedDataset:
    return PackedDataset(prefix, seq_length)
