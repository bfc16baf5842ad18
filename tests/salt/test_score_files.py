"""Folders of scores that are not what they should be."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from megagrow.errors import DataError
from megagrow.salt.records import MANIFEST_FILE, Cost
from megagrow.salt.score_files import SCORES_FILE, identity_of, is_complete, read_scores, write_scores
from tests.salt.samples import opened, random_corpus

SEQ_LENGTH, NUM_SAMPLES = 4, 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good folder of scores, beside its corpus."""
    dataset = opened(random_corpus(tmp_path / "corpus", NUM_SAMPLES, SEQ_LENGTH), SEQ_LENGTH)
    identity = identity_of(dataset, "model", 10, "float32")
    write_scores(tmp_path / "scores", arrays(), identity, Cost(1.5, 2e9, 12))
    return tmp_path / "scores"


def arrays() -> dict[str, Any]:
    return {
        "median_in_top_k": np.array([1, 2, 3], np.float32),
        "median_zero": np.array([0, 2, 0], np.float32),
        "mean_nll": np.array([4, 5, 6], np.float32),
        "in_top_k_fraction": np.array([0.5, 1, 0.25], np.float32),
        "num_tokens": np.array([4, 4, 4], np.int32),
    }


def read(folder: Path, seq_length: int = SEQ_LENGTH) -> Any:
    return read_scores(folder, opened(folder.parent / "corpus", seq_length))


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((folder / MANIFEST_FILE).read_text())
    change(data)
    (folder / MANIFEST_FILE).write_text(json.dumps(data))


