"""The built-in corpus: the source of the running interpreter's standard library.

Real text that every machine has: nothing to download and nothing to redistribute. It differs
between Python versions, so `build_corpus` records a hash of what it used.
"""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megagrow.data.indexed import IndexedDataset
from megagrow.data.preprocess import write_texts
from megagrow.data.tokenizer import load_tokenizer, train_sentencepiece
from megagrow.errors import DataError

VALIDATION_SHARE = 0.05
SPLITS = ("train", "validation")
_LEFT_OUT = {
    *("site-packages", "dist-packages", "__pycache__", "__phello__"),
    *("test", "tests", "idle_test"),
    *("encodings", "pydoc_data"),  # generated tables
    *("idlelib", "lib2to3", "turtledemo"),  # often packaged apart
}
_LEFT_OUT_PREFIXES = ("config-", "_sysconfigdata")  # written when this interpreter was built


@dataclass(frozen=True)
class Document:
    """One source file; `path` is relative to the library, with forward slashes."""

    path: str
    text: str

    @property
    def num_bytes(self) -> int:
        return len(self.text.encode("utf-8"))


def documents(limit_bytes: int | None = None, root: str | Path | None = None) -> list[Document]:
    """The standard library's Python files by relative path, each distinct text once.

    Files that are empty or not UTF-8 are left out. `limit_bytes` keeps a sample, chosen by a hash
    of the paths so that it does not lean to the start of the alphabet, with `VALIDATION_SHARE` of
    it for validation. Raises DataError when the library is not there as source files.
    """
    root = Path(sysconfig.get_path("stdlib") if root is None else root)
    found: dict[str, Document] = {}
    for path in sorted(_python_files(root)):
        text = _text(root / path)
        if text.strip():
            found.setdefault(text, Document(path, text))
    if not found:
        raise DataError(f"{root}: no Python source files; this interpreter comes without its library's source")
    kept = list(found.values())
    return kept if limit_bytes is None else _sample(kept, limit_bytes)


def split_by_file(files: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """(train, validation): a file is for validation when the hash of its path says so."""
    train = [file for file in files if not _is_validation(file.path)]
    validation = [file for file in files if _is_validation(file.path)]
    return train, validation


def build_corpus(output: str | Path, vocab_size: int, limit_bytes: int | None = None) -> bool:
    """Write OUTPUT/tokenizer.model and OUTPUT/{train,validation}.bin/.idx/.json.

    The tokenizer is trained on the training files only. Returns False when the folder already
    holds exactly this corpus. Raises DataError when it is too small for `vocab_size` or to split.
    """
    output = Path(output)
    parts = dict(zip(SPLITS, split_by_file(documents(limit_bytes)), strict=True))
    for split, files in parts.items():
        if not files:
            raise DataError(f"limit_bytes={limit_bytes} leaves no {split} file; raise the limit")
    settings: dict[str, str | int | None] = {
        "vocab_size": vocab_size,
        "limit_bytes": limit_bytes,
        "documents_sha256": _fingerprint(parts),
    }
    if _is_complete(output, settings):
        return False
    tokenizer = train_sentencepiece((file.text for file in parts["train"]), vocab_size, output / "tokenizer")
    for split, files in parts.items():
        write_texts(
            (file.text for file in files),
            tokenizer,
            output / split,
            split=split,
            source=f"standard library of Python {platform.python_version()}",
            settings=settings,
        )
    return True


def _python_files(root: Path) -> list[str]:
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _is_left_out(name)]
        for name in names:
            if name.endswith(".py") and not _is_left_out(name):
                paths.append((Path(folder) / name).relative_to(root).as_posix())
    return paths


def _is_left_out(name: str) -> bool:
    return name in _LEFT_OUT or name.startswith(_LEFT_OUT_PREFIXES)


def _text(path: Path) -> str:
    """The file's text; empty when it cannot be read or is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _sample(files: list[Document], limit_bytes: int) -> list[Document]:
    validation_bytes = int(limit_bytes * VALIDATION_SHARE)
    room = {True: validation_bytes, False: limit_bytes - validation_bytes}
    kept = []
    for file in sorted(files, key=lambda file: _hash("sample", file.path)):
        is_validation = _is_validation(file.path)
        if file.num_bytes <= room[is_validation]:
            room[is_validation] -= file.num_bytes
            kept.append(file)
    return sorted(kept, key=lambda file: file.path)


def _is_validation(path: str) -> bool:
    return _hash("split", path) < VALIDATION_SHARE


def _hash(purpose: str, path: str) -> float:
    """A number in [0, 1) that depends on the arguments only."""
    digest = hashlib.sha256(f"{purpose}:{path}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _fingerprint(parts: dict[str, list[Document]]) -> str:
    digest = hashlib.sha256()
    for split, files in parts.items():
        for file in files:
            digest.update(f"{split}\0{file.path}\0{file.num_bytes}\0{file.text}".encode())
    return digest.hexdigest()


def _is_complete(output: Path, settings: dict[str, str | int | None]) -> bool:
    try:
        fingerprint = load_tokenizer(output / "tokenizer.model").fingerprint
        found = [IndexedDataset(output / split).description for split in SPLITS]
    except DataError:
        return False
    return all(
        description is not None
        and description.get("source_settings") == settings
        and description["tokenizer_sha256"] == fingerprint
        for description in found
    )
