"""Perplexity of a model on a dataset: exact, weighted by token, with the documents' boundaries respected."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from megagrow.config import ModelConfig, require
from megagrow.data.indexed import IndexedDataset
from megagrow.data.tokenizer import Tokenizer
from megagrow.errors import DataError
from megagrow.evaluate.shared_model import SharedModel
from megagrow.evaluate.windows import Window, document_windows, packed_windows
from megagrow.metrics import Progress
from megagrow.parallel.collectives import sum_over
from megagrow.parallel.mesh import Mesh

BATCHES_AT_ONCE = 8  # of each tensor group between two of their meetings


@dataclass(frozen=True)
class PerplexitySettings:
    """What the model sees of a dataset.

    Attributes:
        length: tokens of context at most; 0: `max_seq_length` of the model.
        stride: labels that each window of a longer text scores, the tokens before them being context; 0: `length`.
            The smaller, the more context every label has, and the longer it takes: length / stride times.
        packed: documents are laid end to end, as in training; else each is scored by itself.
        mask_documents: attention stays inside a document where they are packed.
        max_documents: only so many from the first on; 0: all.
        prefix: the token before each document (the first one, if packed), from which its first token is predicted;
            None: the one that ends documents, by PREFIX.json; where that says nothing, first tokens are not scored.
    """

    length: int = 0
    stride: int = 0
    packed: bool = False
    mask_documents: bool = False
    max_documents: int = 0
    prefix: int | None = None

    def __post_init__(self) -> None:
        for name in ("length", "stride", "max_documents"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        require(
            self.packed or not self.mask_documents,
            "mask_documents has no effect on documents that are scored one by one; set packed too, or leave it out",
        )

    def sizes(self, model: ModelConfig) -> tuple[int, int]:
        """Length and stride for a model.

        Raises:
            ConfigError: they do not fit each other or the model's position table, or `prefix` its vocabulary.
        """
        length = self.length or model.max_seq_length
        stride = self.stride or length
        require(stride <= length, f"stride={stride} exceeds length={length}: labels between windows would be left out")
        require(
            model.positions != "learned" or length <= model.max_seq_length,
            f"length={length} exceeds max_seq_length={model.max_seq_length}, the rows of the model's position table",
        )
        require(
            self.prefix is None or 0 <= self.prefix < model.vocab_size,
            f"prefix={self.prefix} is no token of the model, whose vocab_size is {model.vocab_size}",
        )
        return length, stride


@dataclass(frozen=True)
class Perplexity:
    """The result.

    Attributes:
        nll: sum of negative log-likelihoods of the scored tokens in nats, those that end documents included.
        num_tokens: how many were scored.
        num_documents: documents that they are from.
        num_bytes: UTF-8 bytes of their text; None when not known.
        why_no_bytes: the reason then.
    """

    nll: float
    num_tokens: int
    num_documents: int
    num_bytes: int | None
    why_no_bytes: str

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where a float cannot hold it."""
        return math.exp(self.loss) if self.loss < math.log(1e308) else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers; None when the text's bytes are not known."""
        return self.nll / math.log(2) / self.num_bytes if self.num_bytes else None

    @property
    def summary(self) -> str:
        """The result in one line."""
        bits, where = self.bits_per_byte, f"{self.num_tokens:,} tokens of {self.num_documents:,} documents"
        last = f"bits per byte not known: {self.why_no_bytes}" if bits is None else f"{bits:.4f} bits per byte"
        return f"perplexity {self.perplexity:.4f} ({self.loss:.4f} nats per token), {last}; {where}"

    def as_dict(self) -> dict[str, Any]:
        """What a result file says of it."""
        ratios = {"perplexity": self.perplexity, "loss": self.loss, "bits_per_byte": self.bits_per_byte}
        return ratios | asdict(self)


