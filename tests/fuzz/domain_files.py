"""Files of domains: wrong names, ids, header entries and sizes."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from hypothesis import strategies as st

from megagrow.data.domains import Domains, domains_path, read_domains, write_domains
from megagrow.data.indexed import IndexedDataset, IndexedWriter
from tests.fuzz.fields import Field, texts_with, unparsable
from tests.fuzz.literals import rejecting

NUM_DOCUMENTS, NAMES = 5, ("web", "code")


def fields(folder: Path) -> Iterator[Field]:
    folder.mkdir()
    with IndexedWriter(folder / "d", "<u2") as writer:
        writer.add_documents(np.zeros(NUM_DOCUMENTS, np.uint16), [1] * NUM_DOCUMENTS)
    dataset, file = IndexedDataset(folder / "d"), domains_path(folder / "d")
    write_domains(folder / "d", Domains(NAMES, np.zeros(NUM_DOCUMENTS, np.int32)))
    raw = file.read_bytes()

    def read() -> Any:
        return read_domains(file, dataset)

    read()
    described = {"names": list(NAMES)}
    names = texts_with(described, ("names",), rejecting(_are_names)) | unparsable(json.dumps(described).encode())
    yield Field("domains", "names", file, names.map(_with_metadata), read, "names|JSON|domains|safetensors")
    values = st.integers(-(2**31), 2**31 - 1).filter(lambda x: not 0 <= x < len(NAMES))
    yield Field("domains", "domains (values)", file, values.map(_with_value), read, "domains lie in")
    cut = st.integers(0, len(raw) - 1).map(lambda end: raw[:end])
    longer = st.binary(min_size=1, max_size=40).map(lambda more: raw + more)
    yield Field("domains", "(size)", file, cut | longer, read, "safetensors")
    size = struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    for key, right in header["domains"].items():
        wrong = texts_with(header, ("domains", key), rejecting(lambda value, right=right: value == right))
        contents = wrong.map(lambda text: struct.pack("<Q", len(text)) + text + data)
        yield Field("domains", f"domains.{key}", file, contents, read, "safetensors|domains")


def _are_names(value: Any) -> bool:
    is_list = isinstance(value, list) and value and all(isinstance(name, str) and name for name in value)
    return bool(is_list and len(set(value)) == len(value))


def _with_metadata(text: bytes) -> bytes:
    """In the metadata, which hold text only."""
    metadata = {"domains": text.decode("utf-8", "replace")}
    return safetensors.numpy.save({"domains": np.zeros(NUM_DOCUMENTS, np.int32)}, metadata)


def _with_value(value: int) -> bytes:
    ids = np.array([0] * (NUM_DOCUMENTS - 1) + [value], np.int32)
    return safetensors.numpy.save({"domains": ids}, {"domains": json.dumps({"names": NAMES})})
