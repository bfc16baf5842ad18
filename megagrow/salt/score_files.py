"""A folder of scores: `scores.safetensors`, one entry per sample, beside `manifest.json`.

While the corpus is being scored the folder holds `shards/`: `identity.json` and one file per
finished shard. Every file appears by a rename, the manifest last, so that a folder with a manifest
is complete.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from megagrow.data.dataset import PackedDataset
from megagrow.data.files import os_errors_as_data_errors, write_atomically
from megagrow.errors import DataError, named, shown
from megagrow.json_file import parse_object

FORMAT_VERSION = 1
SCORE_NAMES = ("median_in_top_k", "median_zero", "mean_nll", "in_top_k_fraction")
DTYPES = {**dict.fromkeys(SCORE_NAMES, np.dtype("<f4")), "num_tokens": np.dtype("<i4")}
SCORES_FILE, MANIFEST_FILE = "scores.safetensors", "manifest.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REMEDY = "remove the folder and score the corpus again"
_OWN_FILE = re.compile(r"(identity\.json|[0-9]{8,}\.safetensors)(\.tmp-[0-9a-f]{8})?")  # of a folder of shards

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Identity:
    """All that the scores depend on; equal identities give equal scores.

    Attributes:
        corpus_sha256: fingerprint of the token files.
        tokenizer_sha256: of the tokenizer that made them; "" when the corpus does not say.
        model: identity of the weights that scored.
        top_k: a label is in the top k if its rank is below it.
        seq_length: tokens of a sample.
        num_samples: samples of the corpus.
        dtype: of the forward pass.
    """

    corpus_sha256: str
    tokenizer_sha256: str
    model: str
    top_k: int
    seq_length: int
    num_samples: int
    dtype: str


@dataclass(frozen=True)
class Cost:
    """What the scoring took; `flops` is None when nobody counted."""

    seconds: float
    flops: float | None
    tokens: int


@dataclass(frozen=True)
class Scores:
    """A complete folder of scores.

    Attributes:
        folder: where they come from.
        values: the float32 arrays [num_samples] of SCORE_NAMES.
        num_tokens: int32 [num_samples], labels that each score rests on.
        identity: what the scores depend on.
        cost: what they took.
        sha256: of `scores.safetensors`; names these scores.
    """

    folder: Path
    values: dict[str, NDArray[np.float32]]
    num_tokens: NDArray[np.int32]
    identity: Identity
    cost: Cost
    sha256: str


@dataclass(frozen=True)
class _Manifest:
    identity: Identity
    cost: Cost
    scores_sha256: str


def identity_of(dataset: PackedDataset, model: str, top_k: int, dtype: str) -> Identity:
    """The identity of scores of `dataset`; reads the token files once."""
    description = dataset.indexed.description
    tokenizer = description["tokenizer_sha256"] if description else ""
    corpus = dataset.indexed.fingerprint()
    return Identity(corpus, tokenizer, model, top_k, dataset.seq_length, dataset.num_samples, dtype)


def read_scores(folder: Path | str, dataset: PackedDataset | None) -> Scores:
    """The scores in `folder`, which must be those of `dataset`; None: whatever they are of.

    Raises:
        DataError: the folder is missing, unfinished, damaged, or holds the scores of another corpus
            or sample length.
    """
    folder = Path(folder)
    path = folder / MANIFEST_FILE
    if not path.exists():
        started = ShardFolder(folder).path.is_dir()
        raise DataError(
            f"{path}: no such file; "
            + ("scoring is unfinished: run" if started else "make the scores with")
            + " tools/score_corpus.py"
        )
    manifest = _read_manifest(path)
    if dataset is not None:
        _check_dataset(manifest.identity, dataset, path)
    arrays = _read_arrays(folder / SCORES_FILE, manifest)
    values = {name: arrays[name] for name in SCORE_NAMES}
    return Scores(
        folder,
        values,
        arrays["num_tokens"],
        manifest.identity,
        manifest.cost,
        manifest.scores_sha256,
    )


def is_complete(folder: Path, identity: Identity) -> bool:
    """Whether the folder already holds finished scores of this identity.

    Raises:
        DataError: it holds something else or is damaged; nothing is ever overwritten.
    """
    path = folder / MANIFEST_FILE
    if not path.exists():
        return False
    manifest = _read_manifest(path)
    _check_identity(manifest.identity, identity, path)
    _read_arrays(folder / SCORES_FILE, manifest)
    return True


def write_scores(folder: Path, arrays: Arrays, identity: Identity, cost: Cost) -> None:
    """Writes the scores, then the manifest that makes the folder complete.

    Raises:
        DataError: values that are not finite (a model that overflowed), or a folder that cannot be written.
    """
    ordered = {name: arrays[name].astype(dtype, copy=False) for name, dtype in DTYPES.items()}
    _check_values(ordered, folder / SCORES_FILE, identity.seq_length)
    content = safetensors.numpy.save(ordered)
    write_atomically(folder / SCORES_FILE, content)
    manifest = {
        "format_version": FORMAT_VERSION,
        "identity": asdict(identity),
        "cost": asdict(cost),
        "scores_sha256": hashlib.sha256(content).hexdigest(),
    }
    write_atomically(folder / MANIFEST_FILE, _to_json(manifest))


class ShardFolder:
    """The finished shards of a scoring that is under way.

    Args:
        folder: the folder that will hold the scores.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "shards"
        self._identity = self.path / "identity.json"

    def check(self, identity: Identity, shard_size: int) -> None:
        """Raises DataError when the shards that are there belong to another scoring; writes
        nothing.
        """
        if not self._identity.exists():
            if self.path.exists() and any(self.path.glob("[!.]*.safetensors")):
                raise DataError(
                    f"{self._identity}: no such file beside the shards, which may be of any corpus; "
                    f"remove {self.path} or choose another --output"
                )
            return
        stored = _read_object(self._identity)
        size = _field(stored, "shard_size", int, self._identity)
        found = _from_fields(Identity, _field(stored, "identity", dict, self._identity), self._identity)
        _check_identity(found, identity, self._identity)
        if size != shard_size:
            raise DataError(
                f"{self._identity}: shard_size is {size}, this scoring has {shard_size} (whole "
                f"batches); use the earlier batch size, or remove {self.path} to start again"
            )

    def begin(self, identity: Identity, shard_size: int) -> None:
        """Records what the shards belong to, unless that has been done."""
        if not self._identity.exists():
            content = {"identity": asdict(identity), "shard_size": shard_size}
            write_atomically(self._identity, _to_json(content))

    def has(self, shard: int) -> bool:
        return self._file(shard).exists()

    def write(self, shard: int, arrays: Arrays, seconds: float) -> None:
        """Stores one finished shard and the wall-clock time that it took of the whole scoring."""
        content = {**arrays, "seconds": np.array([seconds], np.float64)}
        write_atomically(self._file(shard), safetensors.numpy.save(content))

    def read(self, shard: int, num_samples: int) -> tuple[Arrays, float]:
        """The arrays and seconds of one finished shard.

        Raises:
            DataError: the file is damaged.
        """
        path = self._file(shard)
        arrays = _parse_tensors(_read(path), path)
        seconds = arrays.pop("seconds", np.zeros(0))
        _check_arrays(arrays, path, num_samples)
        return arrays, float(seconds.sum())

    def remove(self) -> None:
        """Removes the shards, and the folder unless somebody else's files are in it too."""
        with os_errors_as_data_errors(self.path):
            names = [path.name for path in self.path.iterdir()] if self.path.is_dir() else []
            own = [name for name in names if _OWN_FILE.fullmatch(name)]
            for name in own:
                (self.path / name).unlink()
            if own and own == names:
                self.path.rmdir()

    def _file(self, shard: int) -> Path:
        return self.path / f"{shard:08d}.safetensors"


