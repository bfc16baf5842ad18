"""Tests megagrow/data/journal.py: a killed preprocessing run goes on, and trusts nothing that it has not checked."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megagrow.data import indexed, journal, preprocess, records
from megagrow.data.indexed import IndexedDataset
from megagrow.data.preprocess import preprocess_files
from megagrow.data.progress import corpus_progress
from megagrow.data.tokenizer import ByteTokenizer
from megagrow.errors import DataError

SUFFIXES = (".bin", ".idx", ".json")
LEFT = [f"out.{name}.tmp" for name in ("bin", "journal", "lengths")]
KILLED = """
import os, signal, sys
from megagrow.data import journal, records
from megagrow.data.preprocess import preprocess_files
journal.SECONDS_BETWEEN_ENTRIES, records._BATCH_BYTES = 0.0, 300
add, left = journal.JournaledWriter.add, int(sys.argv[3])
def add_or_die(self, *args):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    add(self, *args)
journal.JournaledWriter.add = add_or_die
preprocess_files([sys.argv[1]], "byte", sys.argv[2], on_bad_line="skip")
"""


class Stop(Exception):
    """Ends a run in the middle."""


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SECONDS_BETWEEN_ENTRIES", 0.0)
    monkeypatch.setattr(records, "_BATCH_BYTES", 300)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    lines = [json.dumps({"text": f"document {i} " * (i % 7)}) for i in range(120)]
    lines[33] = "no JSON"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    return tmp_path / "a.jsonl"


def process(corpus: Path, name: str = "out", **options: Any) -> preprocess.Summary:
    return preprocess_files([corpus], "byte", corpus.parent / name, **{"on_bad_line": "skip", **options})


def stop_after(batches: int, corpus: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Runs into an error after some batches; what has been done stays."""
    add, left = journal.JournaledWriter.add, batches

    def add_or_stop(self: journal.JournaledWriter, *args: Any) -> None:
        nonlocal left
        if left == 0:
            raise Stop
        left -= 1
        add(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(journal.JournaledWriter, "add", add_or_stop)
        with pytest.raises(Stop):
            process(corpus, **options)


def assert_same(folder: Path) -> None:
    """The finished dataset equals one that was made without a stop, and nothing else is left."""
    process(folder / "a.jsonl", "whole")
    for suffix in SUFFIXES:
        assert (folder / f"out{suffix}").read_bytes() == (folder / f"whole{suffix}").read_bytes()
    assert not list(folder.glob("*.tmp*"))


@pytest.mark.parametrize("batches", [1, 5, 12])
def test_a_killed_process_goes_on_where_it_was(
    batches: int, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-c", KILLED, str(corpus), str(tmp_path / "out"), str(batches)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert sorted(name for name in os.listdir(tmp_path) if "tmp" in name) == LEFT
    done = json.loads((tmp_path / "out.journal.tmp").read_text())
    assert done["num_batches"] == batches
    encoded: list[int] = []
    batch = preprocess._Encoder.batch
    monkeypatch.setattr(preprocess._Encoder, "batch", lambda self, b: (encoded.append(b.first_line), batch(self, b))[1])
    summary = process(corpus)
    monkeypatch.undo()
    assert f"out: goes on after {done['num_documents']} documents" in capfd.readouterr().err
    assert min(encoded) > done["num_documents"]  # nothing is done again
    assert (summary.num_bad, summary.num_empty, len(summary.bad_examples)) == (1, 18, 1)
    monkeypatch.setattr(records, "_BATCH_BYTES", 300)
    assert_same(tmp_path)


def test_stops_may_be_many_and_workers_others(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(4):
        stop_after(2, corpus, monkeypatch)
    process(corpus, workers=2)
    assert_same(tmp_path)


def change_input(folder: Path) -> None:
    text = (folder / "a.jsonl").read_text()
    (folder / "a.jsonl").write_text(text.replace("document 1 ", "DOCUMENT 1 "))


def cut_input(folder: Path) -> None:
    (folder / "a.jsonl").write_text("".join((folder / "a.jsonl").read_text().splitlines(keepends=True)[:3]))


def flip(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[3] ^= 1
        (folder / name).write_bytes(content)

    return change


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, 2)


def rewrite(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "out.journal.tmp"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_input, "the input has changed since"),
        (cut_input, "the input has changed since"),
        (flip("out.bin.tmp"), "out.bin.tmp has changed since"),
        (flip("out.lengths.tmp"), "out.lengths.tmp has changed since"),
        (cut("out.bin.tmp"), "out.bin.tmp is shorter than it was"),
        (cut("out.journal.tmp"), "out.journal.tmp: not valid JSON"),
        (lambda folder: (folder / "out.lengths.tmp").unlink(), "out.lengths.tmp cannot be read"),
        (rewrite(num_batches=3), "the input has changed since"),
        (rewrite(num_documents=10**12), "is shorter than it was"),
        (rewrite(num_token_bytes=-1), "num_token_bytes is negative"),
        (rewrite(num_batches="4"), "num_batches is damaged"),
        (rewrite(num_batches=10**18), "the input has changed since"),
        (rewrite(num_bad=1, bad_examples=[]), "bad_examples are not those of num_bad lines"),
        (rewrite(num_bad=1, bad_examples=[7]), "bad_examples are not those of num_bad lines"),
        (rewrite(settings="x"), "tokenizer, options or names of inputs are others"),
        (rewrite(more=1), "out.journal.tmp: more is unknown"),
    ],
)
def test_what_is_not_as_it_was_is_done_anew(
    change: Callable[[Path], None],
    reason: str,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    stop_after(5, corpus, monkeypatch)
    change(tmp_path)
    process(corpus)
    shown = capfd.readouterr().err
    assert "starts anew" in shown and reason in shown and "goes on" not in shown
    assert_same(tmp_path)


def test_other_options_begin_anew(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(5, corpus, monkeypatch, append_eod=False)
    process(corpus)
    assert_same(tmp_path)


def test_another_end_of_document_begins_anew(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The files beside a tokenizer say it, and may change while the tokenizer stays."""
    stop_after(5, corpus, monkeypatch)
    monkeypatch.setattr(ByteTokenizer, "eod_id", 7)
    process(corpus)
    assert "starts anew, tokenizer, options" in capfd.readouterr().err
    assert 256 not in IndexedDataset(tmp_path / "out").tokens


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("failing", ["out.json", "out.idx"])
def test_a_commit_that_fails_is_done_again(
    failing: str,
    error: BaseException,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The tokens have their name already, the index has not."""
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if Path(target).name == failing:
            raise error
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises((DataError, KeyboardInterrupt)):
            process(corpus)
    left = set(os.listdir(tmp_path))
    assert left >= {"out.bin", "out.idx.tmp", "out.journal.tmp", "out.lengths.tmp"} and "out.idx" not in left
    assert process(corpus).num_documents == 101
    assert "goes on after 101 documents" in capfd.readouterr().err
    assert_same(tmp_path)


def test_a_commit_that_is_under_way_is_left_alone(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process must not take back the tokens whose index is about to appear."""
    replace, refusals = os.replace, list[str]()

    def meanwhile(source: Path, target: Path) -> None:
        if Path(target).name == "out.idx":
            with pytest.raises(DataError) as refused:
                process(corpus)
            refusals.append(str(refused.value))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", meanwhile)
        process(corpus)
    assert len(refusals) == 1 and "another process is writing this dataset" in refusals[0]
    assert_same(tmp_path)


def test_what_a_kill_left_of_other_files_is_swept(corpus: Path, tmp_path: Path) -> None:
    ours = ["out.journal.tmp.tmp-0123abcd", "out.domains.safetensors.tmp-89abcdef"]
    others = ["out.journal.tmp.tmp-x", "other.journal.tmp.tmp-0123abcd"]
    for name in (*ours, *others):
        (tmp_path / name).write_text("left")
    process(corpus)
    assert {name for name in os.listdir(tmp_path) if "tmp" in name} == set(others)


def test_the_rate_is_that_of_this_process(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(9, corpus, monkeypatch)
    seen: list[tuple[int, int, int]] = []

    def progress(label: str, total: int, console: Any = None, start: tuple[int, int, int] = (0, 0, 0)) -> Any:
        seen.append(start)
        return corpus_progress(label, total, console, start)

    monkeypatch.setattr(preprocess, "corpus_progress", progress)
    done = json.loads((tmp_path / "out.journal.tmp").read_text())
    process(corpus)
    position, num_documents, num_tokens = seen[0]
    assert (num_documents, num_tokens) == (done["num_documents"], done["num_token_bytes"] // 2)
    assert 2000 < position <= corpus.stat().st_size


def test_a_mended_line_goes_on_and_a_skipped_one_stops(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match=r"a.jsonl:34: not valid JSON"):
        process(corpus, on_bad_line="stop")
    text = corpus.read_text()
    corpus.write_text(text.replace("no JSON", '{"text": "mended"}'))
    process(corpus, on_bad_line="stop")
    assert "goes on after" in capfd.readouterr().err
    assert_same(tmp_path)
    corpus.write_text(text)
    stop_after(10, corpus, monkeypatch)
    with pytest.raises(DataError, match=r"a.jsonl:34: not valid JSON"):
        process(corpus, on_bad_line="stop")
    process(corpus)
    assert_same(tmp_path)


def test_a_stop_before_the_first_entry_leaves_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "SECONDS_BETWEEN_ENTRIES", 1e9)
    stop_after(9, corpus, monkeypatch)
    assert os.listdir(tmp_path) == ["a.jsonl"]
    assert process(corpus).num_documents == IndexedDataset(tmp_path / "out").num_documents


def test_of_two_processes_the_second_reads_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it could go on with what the first one has finished since."""
    stop_after(5, corpus, monkeypatch)
    take_up, refusals = journal.JournaledWriter._take_up, list[str]()

    def meanwhile(self: journal.JournaledWriter, *args: Any) -> bytes:
        monkeypatch.undo()
        with pytest.raises(DataError) as refused:
            process(corpus)
        refusals.append(str(refused.value))
        monkeypatch.setattr(records, "_BATCH_BYTES", 300)
        return take_up(self, *args)

    monkeypatch.setattr(journal.JournaledWriter, "_take_up", meanwhile)
    process(corpus)
    assert len(refusals) == 1 and "another process is writing this dataset" in refusals[0]
    assert_same(tmp_path)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_end_that_fails_loses_nothing(
    error: BaseException,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(path: Path, content: bytes) -> None:
        path.write_bytes(content[:9])
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(journal, "SECONDS_BETWEEN_ENTRIES", 1e9)
        patch.setattr(indexed, "_write_durably", fail)
        with pytest.raises((DataError, KeyboardInterrupt)):
            process(corpus)
    assert sorted(name for name in os.listdir(tmp_path) if name != "a.jsonl") == LEFT
    assert process(corpus).num_documents == 101
    assert "goes on after 101 documents" in capfd.readouterr().err
    assert_same(tmp_path)
