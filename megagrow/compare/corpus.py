"""The text of a comparison, tokenized once: a folder of files, or the built-in corpus.

    FOLDER/train/… FOLDER/valid/…     what is trained on, and what is held out
    FOLDER/…                          one text of twenty is held out, by its hash
    FOLDER/corpus.json                tokens that were made elsewhere, for a machine that should not make them again

Files are those of `data.records`: .jsonl (key `text`), anything else is one document; .gz and .zst are decompressed.
Figures are known by the hash of these files, not by their names.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megagrow.data.builtin import SPLITS, VALIDATION_SHARE, build_corpus
from megagrow.data.files import os_errors_as_data_errors, write_atomically
from megagrow.data.indexed import IndexedDataset
from megagrow.data.preprocess import write_texts
from megagrow.data.records import read_texts
from megagrow.data.tokenizer import train_sentencepiece
from megagrow.errors import DataError
from megagrow.json_file import parse_object

HELD_OUT = ("valid", "validation")  # names of the folder
TOKENIZER_BYTES = 16 << 20  # of text that the tokenizer is trained on
DONE = "corpus.json"
TEXT_FILES = "text files"  # the kind of a corpus whose facts name none


@dataclass(frozen=True)
class Corpus:
    """Token files.

    Attributes:
        folder: where they are: tokenizer.model and train and validation.bin/.idx/.json.
        kind: `built-in` or `text files`.
        sha256: of what they were made from.
    """

    folder: Path
    kind: str
    sha256: str

    @property
    def train(self) -> str:
        """Prefix of the token files that are trained on."""
        return str(self.folder / "train")

    @property
    def validation(self) -> str:
        """Prefix of those that are held out."""
        return str(self.folder / "validation")

    @property
    def tokenizer(self) -> str:
        """The sentencepiece model that made both."""
        return str(self.folder / "tokenizer.model")

    def facts(self) -> dict[str, str | int]:
        """What a report says about it."""
        counts = {split: IndexedDataset(self.folder / split) for split in SPLITS}
        documents = {f"{split}_documents": each.num_documents for split, each in counts.items()}
        tokens = {f"{split}_tokens": each.num_tokens for split, each in counts.items()}
        return {"kind": self.kind, "sha256": self.sha256, **documents, **tokens}


def make_corpus(data: Path | None, output: Path, vocab_size: int, limit_bytes: int | None = None) -> Corpus:
    """The corpus in `output`, made if it is not there.

    Args:
        data: a folder of text, or of the tokens of one; None: the built-in corpus.
        output: a folder for corpora.
        vocab_size: of the tokenizer, which is trained on the text that is trained on.
        limit_bytes: of the built-in corpus; None: all of it.

    Raises:
        DataError: a file cannot be read, or there is too little text.
    """
    if data is None:
        folder = output / f"builtin-{vocab_size}"
        build_corpus(folder, vocab_size, limit_bytes)
        description = IndexedDataset(folder / "train").description
        assert description is not None, "it has just been written"
        corpus = Corpus(folder, "built-in", str(description["source_settings"]["documents_sha256"]))
        if not _is_complete(corpus, vocab_size):
            _complete(corpus, vocab_size)
        return corpus
    if (data / DONE).is_file():
        return _made_elsewhere(data, vocab_size)
    files = _files(data)
    sha256 = _hash_of(files, data)
    folder = output / f"{sha256[:12]}-{vocab_size}"
    corpus = Corpus(folder, TEXT_FILES, sha256)
    if not _is_complete(corpus, vocab_size):
        _write(corpus, files, data, vocab_size)
        _complete(corpus, vocab_size)
    return corpus


def _made_elsewhere(folder: Path, vocab_size: int) -> Corpus:
    path = folder / DONE
    facts = parse_object(path.read_bytes(), path, DataError, "tokenize the text again")
    corpus = Corpus(folder, str(facts.get("kind", TEXT_FILES)), str(facts.get("sha256")))
    if facts != _facts(corpus, vocab_size):
        raise DataError(f"{path}: is not of tokens of {vocab_size} kinds, which this comparison is about: {facts}")
    return corpus


def _files(data: Path) -> list[Path]:
    with os_errors_as_data_errors(data):
        found = sorted(path for path in data.rglob("*") if path.is_file() and not path.name.startswith("."))
    if _split_folders(data):
        found = [path for path in found if path.relative_to(data).parts[0] in ("train", *HELD_OUT)]
    if not found:
        raise DataError(f"{data}: holds no files; give a folder of text (.jsonl, .txt; .gz and .zst too)")
    return found


def _split_folders(data: Path) -> bool:
    """Whether the folder says itself what is held out."""
    return (data / "train").is_dir() and any((data / name).is_dir() for name in HELD_OUT)


def _hash_of(files: list[Path], data: Path) -> str:
    digest = hashlib.sha256()
    for path in files:
        with os_errors_as_data_errors(path), path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(data).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def _facts(corpus: Corpus, vocab_size: int) -> dict[str, str | int]:
    kind = {} if corpus.kind == TEXT_FILES else {"kind": corpus.kind}
    return {**kind, "sha256": corpus.sha256, "vocab_size": vocab_size}


def _is_complete(corpus: Corpus, vocab_size: int) -> bool:
    path = corpus.folder / DONE
    if not path.is_file():
        return False
    return parse_object(path.read_bytes(), path, DataError, "remove its folder") == _facts(corpus, vocab_size)


def _complete(corpus: Corpus, vocab_size: int) -> None:
    """Says what the token files are of, once they are there."""
    write_atomically(corpus.folder / DONE, (json.dumps(_facts(corpus, vocab_size)) + "\n").encode())


def _write(corpus: Corpus, files: list[Path], data: Path, vocab_size: int) -> None:
    prefix = corpus.folder / "tokenizer"
    tokenizer = train_sentencepiece(_texts(files, data, False), vocab_size, prefix, TOKENIZER_BYTES)
    for split in SPLITS:
        texts = _texts(files, data, split == "validation")
        write_texts(texts, tokenizer, corpus.folder / split, split=split, source=corpus.kind)


def _texts(files: list[Path], data: Path, held_out: bool) -> Iterator[str]:
    """The texts that are held out, or the others."""
    if _split_folders(data):
        yield from read_texts([path for path in files if (path.relative_to(data).parts[0] != "train") == held_out])
        return
    found = False
    for text in read_texts(files):
        if _is_held_out(text) == held_out:
            found = True
            yield text
    if not found:
        raise DataError(f"{data}: of so few texts none is held out by its hash; make folders train and valid in it")


def _is_held_out(text: str) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48 < VALIDATION_SHARE
