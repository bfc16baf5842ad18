"""`tools/cache_teacher.py` as it is called from a shell."""

import json
from pathlib import Path

import pytest

from megagrow.flops import forward_flops
from megagrow.salt import TeacherCache
from tests.salt.samples import SMALL, random_corpus
from tests.salt.work import options, run_tool


def run_here(*arguments: object) -> int:
    return run_tool("cache_teacher", *arguments)


def arguments_for(model: Path, corpus: Path, output: Path, *more: object) -> list[object]:
    return [*options(model=model, data=corpus, output=output, seq_length=8), *more]


def test_targets_are_written_and_their_size_shown(
    tmp_path: Path,
    model: Path,
    corpus: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ("--top-k", 3, "--temperature", 0.5, "--samples", "0.5")
    arguments = arguments_for(model, corpus, tmp_path / "cache", *more)
    assert run_here(*arguments) == 0
    shown, cache = capsys.readouterr(), TeacherCache(tmp_path / "cache")
    assert "10 samples, 80 tokens" in shown.out and f"the cache is in {tmp_path / 'cache'}" in shown.out
    assert f"{cache.num_bytes:,} bytes, {cache.num_bytes / 80:.1f} per token" in shown.out
    assert "caching step 10/10" in shown.err and "nats per token" in shown.err
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    expected = {"kind": "top_k", "num_entries": 3, "temperature": 0.5, "dtype": "float32", "mask_documents": False}
    assert expected.items() <= manifest["identity"].items()
    assert manifest["cost"]["flops"] == forward_flops(SMALL, 80, 8)
    assert run_here(*arguments) == 0  # and leaves it alone
    assert json.loads((tmp_path / "cache" / "manifest.json").read_text()) == manifest


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (["--model", "nowhere"], 4, "nowhere: no such folder"),
        (["--data", "nowhere"], 3, "nowhere.idx: no such file"),
        (["--top-k", "0"], 2, "top_k=0, sampled=0: exactly one of them"),
        (["--sampled", "4"], 2, "top_k=3, sampled=4: exactly one of them"),
        (["--temperature", "0"], 2, "temperature=0.0 must be positive"),
        (["--samples", "5:99"], 2, "samples=5:99 must lie in 0:20"),
        (["--tensor", "2"], 2, "--tensor 2 does not divide the 1 launched ranks"),
        (["--unknown"], 2, "--unknown"),
    ],
)
def test_wrong_arguments(
    tmp_path: Path,
    model: Path,
    corpus: Path,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    code: int,
    message: str,
) -> None:
    assert run_here(*arguments_for(model, corpus, tmp_path / "cache", "--top-k", 3), *change) == code
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not (tmp_path / "cache").exists()


def test_a_model_that_does_not_fit(
    tmp_path: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = arguments_for(model, random_corpus(tmp_path / "random", 20, 8), tmp_path / "cache", "--sampled", 4)
    assert run_here(*arguments) == 3
    assert "do not fit this data" in capsys.readouterr().err
    assert run_here(*arguments, "--skip-source-check") == 0
    assert TeacherCache(tmp_path / "cache").identity.kind == "sampled"
