"""Tests ../../megagrow/compare/corpus.py: folders of text, what is held out, and hashes."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megagrow.compare.corpus import Corpus, make_corpus
from megagrow.data.indexed import IndexedDataset
from megagrow.data.tokenizer import load_tokenizer
from megagrow.errors import DataError
from tests.compare.conftest import VOCAB


def texts(corpus: Corpus, split: str) -> list[str]:
    dataset, tokenizer = IndexedDataset(corpus.folder / split), load_tokenizer(corpus.tokenizer)
    return [tokenizer.decode(dataset.document(i)[:-1].tolist()) for i in range(dataset.num_documents)]


def test_a_folder_that_says_what_is_held_out_is_taken_at_its_word(corpus: Corpus, text: Path) -> None:
    assert texts(corpus, "validation") == [(text / "valid" / "c.txt").read_text()]
    assert len(texts(corpus, "train")) == 3
    assert texts(corpus, "train")[0] == (text / "train" / "a.txt").read_text()
    assert corpus.facts()["train_documents"] == 3


def test_it_is_made_once_and_again_when_a_file_changes(corpus: Corpus, text: Path, tmp_path: Path) -> None:
    made = corpus.folder.stat().st_mtime_ns, (corpus.folder / "train.bin").stat().st_mtime_ns
    assert make_corpus(text, corpus.folder.parent, VOCAB) == corpus
    assert (corpus.folder.stat().st_mtime_ns, (corpus.folder / "train.bin").stat().st_mtime_ns) == made
    (tmp_path / "text").mkdir()
    for number in range(100):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number} words " * 40)
    first = make_corpus(tmp_path / "text", tmp_path, 280)
    (tmp_path / "text" / "7.txt").write_text("other words " * 40)
    second = make_corpus(tmp_path / "text", tmp_path, 280)
    assert first.sha256 != second.sha256 and first.folder != second.folder


def test_without_such_folders_some_texts_are_held_out_by_their_hash(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    written = {f"text {number} says {number * number} " * 20 for number in range(100)}
    for number, each in enumerate(sorted(written)):
        (tmp_path / "text" / f"{number}.txt").write_text(each)
    corpus = make_corpus(tmp_path / "text", tmp_path, 280)
    train, held_out = (set(texts(corpus, split)) for split in ("train", "validation"))
    assert train | held_out == written and not train & held_out
    assert 0 < len(held_out) < 15


def test_the_built_in_corpus_has_a_hash_of_its_documents(tmp_path: Path) -> None:
    corpus = make_corpus(None, tmp_path / "out", 512, limit_bytes=200_000)
    assert corpus.kind == "built-in" and len(corpus.sha256) == 64
    assert make_corpus(None, tmp_path / "out", 512, limit_bytes=200_000) == corpus
    moved = shutil.copytree(corpus.folder, tmp_path / "tokens")
    assert make_corpus(moved, tmp_path / "none", 512) == replace(corpus, folder=moved)


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no files"):
        make_corpus(tmp_path, tmp_path / "out", 300)
    (tmp_path / "only.txt").write_text("words and words " * 100)
    with pytest.raises(DataError, match="none is held out by its hash; make folders train and valid in it"):
        make_corpus(tmp_path, tmp_path.with_name("out"), 280)


def test_tokens_that_were_made_elsewhere_stand_for_their_text(corpus: Corpus, tmp_path: Path) -> None:
    """No text is read, and figures are known by the same hash."""
    moved = shutil.copytree(corpus.folder, tmp_path / "tokens")
    found = make_corpus(moved, tmp_path / "none", VOCAB)
    assert found == replace(corpus, folder=moved) and found.facts() == corpus.facts()
    assert not (tmp_path / "none").exists()
    with pytest.raises(DataError, match=r"corpus\.json: is not of tokens of 999 kinds"):
        make_corpus(moved, tmp_path / "none", 999)
