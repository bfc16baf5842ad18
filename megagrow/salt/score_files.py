"""A folder of scores: `scores.safetensors`, one entry per sample, beside `manifest.json`.

While the corpus is being scored the folder holds `shards/`: `identity.json` and one file per
finished shard. Every file appears by a rename, the manifest last, so that a folder with a manifest
is complete.
"""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from megagrow.data.dataset import PackedDataset
from megagrow.data.files import write_atomically
from megagrow.errors import DataError
from megagrow.salt.records import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    Arrays,
    Cost,
    Reading,
    Training,
    Wording,
    check_identity,
    check_samples,
    corpus_fields,
    field,
    missing,
    parse_tensors,
    read_file,
    read_header,
    to_json,
)
from megagrow.salt.work_folder import WorkFolder

SCORE_NAMES = ("median_in_top_k", "median_zero", "mean_nll", "in_top_k_fraction")
DTYPES = {**dict.fromkeys(SCORE_NAMES, np.dtype("<f4")), "num_tokens": np.dtype("<i4")}
SCORES_FILE = "scores.safetensors"
WORDS = Wording("scores", "scoring", "score anew", "tools/score_corpus.py")


@dataclass(frozen=True)
class Identity(Reading):
    """All that the scores depend on; equal identities give equal scores.

    Attributes:
        top_k: a label is in the top k if its rank is below it.
    """

    top_k: int


@dataclass(frozen=True)
class Scores:
    """A complete folder of scores.

    Attributes:
        folder: where they come from.
        values: the float32 arrays [num_samples] of SCORE_NAMES.
        num_tokens: int32 [num_samples], labels that each score rests on.
        identity: what the scores depend on.
        cost: what they took.
        training: what the model that gave them had cost before; None: nobody knows.
        sha256: of `scores.safetensors`; names these scores.
    """

    folder: Path
    values: dict[str, NDArray[np.float32]]
    num_tokens: NDArray[np.int32]
    identity: Identity
    cost: Cost
    training: Training
    sha256: str


@dataclass(frozen=True)
class _Manifest:
    identity: Identity
    cost: Cost
    training: Training
    scores_sha256: str


def identity_of(
    dataset: PackedDataset,
    model: str,
    top_k: int,
    dtype: str,
    mask_documents: bool = False,
    reset_positions: bool = False,
) -> Identity:
    """The identity of scores of `dataset`; reads the token files once."""
    how: dict[str, Any] = {"dtype": dtype, "mask_documents": mask_documents, "reset_positions": reset_positions}
    return Identity(model=model, top_k=top_k, **how, **corpus_fields(dataset))


def read_scores(folder: Path | str, dataset: PackedDataset | None) -> Scores:
    """The scores in `folder`, which must be those of `dataset`; None: whatever they are of.

    Raises:
        DataError: the folder is missing, unfinished, damaged, or holds the scores of another corpus
            or sample length.
    """
    folder = Path(folder)
    path = folder / MANIFEST_FILE
    if not path.exists():
        raise missing(path, ShardFolder(folder).path.is_dir(), WORDS)
    manifest = _read_manifest(path)
    if dataset is not None:
        check_samples(manifest.identity, dataset, path, WORDS)
    arrays = _read_arrays(folder / SCORES_FILE, manifest)
    values = {name: arrays[name] for name in SCORE_NAMES}
    return Scores(
        folder,
        values,
        arrays["num_tokens"],
        manifest.identity,
        manifest.cost,
        manifest.training,
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
    check_identity(manifest.identity, identity, path, WORDS)
    _read_arrays(folder / SCORES_FILE, manifest)
    return True


def write_scores(folder: Path, arrays: Arrays, identity: Identity, cost: Cost, training: Training = None) -> None:
    """Writes the scores, then the manifest that makes the folder complete; see `Scores`.

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
        "training": training,
        "scores_sha256": hashlib.sha256(content).hexdigest(),
    }
    write_atomically(folder / MANIFEST_FILE, to_json(manifest))


class ShardFolder(WorkFolder):
    """The finished shards of a scoring that is under way.

    Args:
        folder: the folder that will hold the scores.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, ".safetensors", WORDS)

    def write(self, shard: int, arrays: Arrays, seconds: float) -> None:
        """Stores one finished shard and the wall-clock time that it took of the whole scoring."""
        content = {**arrays, "seconds": np.array([seconds], np.float64)}
        write_atomically(self.file(shard), safetensors.numpy.save(content))

    def read(self, shard: int, num_samples: int) -> tuple[Arrays, float]:
        """The arrays and seconds of one finished shard.

        Raises:
            DataError: the file is damaged.
        """
        path = self.file(shard)
        arrays = parse_tensors(read_file(path), path, WORDS)
        seconds = arrays.pop("seconds", np.zeros(0))
        _check_arrays(arrays, path, num_samples)
        return arrays, float(seconds.sum())


def _read_manifest(path: Path) -> _Manifest:
    data, identity, cost, training = read_header(Identity, path, WORDS)
    if identity.top_k == 0:
        raise DataError(f"{path}: top_k is 0, must be positive; {WORDS.remedy}")
    return _Manifest(identity, cost, training, field(data, "scores_sha256", str, path, WORDS))


def _read_arrays(path: Path, manifest: _Manifest) -> Arrays:
    if not path.exists():
        raise DataError(f"{path}: no such file, but a manifest; {WORDS.remedy}")
    content = read_file(path)
    if hashlib.sha256(content).hexdigest() != manifest.scores_sha256:
        raise DataError(
            f"{path}: its sha256 is not the manifest's scores_sha256, one of the two was changed; {WORDS.remedy}"
        )
    arrays = parse_tensors(content, path, WORDS)
    _check_arrays(arrays, path, manifest.identity.num_samples)
    _check_values(arrays, path, manifest.identity.seq_length)
    return arrays


def _check_arrays(arrays: Arrays, path: Path, num_samples: int) -> None:
    if set(arrays) != set(DTYPES):
        raise DataError(
            f"{path}: holds {', '.join(sorted(arrays)) or 'nothing'}, must hold "
            f"{', '.join(DTYPES)}; remove it and {WORDS.again}"
        )
    for name, dtype in DTYPES.items():
        array = arrays[name]
        if array.dtype != dtype or array.shape != (num_samples,):
            raise DataError(
                f"{path}: {name} is {array.dtype.name} {list(array.shape)}, must be {dtype.name} "
                f"[{num_samples}]; remove it and {WORDS.again}"
            )


def _check_values(arrays: Arrays, path: Path, seq_length: int) -> None:
    """Raises DataError for values that no scoring gives; NaN would be sorted among the best."""
    limits = {"in_top_k_fraction": 1.0, "num_tokens": seq_length}
    for name, array in arrays.items():
        least, most = (array.min(), array.max()) if array.size else (0, 0)  # both are NaN if any is
        if not (np.isfinite(least) and np.isfinite(most)):
            raise DataError(f"{path}: {name} holds values that are not finite; {WORDS.remedy}")
        if name in limits and not 0 <= least <= most <= limits[name]:
            raise DataError(f"{path}: {name} lies in [{least}, {most}], must in [0, {limits[name]}]; {WORDS.remedy}")
