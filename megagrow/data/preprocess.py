"""Text corpora to `.bin/.idx`: the same bytes for any number of worker processes."""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megagrow.data.description import Description
from megagrow.data.domains import Domains, collect_domains, encode_domains
from megagrow.data.indexed import IndexedWriter, token_dtype
from megagrow.data.journal import MAX_EXAMPLES, Counts, JournaledWriter, digest_of
from megagrow.data.output import check_output
from megagrow.data.progress import corpus_progress
from megagrow.data.records import BadRecord, Batch, parse_record, read_batches, total_bytes
from megagrow.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, tokenizer_file
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
    num_by_domain: dict[str, int] = field(default_factory=dict)  # documents; empty without `domain_key`


@dataclass(frozen=True)
class _Encoded:
    """The documents of one batch: token ids end to end, and the length of each."""

    tokens: NDArray[Any]
    lengths: list[int]
    num_empty: int
    bad: list[str]
    position: int
    digest: Callable[[], bytes]  # of the batch's records


class _Encoder:
    """Records to tokens; the same object in this process and in every worker."""

    def __init__(self, tokenizer: Tokenizer, json_key: str, append_eod: bool) -> None:
        self._tokenizer = tokenizer
        self._json_key = json_key
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._end = np.array(_end_of_document(tokenizer, append_eod), self._dtype)

    def batch(self, batch: Batch) -> _Encoded:
        texts: list[str] = []
        bad: list[str] = []
        for line, record in enumerate(batch.records, batch.first_line):
            if batch.is_json and not record.strip():
                continue
            try:
                texts.append(parse_record(record, batch.is_json, self._json_key))
            except BadRecord as error:
                bad.append(f"{batch.path}:{line}: {error}")
        tokens, lengths = self.documents(texts)
        num_empty = len(texts) - len(lengths)
        return _Encoded(tokens, lengths, num_empty, bad, batch.position, partial(digest_of, batch))

    def documents(self, texts: Sequence[str]) -> tuple[NDArray[Any], list[int]]:
        """Token ids end to end, and the length of each document; texts of white space only are left out."""
        filled = [text for text in texts if text and not text.isspace()]
        if isinstance(self._tokenizer, ByteTokenizer):
            return self._bytes([self._tokenizer.encode_bytes(text) for text in filled])
        end = self._end.tolist()
        encoded = [ids for text in filled if (ids := self._tokenizer.encode(text) + end)]
        return np.array(list(chain.from_iterable(encoded)), self._dtype), [len(ids) for ids in encoded]

    def _bytes(self, encoded: Sequence[bytes]) -> tuple[NDArray[Any], list[int]]:
        """All documents at once: reading the JSON takes hardly longer than a few numpy calls for each of them."""
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        content = np.frombuffer(b"".join(encoded), np.uint8).astype(self._dtype)
        ends = np.repeat(lengths.cumsum(), len(self._end))
        tokens = np.insert(content, ends, np.tile(self._end, len(encoded)))
        return tokens, (lengths + len(self._end)).tolist()


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
    domain_key: str = "",
) -> Summary:
    """Tokenize `inputs` (see records.read_batches) into OUTPUT_PREFIX.bin/.idx/.json.

    One document per JSON line or text file, in input order; empty ones are left out. The output
    appears whole or not at all. A stopped or killed run goes on where it was when it is started
    again (see `journal`), with any number of workers; with another input, tokenizer or option it
    starts anew. With a `domain_key`, OUTPUT_PREFIX.domains.safetensors says which domain each
    document is of (see `domains`), which takes a pass over the input of its own. Raises DataError
    for an unreadable input, a bad line (unless skipped), a corpus without text, or an output that
    would replace a file of another kind; ConfigError for bad arguments, an input that the output
    would replace among them.
    """
    if workers < 1:
        raise ConfigError(f"workers={workers} must be at least 1")
    check_output(output_prefix, [*inputs, tokenizer_path])
    size, started = total_bytes(inputs), time.monotonic()
    tokenizer = load_tokenizer(tokenizer_path)
    encoder = _Encoder(tokenizer, json_key, append_eod)
    domains = collect_domains(inputs, json_key, domain_key) if domain_key else None
    settings = _settings(inputs, tokenizer, tokenizer_path, json_key, append_eod)
    dtype = token_dtype(tokenizer.vocab_size)
    with JournaledWriter(output_prefix, dtype, settings, lambda: read_batches(inputs)) as journal:
        _tell_what_is_done(journal, output_prefix)
        if journal.counts.num_bad and on_bad_line == "stop":
            raise DataError(f"{journal.counts.bad_examples[0]}; mend the line or use --on-bad-line skip")
        if workers == 1:
            encoded = (encoder.batch(batch) for batch in journal.batches)
        else:
            encoded = _encode_in_processes(journal.batches, workers, (tokenizer_path, json_key, append_eod))
        start = journal.position, journal.writer.num_documents, journal.writer.num_tokens
        with closing(encoded), corpus_progress("tokenizing", size, start=start) as report:
            for part in encoded:
                if part.bad and on_bad_line == "stop":
                    raise DataError(f"{part.bad[0]}; mend the line or use --on-bad-line skip")
                journal.add(part.digest, part.tokens, part.lengths, _counted(journal.counts, part))
                report(part.position, journal.writer.num_documents, journal.writer.num_tokens)
        names = ", ".join(Path(path).name for path in inputs)
        description = _described(journal.writer, tokenizer, append_eod, split=split, source=names)
        journal.close(description, _encoded_domains(output_prefix, domains, journal.writer.num_documents))
    return Summary(
        num_documents=journal.writer.num_documents,
        num_tokens=journal.writer.num_tokens,
        seconds=time.monotonic() - started,
        num_by_domain={} if domains is None else domains.counts(),
        **asdict(journal.counts),
    )


