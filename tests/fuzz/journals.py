"""PREFIX.journal.tmp: of a stopped preprocessing run; what is wrong in it is not gone on with."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from megagrow.data.journal import Counts, JournaledWriter, digest_of
from megagrow.data.records import read_batches
from megagrow.errors import DataError
from tests.fuzz.fields import Field, texts_with, unparsable
from tests.fuzz.literals import rejecting


class _Stop(Exception):
    """Ends a run in the middle."""


def fields(folder: Path) -> Iterator[Field]:
    """Every field of the journal; what lies beside it is put back before each file."""
    text, prefix, file = folder / "text.jsonl", folder / "stopped", folder / "stopped.journal.tmp"
    text.write_text('{"text": "a"}\n')
    with suppress(_Stop), _opened(prefix, text) as writer:
        for batch in writer.batches:
            writer.add(lambda batch=batch: digest_of(batch), np.arange(9), [4, 5], Counts())  # type: ignore[misc]
        writer._enter()
        raise _Stop
    record = json.loads(file.read_bytes())
    beside = {path: path.read_bytes() for path in (folder / f"stopped.{name}.tmp" for name in ("bin", "lengths"))}

    def write(content: bytes) -> None:
        for path, good in beside.items():
            path.write_bytes(good)
        file.write_bytes(content)

    def read() -> None:
        """Preprocessing says what is wrong, with the prefix, and starts anew."""
        with suppress(_Stop), _opened(prefix, text) as writer:
            if writer.problem:
                raise DataError(f"{file.name}: {writer.problem}")
            raise _Stop

    says = {
        "settings": "tokenizer, options or names",
        "num_batches": "the input has changed",
        "num_documents": "shorter|lengths",
        "num_token_bytes": "shorter|bin.tmp has changed",
        "input_sha256": "the input has changed",
        "lengths_sha256": "lengths.tmp has changed",
        "tokens_sha256": "bin.tmp has changed",
    }
    accepted: dict[str, Any] = {
        **{name: lambda v, name=name: type(v) is type(record[name]) and v == record[name] for name in record},
        "num_empty": lambda v: type(v) is int and v >= 0,
    }
    for name, accepts in accepted.items():
        texts = texts_with(record, (name,), rejecting(accepts))
        yield Field("PREFIX.journal.tmp", name, file, texts, read, f"{name}|{says.get(name, name)}", write)
    whole = unparsable(json.dumps(record).encode())
    yield Field("PREFIX.journal.tmp", "(whole file)", file, whole, read, "JSON", write)


def _opened(prefix: Path, text: Path) -> JournaledWriter:
    return JournaledWriter(prefix, "<u2", "0" * 64, lambda: read_batches([text]))
