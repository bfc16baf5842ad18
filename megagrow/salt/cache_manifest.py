"""What a teacher's cache says of itself: `manifest.json`, written last, so that a folder with it is complete."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from megagrow.data.files import write_atomically
from megagrow.errors import DataError, shown
from megagrow.salt.cache_format import COMPRESSIONS, KINDS, Kind, Shape, can_compress
from megagrow.salt.records import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    SHA256,
    Cost,
    Reading,
    Training,
    Wording,
    check_numbers,
    field,
    read_header,
    to_json,
)

WORDS = Wording("a teacher's cache", "cache", "make it anew", "tools/cache_teacher.py")


@dataclass(frozen=True)
class CacheIdentity(Reading):
    """All that the targets depend on; equal identities give equal targets.

    Attributes:
        vocab_size: of the teacher.
        kind, num_entries: see `cache_format.Shape`.
        temperature: by which the teacher's logits are divided.
        samples_sha256: of the ids that the cache holds; "" when it holds all of them.
    """

    vocab_size: int
    kind: str
    num_entries: int
    temperature: float
    samples_sha256: str

    @property
    def shape(self) -> Shape:
        return Shape(cast(Kind, self.kind), self.seq_length, self.num_entries, self.vocab_size)


@dataclass(frozen=True)
class Manifest:
    """A complete cache.

    Attributes:
        identity: what the targets depend on.
        cost: what making them took.
        training: what the teacher had cost before; None: nobody knows.
        shard_size: samples of a shard, the last one may have fewer.
        compression: of each sample's targets.
        shards: sha256 of the index of every shard.
    """

    identity: CacheIdentity
    cost: Cost
    training: Training
    shard_size: int
    compression: str
    shards: tuple[str, ...]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Completes a cache whose shards are all there."""
    write_atomically(folder / MANIFEST_FILE, to_json({"format_version": FORMAT_VERSION, **asdict(manifest)}))


def read_manifest(path: Path) -> Manifest:
    """What `write_manifest` wrote.

    Raises:
        DataError: it is not the manifest of a cache, or of none that this program makes.
    """
    data, identity, cost, training = read_header(CacheIdentity, path, WORDS)
    sizes = {"shard_size": field(data, "shard_size", int, path, WORDS)}
    compression, shards = (field(data, n, kind, path, WORDS) for n, kind in (("compression", str), ("shards", list)))
    check_numbers(sizes, path, WORDS)
    _check_identity_values(identity, path)
    if not 0 < sizes["shard_size"] < 2**31:
        raise DataError(f"{path}: shard_size is {sizes['shard_size']}, must be positive and below 2^31; {WORDS.remedy}")
    if not all(isinstance(digest, str) and SHA256.fullmatch(digest) for digest in shards):
        raise DataError(f"{path}: shards must be sha256 in hexadecimal; {WORDS.remedy}")
    if compression not in COMPRESSIONS:
        raise DataError(f"{path}: compression is {shown(compression)}, must be one of {', '.join(COMPRESSIONS)}")
    if not can_compress(compression):
        raise DataError(f"{path}: reading it needs one more package: pip install zstandard")
    return Manifest(identity, cost, training, sizes["shard_size"], compression, tuple(shards))


def _check_identity_values(identity: CacheIdentity, path: Path) -> None:
    rules = {
        "samples_sha256": identity.samples_sha256 == "" or bool(SHA256.fullmatch(identity.samples_sha256)),
        "kind": identity.kind in KINDS,
        "vocab_size": 0 < identity.vocab_size <= 2**31,
        "seq_length": 0 < identity.seq_length <= 2**31,
        "num_samples": identity.num_samples > 0,
        "num_entries": 0 < identity.num_entries <= (identity.vocab_size if identity.kind == "top_k" else 2**16),
        "temperature": 0 < identity.temperature < 1e6,
    }
    for name, holds in rules.items():
        if not holds:
            value = shown(getattr(identity, name))
            raise DataError(f"{path}: {name} is {value}, which no cache is made with; {WORDS.remedy}")