def _check_dataset(identity: Identity, dataset: PackedDataset, path: Path) -> None:
    expected = {
        "corpus_sha256": dataset.indexed.fingerprint(),
        "seq_length": dataset.seq_length,
        "num_samples": dataset.num_samples,
    }
    for name, value in expected.items():
        found = getattr(identity, name)
        if found != value:
            raise DataError(
                f"{path}: {name} is {found}, that of {dataset.prefix} is {value}: the scores are "
                "those of other samples; score this corpus with this seq_length"
            )


def _check_identity(found: Identity, expected: Identity, path: Path) -> None:
    for field in fields(Identity):
        old, new = getattr(found, field.name), getattr(expected, field.name)
        if old != new:
            raise DataError(
                f"{path}: {field.name} is {shown(old)}, this scoring has {shown(new)}; "
                "choose another --output, or remove the folder to score anew"
            )


def _read_manifest(path: Path) -> _Manifest:
    data = _read_object(path)
    version = _field(data, "format_version", int, path)
    if version != FORMAT_VERSION:
        raise DataError(f"{path}: format_version is {version}, must be {FORMAT_VERSION}")
    identity = _from_fields(Identity, _field(data, "identity", dict, path), path)
    cost = _from_fields(Cost, _field(data, "cost", dict, path), path)
    for name, value in {**asdict(identity), **asdict(cost)}.items():
        largest = 1e60 if name in ("flops", "seconds") else 2**63
        if isinstance(value, int | float) and not 0 <= value < largest:
            raise DataError(f"{path}: {name} is {shown(value)}, must not be negative or {largest} and more; {_REMEDY}")
    if identity.top_k == 0:
        raise DataError(f"{path}: top_k is 0, must be positive; {_REMEDY}")
    if identity.tokenizer_sha256 and not _SHA256.fullmatch(identity.tokenizer_sha256):
        raise DataError(f"{path}: tokenizer_sha256 is no sha256 in hexadecimal; {_REMEDY}")
    return _Manifest(identity, cost, _field(data, "scores_sha256", str, path))


