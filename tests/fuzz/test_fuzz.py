"""A share of `make fuzz`, the watch that it keeps, and what large files may take."""

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from megagrow.data.description import describe
from megagrow.data.indexed import IndexedDataset, IndexedWriter
from megagrow.errors import DataError
from tests.fuzz.campaign import all_fields
from tests.fuzz.fields import Field, count_refusals
from tests.fuzz.watch import Misbehaved, refusal, watching

PER_FIELD = 2


def test_every_field_refuses_what_is_malformed(tmp_path: Path) -> None:
    counts = []
    for field in all_fields(tmp_path):
        with watching():
            counts.append(count_refusals(field, PER_FIELD))
    assert len(counts) > 200 and set(counts) == {PER_FIELD}


def test_it_holds_without_asserts(tmp_path: Path) -> None:
    command = [sys.executable, "-O", "-m", "tests.fuzz.campaign", "--per-field", "10", "--only", ".idx"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=240)
    assert done.returncode == 0, done.stderr
    assert "100" in done.stdout and "asserts off" in done.stdout


def hang() -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("read", "problem"),
    [
        (lambda: {}["missing"], "KeyError"),
        (lambda: np.zeros(8 << 20, np.uint8).sum(), "took 8"),
        (lambda: torch.empty(2 << 30, dtype=torch.uint8), "RuntimeError|MemoryError"),
        (lambda: np.empty(2 << 30, np.uint8), "MemoryError|took"),
        (hang, "no answer"),
    ],
    ids=["crash", "8 MiB", "2 GiB by torch", "2 GiB untouched", "hang"],
)
def test_the_watch_sees_what_it_watches_for(
    read: Callable[[], Any], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.fuzz.watch.SECONDS", 1.0)
    with watching(), pytest.raises(Misbehaved, match=problem):
        refusal(read, 1000)
    with watching():
        assert refusal(lambda: None, 1000) is None


def test_what_is_accepted_or_badly_named_is_reported(tmp_path: Path) -> None:
    def silent() -> None:
        raise DataError("something is wrong")

    for read, problem in ((lambda: None, "it is accepted"), (silent, "does not name f.bin")):
        field = Field("format", "field", tmp_path / "f.bin", st.binary(), read, "field")
        with watching(), pytest.raises(Misbehaved, match=problem):
            count_refusals(field, 3)


def traced_peak(read: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_large_malformed_index_takes_less_than_twice_its_size(tmp_path: Path) -> None:
    """Refused by its last element, so that all others have been looked at."""
    with IndexedWriter(tmp_path / "c", "<u2") as writer:
        writer.add_documents(np.zeros(1 << 20, np.uint16), [1] * (1 << 20))
    path = tmp_path / "c.idx"
    content = bytearray(path.read_bytes())
    for at, number in ((len(content) - 8, 5), (34 + 12 * (1 << 20) - 8, 5)):
        changed = bytearray(content)
        changed[at : at + 8] = number.to_bytes(8, "little")
        path.write_bytes(changed)
        assert traced_peak(lambda: IndexedDataset(tmp_path / "c")) < 2 * len(content)


def test_large_json_takes_a_bounded_multiple_of_its_size(tmp_path: Path) -> None:
    """Python's parser makes an object of 56 bytes and a place of 8 for every `[],`: the worst that text can do."""
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"source": [[]] * 300_000}, separators=(",", ":")))
    size = path.stat().st_size
    assert traced_peak(lambda: describe(tmp_path / "c")) < 30 * size
