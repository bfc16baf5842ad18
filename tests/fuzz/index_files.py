"""PREFIX.idx beside PREFIX.bin, and PREFIX.json: built field by field, and judged by the format's table alone."""

import json
import struct
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from megagrow.data.indexed import IndexedDataset
from tests.fuzz.fields import Field, texts_with, unparsable
from tests.fuzz.literals import is_count, is_digest, is_text, rejecting

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
ITEM_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}
COUNTS = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**20, 2**31, 2**61, 2**62, 2**63, 2**64 - 1])
INT32 = st.integers(-(2**31), 2**31 - 1) | st.integers(-9, 9) | st.sampled_from([-1, -5, 2**20, -(2**31)])
INT64 = st.integers(-(2**63), 2**63 - 1) | st.integers(-9, 99) | st.sampled_from([-1, 2**40, 2**62, -(2**63)])

Parts = dict[str, Any]


def fields(folder: Path) -> Iterator[Field]:
    """Every field of the index, the sizes of both files, and every field of the description."""
    prefix = folder / "corpus"
    index, tokens = folder / "corpus.idx", folder / "corpus.bin"

    def write(content: bytes) -> None:
        """`content` is the index and, behind it, in 8 bytes, the size of the tokens' file."""
        index.write_bytes(content[:-8])
        tokens.write_bytes(bytes(struct.unpack("<Q", content[-8:])[0]))

    says = {
        "magic": "magic",
        "version": "version",
        "dtype_code": "dtype code|pointer|bytes, must be",
        "sequence_count": "sequence_count",
        "document_count": "document_count",
        "lengths": "length|pointer|bytes, must be",
        "pointers": "pointer",
        "document_indices": "document_indices",
        # What is cut off is made up with any bytes, so any field may be the first that is wrong.
        "index_size": "bytes|multimodal|magic|version|dtype code|sequence_count|document_|pointer|length",
    }
    for name, pattern in says.items():
        contents = malformed(name)
        yield Field(".idx", name, index, contents, lambda: IndexedDataset(prefix), pattern, write)
    yield Field(".idx", "tokens_size", tokens, malformed("tokens_size"), lambda: IndexedDataset(prefix), "bytes", write)
    yield from _description_fields(folder)


def malformed(name: str) -> SearchStrategy[bytes]:
    """Indices of random datasets in which one part is something else, and by the table wrong."""
    return _parts().flatmap(lambda parts: _changed(parts, name)).filter(lambda content: not is_valid(content))


@st.composite
def _parts(draw: st.DrawFn) -> Parts:
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    code = draw(st.sampled_from(sorted(ITEM_BYTES)))
    sizes = [ITEM_BYTES[code] * length for length in lengths]
    inner = sorted(draw(st.lists(st.integers(0, len(lengths)), max_size=4)))
    return {
        "magic": MAGIC,
        "version": 1,
        "dtype_code": code,
        "sequence_count": len(lengths),
        "document_count": len(inner) + 2,
        "lengths": lengths,
        "pointers": [0, *accumulate(sizes)][:-1],
        "document_indices": [0, *inner, len(lengths)],
        "tokens_size": sum(sizes),
    }


@st.composite
def _changed(draw: st.DrawFn, parts: Parts, name: str) -> bytes:
    values: dict[str, SearchStrategy[Any]] = {
        "magic": st.binary(min_size=9, max_size=9),
        "version": COUNTS,
        "dtype_code": st.integers(0, 255),
        "sequence_count": COUNTS,
        "document_count": COUNTS,
        "lengths": INT32,
        "pointers": INT64,
        "document_indices": INT64,
        "tokens_size": st.integers(0, 200),
    }
    if name == "index_size":
        content = _index(parts)
        cut = draw(st.integers(0, len(content)))
        content = content[:cut] + draw(st.binary(max_size=40))
        return content + struct.pack("<Q", parts["tokens_size"])
    if isinstance(parts[name], list):
        at = draw(st.integers(0, len(parts[name]) - 1))
        value = [draw(values[name]) if i == at else old for i, old in enumerate(parts[name])]
    else:
        value = draw(values[name])
    parts = {**parts, name: value}
    return _index(parts) + struct.pack("<Q", parts["tokens_size"])


def _index(parts: Parts) -> bytes:
    header = HEADER.pack(
        *(parts[name] for name in ("magic", "version", "dtype_code", "sequence_count", "document_count"))
    )
    lengths, pointers, documents = (parts[name] for name in ("lengths", "pointers", "document_indices"))
    body = struct.pack(f"<{len(lengths)}i{len(pointers)}q", *lengths, *pointers)
    return header + body + struct.pack(f"<{len(documents)}q", *documents)


def is_valid(content: bytes) -> bool:
    """Whether an index (and, behind it, the size of the tokens' file) follows the table; an element at a time."""
    index, tokens_size = content[:-8], struct.unpack("<Q", content[-8:])[0]
    if len(index) < HEADER.size:
        return False
    magic, version, code, count, boundaries = HEADER.unpack(index[: HEADER.size])
    if magic != MAGIC or version != 1 or code not in ITEM_BYTES or boundaries < 1:
        return False
    if len(index) != HEADER.size + 12 * count + 8 * boundaries:
        return False
    lengths = struct.unpack_from(f"<{count}i", index, HEADER.size)
    pointers = struct.unpack_from(f"<{count}q", index, HEADER.size + 4 * count)
    documents = struct.unpack_from(f"<{boundaries}q", index, HEADER.size + 12 * count)
    ends = list(accumulate((ITEM_BYTES[code] * length for length in lengths), initial=0))
    rises = all(a <= b for a, b in zip(documents, documents[1:], strict=False))
    return (
        all(length >= 0 for length in lengths)
        and list(pointers) == ends[:-1]
        and ends[-1] == tokens_size
        and documents[0] == 0
        and documents[-1] == count
        and rises
    )


def _description_fields(folder: Path) -> Iterator[Field]:
    prefix, file = folder / "described", folder / "described.json"
    index = _index(
        {
            "magic": MAGIC,
            "version": 1,
            "dtype_code": 8,
            "sequence_count": 1,
            "document_count": 2,
            "lengths": [4],
            "pointers": [0],
            "document_indices": [0, 1],
        }
    )
    Path(f"{prefix}.idx").write_bytes(index)
    Path(f"{prefix}.bin").write_bytes(bytes(8))
    accepted: dict[str, Any] = {
        "tokenizer": lambda v: v in ("sentencepiece", "huggingface", "byte"),
        "tokenizer_sha256": is_digest,
        "vocab_size": lambda v: is_count(v) and v > 0,
        "eod_id": lambda v: v is None or is_count(v),
        "num_documents": lambda v: type(v) is int and v == 1,
        "num_tokens": lambda v: type(v) is int and v == 4,
        "split": is_text,
        "source": is_text,
        "source_settings": lambda v: isinstance(v, dict),
    }
    record = {
        "tokenizer": "byte",
        "tokenizer_sha256": "0" * 64,
        "vocab_size": 257,
        "eod_id": 256,
        "num_documents": 1,
        "num_tokens": 4,
        "split": "train",
        "source": "here",
        "source_settings": {},
    }
    file.write_text(json.dumps(record))
    IndexedDataset(prefix)
    for name, accepts in accepted.items():
        texts = texts_with(record, (name,), rejecting(accepts), required=name != "source_settings")
        yield Field("PREFIX.json", name, file, texts, lambda: IndexedDataset(prefix), name)
    whole = unparsable(json.dumps(record).encode())
    yield Field("PREFIX.json", "(whole file)", file, whole, lambda: IndexedDataset(prefix), "JSON")
