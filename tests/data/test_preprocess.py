"""Tests megagrow/data/preprocess.py, description.py, progress.py, and the three tools end to end."""

import gzip
import io
import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from megagrow.data import preprocess
from megagrow.data.builtin import Document
from megagrow.data.dataset import PackedDataset
from megagrow.data.description import describe
from megagrow.data.indexed import IndexedDataset
from megagrow.data.preprocess import preprocess_files, write_texts
from megagrow.data.progress import corpus_progress
from megagrow.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, load_tokenizer
from megagrow.errors import ConfigError, DataError

TOOLS = Path(__file__).parents[2] / "tools"
END = 256  # the byte tokenizer's end of a document


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def stored(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    return [dataset.document(i).tolist() for i in range(dataset.num_documents)]


def test_documents_in_input_order_each_ended(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "a.jsonl", [{"body": "ab"}, {"body": " \n"}, {"body": "c"}])
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"d\n"))
    (tmp_path / "c.txt").write_bytes(b"")
    inputs = [first, tmp_path / "b.txt.gz", tmp_path / "c.txt"]
    summary = preprocess_files(inputs, "byte", tmp_path / "out", json_key="body")
    assert stored(tmp_path / "out") == [[97, 98, END], [99, END], [100, 10, END]]
    assert (summary.num_documents, summary.num_tokens, summary.num_bad) == (3, 8, 0)
    assert summary.num_empty == 1
    assert describe(tmp_path / "out") == {
        "tokenizer": "byte",
        "tokenizer_sha256": ByteTokenizer().fingerprint,
        "vocab_size": 257,
        "eod_id": END,
        "num_documents": 3,
        "num_tokens": 8,
        "split": "train",
        "source": "a.jsonl, b.txt.gz, c.txt",
    }


