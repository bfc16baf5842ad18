"""The domains of a corpus: PREFIX.domains.safetensors says of every document which one it is of.

The file holds one tensor, `domains`, whole numbers [documents], and in its metadata, under the same name, the JSON
object {"names": [...]}: document i is of domain names[domains[i]]. Preprocessing writes it (`--domain-key`), merging
does, and any other program can.
"""

import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from megagrow.data.dataset import PackedDataset
from megagrow.data.description import readable
from megagrow.data.files import os_errors_as_data_errors, write_atomically
from megagrow.data.indexed import IndexedDataset
from megagrow.data.output import DOMAINS, domains_path
from megagrow.data.progress import corpus_progress
from megagrow.data.records import BadRecord, read_batches, text_and_fields, total_bytes
from megagrow.errors import DataError, named, shown
from megagrow.json_file import parse_object

MAX_DOMAINS = 10_000  # more are no domains, but something that names each document
NO_DOMAIN = "(none)"  # of documents that do not say
_TENSOR = _METADATA = DOMAINS
_REMEDY = "make it with tools/preprocess_data.py --domain-key, see docs/selection.md"


@dataclass(frozen=True)
class Domains:
    """Which domain each of many things is of.

    Attributes:
        names: of the domains.
        ids: int32, the place in `names`, of each document of a corpus, or of each sample.
    """

    names: tuple[str, ...]
    ids: NDArray[np.int32]

    def of_samples(self, dataset: PackedDataset) -> "Domains":
        """Those of a dataset's samples: where a sample holds several, the one of most of its inputs, first of equals.

        Args:
            dataset: of the documents that these are the domains of.
        """
        length, ends = dataset.seq_length, dataset.indexed.document_ends
        starts = np.arange(dataset.num_samples + 1) * length
        bounds = np.union1d(starts, ends[ends < starts[-1]])
        pieces, num_tokens = bounds[:-1], np.diff(bounds)  # each of one sample and of one document
        document = np.searchsorted(ends, pieces, side="right")
        pairs, place = np.unique(pieces // length * len(self.names) + self.ids[document], return_inverse=True)
        tokens_of_pair = np.bincount(place, num_tokens)
        sample, domain = np.divmod(pairs, len(self.names))
        order = np.lexsort((domain, -tokens_of_pair, sample))
        largest = order[np.unique(sample[order], return_index=True)[1]]
        return Domains(self.names, domain[largest].astype(np.int32))

    def among(self, places: NDArray[np.int64]) -> "Domains":
        """Those of some of the things."""
        return Domains(self.names, self.ids[places])

    def counts(self) -> dict[str, int]:
        """How many things are of each domain."""
        return dict(zip(self.names, np.bincount(self.ids, minlength=len(self.names)).tolist(), strict=True))


def encode_domains(domains: Domains) -> bytes:
    """The bytes of PREFIX.domains.safetensors."""
    metadata = {_METADATA: json.dumps({"names": domains.names})}
    return safetensors.numpy.save({_TENSOR: domains.ids}, metadata)


def write_domains(prefix: str | Path, domains: Domains) -> None:
    """Writes the domains of the documents of PREFIX.bin/.idx, which is there."""
    write_atomically(domains_path(prefix), encode_domains(domains))


def read_domains(path: Path | str, dataset: IndexedDataset) -> Domains:
    """The domains of the documents of `dataset`.

    Raises:
        DataError: the file is missing, malformed, has more than 10,000 names, or is of another number of documents.
    """
    path = Path(path)
    names, ids = _read(path)
    count = dataset.num_documents
    if ids.dtype.kind not in "iu" or ids.shape != (count,):
        raise DataError(
            f"{path}: domains is {ids.dtype.name} {list(ids.shape)}, must be whole numbers [{count}], one for each "
            f"document of {dataset.prefix}; {_REMEDY}"
        )
    if count and not 0 <= ids.min() <= ids.max() < len(names):
        raise DataError(
            f"{path}: domains lie in [{ids.min()}, {ids.max()}], there are {len(names)} names, from 0 on; {_REMEDY}"
        )
    return Domains(names, ids.astype(np.int32))


def collect_domains(inputs: Sequence[str | Path], json_key: str, domain_key: str) -> Domains:
    """The domain of every document that preprocessing makes of `inputs`, in one pass over them.

    That of a JSON object stands under `domain_key`, in which dots lead into objects (`meta.pile_set_name`); that of any
    other file is the file's name. Records that preprocessing leaves out, or refuses, are passed over.

    Raises:
        DataError: a file that cannot be read, or more than 10,000 domains.
    """
    numbers: dict[str, int] = {}
    ids = array("i")
    with corpus_progress("reading domains", total_bytes(inputs)) as report:
        for batch in read_batches(inputs):
            for record in batch.records:
                try:
                    text, fields = text_and_fields(record, batch.is_json, json_key)
                except BadRecord:
                    continue
                if text and not text.isspace():
                    name = readable(_domain(fields, domain_key) if batch.is_json else Path(batch.path).name)
                    ids.append(numbers.setdefault(name, len(numbers)))
            if len(numbers) > MAX_DOMAINS:
                raise DataError(
                    f"{domain_key} gives more than {MAX_DOMAINS} domains; use a key that many documents share"
                )
            report(batch.position, len(ids), 0)
    return Domains(tuple(numbers), np.array(ids, np.int32))


def joined_domains(datasets: Sequence[IndexedDataset]) -> Domains:
    """The domains of the documents of several datasets, one after the other; one without domains is one of its own."""
    short = {dataset.prefix: Path(dataset.prefix).name for dataset in datasets}
    are_distinct = len(set(short.values())) == len(short)
    numbers: dict[str, int] = {}
    parts = []
    for dataset in datasets:
        own = _own_domains(dataset, short[dataset.prefix] if are_distinct else dataset.prefix)
        places = [numbers.setdefault(name, len(numbers)) for name in own.names]
        if len(numbers) > MAX_DOMAINS:
            raise DataError(f"{dataset.prefix}: with its domains there are more than {MAX_DOMAINS}; merge fewer")
        parts.append(np.array(places, np.int32)[own.ids])
    return Domains(tuple(numbers), np.concatenate(parts))


def _own_domains(dataset: IndexedDataset, name: str) -> Domains:
    if domains_path(dataset.prefix).exists():
        return read_domains(domains_path(dataset.prefix), dataset)
    return Domains((name,), np.zeros(dataset.num_documents, np.int32))


def _domain(fields: Mapping[str, Any], key: str) -> str:
    """What stands under the key, or under its parts, one inside the other, as text."""
    value: Any = fields.get(key)
    if value is None:
        value = fields
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
    is_name = isinstance(value, str | int) and not isinstance(value, bool)
    return str(value) if is_name and value != "" else NO_DOMAIN


def _read(path: Path) -> tuple[tuple[str, ...], NDArray[Any]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file; {_REMEDY}")
    try:
        with os_errors_as_data_errors(path), safe_open(str(path), framework="numpy") as file:
            metadata, names = file.metadata() or {}, file.keys()
            if _TENSOR not in names or _METADATA not in metadata:
                raise DataError(f"{path}: holds no tensor and metadata called domains; {_REMEDY}")
            ids = np.asarray(file.get_tensor(_TENSOR))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a safetensors file ({shown(str(error))}); {_REMEDY}") from None
    return _names(metadata[_METADATA], path), ids


def _names(metadata: str, path: Path) -> tuple[str, ...]:
    content = parse_object(metadata.encode("utf-8", "surrogatepass"), f"{path}: metadata", DataError, _REMEDY)
    found = content.get("names")
    if not isinstance(found, list) or not found or not all(isinstance(name, str) and name for name in found):
        raise DataError(f"{path}: names is {shown(found)}, must be a list of names; {_REMEDY}")
    if len(set(found)) < len(found):
        twice = next(name for place, name in enumerate(found) if name in found[:place])
        raise DataError(f"{path}: the name {named(twice)} stands twice; {_REMEDY}")
    if len(found) > MAX_DOMAINS:
        raise DataError(f"{path}: {len(found)} names, more than {MAX_DOMAINS}; {_REMEDY}")
    return tuple(found)
