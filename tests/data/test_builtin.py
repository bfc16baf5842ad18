"""Tests megagrow/data/builtin.py: which files, two disjoint splits, and building once."""

import os
from pathlib import Path

import pytest

from megagrow.data import builtin
from megagrow.data.builtin import build_corpus, documents, split_by_file
from megagrow.data.dataset import PackedDataset
from megagrow.data.indexed import IndexedDataset
from megagrow.data.tokenizer import load_tokenizer, train_sentencepiece
from megagrow.errors import ConfigError, DataError


def test_the_library_is_real_text_without_tests_and_tables() -> None:
    found = documents()
    paths = [file.path for file in found]
    assert paths == sorted(paths) and "argparse.py" in paths and "json/decoder.py" in paths
    folders = {part for path in paths for part in path.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "encodings", "__pycache__"}
    assert not [path for path in paths if path.startswith(("/", "_sysconfigdata", "config-"))]
    assert sum(file.num_bytes for file in found) > 5_000_000


def test_splits_are_disjoint_in_files_and_in_texts() -> None:
    train, validation = split_by_file(documents())
    assert not {file.path for file in train} & {file.path for file in validation}
    assert not {file.text for file in train} & {file.text for file in validation}
    assert 0.02 < len(validation) / (len(train) + len(validation)) < 0.09


def test_a_file_keeps_its_side_when_others_change() -> None:
    train, validation = split_by_file(documents(limit_bytes=1_000_000))
    all_train, all_validation = split_by_file(documents())
    assert set(train) < set(all_train) and set(validation) < set(all_validation)


@pytest.mark.parametrize("limit", [200_000, 1_000_000, 3_000_000])
def test_limit_keeps_a_mixed_sample_and_the_share(limit: int) -> None:
    train, validation = split_by_file(documents(limit_bytes=limit))
    total = sum(file.num_bytes for file in train + validation)
    assert 0.9 * limit < total <= limit
    assert 0.02 < sum(file.num_bytes for file in validation) / total <= 0.06
    assert any(file.path > "m" for file in train) and any(file.path < "m" for file in train)


def test_duplicates_bad_encodings_and_empty_files_are_left_out(tmp_path: Path) -> None:
    for name, content in {
        "b.py": b"x = 1\n",
        "a.py": b"x = 1\n",  # the same text as b.py: one of them could be on the other side
        "latin.py": b"# \xe9\n",
        "empty.py": b"",
        "blank.py": b"\n\n",
        "notes.txt": b"text",
        "package/c.py": "# é\r\n".encode(),
        "site-packages/d.py": b"y = 2\n",
        "package/tests/e.py": b"z = 3\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    found = [(file.path, file.text) for file in documents(root=tmp_path)]
    assert found == [("a.py", "x = 1\n"), ("package/c.py", "# é\r\n")]


def test_interpreter_without_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no Python source files"):
        documents(root=tmp_path)


def test_corpus_holds_exactly_the_documents_of_its_split(tmp_path: Path) -> None:
    assert build_corpus(tmp_path, vocab_size=400, limit_bytes=200_000)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    parts = dict(zip(builtin.SPLITS, split_by_file(documents(200_000)), strict=True))
    for split, files in parts.items():
        dataset = IndexedDataset(tmp_path / split)
        stored = [dataset.document(i).tolist() for i in range(dataset.num_documents)]
        assert [tokenizer.decode(ids) for ids in stored] == [file.text for file in files]
        assert all(ids[-1] == tokenizer.eod_id for ids in stored)
        assert dataset.description is not None
        assert dataset.description["split"] == split
        assert dataset.description["vocab_size"] == tokenizer.vocab_size == 400
        assert dataset.description["tokenizer_sha256"] == tokenizer.fingerprint
        assert PackedDataset(tmp_path / split, 64, vocab_size=400).num_samples > 10


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    paths = [folder / name for name in os.listdir(folder)]
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def test_building_again_touches_nothing_and_repairs_what_is_broken(tmp_path: Path) -> None:
    build_corpus(tmp_path, vocab_size=400, limit_bytes=100_000)
    before = contents(tmp_path)
    assert not build_corpus(tmp_path, vocab_size=400, limit_bytes=100_000)
    assert contents(tmp_path) == before
    for name in before:
        (tmp_path / name).write_bytes(before[name][0][:-2])
        assert build_corpus(tmp_path, vocab_size=400, limit_bytes=100_000)
        after = contents(tmp_path)
        assert {n: c for n, (c, _) in after.items()} == {n: c for n, (c, _) in before.items()}
    train_sentencepiece(["other text " * 50], 270, tmp_path / "tokenizer")
    assert build_corpus(tmp_path, vocab_size=400, limit_bytes=100_000)  # token files of another
    assert build_corpus(tmp_path, vocab_size=410, limit_bytes=100_000)
    assert build_corpus(tmp_path, vocab_size=410, limit_bytes=110_000)


def test_limits_that_leave_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="limit_bytes=100 leaves no (train|validation) file; raise"):
        build_corpus(tmp_path / "out", 400, limit_bytes=100)
    with pytest.raises(ConfigError, match="vocab_size=100"):
        build_corpus(tmp_path / "out", 100, limit_bytes=100_000)
    assert not (tmp_path / "out").exists()
