"""Windows: the stretches of tokens that a model sees at once, each label being scored in one of them."""

# Shape suffix legend: n = tokens of a window without its last one (inputs, and as many labels).

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megagrow.data.indexed import IndexedDataset


@dataclass(frozen=True)
class Window:
    """Tokens that a model sees at once.

    Attributes:
        tokens: int64 [n + 1]; all but the last are inputs, all but the first labels.
        num_scored: how many labels count: the last ones.
        documents: [n] the document of every input; None: attention crosses documents.
    """

    tokens: NDArray[np.int64]
    num_scored: int
    documents: NDArray[np.int64] | None = None


def spans(num_tokens: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Cuts a sequence into windows (start, stop, num_scored) in which each token but the first is scored once.

    The first window scores all its labels, every later one the next `stride`, with as many tokens before them as fit.

    Args:
        num_tokens: of the sequence.
        length: inputs of a window at most.
        stride: labels that a later window scores, at most `length`.
    """
    done = 1
    while done < num_tokens:
        num_scored = min(length if done == 1 else stride, num_tokens - done)
        done += num_scored
        yield max(0, done - length - 1), done, num_scored


def document_windows(
    dataset: IndexedDataset, num_documents: int, length: int, stride: int, prefix: int | None
) -> Iterator[Window]:
    """The windows of the first documents, each by itself.

    Args:
        dataset: documents of tokens.
        num_documents: how many of them.
        length, stride: see `spans`.
        prefix: the token before each document, from which its first one is predicted; None: that is not scored.
    """
    for index in range(num_documents):
        tokens = _with_prefix(dataset.document(index).astype(np.int64), prefix)
        for start, stop, num_scored in spans(len(tokens), length, stride):
            yield Window(tokens[start:stop], num_scored)


def packed_windows(
    dataset: IndexedDataset, num_documents: int, length: int, stride: int, prefix: int | None, mask_documents: bool
) -> Iterator[Window]:
    """The windows of the first documents laid end to end, as in training.

    Args:
        dataset, num_documents, length, stride: as in `document_windows`.
        prefix: the token before the first document; None: its first token is not scored.
        mask_documents: attention stays inside a document.
    """
    ends = dataset.document_ends[:num_documents]
    num_tokens, shift = int(ends[-1]) if len(ends) else 0, int(prefix is not None)
    for start, stop, num_scored in spans(num_tokens + shift, length, stride):
        tokens = dataset.tokens[max(0, start - shift) : stop - shift].astype(np.int64)
        tokens = _with_prefix(tokens, prefix) if start == 0 else tokens
        positions = np.arange(start, stop - 1) - shift
        documents = np.searchsorted(ends, positions, side="right") if mask_documents else None
        yield Window(tokens, num_scored, documents)


def _with_prefix(tokens: NDArray[np.int64], prefix: int | None) -> NDArray[np.int64]:
    return tokens if prefix is None else np.concatenate([[prefix], tokens])
