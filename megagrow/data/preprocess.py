"""Text corpora to `.bin/.idx`: the same bytes for any number of worker processes."""

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megagrow.data.description import Description
from megagrow.data.indexed import IndexedWriter, token_dtype
from megagrow.data.progress import corpus_progress
from megagrow.data.records import BadRecord, Batch, parse_record, read_batches, total_bytes
from megagrow.data.tokenizer import Tokenizer, load_tokenizer
from megagrow.errors import ConfigError, DataError

_BATCHES_PER_WORKER = 4  # in flight: keeps workers busy and the memory bounded


@dataclass(frozen=True)
class Summary:
    """What `preprocess_files` did."""

    num_documents: int
    num_tokens: int
    num_empty: int  # texts of white space only, left out
    num_bad: int  # records that could not be read, left out (`on_bad_line="skip"`)
    bad_examples: list[str]  # the first of these: "file:line: reason"
    seconds: float


@dataclass(frozen=True)
class _Encoded:
    """The documents of one batch: token ids end to end, and the length of each."""

    tokens: NDArray[Any]
    lengths: list[int]
    num_empty: int
    bad: list[str]
    position: int


class _Encoder:
    """Records to tokens; the same object in this process and in every worker."""

    def __init__(self, tokenizer: Tokenizer, json_key: str, append_eod: bool) -> None:
        self._tokenizer = tokenizer
        self._json_key = json_key
        self._end = _end_of_document(tokenizer, append_eod)
        self._dtype = token_dtype(tokenizer.vocab_size)

    def document(self, text: str) -> list[int]:
        """Token ids of one document; none for a text of white space only."""
        return self._tokenizer.encode(text) + self._end if text.strip() else []

    def batch(self, batch: Batch) -> _Encoded:
        tokens: list[int] = []
        lengths: list[int] = []
        bad: list[str] = []
        num_empty = 0
        for line, record in enumerate(batch.records, batch.first_line):
            if batch.is_json and not record.strip():
                continue
            try:
                ids = self.document(parse_record(record, batch.is_json, self._json_key))
            except BadRecord as error:
                bad.append(f"{batch.path}:{line}: {error}")
                continue
            num_empty += not ids
            if ids:
                tokens += ids
                lengths.append(len(ids))
        array = np.array(tokens, self._dtype)
        return _Encoded(array, lengths, num_empty, bad, batch.position)


def preprocess_files(
    inputs: Sequence[str | Path],
    tokenizer_path: str | Path,
    output_prefix: str | Path,
    *,
    json_key: str = "text",
    append_eod: bool = True,
    workers: int = 1,
    on_bad_line: Literal["stop", "skip"] = "stop",
    split: str = "train",
) -> Summary:
    """Tokenize `inputs` (see records.read_batches) into OUTPUT_PREFIX.bin/.idx/.json.

    One document per JSON line or text file, in input order; empty ones are left out. The output
    appears whole or not at all. Raises DataError for an unreadable input, a bad line (unless
    skipped), or a corpus without text; ConfigError for bad arguments.
    """
    if workers < 1:
        raise ConfigError(f"workers={workers} must be at least 1")
    size, started = total_bytes(inputs), time.monotonic()
    tokenizer = load_tokenizer(tokenizer_path)
    encoder = _Encoder(tokenizer, json_key, append_eod)
    batches = read_batches(inputs)
    if workers == 1:
        encoded = (encoder.batch(batch) for batch in batches)
    else:
        encoded = _encode_in_processes(batches, workers, (tokenizer_path, json_key, append_eod))
    num_empty, num_bad, examples = 0, 0, list[str]()
    with (
        closing(encoded),
        IndexedWriter(output_prefix, token_dtype(tokenizer.vocab_size)) as writer,
        corpus_progress("tokenizing", size) as report,
    ):
        for part in encoded:
            if part.bad and on_bad_line == "stop":
                raise DataError(f"{part.bad[0]}; mend the line or use --on-bad-line skip")
            writer.add_documents(part.tokens, part.lengths)
            report(part.position, writer.num_documents, writer.num_tokens)
            num_empty, num_bad = num_empty + part.num_empty, num_bad + len(part.bad)
            examples = (examples + part.bad)[:5]
        names = ", ".join(Path(path).name for path in inputs)
        _finish(writer, tokenizer, append_eod, split=split, source=names)
    return Summary(
        num_documents=writer.num_documents,
        num_tokens=writer.num_tokens,
        num_empty=num_empty,
        num_bad=num_bad,
        bad_examples=examples,
        seconds=time.monotonic() - started,
    )


def write_texts(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    output_prefix: str | Path,
    *,
    split: str,
    source: str,
    settings: dict[str, str | int | None] | None = None,
) -> None:
    """Tokenize documents that are in memory, each ended, into OUTPUT_PREFIX.bin/.idx/.json.

    Raises DataError when there is no text.
    """
    encoder = _Encoder(tokenizer, "", append_eod=True)
    with IndexedWriter(output_prefix, token_dtype(tokenizer.vocab_size)) as writer:
        for text in texts:
            if ids := encoder.document(text):
                writer.add_document(ids)
        _finish(writer, tokenizer, True, split=split, source=source, settings=settings)


def _finish(
    writer: IndexedWriter,
    tokenizer: Tokenizer,
    append_eod: bool,
    *,
    split: str,
    source: str,
    settings: dict[str, str | int | None] | None = None,
) -> None:
    if writer.num_tokens == 0:
        raise DataError(f"{source or 'no input'}: no text in it, so {writer.prefix} is not written")
    description: Description = {
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id if append_eod else None,
        "num_documents": writer.num_documents,
        "num_tokens": writer.num_tokens,
        "split": split,
        "source": source,
    }
    if settings is not None:
        description["source_settings"] = settings
    writer.close(description)


def _end_of_document(tokenizer: Tokenizer, append_eod: bool) -> list[int]:
    if not append_eod:
        return []
    if tokenizer.eod_id is None:
        raise DataError(
            f"the {tokenizer.name} tokenizer has no token that ends a document; "
            "add one (eos_token) or use --no-append-eod"
        )
    return [tokenizer.eod_id]


def _encode_in_processes(
    batches: Iterator[Batch], workers: int, arguments: tuple[str | Path, str, bool]
) -> Generator[_Encoded, None, None]:
    """Encoded batches in input order; at most a few per worker are in flight."""
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, arguments)
    pending: deque[Future[_Encoded]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_encode_in_worker, batch))
            if len(pending) >= _BATCHES_PER_WORKER * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError("a tokenizing process died (killed, or out of memory); use fewer workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker_encoder: _Encoder


def _start_worker(tokenizer_path: str | Path, json_key: str, append_eod: bool) -> None:
    global _worker_encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is for the parent, which ends the pool
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_encoder = _Encoder(load_tokenizer(tokenizer_path), json_key, append_eod)


def _encode_in_worker(batch: Batch) -> _Encoded:
    return _worker_encoder.batch(batch)
