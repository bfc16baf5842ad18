"""How the teacher's targets for one sample become bytes.

    token ids            in as many bits as the vocabulary needs
    log-probabilities    in steps of 2^-11 down to -32, as differences from entry to entry, which never fall
    the rest             of each position: the log of the tail's mass, or the teacher's entropy, in the same steps

Half a step bounds the error: 2.5e-4 of any probability, where half precision errs by 2e-3 at e^-8 (see
`CODE_ERROR`). Sampled targets have no probabilities: each draw stands for one part in `num_entries`.
"""

# Shape suffix legend: S = positions of a sample, K = entries of a position.

import importlib
import importlib.util
import zlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megagrow.salt.bits import pack_bits, packed_size, unpack_bits

Kind = Literal["top_k", "sampled"]
KINDS: tuple[Kind, ...] = ("top_k", "sampled")
COMPRESSIONS = ("zstd", "zlib")
STEP = 2.0**-11  # nats
CODE_ERROR = STEP / 2  # of a log-probability above -31.99
NOTHING = 2**16 - 1  # the code of probability 0, and of what is rarer than e^-31.99


@dataclass(frozen=True)
class Shape:
    """What one sample's targets look like.

    Attributes:
        kind: `top_k`: the most likely tokens and the mass of all others; `sampled`: draws from the teacher.
        seq_length: positions.
        num_entries: tokens of each position.
        vocab_size: ids are below it.
    """

    kind: Kind
    seq_length: int
    num_entries: int
    vocab_size: int

    @property
    def id_bits(self) -> int:
        return max((self.vocab_size - 1).bit_length(), 1)

    @property
    def num_ids(self) -> int:
        return self.seq_length * self.num_entries

    @property
    def id_bytes(self) -> int:
        return packed_size(self.num_ids, self.id_bits)

    @property
    def num_bytes(self) -> int:
        """Of a sample before it is compressed."""
        codes = self.seq_length + (self.num_ids if self.kind == "top_k" else 0)
        return self.id_bytes + 2 * codes


@dataclass(frozen=True)
class Entries:
    """One sample's targets as they are stored.

    Attributes:
        ids_SK: token ids, the most likely first; sampled ones in ascending order, with repeats.
        codes_SK: of their log-probabilities; None where they are sampled.
        rest_S: code of the tail's mass (top_k) or of the teacher's entropy (sampled).
    """

    ids_SK: NDArray[np.integer]
    codes_SK: NDArray[np.uint16] | None
    rest_S: NDArray[np.uint16]


def to_codes(nats: NDArray[np.floating]) -> NDArray[np.uint16]:
    """Numbers from 0 on, infinity included, in steps of 2^-11; what is too large becomes NOTHING."""
    return np.clip(np.rint(nats / STEP), 0, NOTHING).astype(np.uint16)


def to_nats(codes: NDArray[np.uint16]) -> NDArray[np.float64]:
    """The inverse of `to_codes`; NOTHING is infinity."""
    return np.where(codes == NOTHING, np.inf, codes * STEP)


def masses(entries: Entries, shape: Shape) -> NDArray[np.float32]:
    """The probabilities [S, K + 1] that the entries stand for, the rest last.

    Those of top_k are a distribution together with the tail: rounding is taken out. Of sampled tokens that come more
    than once the first has all of their mass; the rest is the entropy in nats.

    Raises:
        ValueError: no teacher gives such entries.
    """
    if entries.codes_SK is None:
        counts_SK = _counts(np.asarray(entries.ids_SK))
        entropy_S1 = to_nats(entries.rest_S)[:, None]
        return np.concatenate([counts_SK / shape.num_entries, entropy_S1], axis=1).astype(np.float32)
    codes_SK1 = np.concatenate([entries.codes_SK, entries.rest_S[:, None]], axis=1)
    masses_SK1 = np.exp(-to_nats(codes_SK1))
    total_S1 = masses_SK1.sum(-1, keepdims=True)
    if not total_S1.all():
        raise ValueError("a position without any mass")
    return (masses_SK1 / total_S1).astype(np.float32)