def _read_arrays(path: Path, manifest: _Manifest) -> Arrays:
    if not path.exists():
        raise DataError(f"{path}: no such file, but a manifest; score into an empty folder")
    content = _read(path)
    if hashlib.sha256(content).hexdigest() != manifest.scores_sha256:
        raise DataError(
            f"{path}: its sha256 is not the manifest's scores_sha256, one of the two was changed; "
            "score the corpus again into an empty folder"
        )
    arrays = _parse_tensors(content, path)
    _check_arrays(arrays, path, manifest.identity.num_samples)
    _check_values(arrays, path, manifest.identity.seq_length)
    return arrays


def _parse_tensors(content: bytes, path: Path) -> Arrays:
    try:
        return safetensors.numpy.load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise DataError(
            f"{path}: not a safetensors file ({shown(str(error))}); remove it and score the corpus again"
        ) from None


def _check_arrays(arrays: Arrays, path: Path, num_samples: int) -> None:
    if set(arrays) != set(DTYPES):
        raise DataError(
            f"{path}: holds {', '.join(sorted(arrays)) or 'nothing'}, must hold "
            f"{', '.join(DTYPES)}; remove it and score the corpus again"
        )
    for name, dtype in DTYPES.items():
        array = arrays[name]
        if array.dtype != dtype or array.shape != (num_samples,):
            raise DataError(
                f"{path}: {name} is {array.dtype.name} {list(array.shape)}, must be {dtype.name} "
                f"[{num_samples}]; remove it and score the corpus again"
            )


def _check_values(arrays: Arrays, path: Path, seq_length: int) -> None:
    """Raises DataError for values that no scoring gives; NaN would be sorted among the best."""
    limits = {"in_top_k_fraction": 1.0, "num_tokens": seq_length}
    for name, array in arrays.items():
        least, most = (array.min(), array.max()) if array.size else (0, 0)  # both are NaN if any is
        if not (np.isfinite(least) and np.isfinite(most)):
            raise DataError(f"{path}: {name} holds values that are not finite; {_REMEDY}")
        if name in limits and not 0 <= least <= most <= limits[name]:
            raise DataError(f"{path}: {name} lies in [{least}, {most}], must in [0, {limits[name]}]; {_REMEDY}")


def _read(path: Path) -> bytes:
    with os_errors_as_data_errors(path):
        return path.read_bytes()


def _read_object(path: Path) -> dict[str, Any]:
    return parse_object(_read(path), path, DataError, "remove it and score the corpus again")


def _field(data: dict[str, Any], name: str, kind: Any, path: Path) -> Any:
    value = data.get(name)
    if name not in data or not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(
            f"{path}: field {name} is missing or of the wrong type ({shown(value)}); "
            "not a file of scores, choose another folder"
        )
    return value


def _from_fields(kind: Any, data: dict[str, Any], path: Path) -> Any:
    """A flat dataclass from an object; integers pass for floats, unknown names are refused."""
    known = {field.name: field.type for field in fields(kind)}
    for name in data:
        if name not in known:
            raise DataError(f"{path}: unknown field {named(name)}; written by another version")
    values = {}
    for name, hint in known.items():
        allowed = hint | int if hint is not str and hint is not int else hint
        values[name] = _field(data, name, allowed, path)
    return kind(**values)


def _to_json(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=1, allow_nan=False) + "\n").encode()
