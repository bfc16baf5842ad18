"""Tests megagrow/data/domains.py: which domain documents and samples are of."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from megagrow.data import domains as domains_module
from megagrow.data.dataset import PackedDataset
from megagrow.data.description import describe
from megagrow.data.domains import Domains, domains_path, joined_domains, read_domains, write_domains
from megagrow.data.indexed import IndexedDataset, IndexedWriter
from megagrow.data.merge import merge_datasets
from megagrow.data.preprocess import preprocess_files
from megagrow.errors import DataError
from tests.data.test_preprocess import run_tool

MakeDataset = Callable[..., Path]


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def domains_of(prefix: Path) -> list[str]:
    found = read_domains(domains_path(prefix), IndexedDataset(prefix))
    return [found.names[i] for i in found.ids]


LINES: list[Any] = [
    {"text": "one", "source": "web"},
    {"text": "  ", "source": "left out"},
    {"text": "two", "source": "code"},
    "",
    {"text": "three", "source": "web"},
    {"text": "four"},
    {"text": "five", "source": 7},
    {"text": "six", "source": ["no name"]},
]


@pytest.mark.parametrize("workers", [1, 2])
def test_preprocessing_notes_the_domain_of_every_document(tmp_path: Path, workers: int) -> None:
    lines = write_lines(tmp_path / "a.jsonl", LINES)
    (tmp_path / "notes.txt").write_text("plain text")
    inputs = [lines, tmp_path / "notes.txt"]
    summary = preprocess_files(inputs, "byte", tmp_path / "out", domain_key="source", workers=workers)
    assert domains_of(tmp_path / "out") == ["web", "code", "web", "(none)", "7", "(none)", "notes.txt"]
    assert summary.num_by_domain == {"web": 2, "code": 1, "(none)": 2, "7": 1, "notes.txt": 1}
    assert summary.num_documents == 7


def test_a_key_may_lead_into_objects(tmp_path: Path) -> None:
    """As in the Pile; a key that has a dot itself comes first."""
    lines = [{"text": "a", "meta": {"set": "x"}}, {"text": "b", "meta.set": "y", "meta": {"set": "x"}}, {"text": "c"}]
    inputs = [write_lines(tmp_path / "a.jsonl", lines)]
    preprocess_files(inputs, "byte", tmp_path / "out", domain_key="meta.set")
    assert domains_of(tmp_path / "out") == ["x", "y", "(none)"]


def test_lines_that_are_left_out_have_no_domain(tmp_path: Path) -> None:
    lines = ["no json", {"source": "web"}, {"text": "a", "source": "code"}, {"text": "\ud800", "source": "web"}]
    inputs = [write_lines(tmp_path / "a.jsonl", lines)]
    preprocess_files(inputs, "byte", tmp_path / "out", domain_key="source", on_bad_line="skip")
    assert domains_of(tmp_path / "out") == ["code"]
    with pytest.raises(DataError, match="a.jsonl:1: not valid JSON"):
        preprocess_files(inputs, "byte", tmp_path / "other", domain_key="source")


def test_without_a_key_nothing_is_written(tmp_path: Path) -> None:
    summary = preprocess_files([write_lines(tmp_path / "a.jsonl", LINES)], "byte", tmp_path / "out")
    assert not domains_path(tmp_path / "out").exists() and summary.num_by_domain == {}


def test_a_key_that_names_each_document_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domains_module, "MAX_DOMAINS", 3)
    inputs = [write_lines(tmp_path / "a.jsonl", [{"text": "a", "url": str(i)} for i in range(5)])]
    with pytest.raises(DataError, match="url gives more than 3 domains; use a key that many documents share"):
        preprocess_files(inputs, "byte", tmp_path / "out", domain_key="url")
    assert not list(tmp_path.glob("out*"))


def test_the_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines, output = write_lines(tmp_path / "a.jsonl", LINES), tmp_path / "out"
    arguments = ["--input", lines, "--tokenizer", "byte", "--output", output, "--domain-key", "source"]
    assert run_tool("preprocess_data.py", arguments, monkeypatch) == 0
    assert "domain web: 2 documents" in capsys.readouterr().out


def test_merging_joins_domains(make_dataset: MakeDataset, tmp_path: Path) -> None:
    """A dataset without domains is one of its own."""
    a, b, c = (make_dataset([[1], [2]], name=name) for name in "abc")
    write_domains(a, Domains(("x", "y"), np.array([1, 0], np.int32)))
    write_domains(b, Domains(("y", "z"), np.array([1, 0], np.int32)))
    merge_datasets([a, b, c], tmp_path / "merged")
    assert domains_of(tmp_path / "merged") == ["y", "x", "z", "y", "c", "c"]


def test_datasets_of_one_name_stay_apart(make_dataset: MakeDataset, tmp_path: Path) -> None:
    prefixes = [tmp_path / folder / "train" for folder in "ab"]
    for prefix in prefixes:
        with IndexedWriter(prefix, "<u2") as writer:
            writer.add_document([1])
            writer.close()
    merge_datasets(prefixes, tmp_path / "merged")
    assert domains_of(tmp_path / "merged") == [str(prefix) for prefix in prefixes]


def test_a_sample_is_of_the_domain_of_most_of_its_inputs(make_dataset: MakeDataset) -> None:
    """Four inputs each: aaaa | aabb, of equals the first | bbbc | cccc; the last token is a label only."""
    lengths, domains = [6, 0, 5, 6], Domains(("a", "empty", "b", "c"), np.arange(4, dtype=np.int32))
    dataset = PackedDataset(make_dataset([[1] * length for length in lengths]), 4)
    assert domains.of_samples(dataset).ids.tolist() == [0, 0, 2, 3]
    backwards = Domains(("c", "b", "empty", "a"), np.arange(3, -1, -1, dtype=np.int32))
    assert backwards.of_samples(dataset).ids.tolist() == [3, 1, 1, 0]


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 2)), min_size=1, max_size=12),
    st.integers(1, 5),
)
def test_domains_of_samples_follow_from_their_documents(documents: list[tuple[int, int]], seq_length: int) -> None:
    """Against a count of every input, one by one."""
    ends = np.cumsum([length for length, _ in documents])
    num_samples = max((int(ends[-1]) - 1) // seq_length, 0)

    indexed = SimpleNamespace(document_ends=ends)
    dataset = SimpleNamespace(indexed=indexed, seq_length=seq_length, num_samples=num_samples)
    ids = np.array([domain for _, domain in documents], np.int32)
    found = Domains(("a", "b", "c"), ids).of_samples(dataset)
    of_token = [domain for length, domain in documents for _ in range(length)]
    inputs = [of_token[i * seq_length : (i + 1) * seq_length] for i in range(num_samples)]
    assert found.ids.tolist() == [max(range(3), key=lambda d, x=x: (x.count(d), -d)) for x in inputs]


@pytest.mark.parametrize(
    ("ids", "metadata", "message"),
    [
        ([0, 1, 0], {"domains": '{"names": ["a", "b"]}'}, r"domains is int32 \[3\], must be whole numbers \[2\]"),
        ([0.0, 1.0], {"domains": '{"names": ["a", "b"]}'}, r"domains is float64 \[2\], must be whole numbers"),
        ([0, 2], {"domains": '{"names": ["a", "b"]}'}, r"domains lie in \[0, 2\], there are 2 names"),
        ([0, -1], {"domains": '{"names": ["a", "b"]}'}, r"domains lie in \[-1, 0\]"),
        ([0, 1], None, "holds no tensor and metadata called domains"),
        ([0, 1], {"domains": "[]"}, "must hold a JSON object"),
        ([0, 1], {"domains": "{"}, "not valid JSON"),
        ([0, 1], {"domains": '{"names": []}'}, "must be a list of names"),
        ([0, 1], {"domains": '{"names": ["a", 1]}'}, "must be a list of names"),
        ([0, 1], {"domains": '{"names": ["a", "a"]}'}, "the name a stands twice"),
    ],
)
def test_files_that_are_wrong(
    make_dataset: MakeDataset, tmp_path: Path, ids: list[Any], metadata: dict[str, str] | None, message: str
) -> None:
    dataset = IndexedDataset(make_dataset([[1], [2]]))
    values = np.array(ids, np.int32 if isinstance(ids[0], int) else np.float64)
    path = tmp_path / "x.domains.safetensors"
    path.write_bytes(safetensors.numpy.save({"domains": values}, metadata))
    with pytest.raises(DataError, match=message) as error:
        read_domains(path, dataset)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 9, b"{}", b"x" * 100])
def test_files_that_are_no_such_files(make_dataset: MakeDataset, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"/x: (not a safetensors file|no such file)"):
        read_domains(path, IndexedDataset(make_dataset([[1]])))


def test_names_that_are_no_text_become_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one", "src": "caf\\ud800"}\n{"text": "two", "src": "b"}\n')
    other = tmp_path / os.fsdecode(b"caf\xe9.txt")
    other.write_text("three")
    preprocess_files([tmp_path / "a.jsonl", other], "byte", tmp_path / "out", domain_key="src")
    dataset = IndexedDataset(tmp_path / "out")
    assert read_domains(domains_path(tmp_path / "out"), dataset).names == ("caf?", "b", "caf?.txt")
    assert describe(tmp_path / "out")["source"] == "a.jsonl, caf?.txt"


def test_more_domains_than_a_file_may_have_are_not_merged(
    make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = [IndexedDataset(make_dataset([[number]], name=name)) for number, name in enumerate("abc")]
    monkeypatch.setattr(domains_module, "MAX_DOMAINS", 2)
    assert len(joined_domains(datasets[:2]).names) == 2
    with pytest.raises(DataError, match="c: with its domains there are more than 2; merge fewer"):
        joined_domains(datasets)
