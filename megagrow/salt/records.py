"""The JSON records of folders that are made sample by sample from a corpus: flat dataclasses, read strictly."""

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from megagrow.data.dataset import PackedDataset
from megagrow.data.files import os_errors_as_data_errors
from megagrow.errors import DataError, named, shown
from megagrow.json_file import parse_object
from megagrow.parallel import heartbeat
from megagrow.parallel.collectives import broadcast_json
from megagrow.parallel.mesh import Mesh

Arrays = dict[str, NDArray[Any]]
Training = dict[str, Any] | None  # the ledger of the model that read the corpus, as plain data; None: nobody knows
MANIFEST_FILE = "manifest.json"  # written last, so that a folder with it is complete
FORMAT_VERSION = 1
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Wording:
    """How messages name what a folder holds.

    Attributes:
        things: what it is, as in "not a file of …".
        work: what is under way, as in "this … has".
        anew: why one would remove the folder, as in "to …".
        tool: what makes it.
    """

    things: str
    work: str
    anew: str
    tool: str

    @property
    def again(self) -> str:
        return f"run {self.tool} again"

    @property
    def remedy(self) -> str:
        return f"remove the folder and {self.again}"


@dataclass(frozen=True)
class Cost:
    """What making the folder took; `flops` is None when nobody counted."""

    seconds: float
    flops: float | None
    tokens: int


@dataclass(frozen=True)
class Reading:
    """Which samples a model has read, and how: all that its outputs depend on.

    Attributes:
        corpus_sha256: fingerprint of the token files.
        tokenizer_sha256: of the tokenizer that made them; "" when the corpus does not say.
        seq_length: tokens of a sample.
        num_samples: samples of the corpus.
        model: identity of the weights.
        dtype: of the forward pass.
        mask_documents: attention stayed inside a document.
        reset_positions: positions began anew at each document.
    """

    corpus_sha256: str
    tokenizer_sha256: str
    seq_length: int
    num_samples: int
    model: str
    dtype: str
    mask_documents: bool
    reset_positions: bool


R = TypeVar("R", bound=Reading)


def read_file(path: Path) -> bytes:
    """The whole file; DataError when it cannot be read."""
    with os_errors_as_data_errors(path):
        return path.read_bytes()


def read_object(path: Path, words: Wording) -> dict[str, Any]:
    """The JSON object in a file; DataError when it holds none."""
    return parse_object(read_file(path), path, DataError, f"remove it and {words.again}")


def to_json(data: dict[str, Any]) -> bytes:
    """As these records are written."""
    return (json.dumps(data, indent=1, allow_nan=False) + "\n").encode()


def parse_tensors(content: bytes, path: Path, words: Wording) -> Arrays:
    """The arrays of a safetensors file; DataError when it is none."""
    try:
        return safetensors.numpy.load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise DataError(f"{path}: not a safetensors file ({shown(str(error))}); remove it and {words.again}") from None


def field(data: dict[str, Any], name: str, kind: Any, path: Path, words: Wording) -> Any:
    """One value of a record, of one of the types in `kind`; a flag is no number.

    Raises:
        DataError: it is missing or of another type.
    """
    value = data.get(name)
    if name not in data or not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise DataError(
            f"{path}: field {name} is missing or of the wrong type ({shown(value)}); "
            f"not a file of {words.things}, choose another folder"
        )
    return value


def read_section(kind: Any, data: dict[str, Any], name: str, path: Path, words: Wording) -> Any:
    """A flat dataclass from the object `name` of a record; integers pass for floats, unknown names are refused."""
    section = field(data, name, dict, path, words)
    known = {each.name: each.type for each in fields(kind)}
    for key in section:
        if key not in known:
            raise DataError(f"{path}: unknown field {named(key)} of {name}; written by another version")
    values = {}
    for key, hint in known.items():
        allowed = hint if hint in (str, int, bool) else hint | int
        values[key] = field(section, key, allowed, path, words)
    return kind(**values)


def missing(path: Path, is_begun: bool, words: Wording) -> DataError:
    """That a manifest is not there."""
    what = "the work is unfinished: " + words.again if is_begun else f"make {words.things} with {words.tool}"
    return DataError(f"{path}: no such file; {what}")


def read_header(kind: type[R], path: Path, words: Wording) -> tuple[dict[str, Any], R, Cost, Training]:
    """A manifest, and what all manifests hold of it.

    Returns:
        The whole; the identity, of the dataclass `kind`; what the work took; what the model had cost before.

    Raises:
        DataError: it is not the manifest of such a folder, or of none that this program makes.
    """
    data = read_object(path, words)
    version = field(data, "format_version", int, path, words)
    if version != FORMAT_VERSION:
        raise DataError(f"{path}: format_version is {version}, must be {FORMAT_VERSION}")
    identity = read_section(kind, data, "identity", path, words)
    cost = read_section(Cost, data, "cost", path, words)
    check_numbers({**asdict(identity), **asdict(cost)}, path, words)
    tokenizer = identity.tokenizer_sha256
    if tokenizer and not SHA256.fullmatch(tokenizer):
        raise DataError(
            f"{path}: tokenizer_sha256 is {shown(tokenizer)}, must be a sha256 in hexadecimal; {words.remedy}"
        )
    return data, identity, cost, field(data, "training", dict | NoneType, path, words)


def check_numbers(values: dict[str, Any], path: Path, words: Wording) -> None:
    """Raises DataError for a number that is negative, or larger than any cost or count is."""
    for name, value in values.items():
        largest = 1e60 if name in ("flops", "seconds") else 2**63
        if isinstance(value, int | float) and not 0 <= value < largest:
            raise DataError(
                f"{path}: {name} is {shown(value)}, must not be negative or {largest} and more; {words.remedy}"
            )


def check_identity(found: Any, expected: Any, path: Path, words: Wording) -> None:
    """Raises DataError unless both identities, of one dataclass, are equal; names the first field that is not."""
    for each in fields(expected):
        old, new = getattr(found, each.name), getattr(expected, each.name)
        if old != new:
            raise DataError(
                f"{path}: {each.name} is {shown(old)}, this {words.work} has {shown(new)}; "
                f"choose another --output, or remove the folder to {words.anew}"
            )


def check_samples(found: Reading, dataset: PackedDataset, path: Path, words: Wording) -> None:
    """Raises DataError unless it is these samples that were read."""
    expected = corpus_fields(dataset)
    for name in ("corpus_sha256", "seq_length", "num_samples"):
        old, new = getattr(found, name), expected[name]
        if old != new:
            raise DataError(
                f"{path}: {name} is {named(str(old))}, that of {dataset.prefix} is {new}: what is here is of other "
                f"samples; make {words.things} of this corpus with this seq_length"
            )


def corpus_fields(dataset: PackedDataset) -> dict[str, Any]:
    """What names the samples of a dataset; reads the token files once."""
    description = dataset.indexed.description
    return {
        "corpus_sha256": dataset.indexed.fingerprint(heartbeat.progress),
        "tokenizer_sha256": description["tokenizer_sha256"] if description else "",
        "seq_length": dataset.seq_length,
        "num_samples": dataset.num_samples,
    }


def share_fingerprint(dataset: PackedDataset, mesh: Mesh) -> None:
    """The first rank reads the token files for all, who would each read the whole corpus; a collective."""
    own = dataset.indexed.fingerprint(heartbeat.progress) if mesh.is_main else ""
    dataset.indexed.take_fingerprint(broadcast_json(own, mesh.world, mesh.device))
