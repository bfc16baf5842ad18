"""Tests megagrow/data/merge.py: nothing but the order of documents changes, and what does not fit is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megagrow.data.indexed import IndexedDataset, IndexedWriter
from megagrow.data.merge import merge_datasets
from megagrow.data.preprocess import write_texts
from megagrow.data.tokenizer import ByteTokenizer
from megagrow.errors import DataError
from tests.data.test_preprocess import run_tool

MakeDataset = Callable[..., Path]


def test_a_merged_dataset_is_what_writing_all_at_once_gives(make_dataset: MakeDataset, tmp_path: Path) -> None:
    parts = [[[1, 2], [], [3]], [], [[4, 5, 6]]]
    prefixes = [make_dataset(part, name=f"part{i}") for i, part in enumerate(parts)]
    merge_datasets(prefixes, tmp_path / "merged")
    whole = make_dataset([tokens for part in parts for tokens in part], name="whole")
    for suffix in (".bin", ".idx"):
        assert Path(f"{tmp_path}/merged{suffix}").read_bytes() == Path(f"{whole}{suffix}").read_bytes()


def test_documents_of_several_sequences_stay_documents(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", "<i4") as writer:
        for tokens in ([1, 2], [3]):
            writer.add_sequence(tokens)
        writer.end_document()
    merged = merge_datasets([tmp_path / "a", tmp_path / "a"], tmp_path / "b")
    assert merged.document_indices.tolist() == [0, 2, 4]
    assert [merged.document(i).tolist() for i in range(2)] == [[1, 2, 3], [1, 2, 3]]


def test_descriptions_are_merged(tmp_path: Path) -> None:
    for name in "ab":
        write_texts([name * 3], ByteTokenizer(), tmp_path / name, split="train", source=name, settings={"x": 1})
    description = merge_datasets([tmp_path / "a", tmp_path / "b"], tmp_path / "c").description
    assert description is not None and "source_settings" not in description
    assert (description["num_documents"], description["num_tokens"], description["source"]) == (2, 8, "a, b")


def test_what_does_not_fit_is_refused_and_nothing_is_written(make_dataset: MakeDataset, tmp_path: Path) -> None:
    short, wide = make_dataset([[1]], name="short"), make_dataset([[1]], "<i4", name="wide")
    with pytest.raises(DataError, match=r"wide: stores tokens as int32, .*merged as uint16"):
        merge_datasets([short, wide], tmp_path / "merged")
    with pytest.raises(DataError, match="short is an input too"):
        merge_datasets([short, wide], tmp_path / "." / "short")
    for name, split in (("train", "train"), ("held", "validation")):
        write_texts(["text"], ByteTokenizer(), tmp_path / name, split=split, source=name)
    with pytest.raises(DataError, match=r"split differs .*merge only"):
        merge_datasets([tmp_path / "train", tmp_path / "held"], tmp_path / "merged")
    assert not list(tmp_path.glob("merged*"))


def test_the_tool(
    make_dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix, output = make_dataset([[1, 2], [3]]), tmp_path / "merged"
    assert run_tool("merge_datasets.py", ["--output", output, "--input", prefix, prefix], monkeypatch) == 0
    assert capsys.readouterr().out == f"{output}: 4 documents, 6 tokens\n"
    assert IndexedDataset(output).tokens.tolist() == np.tile([1, 2, 3], 2).tolist()
    assert run_tool("merge_datasets.py", ["--output", output, "--input", tmp_path / "none"], monkeypatch) == 3
    assert "none.idx: no such file" in capsys.readouterr().err