def test_without_end_of_document(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": "ab"}, {"text": "c"}])
    preprocess_files([source], "byte", tmp_path / "out", append_eod=False, split="validation")
    assert stored(tmp_path / "out") == [[97, 98], [99]]
    description = describe(tmp_path / "out")
    assert description is not None
    assert description["eod_id"] is None and description["split"] == "validation"


def test_workers_give_the_same_bytes(
    tmp_path: Path,
    trained: SentencePieceTokenizer,
    library: list[Document],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("megagrow.data.records._BATCH_BYTES", 5000)  # more batches than in flight
    trained.save(tmp_path)
    records = [{"text": file.text[:3000]} for file in library] * 2
    lines = write_lines(tmp_path / "a.jsonl", [*records[:9], "bad", *records[9:], {"no": 1}])
    for workers in (1, 2):
        summary = preprocess_files(
            [lines],
            tmp_path / "tokenizer.model",
            tmp_path / f"out{workers}",
            workers=workers,
            on_bad_line="skip",
        )
        assert summary.num_bad == 2
        assert [line.split(": ")[0] for line in summary.bad_examples] == [
            f"{lines}:10",
            f"{lines}:{len(records) + 2}",
        ]
    with pytest.raises(DataError, match=r"a.jsonl:10: must be a JSON object"):
        preprocess_files([lines], tmp_path / "tokenizer.model", tmp_path / "out2", workers=2)
    for suffix in ("bin", "idx", "json"):
        one, two = (tmp_path / f"out{workers}.{suffix}" for workers in (1, 2))
        assert one.read_bytes() == two.read_bytes()


def test_bad_line_stops_and_leaves_nothing(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [{"text": "fine"}, {"text": 3}])
    with pytest.raises(DataError, match=r"a.jsonl:2: 'text' must be a string.*--on-bad-line skip"):
        preprocess_files([lines], "byte", tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_record_that_is_too_long_is_a_bad_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr("megagrow.data.records._MAX_RECORD_BYTES", 100)
    lines = write_lines(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b" * 5000}, {"text": "c"}])
    (tmp_path / "b.txt").write_text("x" * 101)
    inputs = [lines, tmp_path / "b.txt"]
    summary = preprocess_files(inputs, "byte", tmp_path / "out", on_bad_line="skip", workers=workers)
    assert stored(tmp_path / "out") == [[97, END], [99, END]]
    assert summary.bad_examples[0] == f"{lines}:2: larger than 100 bytes"
    assert summary.bad_examples[1].startswith(f"{tmp_path}/b.txt:1: larger than 100 bytes; ")
    assert "JSON lines" in summary.bad_examples[1]
    with pytest.raises(DataError, match=r"a.jsonl:2: larger than 100 bytes; mend the line or use --on-bad-line skip"):
        preprocess_files(inputs, "byte", tmp_path / "other", workers=workers)


@pytest.mark.parametrize("records", [[], [{"text": ""}], [{"text": "\n "}], [{"other": "x"}]])
def test_input_without_text_is_refused_and_leaves_nothing(tmp_path: Path, records: list[Any]) -> None:
    lines = write_lines(tmp_path / "a.jsonl", records)
    with pytest.raises(DataError, match=r"a.jsonl: no text in it"):
        preprocess_files([lines], "byte", tmp_path / "out", on_bad_line="skip")
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_failure_in_the_middle_keeps_the_earlier_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_texts(["old"], ByteTokenizer(), tmp_path / "out", split="train", source="s")
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    monkeypatch.setattr("megagrow.data.records._BATCH_BYTES", 1)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "new"}\n' * 99)[:-9])
    with pytest.raises(DataError, match="damaged or truncated"):
        preprocess_files([tmp_path / "a.jsonl.gz"], "byte", tmp_path / "out")
    (tmp_path / "a.jsonl.gz").unlink()
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def die(_: object) -> None:
    os._exit(9)


def test_a_worker_that_dies_is_an_error_not_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "_encode_in_worker", die)
    lines = write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(DataError, match="a tokenizing process died"):
        preprocess_files([lines], "byte", tmp_path / "out", workers=2)
    assert os.listdir(tmp_path) == ["a.jsonl"]


ENDLESS = """
import sys, time
from megagrow.data import preprocess
def workers():
    return [process.pid for process in __import__("multiprocessing").active_children()]
def endless():
    while True:
        yield from preprocess.read_batches([sys.argv[1]])
if __name__ == "__main__":
    for _ in preprocess._encode_in_processes(endless(), 2, ("byte", "text", True)):
        print(*workers(), flush=True)
"""


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(ENDLESS)
    (tmp_path / "a.txt").write_text("text")
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "a.txt")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(is_running(pid) for pid in workers)


def is_running(pid: int) -> bool:
    """Whether the process is there, and is no zombie that nobody has asked for its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_workers_of_the_tool_need_no_torch() -> None:
    code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__mp_main__'); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(TOOLS / "preprocess_data.py")], check=True)


def test_wrong_arguments(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(ConfigError, match="workers=0"):
        preprocess_files([lines], "byte", tmp_path / "out", workers=0)
    with pytest.raises(DataError, match="absent.model: no such tokenizer"):
        preprocess_files([lines], tmp_path / "absent.model", tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file"):
        preprocess_files([lines], "byte", tmp_path / "file" / "out")


def test_description_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    prefix = tmp_path / "out"
    write_texts(["ab"], ByteTokenizer(), prefix, split="train", source="s")
    path = tmp_path / "out.json"
    good = json.loads(path.read_text())
    cases: list[tuple[Any, str]] = [
        ({**good, "num_tokens": 4}, "num_tokens is 4, the dataset has 3"),
        ({**good, "vocab_size": "257"}, "field vocab_size"),
        ({**good, "vocab_size": True}, "field vocab_size"),
        ({**good, "eod_id": -1}, "field eod_id is -1"),
        ({k: v for k, v in good.items() if k != "tokenizer"}, "field tokenizer is missing"),
        ([good], "must hold a JSON object"),
    ]
    for fields, message in cases:
        path.write_text(json.dumps(fields))
        with pytest.raises(DataError, match=rf"out.json: .*{message}"):
            IndexedDataset(prefix)
    for content in (b"{", b"\xff", b"[" * 10**5):
        path.write_bytes(content)
        with pytest.raises(DataError, match="out.json: not valid JSON"):
            describe(prefix)
    path.unlink()
    assert describe(prefix) is None and IndexedDataset(prefix).description is None


def test_a_dataset_without_description_removes_the_old_one(tmp_path: Path) -> None:
    write_texts(["ab"], ByteTokenizer(), tmp_path / "c", split="train", source="s")
    with preprocess.IndexedWriter(tmp_path / "c", "<u2") as writer:
        writer.add_document([1])
    assert IndexedDataset(tmp_path / "c").description is None


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=120)
    with corpus_progress("tokenizing", 2_000_000, terminal) as report:
        report(1_000_000, 10, 1000)
    assert "tokenizing" in screen.getvalue() and "documents/s" in screen.getvalue()
    monkeypatch.setattr("megagrow.data.progress._SECONDS_BETWEEN_LINES", 0.0)
    with corpus_progress("tokenizing", 2_000_000, Console(file=io.StringIO())) as report:
        report(1_000_000, 10, 1000)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("tokenizing: 50.0 %, ") and "\x1b" not in lines[0]


def test_time_left_of_a_resumed_pass_follows_from_its_own_speed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megagrow.data.progress._SECONDS_BETWEEN_LINES", 0.0)
    clock = iter([0.0, *[10.0] * 9])
    monkeypatch.setattr("megagrow.data.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    start = (900_000, 9_000, 90_000)
    with corpus_progress("tokenizing", 1_000_000, Console(file=io.StringIO()), start) as report:
        report(910_000, 9_100, 91_000)
    assert capsys.readouterr().err == "tokenizing: 91.0 %, 10 documents/s, 100 tokens/s, 90 s left\n"


def run_tool(name: str, arguments: list[object], monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    monkeypatch.syspath_prepend(str(TOOLS))
    with pytest.raises(SystemExit) as finished:
        runpy.run_path(str(TOOLS / name), run_name="__main__")
    return finished.value.code


def test_tools_end_to_end(
    tmp_path: Path,
    library: list[Document],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [{"text": file.text} for file in library])
    arguments = ["--input", lines, "--vocab-size", 400, "--output", tmp_path / "t"]
    assert run_tool("train_tokenizer.py", arguments, monkeypatch) == 0
    arguments = ["--input", lines, "--tokenizer", tmp_path / "t.model"]
    arguments += ["--output", tmp_path / "data/train", "--append-eod"]
    assert run_tool("preprocess_data.py", arguments, monkeypatch) == 0
    out = capsys.readouterr().out
    assert f"{len(library)} documents" in out and "0 bad" in out
    dataset = PackedDataset(tmp_path / "data/train", 32, vocab_size=400)
    tokenizer = load_tokenizer(tmp_path / "t.model")
    first = dataset.indexed.document(0)
    assert tokenizer.decode(first.tolist()) == library[0].text and first[-1] == tokenizer.eod_id


def test_builtin_corpus_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--output", tmp_path, "--vocab-size", 400, "--limit-bytes", 100_000]
    for said in ("written", "already complete"):
        assert run_tool("make_builtin_corpus.py", arguments, monkeypatch) == 0
        assert capsys.readouterr().out.count(said) == 2


@pytest.mark.parametrize(
    ("tool", "arguments", "code", "message"),
    [
        ("preprocess_data.py", [], 2, "the following arguments are required"),
        (
            "preprocess_data.py",
            ["--input", "x", "--tokenizer", "byte", "--output", "o", "--workers", "two"],
            2,
            "invalid int value",
        ),
        (
            "preprocess_data.py",
            ["--input", "absent", "--tokenizer", "byte", "--output", "o"],
            3,
            "absent: no such input file",
        ),
        (
            "train_tokenizer.py",
            ["--input", "absent", "--vocab-size", "300", "--output", "o"],
            3,
            "absent: no such input file",
        ),
        ("train_tokenizer.py", ["--input", "x", "--vocab-size", "3", "--output", "o"], 2, "vocab_size=3"),
        ("make_builtin_corpus.py", ["--output", "o", "--limit-bytes", "9"], 3, "limit_bytes=9"),
    ],
)
def test_tools_say_errors_in_one_line(
    tool: str,
    arguments: list[object],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_tool(tool, arguments, monkeypatch) == code
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1
    assert os.listdir(tmp_path) == []
