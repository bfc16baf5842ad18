"""Tests megagrow/data/output.py: writing a dataset replaces nothing but an earlier one of that name."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from megagrow.data.description import MAX_BYTES, describe
from megagrow.data.domains import Domains, domains_path, read_domains, write_domains
from megagrow.data.indexed import IndexedDataset, IndexedWriter
from megagrow.data.merge import merge_datasets
from megagrow.data.preprocess import preprocess_files, write_texts
from megagrow.data.tokenizer import ByteTokenizer
from megagrow.errors import ConfigError, DataError
from tests.data.kills import killed_after
from tests.data.test_preprocess import run_tool

MakeDataset = Callable[..., Path]
LINES = json.dumps({"text": "precious"}) + "\n"


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


@pytest.mark.parametrize("name", ["out.json", "out.bin.tmp", "out.journal.tmp", "out.domains.safetensors"])
def test_an_input_is_never_an_output(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(LINES)
    (tmp_path / "link").symlink_to(tmp_path / name)
    for path in (tmp_path / name, tmp_path / "link"):
        with pytest.raises(ConfigError, match=r"is an input.*give the output another name"):
            preprocess_files([path], "byte", tmp_path / "." / "out")
    assert contents(tmp_path) == dict.fromkeys((name, "link"), LINES.encode())


def test_the_tool_keeps_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.json").write_text(LINES)
    arguments = ["--input", tmp_path / "train.json", "--tokenizer", "byte", "--output", tmp_path / "train"]
    assert run_tool("preprocess_data.py", arguments, monkeypatch) == 2
    assert contents(tmp_path) == {"train.json": LINES.encode()}


@pytest.mark.parametrize("suffix", [".json", ".idx", ".bin", ".domains.safetensors"])
def test_a_file_of_another_kind_stays(make_dataset: MakeDataset, tmp_path: Path, suffix: str) -> None:
    """Whoever writes: preprocessing, merging, or texts from memory."""
    prefix, other = tmp_path / "c" / "corpus", make_dataset([[1]])
    (tmp_path / "a.jsonl").write_text(LINES)
    prefix.parent.mkdir()
    Path(f"{prefix}{suffix}").write_text(LINES)
    for write in (
        lambda: preprocess_files([tmp_path / "a.jsonl"], "byte", prefix),
        lambda: merge_datasets([other], prefix),
        lambda: write_texts(["a"], ByteTokenizer(), prefix, split="train", source="s"),
    ):
        with pytest.raises(DataError, match=rf"corpus{suffix}: .*move it away, or give the output another name"):
            write()
    assert contents(prefix.parent) == {f"corpus{suffix}": LINES.encode()}


def test_a_file_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "c", "<u2")
    writer.add_document([1])
    (tmp_path / "c.json").write_text(LINES)
    with pytest.raises(DataError, match=r"c.json: .*move it away"):
        writer.close()
    assert contents(tmp_path) == {"c.json": LINES.encode()}


def test_an_earlier_dataset_is_replaced(tmp_path: Path) -> None:
    """Whole, or what a killed commit left of it."""
    for missing in ("", "c.idx"):
        write_texts(["ab"], ByteTokenizer(), tmp_path / "c", split="train", source="s")
        write_domains(tmp_path / "c", Domains(("web",), np.zeros(1, np.int32)))
        if missing:
            (tmp_path / "c.idx").rename(tmp_path / "c.idx.tmp")
        write_texts(["xyz"], ByteTokenizer(), tmp_path / "c", split="train", source="s")
        assert IndexedDataset(tmp_path / "c").num_tokens == 4
        assert sorted(os.listdir(tmp_path)) == ["c.bin", "c.idx", "c.json"]


def test_a_large_foreign_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "c.json", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    monkeypatch.setattr(Path, "read_bytes", None)
    with pytest.raises(DataError, match=rf"c.json: {MAX_BYTES + 1} bytes, more than a description has.*move it away"):
        describe(tmp_path / "c")


def test_a_description_of_many_inputs_can_be_read_again(tmp_path: Path) -> None:
    source = "ü" * (8 << 20)
    write_texts(["ab"], ByteTokenizer(), tmp_path / "c", split="train", source=source)
    description = describe(tmp_path / "c")
    assert description is not None and description["source"].startswith("üü") and "…" in description["source"]


def domains_of(prefix: Path) -> list[str]:
    found = read_domains(domains_path(prefix), IndexedDataset(prefix))
    return [found.names[i] for i in found.ids]


def test_domains_go_with_the_dataset_that_they_are_of(tmp_path: Path) -> None:
    """Also where the next one has as many documents."""
    lines = [json.dumps({"text": "a", "source": source}) for source in ("web", "code")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    preprocess_files([tmp_path / "a.jsonl"], "byte", tmp_path / "out", domain_key="source")
    assert domains_of(tmp_path / "out") == ["web", "code"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[::-1]))
    preprocess_files([tmp_path / "a.jsonl"], "byte", tmp_path / "out")
    assert not domains_path(tmp_path / "out").exists()


def test_no_kill_leaves_old_domains_beside_a_new_dataset(
    make_dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = make_dataset([[1], [2]], name="old"), make_dataset([[3], [4]], name="new")
    right, seen = {1: ["old", "old"], 3: ["new", "new"]}, set()
    for fatal in range(60):
        merge_datasets([old], tmp_path / "out")
        with killed_after(fatal, monkeypatch) as num_calls:
            merge_datasets([new], tmp_path / "out")
        if (tmp_path / "out.idx").exists():
            first = int(IndexedDataset(tmp_path / "out").tokens[0])
            assert domains_of(tmp_path / "out") == right[first]
            seen.add(first)
        if num_calls() <= fatal:
            break
    assert seen == right.keys()


def test_merging_replaces_domains_with_the_dataset(make_dataset: MakeDataset, tmp_path: Path) -> None:
    a, b = make_dataset([[1], [2]], name="a"), make_dataset([[3], [4]], name="b")
    merge_datasets([a], tmp_path / "merged")
    merge_datasets([b], tmp_path / "merged")
    assert domains_of(tmp_path / "merged") == ["b", "b"]
    stored = safetensors.numpy.load_file(domains_path(tmp_path / "merged"))
    assert stored["domains"].tolist() == [0, 0]
