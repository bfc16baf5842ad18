"""Small real tokenizers and corpora, made once for the session."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megagrow.data.builtin import Document, documents
from megagrow.data.indexed import IndexedWriter
from megagrow.data.tokenizer import SentencePieceTokenizer, train_sentencepiece


@pytest.fixture(scope="session")
def library() -> list[Document]:
    """About 300 kB of the standard library."""
    return documents(limit_bytes=300_000)


@pytest.fixture(scope="session")
def trained(library: list[Document], tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    prefix = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    return train_sentencepiece((file.text for file in library), 700, prefix)


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., Path]:
    """make_dataset([[1, 2], [3]]) writes these documents and returns the prefix."""

    def make(token_lists: list[list[int]], dtype: str = "<u2", name: str = "corpus") -> Path:
        with IndexedWriter(tmp_path / name, dtype) as writer:
            for tokens in token_lists:
                writer.add_document(tokens)
        return tmp_path / name

    return make