def _counts(ids_SK: NDArray[np.integer]) -> NDArray[np.int64]:
    """How often each token of an ascending row comes, where it comes first; 0 for its repeats."""
    is_new_SK = np.ones(ids_SK.shape, bool)
    is_new_SK[:, 1:] = ids_SK[:, 1:] != ids_SK[:, :-1]
    firsts = np.flatnonzero(is_new_SK)
    counts = np.zeros(ids_SK.size, np.int64)
    counts[firsts] = np.diff(firsts, append=ids_SK.size)  # every row begins with a new one
    return counts.reshape(ids_SK.shape)


def encode(entries: Entries, shape: Shape) -> bytes:
    """The sample's bytes, not compressed."""
    parts = [pack_bits(entries.ids_SK, shape.id_bits)]
    if entries.codes_SK is not None:
        parts.append(_planes(np.diff(entries.codes_SK, axis=1, prepend=np.uint16(0))))
    return b"".join([*parts, _planes(entries.rest_S)])


def decode(content: bytes, shape: Shape) -> Entries:
    """The inverse of `encode`; `content` has `shape.num_bytes` bytes."""
    rows = shape.seq_length, shape.num_entries
    ids_SK = unpack_bits(content[: shape.id_bytes], shape.id_bits, shape.num_ids).reshape(rows)
    rest_S = _from_planes(content[-2 * shape.seq_length :])
    if shape.kind == "sampled":
        return Entries(ids_SK, None, rest_S)
    steps_SK = _from_planes(content[shape.id_bytes : -2 * shape.seq_length]).reshape(rows)
    return Entries(ids_SK, np.cumsum(steps_SK, axis=1, dtype=np.uint16), rest_S)


def _planes(codes: NDArray[np.uint16]) -> bytes:
    """All low bytes, then all high ones, most of which are 0."""
    return np.ascontiguousarray(codes.astype("<u2").reshape(-1, 1).view(np.uint8).T).tobytes()


def _from_planes(content: bytes) -> NDArray[np.uint16]:
    low, high = np.frombuffer(content, np.uint8).reshape(2, -1).astype(np.uint16)
    return low | (high << np.uint16(8))


def best_compression() -> str:
    """zstd where its package is installed, else zlib, which Python has."""
    return "zstd" if importlib.util.find_spec("zstandard") else "zlib"


def can_compress(compression: str) -> bool:
    """Whether this machine has what it takes."""
    return compression == "zlib" or best_compression() == "zstd"


def compress(content: bytes, compression: str) -> bytes:
    """By the one of COMPRESSIONS that is named."""
    return _zstandard().ZstdCompressor(level=3).compress(content) if compression == "zstd" else zlib.compress(content)


def decompress(content: bytes, compression: str, num_bytes: int) -> bytes:
    """The `num_bytes` that were compressed; never makes more than that.

    Raises:
        ValueError: the content is damaged, or holds another number of bytes.
    """
    if compression == "zstd":
        zstandard = _zstandard()
        try:
            if zstandard.frame_content_size(content) != num_bytes:  # what the decompressor would set aside
                raise ValueError(f"not {num_bytes} bytes")
            found = zstandard.ZstdDecompressor().decompress(content)
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from None
    else:
        inflater = zlib.decompressobj()
        try:
            found = inflater.decompress(content, num_bytes)
            more = inflater.decompress(inflater.unconsumed_tail, 1)
        except zlib.error as error:
            raise ValueError(str(error)) from None
        if more or not inflater.eof:
            raise ValueError(f"more than {num_bytes} bytes, or cut off")
    if len(found) != num_bytes:
        raise ValueError(f"{len(found)} bytes instead of {num_bytes}")
    return bytes(found)


def _zstandard() -> Any:
    return importlib.import_module("zstandard")