def evaluate_perplexity(
    shared: SharedModel,
    dataset: IndexedDataset,
    settings: PerplexitySettings,
    tokenizer: Tokenizer | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of a model on a dataset; all ranks call it and get the same result.

    Args:
        shared: the model.
        dataset: documents of tokens.
        settings: see `PerplexitySettings`.
        tokenizer: that of the dataset, for bits per byte.
        progress: where to report; `num_labels` is its total.

    Raises:
        ConfigError: the settings do not fit the model.
        DataError: the dataset has nothing to score or tokens outside the vocabulary, or the model gives a loss that is
            not finite.
    """
    model, prefix = shared.model.config, _prefix(dataset, settings)
    length, stride = settings.sizes(model)
    num_documents = min(dataset.num_documents, settings.max_documents or dataset.num_documents)
    if settings.packed:
        windows = packed_windows(dataset, num_documents, length, stride, prefix, settings.mask_documents)
    else:
        windows = document_windows(dataset, num_documents, length, stride, prefix)
    nll, num_tokens = _score(shared, windows, dataset, progress)
    if num_tokens == 0:
        raise DataError(f"{dataset.prefix}: no token can be scored in {num_documents} documents; give longer ones")
    reason = _why_no_bytes(dataset, tokenizer, prefix)
    num_bytes = None
    if not reason and tokenizer is not None:
        num_bytes = _text_bytes(dataset, tokenizer, num_documents, shared.mesh)
        reason = "" if num_bytes is not None else "the tokenizer does not give back the text that it encoded"
    return Perplexity(nll, num_tokens, num_documents, num_bytes, reason)


def num_labels(dataset: IndexedDataset, settings: PerplexitySettings) -> int:
    """How many tokens `evaluate_perplexity` will score."""
    lengths = np.diff(dataset.document_ends, prepend=0)[: settings.max_documents or None]
    if _prefix(dataset, settings) is not None:
        return int(lengths.sum())
    return max(int(lengths.sum()) - 1, 0) if settings.packed else int((lengths - 1).clip(min=0).sum())


def _score(
    shared: SharedModel, windows: Iterator[Window], dataset: IndexedDataset, progress: Progress | None
) -> tuple[float, int]:
    nll, num_tokens, begin = 0.0, 0, time.monotonic()
    block_size = BATCHES_AT_ONCE * shared.batch_size * shared.num_groups
    while block := list(islice(windows, block_size)):
        try:
            nll += shared.score(block)[0].sum().item()
        except DataError as error:
            raise DataError(f"{dataset.prefix}: {error}") from error
        num_tokens += sum(window.num_scored for window in block)
        if progress is not None:
            speed = num_tokens / max(time.monotonic() - begin, 1e-9)
            progress.update(num_tokens, phase="perplexity", loss=nll / num_tokens, tokens_per_second=speed)
    return nll, num_tokens


def _prefix(dataset: IndexedDataset, settings: PerplexitySettings) -> int | None:
    if settings.prefix is not None or dataset.description is None:
        return settings.prefix
    return dataset.description["eod_id"]


def _why_no_bytes(dataset: IndexedDataset, tokenizer: Tokenizer | None, prefix: int | None) -> str:
    """Why the scored tokens' text is not known before it is looked at; empty when it may be."""
    if tokenizer is None:
        return "no tokenizer is given"
    if dataset.description is None:
        return f"there is no {dataset.prefix}.json to say which tokenizer made the dataset"
    if dataset.description["tokenizer_sha256"] != tokenizer.fingerprint:
        return "the dataset was made with another tokenizer"
    return "" if prefix is not None else "first tokens are not scored"


def _text_bytes(dataset: IndexedDataset, tokenizer: Tokenizer, num_documents: int, mesh: Mesh) -> int | None:
    """UTF-8 bytes of the documents' text, decoded by all ranks together; None if it does not encode to the same ids."""
    num_bytes, num_changed = 0, 0
    for index in range(mesh.world.rank, num_documents, mesh.world.size):
        ids = dataset.document(index).tolist()
        if ids and ids[-1] == tokenizer.eod_id:
            ids.pop()
        text = tokenizer.decode(ids)
        num_bytes += len(text.encode())
        num_changed += tokenizer.encode(text) != ids
    totals = torch.tensor([num_bytes, num_changed], device=mesh.device)
    num_bytes, num_changed = sum_over(totals, mesh.world).tolist()
    return None if num_changed else num_bytes
