"""Megatron's indexed dataset, byte for byte: PREFIX.bin (tokens, no header) and PREFIX.idx.

PREFIX.idx, little-endian: magic (9 bytes), version u64 = 1, dtype code u8, sequence_count N u64,
document_count D u64, then N int32 lengths (tokens), N int64 pointers (bytes into .bin),
D int64 document indices (0 … N, in sequences).
Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py.

Shape legend: T = tokens, N = sequences, D = document boundaries (documents + 1)
"""

import fcntl
import hashlib
import os
import struct
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from megagrow.data.description import Description, describe, description_path, encode_description
from megagrow.data.files import fsync_path, os_errors_as_data_errors, sweep_leftovers
from megagrow.data.output import MAGIC, check_output, domains_path, files_of, index_path, temporary, tokens_path
from megagrow.errors import DataError

_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_FLOAT_CODES = {6: "float64", 7: "float32"}
_PIECE, _NUM_PIECES = 1 << 16, 64  # of a file, for `sketch`
_BLOCK = 1 << 16  # sequences checked at a time: in the cache, and little memory


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype in which Megatron stores tokens: uint16 below 65,500 ids, int32 from there on."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


class IndexedDataset:
    """Memory-mapped reader of PREFIX.bin/.idx; every field is checked against the file sizes first.

    `lengths` int32 [N] in tokens, `pointers` int64 [N] in bytes, `document_indices` int64 [D],
    `tokens` [T] in the stored dtype: all sequences laid end to end in file order. `description` is
    PREFIX.json, or None. Raises DataError naming file, field and rule when something does not fit.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self._index_path, self._tokens_path = index_path(prefix), tokens_path(prefix)
        self._fingerprint = ""
        index_bytes, num_token_bytes = self._open()
        self.dtype, num_sequences, num_boundaries = self._read_header(index_bytes)
        self.lengths, self.pointers, self.document_indices = _index_arrays(index_bytes, num_sequences, num_boundaries)
        self._check_sequences(num_token_bytes)
        self._check_documents()
        self.tokens: NDArray[Any] = _map_file(self._tokens_path, self.dtype)
        self.description = self._checked_description()

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        return len(self.document_indices) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @cached_property
    def document_ends(self) -> NDArray[np.int64]:
        """Where each document ends, in tokens; 8 bytes per document, made when first asked for."""
        first_tokens = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        ends: NDArray[np.int64] = first_tokens[self.document_indices[1:]]
        return ends

    def __len__(self) -> int:
        return self.num_sequences

    def __getitem__(self, index: int) -> NDArray[Any]:
        """The tokens of sequence `index`, in the stored dtype, without a copy."""
        start = int(self.pointers[index]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[index])]

    def document(self, index: int) -> NDArray[Any]:
        """The tokens of all sequences of document `index`, in the stored dtype, without a copy."""
        first, end = (int(self.document_indices[i]) for i in (index, index + 1))
        start = int(self.pointers[first]) // self.dtype.itemsize if first < end else 0
        return self.tokens[start : start + int(self.lengths[first:end].sum(dtype=np.int64))]

    def fingerprint(self, note: Callable[[], None] | None = None) -> str:
        """sha256 over the bytes of .idx and .bin; reads the whole dataset when it is first asked for.

        Args:
            note: called now and then meanwhile.
        """
        if not self._fingerprint:
            digest = hashlib.sha256()
            for path in (self._index_path, self._tokens_path):
                with os_errors_as_data_errors(path), open(path, "rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
                        if note is not None:
                            note()
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def sketch(self) -> str:
        """sha256 over the sizes of .idx and .bin and 4 MiB of each, spread evenly: a quick look at a large dataset."""
        digest = hashlib.sha256()
        for path in (self._index_path, self._tokens_path):
            with os_errors_as_data_errors(path), open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(f"{size},".encode())
                for start in np.linspace(0, max(0, size - _PIECE), _NUM_PIECES).astype(np.int64).tolist():
                    file.seek(start)
                    digest.update(file.read(_PIECE))
        return digest.hexdigest()

    def take_fingerprint(self, fingerprint: str) -> None:
        """Another process has read the files, and says what the fingerprint is."""
        self._fingerprint = fingerprint

    def _open(self) -> tuple[NDArray[np.uint8], int]:
        for path in (self._index_path, self._tokens_path):
            if not path.is_file():
                raise DataError(f"{path}: no such file; a dataset is named by its prefix, without .bin or .idx")
        index_bytes: NDArray[np.uint8] = _map_file(self._index_path, np.dtype(np.uint8))
        return index_bytes, self._tokens_path.stat().st_size

    def _read_header(self, index_bytes: NDArray[np.uint8]) -> tuple[np.dtype[Any], int, int]:
        path, size = self._index_path, len(index_bytes)
        if size < _HEADER.size:
            raise DataError(f"{path}: {size} bytes, shorter than the {_HEADER.size}-byte header")
        magic, version, code, num_sequences, num_boundaries = _HEADER.unpack(index_bytes[: _HEADER.size].tobytes())
        if magic != MAGIC:
            raise DataError(f"{path}: magic is {magic!r}, must be {MAGIC!r}; not a Megatron index")
        if version != _VERSION:
            raise DataError(f"{path}: version is {version}, must be {_VERSION}")
        if code not in _DTYPES:
            known = ", ".join(f"{c} {d.name}" for c, d in _DTYPES.items())
            kind = f" ({_FLOAT_CODES[code]})" if code in _FLOAT_CODES else ""
            raise DataError(f"{path}: dtype code is {code}{kind}, tokens are one of {known}")
        if num_boundaries < 1:
            raise DataError(f"{path}: document_count is 0, must be the number of documents + 1")
        expected = _HEADER.size + 12 * num_sequences + 8 * num_boundaries
        if num_sequences and size == expected + num_sequences:
            raise DataError(f"{path}: has sequence modes (multimodal), only text is supported")
        if size != expected:
            raise DataError(
                f"{path}: {size} bytes, must be {expected} for sequence_count {num_sequences} and "
                f"document_count {num_boundaries}; the file is truncated or has trailing bytes"
            )
        return _DTYPES[code], num_sequences, num_boundaries

    def _check_sequences(self, num_token_bytes: int) -> None:
        path, itemsize, end = self._index_path, self.dtype.itemsize, 0
        for block in range(0, self.num_sequences, _BLOCK):
            lengths = self.lengths[block : block + _BLOCK].astype(np.int64)
            if lengths.min() < 0:
                bad = int(np.argmax(lengths < 0))
                raise DataError(f"{path}: length of sequence {block + bad} is {lengths[bad]}, must not be negative")
            ends = end + np.cumsum(lengths * itemsize)
            starts = ends - lengths * itemsize
            wrong = self.pointers[block : block + _BLOCK] != starts
            if wrong.any():
                bad = int(np.argmax(wrong))
                raise DataError(
                    f"{path}: pointer of sequence {block + bad} is {self.pointers[block + bad]}, "
                    f"must be {starts[bad]}: sequences lie end to end"
                )
            end = int(ends[-1])
            if end > num_token_bytes:
                break
        if end != num_token_bytes:
            more = " or more" if end > num_token_bytes else ""
            raise DataError(
                f"{self._tokens_path}: {num_token_bytes} bytes, must be {end}{more} by the lengths "
                f"in {path.name}; one of the two is truncated or belongs to another dataset"
            )

    def _check_documents(self) -> None:
        path, indices = self._index_path, self.document_indices
        if indices[0] != 0:
            raise DataError(f"{path}: document_indices starts with {indices[0]}, must be 0")
        if indices[-1] != self.num_sequences:
            raise DataError(
                f"{path}: document_indices ends with {indices[-1]}, must be sequence_count {self.num_sequences}"
            )
        for block in range(0, len(indices) - 1, _BLOCK):
            part = indices[block : block + _BLOCK + 1]
            falling = part[1:] < part[:-1]
            if falling.any():
                bad = block + int(np.argmax(falling))
                raise DataError(f"{path}: document_indices falls from entry {bad} to {bad + 1}")

    def _checked_description(self) -> Description | None:
        description = describe(self.prefix)
        if description is None:
            return None
        for name, described, actual in (
            ("num_documents", description["num_documents"], self.num_documents),
            ("num_tokens", description["num_tokens"], self.num_tokens),
        ):
            if described != actual:
                raise DataError(
                    f"{description_path(self.prefix)}: {name} is {described}, the dataset has "
                    f"{actual}; it belongs to another dataset: move it away"
                )
        return description


def _map_file(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The file as a read-only array; mmap refuses empty files, which are valid here."""
    with os_errors_as_data_errors(path):
        if path.stat().st_size == 0:
            return np.empty(0, dtype)
        return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)


