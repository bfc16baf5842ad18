"""PREFIX.json: what `.bin/.idx` cannot say about themselves (which tokenizer, which split)."""

import json
from pathlib import Path
from typing import NotRequired, TypedDict, cast

from megagrow.data.files import os_errors_as_data_errors
from megagrow.errors import DataError, shown
from megagrow.json_file import parse_object


class Description(TypedDict):
    """The side file of one dataset; foreign datasets have none."""

    tokenizer: str  # kind: "sentencepiece", "huggingface" or "byte"
    tokenizer_sha256: str  # Tokenizer.fingerprint
    vocab_size: int
    eod_id: int | None  # the id that ends each document; None: documents were not ended
    num_documents: int
    num_tokens: int
    split: str  # "train" or "validation"
    source: str  # where the text came from, in words
    source_settings: NotRequired[dict[str, str | int | None]]  # what a rebuild would need to be equal


_RULES: dict[str, type | tuple[type, ...]] = {
    "tokenizer": str,
    "tokenizer_sha256": str,
    "vocab_size": int,
    "eod_id": (int, type(None)),
    "num_documents": int,
    "num_tokens": int,
    "split": str,
    "source": str,
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
        content = path.read_bytes()
    fields = parse_object(content, path, DataError, "remove it or preprocess the corpus again")
    for name, kind in _RULES.items():
        value = fields.get(name)
        if name not in fields or not isinstance(value, kind) or isinstance(value, bool):
            raise DataError(f"{path}: field {name} is missing or of the wrong type ({shown(value)})")
        if isinstance(value, int) and value < 0:
            raise DataError(f"{path}: field {name} is {value}, must not be negative")
    return cast(Description, fields)


def encode_description(description: Description) -> bytes:
    """The bytes of PREFIX.json."""
    return (json.dumps(description, indent=2, sort_keys=True) + "\n").encode()