def _settings(inputs: Sequence[str | Path], tokenizer: Tokenizer, tokenizer_path: str | Path, *options: Any) -> str:
    """A hash of what decides the output beside the content of the inputs."""
    is_file = tokenizer.name != ByteTokenizer.name
    content = tokenizer_file(tokenizer_path).read_bytes() if is_file else b""
    said = tokenizer.fingerprint, hashlib.sha256(content).hexdigest(), tokenizer.eod_id  # files beside it say the last
    given = [[str(path) for path in inputs], *said, *options]
    return hashlib.sha256(json.dumps(given).encode()).hexdigest()


def _encoded_domains(prefix: str | Path, domains: Domains | None, num_documents: int) -> bytes | None:
    if domains is None:
        return None
    if len(domains.ids) != num_documents:
        raise DataError(
            f"{prefix}: {num_documents} documents were written, {len(domains.ids)} have a domain: a text without "
            "tokens is among them, or the input has changed meanwhile; preprocess it again"
        )
    return encode_domains(domains)


def _counted(counts: Counts, part: _Encoded) -> Counts:
    examples = (counts.bad_examples + part.bad)[:MAX_EXAMPLES]
    return Counts(counts.num_empty + part.num_empty, counts.num_bad + len(part.bad), examples)


def _tell_what_is_done(journal: JournaledWriter, prefix: str | Path) -> None:
    if journal.problem:
        print(f"{prefix}: starts anew, {journal.problem}", file=sys.stderr)
    if journal.done.num_batches > 0:
        print(f"{prefix}: goes on after {journal.done.num_documents} documents", file=sys.stderr)


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
            writer.add_documents(*encoder.documents([text]))
        writer.close(_described(writer, tokenizer, True, split=split, source=source, settings=settings))


def _described(
    writer: IndexedWriter,
    tokenizer: Tokenizer,
    append_eod: bool,
    *,
    split: str,
    source: str,
    settings: dict[str, str | int | None] | None = None,
) -> Description:
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
    return description


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
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_encoder = _Encoder(load_tokenizer(tokenizer_path), json_key, append_eod)


def _end_with_parent() -> None:
    """A parent that is killed ends no pool, and workers never see that nothing comes any more."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(batch: Batch) -> _Encoded:
    encoded = _worker_encoder.batch(batch)
    return replace(encoded, digest=partial(bytes, encoded.digest()))  # without the records