def _index_arrays(
    index_bytes: NDArray[np.uint8], num_sequences: int, num_boundaries: int
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """Views of the three arrays; the counts have been checked (frombuffer takes -1 for "all")."""
    pointers_at = _HEADER.size + 4 * num_sequences
    documents_at = pointers_at + 8 * num_sequences
    return (
        np.frombuffer(index_bytes, "<i4", num_sequences, _HEADER.size),
        np.frombuffer(index_bytes, "<i8", num_sequences, pointers_at),
        np.frombuffer(index_bytes, "<i8", num_boundaries, documents_at),
    )


class IndexedWriter:
    """Writes PREFIX.bin/.idx (and what stands beside it) under temporary names; `close` renames them, .idx last.

    Leaving the `with` block by an exception removes what was written. A killed process leaves only
    `*.tmp` files, which the next writer of the same prefix takes over; of two live writers of one
    prefix the second is refused. Raises DataError when the folder cannot be written, a file of
    another kind would be replaced (see `output`), or a token id does not fit `dtype`.

    With `keep` the temporary file that `suspend` left stays as it is until `resume` is called, and
    that of a commit which ended half-way gets its temporary name back.
    """

    def __init__(self, prefix: str | Path, dtype: DTypeLike, keep: bool = False) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        assert self.dtype in _CODES, f"{self.dtype} cannot hold tokens"
        check_output(prefix)
        self._final = files_of(prefix)
        self._temporary = [temporary(path) for path in self._final]
        self._lengths, self._document_indices, self.num_tokens = array("i"), array("q", [0]), 0
        self._is_committing = False
        with os_errors_as_data_errors(self._final[0]):
            self._final[0].parent.mkdir(parents=True, exist_ok=True)
            if keep:
                self._take_back()
            self._tokens_file = _open_alone(self._temporary[0], keep)
        sweep_leftovers(domains_path(prefix))

    @property
    def num_documents(self) -> int:
        return len(self._document_indices) - 1

    def resume(self, num_bytes: int, lengths: bytes) -> None:
        """Go on after what is there: its first `num_bytes`, and the lengths (int32) of the documents in them, of one
        sequence each."""
        self._lengths = array("i", lengths)
        self._document_indices = array("q", range(len(self._lengths) + 1))
        self.num_tokens = num_bytes // self.dtype.itemsize
        with os_errors_as_data_errors(self._temporary[0]):
            self._tokens_file.truncate(num_bytes)

    def add_sequence(self, tokens: ArrayLike) -> None:
        """Append one sequence (token ids [T]) to the current document."""
        self._append(np.asarray(tokens), [np.size(tokens)])

    def end_document(self) -> None:
        """End the current document."""
        self._document_indices.append(len(self._lengths))

    def add_document(self, tokens: ArrayLike) -> None:
        """Append one document of one sequence: token ids [T]."""
        self.add_documents(np.asarray(tokens), [np.size(tokens)])

    def add_documents(self, tokens: NDArray[Any], lengths: Sequence[int]) -> None:
        """Append documents of one sequence each: token ids [T] end to end, lengths summing to T."""
        first = len(self._lengths) + 1
        self._append(tokens, lengths)
        self._document_indices.extend(range(first, len(self._lengths) + 1))

    def add_dataset(self, dataset: IndexedDataset) -> None:
        """Append all documents of a dataset as they are, its sequences and its empty documents too.

        Raises DataError when it stores tokens in another dtype.
        """
        if dataset.dtype != self.dtype:
            raise DataError(
                f"{dataset.prefix}: stores tokens as {dataset.dtype.name}, {self.prefix} as {self.dtype.name}; "
                "preprocess both with the same tokenizer"
            )
        first = len(self._lengths)
        with os_errors_as_data_errors(self._final[0]):
            for start in range(0, dataset.num_tokens, _BLOCK):
                self._tokens_file.write(dataset.tokens[start : start + _BLOCK].data)
        self._lengths.frombytes(dataset.lengths.tobytes())
        self._document_indices.frombytes((dataset.document_indices[1:] + first).tobytes())
        self.num_tokens += dataset.num_tokens

    def close(self, description: Description | None = None, keep: bool = False, domains: bytes | None = None) -> None:
        """Commit: the files appear under their final names and replace an earlier dataset there.

        After an error nothing is left, or, with `keep`, what another writer can `resume`; all is left
        once the old index is gone, since nothing else holds the dataset then.

        Args:
            description: for PREFIX.json; None removes that of an earlier dataset.
            keep: see above.
            domains: content of PREFIX.domains.safetensors, likewise.
        """
        assert self._document_indices[-1] == len(self._lengths), "the last document was not ended"
        described = None if description is None else encode_description(description)
        try:
            check_output(self.prefix)  # once more: hours may have gone by
            with os_errors_as_data_errors(self._final[0]):
                contents = (described, domains, self._index())
                for path, content in zip(self._temporary[1:], contents, strict=True):
                    if content is not None:
                        _write_durably(path, content)
                self._tokens_file.flush()
                os.fsync(self._tokens_file.fileno())
                self._commit([True, described is not None, domains is not None])
        except BaseException:
            (self.suspend if keep else self.discard)()
            raise
        self._tokens_file.close()

    def sync(self) -> int:
        """Makes the tokens so far durable; their bytes."""
        with os_errors_as_data_errors(self._temporary[0]):
            self._tokens_file.flush()
            os.fsync(self._tokens_file.fileno())
        return self.num_tokens * self.dtype.itemsize

    def suspend(self) -> None:
        """Stop and leave the temporary file; another writer can `resume` what was synced."""
        # Where a commit has ended after the old index went, this one says that the tokens without one are unfinished.
        is_cut_off = self._final[0].exists() and not self._final[-1].exists()
        self._remove(self._temporary[1:-1] if is_cut_off else self._temporary[1:])

    def discard(self) -> None:
        """Remove what was written; an earlier dataset of that name stays."""
        self._remove(self._temporary)

    def _remove(self, paths: Sequence[Path]) -> None:
        try:
            for path in () if self._is_committing else paths:
                path.unlink(missing_ok=True)
        finally:
            with suppress(OSError):  # flushing what is thrown away may fail on a full disk
                self._tokens_file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.discard()
        elif not self._tokens_file.closed:
            self.close()

    def _append(self, tokens: NDArray[Any], lengths: Sequence[int]) -> None:
        assert tokens.ndim == 1 and sum(lengths) == len(tokens)
        limits = np.iinfo(self.dtype)
        if (
            len(tokens)
            and tokens.dtype != self.dtype
            and not (limits.min <= tokens.min() and tokens.max() <= limits.max)
        ):
            bad = tokens.max() if tokens.max() > limits.max else tokens.min()
            raise DataError(
                f"{self._final[0]}: token id {bad} does not fit {self.dtype.name}, at most "
                f"{limits.max}; the vocabulary is larger than the dtype: write int32"
            )
        with os_errors_as_data_errors(self._final[0]):
            self._tokens_file.write(np.ascontiguousarray(tokens, self.dtype).data)
        self._lengths.extend(lengths)
        self.num_tokens += len(tokens)

    def _index(self) -> bytes:
        lengths = np.asarray(self._lengths, "<i4")
        sizes = lengths.astype("<i8") * self.dtype.itemsize
        documents = np.asarray(self._document_indices, "<i8")
        header = _HEADER.pack(MAGIC, _VERSION, _CODES[self.dtype], len(lengths), len(documents))
        pointers = np.cumsum(sizes) - sizes
        return header + lengths.tobytes() + pointers.tobytes() + documents.tobytes()

    def _commit(self, are_new: Sequence[bool]) -> None:
        """Rename; the old index goes first and the new one comes last, so that none stands by what is another's.

        Args:
            are_new: which of the other files this dataset has; an earlier one's are removed.
        """
        folder, (*others, index) = self._final[0].parent, zip(self._temporary, self._final, strict=True)
        self._is_committing = True
        index[1].unlink(missing_ok=True)
        fsync_path(folder)
        for (written, final), is_new in zip(others, are_new, strict=True):
            if is_new:
                os.replace(written, final)
            else:
                written.unlink(missing_ok=True)  # of a writer that was killed
                final.unlink(missing_ok=True)
        fsync_path(folder)
        os.replace(*index)
        self._is_committing = False
        fsync_path(folder)

    def _take_back(self) -> None:
        """The tokens of a commit that ended before the index was renamed: under their temporary name they are resumed,
        and the commit is done again."""
        tokens, index = self._final[0], self._final[-1]
        if self._temporary[0].exists() or not tokens.exists() or not self._is_unfinished(index):
            return
        with _open_alone(tokens, keep=True):  # whoever commits at this moment holds the file
            if self._is_unfinished(index):
                os.replace(tokens, self._temporary[0])

    @staticmethod
    def _is_unfinished(index: Path) -> bool:
        return temporary(index).exists() and not index.exists()


def _open_alone(path: Path, keep: bool) -> IO[bytes]:
    """Open `path` for writing, emptied unless `keep`, or raise DataError when a live process is writing it."""
    file = open(path, "ab")  # noqa: SIM115 (closed by the writer); "a" keeps what another writer has
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"{path}: another process is writing this dataset") from None
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            raise DataError(f"{path}: another process has just written this dataset; try again")
        if not keep:
            file.truncate(0)
    except BaseException:
        file.close()
        raise
    return file


def _write_durably(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
