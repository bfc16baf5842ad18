"""Tests megagrow/data/indexed.py: the format to the byte, malformed files, and commits."""

import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagrow.data import indexed
from megagrow.data.indexed import IndexedDataset, IndexedWriter, token_dtype
from megagrow.errors import DataError
from tests.data.kills import killed_after

DOCUMENTS = [[5, 6, 7], [65_000], [1, 2, 3, 4]]
MakeDataset = Callable[..., Path]


def index_bytes(
    magic: bytes = b"MMIDIDX\x00\x00",
    version: int = 1,
    code: int = 8,
    counts: tuple[int, int] = (3, 4),
    lengths: tuple[int, ...] = (3, 1, 4),
    pointers: tuple[int, ...] = (0, 6, 8),
    documents: tuple[int, ...] = (0, 1, 2, 3),
) -> bytes:
    """An index written field by field from the format's table, independently of the writer."""
    header = magic + struct.pack("<Q", version) + struct.pack("<B", code)
    header += struct.pack("<QQ", *(count % 2**64 for count in counts))
    body = struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(pointers)}q", *pointers)
    return header + body + struct.pack(f"<{len(documents)}q", *documents)


def test_written_bytes_are_megatrons(make_dataset: MakeDataset) -> None:
    prefix = make_dataset(DOCUMENTS)
    assert Path(f"{prefix}.idx").read_bytes() == index_bytes()
    assert Path(f"{prefix}.bin").read_bytes() == struct.pack("<8H", 5, 6, 7, 65_000, 1, 2, 3, 4)


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "c", "<i4") as writer:
        writer.add_sequence([1, 2])
        writer.add_sequence([70_000])
        writer.end_document()
        writer.end_document()  # an empty document, which Megatron can write too
        writer.add_sequence([])
        writer.add_sequence([9])
        writer.end_document()
    assert Path(f"{tmp_path}/c.idx").read_bytes() == index_bytes(
        code=4, counts=(4, 4), lengths=(2, 1, 0, 1), pointers=(0, 8, 12, 12), documents=(0, 2, 2, 4)
    )
    dataset = IndexedDataset(tmp_path / "c")
    assert [dataset.document(i).tolist() for i in range(3)] == [[1, 2, 70_000], [], [9]]
    assert [dataset[i].tolist() for i in range(4)] == [[1, 2], [70_000], [], [9]]


@pytest.mark.parametrize("dtype", ["<u1", "<i1", "<i2", "<u2", "<i4", "<i8"])
def test_every_token_dtype_comes_back(make_dataset: MakeDataset, dtype: str) -> None:
    limits = np.iinfo(dtype)
    dataset = IndexedDataset(make_dataset([[0, limits.max], [1]], dtype))
    assert dataset.dtype == np.dtype(dtype)
    assert dataset.tokens.tolist() == [0, limits.max, 1]
    assert (dataset.num_documents, dataset.num_tokens) == (2, 3)


def test_empty_dataset_is_valid(make_dataset: MakeDataset) -> None:
    dataset = IndexedDataset(make_dataset([]))
    assert (dataset.num_documents, dataset.num_sequences, dataset.num_tokens) == (0, 0, 0)


def test_token_dtype_switches_where_megatron_does() -> None:
    assert token_dtype(65_499) == np.dtype("<u2")
    assert token_dtype(65_500) == np.dtype("<i4")


@pytest.mark.parametrize(("tokens", "dtype"), [([65_536], "<u2"), ([-1], "<u2"), ([128], "<i1")])
def test_token_that_does_not_fit_is_refused(
    make_dataset: MakeDataset, tmp_path: Path, tokens: list[int], dtype: str
) -> None:
    with pytest.raises(DataError, match=rf"token id {tokens[0]} .* larger than the dtype"):
        make_dataset([[1], tokens], dtype)
    assert os.listdir(tmp_path) == []


MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "0 bytes, shorter than the 34-byte header"),
    "half a header": (index_bytes()[:20], "shorter than the 34-byte header"),
    "magic": (index_bytes(magic=b"MMIDIDX\x00\x01"), "magic"),
    "version": (index_bytes(version=2), "version is 2"),
    "unknown dtype": (index_bytes(code=9), "dtype code is 9"),
    "zero dtype": (index_bytes(code=0), "dtype code is 0"),
    "float dtype": (index_bytes(code=7), r"dtype code is 7 \(float32\)"),
    "negative sequence count": (index_bytes(counts=(-1, 4)), "sequence_count 18446744073709551615"),
    "huge sequence count": (index_bytes(counts=(2**62, 4)), "sequence_count 4611686018427387904"),
    "negative document count": (index_bytes(counts=(3, -1)), "document_count 18446744073709551615"),
    "count that wraps to the size": (index_bytes(counts=(3 + 2**61, 4)), "sequence_count"),
    "no document index": (index_bytes(counts=(3, 0)), "document_count is 0"),
    "count one short": (index_bytes(counts=(2, 4)), "must be 90"),
    "truncated": (index_bytes()[:-1], "truncated or has trailing bytes"),
    "trailing": (index_bytes() + b"\x00", "truncated or has trailing bytes"),
    "modes": (index_bytes() + b"\x00" * 3, "multimodal"),
    "negative length": (index_bytes(lengths=(3, -1, 6)), "length of sequence 1 is -1"),
    "lengths below .bin": (
        index_bytes(lengths=(3, 1, 3)),
        r"corpus.bin: 16 bytes, must be 14 .* corpus.idx",
    ),
    "lengths above .bin": (index_bytes(lengths=(3, 1, 2**31 - 1)), "corpus.bin: 16 bytes, must be"),
    "wrong item size": (index_bytes(code=4), "pointer of sequence 1 is 6, must be 12"),
    "negative pointer": (index_bytes(pointers=(0, -6, 8)), "pointer of sequence 1 is -6"),
    "pointer past .bin": (index_bytes(pointers=(0, 6, 16)), "pointer of sequence 2 is 16"),
    "overlapping": (index_bytes(pointers=(0, 4, 8)), "pointer of sequence 1 is 4, must be 6"),
    "first document": (index_bytes(documents=(1, 1, 2, 3)), "document_indices starts with 1"),
    "last document": (index_bytes(documents=(0, 1, 2, 2)), "document_indices ends with 2"),
    "falling documents": (index_bytes(documents=(0, 2, 1, 3)), "falls from entry 1 to 2"),
    "document far away": (index_bytes(documents=(0, 2**62, 2, 3)), "falls from entry 1 to 2"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_index_names_file_and_field(make_dataset: MakeDataset, case: str) -> None:
    prefix = make_dataset(DOCUMENTS)
    content, message = MALFORMED[case]
    Path(f"{prefix}.idx").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        IndexedDataset(prefix)
    assert "corpus." in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_missing_file_is_named(make_dataset: MakeDataset, suffix: str) -> None:
    prefix = make_dataset(DOCUMENTS)
    Path(f"{prefix}{suffix}").unlink()
    with pytest.raises(DataError, match=rf"corpus\{suffix}: no such file"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("change", [-1, 1])
def test_tokens_of_another_size_are_refused(make_dataset: MakeDataset, change: int) -> None:
    prefix = make_dataset(DOCUMENTS)
    path = Path(f"{prefix}.bin")
    path.write_bytes((path.read_bytes() + b"\x00")[: 16 + change])
    with pytest.raises(DataError, match=rf"corpus.bin: {16 + change} bytes, must be 16"):
        IndexedDataset(prefix)


def test_checks_go_on_past_the_first_block(make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 2 sequences: offsets must carry over, and faults in later blocks must be seen."""
    monkeypatch.setattr(indexed, "_BLOCK", 2)
    prefix = make_dataset([[i] * (i % 4) for i in range(11)])
    assert IndexedDataset(prefix).num_tokens == 15
    content = bytearray(Path(f"{prefix}.idx").read_bytes())
    for at, name in (
        (34 + 4 * 11 + 8 * 7, "pointer of sequence 7"),
        (34 + 12 * 11 + 8 * 9, "falls"),
    ):
        changed = content.copy()
        changed[at : at + 8] = struct.pack("<q", 100)
        Path(f"{prefix}.idx").write_bytes(changed)
        with pytest.raises(DataError, match=name):
            IndexedDataset(prefix)


FIELDS = [(0, 9), (9, 8), (17, 1), (18, 8), (26, 8)]
FIELDS += [(34 + 4 * i, 4) for i in range(3)] + [(46 + 8 * i, 8) for i in range(7)]
VALUES = st.one_of(
    st.integers(-4, 4),
    st.sampled_from([2**31 - 1, 2**32, 2**61 + 3, 2**62, 2**63 - 1, -(2**31), -(2**63)]),
    st.integers(-(2**63), 2**63 - 1),
)


@given(field=st.sampled_from(FIELDS), value=VALUES, cut=st.integers(-3, 40), tail=st.binary(max_size=9))
def test_fuzzed_index_is_refused_or_consistent(
    tmp_path_factory: pytest.TempPathFactory,
    field: tuple[int, int],
    value: int,
    cut: int,
    tail: bytes,
) -> None:
    """Any damage gives a DataError or a dataset whose parts fit, never another error or a crash."""
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    content = bytearray(index_bytes())
    at, width = field
    content[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
    (folder / "c.idx").write_bytes(bytes(content[: len(content) - max(0, cut)] + tail))
    (folder / "c.bin").write_bytes(bytes(16))
    try:
        dataset = IndexedDataset(folder / "c")
    except DataError as error:
        assert "c.idx" in str(error) or "c.bin" in str(error)
        return
    pieces = [dataset.document(i).tolist() for i in range(dataset.num_documents)]
    assert sum(pieces, []) == dataset.tokens.tolist() and dataset.num_tokens == 8


def test_exception_leaves_nothing_and_keeps_the_earlier_dataset(make_dataset: MakeDataset, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), IndexedWriter(tmp_path / "new", "<u2") as writer:
        writer.add_document([1, 2, 3])
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
    prefix = make_dataset(DOCUMENTS)
    with pytest.raises(ZeroDivisionError), IndexedWriter(prefix, "<u2") as writer:
        writer.add_document([8])
        raise ZeroDivisionError
    assert IndexedDataset(prefix).tokens.tolist() == sum(DOCUMENTS, [])
    assert sorted(os.listdir(tmp_path)) == ["corpus.bin", "corpus.idx"]


def test_death_at_any_system_call_leaves_old_or_new_or_nothing(
    make_dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new dataset has the old one's sizes: an index beside the wrong tokens would go unseen."""
    new = [[9, 9, 9], [8], [7, 7, 7, 7]]
    outcomes = []
    for fatal in range(100):
        prefix = make_dataset(DOCUMENTS)
        with killed_after(fatal, monkeypatch) as num_calls:
            make_dataset(new)
        try:
            outcomes.append(IndexedDataset(prefix).tokens.tolist())
        except DataError as error:
            assert "corpus.idx: no such file" in str(error)
            outcomes.append(None)
        if num_calls() <= fatal:
            break
    old_tokens, new_tokens = sum(DOCUMENTS, []), sum(new, [])
    assert outcomes[0] == old_tokens and outcomes[-1] == new_tokens and None in outcomes
    assert all(outcome in (old_tokens, new_tokens, None) for outcome in outcomes)
    assert sorted(os.listdir(tmp_path)) == ["corpus.bin", "corpus.idx"]


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    writer = IndexedWriter(tmp_path / "c", "<u2")
    writer.add_document([1])
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device"):
        writer.close()
    assert os.listdir(tmp_path) == []


def test_leftovers_of_a_killed_writer_are_taken_over(make_dataset: MakeDataset, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"corpus{suffix}.tmp").write_bytes(b"left over" * 100)
    assert IndexedDataset(make_dataset(DOCUMENTS)).num_tokens == 8
    assert sorted(os.listdir(tmp_path)) == ["corpus.bin", "corpus.idx"]


def test_two_live_writers_of_one_prefix_are_refused(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "c", "<u2") as first:
        first.add_document([1, 2])
        with pytest.raises(DataError, match="another process is writing"):
            IndexedWriter(tmp_path / "c", "<u2")
    assert IndexedDataset(tmp_path / "c").tokens.tolist() == [1, 2]


def test_fingerprint_depends_on_both_files(make_dataset: MakeDataset) -> None:
    prints = {
        IndexedDataset(make_dataset(token_lists)).fingerprint()
        for token_lists in (DOCUMENTS, [[5, 6, 7, 65_000], [1, 2, 3, 4]], [[5, 6, 7], [0], [1] * 4])
    }
    assert len(prints) == 3
    again = IndexedDataset(make_dataset(DOCUMENTS, name="again")).fingerprint()
    assert again in prints


def test_a_fingerprint_is_made_once_and_says_that_it_goes_on(
    make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[None] = []
    dataset = IndexedDataset(make_dataset(DOCUMENTS))
    first = dataset.fingerprint(lambda: notes.append(None))
    assert len(notes) == 2, "a block of the index, and one of the tokens"
    monkeypatch.setattr(indexed.hashlib, "sha256", None)
    assert dataset.fingerprint(lambda: notes.append(None)) == first and len(notes) == 2


def test_opening_copies_nothing(tmp_path: Path) -> None:
    """An index of 20 bytes per document is checked block by block, without a second one in memory."""
    count = 3 * indexed._BLOCK
    with IndexedWriter(tmp_path / "many", "u1") as writer:
        writer.add_documents(np.zeros(count, np.uint8), [1] * count)
    tracemalloc.start()
    try:
        dataset = IndexedDataset(tmp_path / "many")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert dataset.num_documents == count
    assert peak < 0.8 * (tmp_path / "many.idx").stat().st_size  # a few blocks of int64
