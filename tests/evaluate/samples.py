"""Small models and datasets with documents, which every rank can make or open for itself."""

import dataclasses
from pathlib import Path

from megagrow.config import ModelConfig
from megagrow.data.description import Description
from megagrow.data.indexed import IndexedWriter, token_dtype
from megagrow.data.tokenizer import ByteTokenizer
from megagrow.evaluate.shared_model import SharedModel
from megagrow.model import Transformer
from megagrow.parallel.mesh import make_inference_mesh
from megagrow.parallel.shards import fill, shard_parameters
from tests.growth.models import LLAMA, make
from tests.models import as_gpt2

BYTES = dataclasses.replace(LLAMA, vocab_size=ByteTokenizer.vocab_size, num_kv_heads=4, max_seq_length=12)
BYTES_GPT2 = as_gpt2(BYTES)
TEXTS = ["a first document, longer than one window", "", "b", "üñï \U0001f600 and more of it", "last"]


def write_texts(prefix: Path, texts: list[str], described: bool = True) -> Path:
    """The texts as documents of bytes, each ended by its token."""
    tokenizer = ByteTokenizer()
    documents = [[*tokenizer.encode(text), tokenizer.eod_id] for text in texts]
    description: Description = {
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "num_documents": len(documents),
        "num_tokens": sum(map(len, documents)),
        "split": "validation",
        "source": "a test",
    }
    writer = IndexedWriter(prefix, token_dtype(tokenizer.vocab_size))
    for document in documents:
        writer.add_document(document)
    writer.close(description if described else None)
    return prefix


def shared_model(config: ModelConfig, tensor: int = 1, batch_size: int = 3) -> SharedModel:
    """The model of `make` on the ranks that are running, in float64."""
    mesh, whole = make_inference_mesh(tensor), make(config)
    model = Transformer(config, mesh.tensor_only()).double()
    shard_parameters(model, config, mesh.tensor_only())
    for name, parameter in model.named_parameters():
        fill(parameter, dict(whole.named_parameters())[name].detach())
    return SharedModel(model.requires_grad_(False), mesh, batch_size)