def change_arrays(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the arrays and their hash, as a program with a bug would."""
    content = arrays()
    change(content)
    raw = safetensors.numpy.save(content)
    (folder / SCORES_FILE).write_bytes(raw)
    digest = hashlib.sha256(raw).hexdigest()
    change_manifest(folder, lambda data: data.update(scores_sha256=digest))


def refusal(folder: Path, seq_length: int = SEQ_LENGTH) -> str:
    """The message, which is one line and names a file in the folder."""
    with pytest.raises(DataError) as error:
        read(folder, seq_length)
    message = str(error.value)
    assert "\n" not in message and str(folder) in message
    return message


def test_what_was_written_is_read(folder: Path) -> None:
    scores = read(folder)
    expected = arrays()
    assert np.array_equal(scores.num_tokens, expected.pop("num_tokens"))
    assert list(scores.values) == list(expected)
    for name, value in expected.items():
        assert scores.values[name].dtype == np.float32
        assert np.array_equal(scores.values[name], value)
    assert scores.cost == Cost(1.5, 2e9, 12)
    assert scores.identity.seq_length == SEQ_LENGTH and scores.identity.tokenizer_sha256 == ""
    assert scores.sha256 == hashlib.sha256((folder / SCORES_FILE).read_bytes()).hexdigest()


def test_unknown_flops_stay_unknown(folder: Path) -> None:
    write_scores(folder, arrays(), read(folder).identity, Cost(1.5, None, 12))
    assert read(folder).cost.flops is None


def test_a_missing_folder(tmp_path: Path) -> None:
    random_corpus(tmp_path / "corpus", NUM_SAMPLES, SEQ_LENGTH)
    assert "no such file; make scores with tools/score_corpus.py" in refusal(tmp_path / "no")


def test_an_unfinished_folder(folder: Path) -> None:
    (folder / MANIFEST_FILE).unlink()
    (folder / "shards").mkdir()
    assert "the work is unfinished: run tools/score_corpus.py again" in refusal(folder)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"", b"[" * 100_000])
def test_a_manifest_that_is_not_json(folder: Path, content: bytes) -> None:
    (folder / MANIFEST_FILE).write_bytes(content)
    assert "manifest.json: not valid JSON" in refusal(folder)


def test_a_manifest_that_is_a_list(folder: Path) -> None:
    (folder / MANIFEST_FILE).write_text("[1]")
    assert "manifest.json: must hold a JSON object, has list" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format_version=2), "format_version is 2, must be 1"),
        (lambda d: d.pop("identity"), "field identity is missing"),
        (lambda d: d.pop("scores_sha256"), "field scores_sha256 is missing"),
        (lambda d: d["identity"].pop("top_k"), "field top_k is missing"),
        (lambda d: d["identity"].update(top_k="10"), "field top_k is .* wrong type \\('10'\\)"),
        (lambda d: d["identity"].update(top_k=True), "field top_k is .* wrong type"),
        (lambda d: d["identity"].update(mask_documents=0), "field mask_documents is .* wrong type"),
        (lambda d: d["identity"].update(tokenizer_sha256="0"), "tokenizer_sha256 is '0', must be a sha256"),
        (lambda d: d["identity"].update(variant=1), "unknown field variant"),
        (lambda d: d["cost"].update(flops="many"), "field flops is .* wrong type"),
        (lambda d: d["identity"].update(corpus_sha256="0"), "corpus_sha256 is 0, that of .*corpus"),
        (lambda d: d["identity"].update(num_samples=4), "num_samples is 4, that of .* is 3"),
        (lambda d: d.update(scores_sha256="0"), "its sha256 is not the manifest's"),
    ],
)
def test_wrong_fields(folder: Path, change: Callable[[Any], Any], message: str) -> None:
    change_manifest(folder, change)
    with pytest.raises(DataError, match=message):
        read(folder)
    refusal(folder)


def test_scores_of_another_sample_length(folder: Path) -> None:
    assert "seq_length is 4, that of" in refusal(folder, seq_length=5)


def test_a_missing_scores_file(folder: Path) -> None:
    (folder / SCORES_FILE).unlink()
    assert "scores.safetensors: no such file, but a manifest" in refusal(folder)


def test_a_truncated_scores_file(folder: Path) -> None:
    (folder / SCORES_FILE).write_bytes((folder / SCORES_FILE).read_bytes()[:-1])
    assert "its sha256 is not the manifest's scores_sha256" in refusal(folder)


def test_a_scores_file_of_another_format(folder: Path) -> None:
    (folder / SCORES_FILE).write_bytes(b"scores")
    digest = hashlib.sha256(b"scores").hexdigest()
    change_manifest(folder, lambda data: data.update(scores_sha256=digest))
    assert "not a safetensors file" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("mean_nll"), "must hold median_in_top_k, median_zero, mean_nll"),
        (lambda a: a.update(extra=np.zeros(3)), "holds extra, in_top_k_fraction"),
        (
            lambda a: a.update(mean_nll=np.zeros(3)),
            r"mean_nll is float64 \[3\], must be float32 \[3\]",
        ),
        (
            lambda a: a.update(num_tokens=np.zeros(4, np.int32)),
            r"num_tokens is int32 \[4\], must be int32 \[3\]",
        ),
    ],
)
def test_wrong_arrays(folder: Path, change: Callable[[Any], Any], message: str) -> None:
    change_arrays(folder, change)
    with pytest.raises(DataError, match=message):
        read(folder)
    refusal(folder)


def test_a_changed_corpus(folder: Path) -> None:
    tokens = (folder.parent / "corpus.bin").read_bytes()
    (folder.parent / "corpus.bin").write_bytes(tokens[:-2] + b"\x05\x00")
    assert "corpus_sha256 is" in refusal(folder)


def test_a_complete_folder_must_be_whole(folder: Path) -> None:
    identity = read(folder).identity
    assert is_complete(folder, identity)
    assert not is_complete(folder.parent / "none", identity)
    (folder / SCORES_FILE).unlink()
    with pytest.raises(DataError, match="no such file, but a manifest"):
        is_complete(folder, identity)


def test_the_manifest_of_something_else_is_not_taken_over(folder: Path) -> None:
    """A checkpoint has a manifest.json too."""
    identity = read(folder).identity
    (folder / MANIFEST_FILE).write_text('{"format_version": 1, "step": 3, "config": {}}')
    with pytest.raises(DataError, match="not a file of scores, choose another folder"):
        is_complete(folder, identity)
