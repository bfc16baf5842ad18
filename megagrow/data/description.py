"""PREFIX.json: what `.bin/.idx` cannot say about themselves (which tokenizer, which split)."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from megagrow.config import DataConfig
from megagrow.data.blend import parse_blend
from megagrow.data.files import os_errors_as_data_errors
from megagrow.data.tokenizer import load_tokenizer
from megagrow.errors import DataError, shown
from megagrow.json_file import is_count, parse_object

TOKENIZERS = ("sentencepiece", "huggingface", "byte")
_SHA256 = re.compile(r"[0-9a-f]{64}")
BEGINNING = b'{\n  "eod_id": '  # the keys are sorted, see `encode_description`
MAX_BYTES = 16 << 20  # a larger file is a corpus or so, and is not read
_MAX_SOURCE = 1 << 20  # characters, so that a merged dataset of thousands of files stays below
_REMEDY = "move it away or preprocess the corpus again"


class Description(TypedDict):
    """The side file of one dataset; foreign datasets have none."""

    tokenizer: str  # kind: "sentencepiece", "huggingface" or "byte"
    tokenizer_sha256: str  # Tokenizer.fingerprint
    vocab_size: int
    eod_id: int | None  # the id that ends each document; None: documents were not ended
    num_documents: int
    num_tokens: int
    split: str  # "train", "validation", or what --split said
    source: str  # where the text came from, in words
    source_settings: NotRequired[dict[str, str | int | None]]  # what a rebuild would need to be equal


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "tokenizer": (lambda v: v in TOKENIZERS, f"one of {', '.join(TOKENIZERS)}"),
    "tokenizer_sha256": (lambda v: isinstance(v, str) and bool(_SHA256.fullmatch(v)), "a sha256 in hexadecimal"),
    "vocab_size": (lambda v: is_count(v) and v > 0, "a positive whole number"),
    "eod_id": (lambda v: v is None or is_count(v), "a token id or null"),
    "num_documents": (is_count, "a whole number from 0 on"),
    "num_tokens": (is_count, "a whole number from 0 on"),
    "split": (lambda v: isinstance(v, str), "text"),
    "source": (lambda v: isinstance(v, str), "text"),
}


def description_path(prefix: str | Path) -> Path:
    """PREFIX.json for the dataset PREFIX."""
    return Path(f"{prefix}.json")


def describe(prefix: str | Path) -> Description | None:
    """Read and check PREFIX.json; None when there is none (a dataset that another program wrote).

    Raises DataError naming file and field when the file is not what `preprocess` writes.
    """
    path = description_path(prefix)
    if not path.exists():
        return None
    with os_errors_as_data_errors(path):
        if (size := path.stat().st_size) > MAX_BYTES:
            raise DataError(f"{path}: {size} bytes, more than a description has ({MAX_BYTES}); {_REMEDY}")
        content = path.read_bytes()
    fields = parse_object(content, path, DataError, _REMEDY)
    for name, (holds, kind) in _RULES.items():
        if name not in fields:
            raise DataError(f"{path}: field {name} is missing; {_REMEDY}")
        if not holds(fields[name]):
            raise DataError(f"{path}: field {name} is {shown(fields[name])}, must be {kind}; {_REMEDY}")
    settings = fields.get("source_settings", {})
    if not isinstance(settings, dict):
        raise DataError(f"{path}: field source_settings is {shown(settings)}, must be an object; {_REMEDY}")
    return cast(Description, fields)


def check_one_tokenizer(data: DataConfig) -> None:
    """Raises DataError unless all datasets that say what made them name one tokenizer, that of `data.tokenizer` if set.

    Ids of another are in range as often as not, and mean other text: the loss would not tell. One whose tokens
    `data.tokenizer` begins with will do.
    """
    fields = {"data.train": data.train, "data.validation": data.validation}
    prefixes = [prefix for field, value in fields.items() if value for prefix in parse_blend(value, field).prefixes]
    described = {prefix: found for prefix in prefixes if (found := describe(prefix))}
    tokenizer = load_tokenizer(data.tokenizer) if data.tokenizer else None
    first = next(iter(described), "")
    for prefix, found in described.items():
        if tokenizer is None:
            wanted = described[first]["tokenizer_sha256"]
            rest = f"that of {first}; name a tokenizer that has the tokens of both (data.tokenizer)"
        else:
            wanted = tokenizer.fingerprint_of_first(found["vocab_size"])
            rest = f"data.tokenizer={data.tokenizer}; give the one that made it"
        if found["tokenizer_sha256"] != wanted:
            raise DataError(
                f"{description_path(prefix)}: the dataset was made with another tokenizer than {rest}, or preprocess "
                "the corpus again"
            )


def readable(text: str) -> str:
    """The text, with question marks for bytes and halves of surrogate pairs that no file may hold as text."""
    return text.encode("utf-8", "replace").decode()


def encode_description(description: Description) -> bytes:
    """The bytes of PREFIX.json; of a very long source the beginning."""
    source = readable(description["source"])
    description = {**description, "source": source[:_MAX_SOURCE] + "…" * (len(source) > _MAX_SOURCE)}
    return (json.dumps(description, indent=2, sort_keys=True) + "\n").encode()
