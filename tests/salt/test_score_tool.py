"""`tools/score_corpus.py` as it is called from a shell."""

import json
from pathlib import Path
from unittest import mock

import pytest

from megagrow.flops import forward_flops
from tests.ranks import run_ranks
from tests.salt.samples import SMALL, random_corpus
from tests.salt.work import options, run_tool, times

SEQ_LENGTH = 8


def run_here(*arguments: object) -> int:
    return run_tool("score_corpus", *arguments)


def arguments_for(model: Path, corpus: Path, output: Path) -> list[object]:
    return options(model=model, data=corpus, output=output, seq_length=8, top_k=3)


def test_scores_are_written_and_shown(
    tmp_path: Path, model: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = arguments_for(model, corpus, tmp_path / "scores")
    assert run_here(*arguments) == 0
    shown = capsys.readouterr()
    assert "20 samples, 160 tokens" in shown.out
    assert f"scores are in {tmp_path / 'scores'}" in shown.out
    assert "scoring step 20/20" in shown.err and "nats per token" in shown.err
    manifest = json.loads((tmp_path / "scores" / "manifest.json").read_text())
    assert manifest["identity"]["top_k"] == 3 and manifest["identity"]["dtype"] == "float32"
    assert manifest["cost"]["flops"] == forward_flops(SMALL, 160, 8)
    before = times(tmp_path / "scores")
    assert run_here(*arguments) == 0
    assert before == times(tmp_path / "scores")


def test_fast_ranks_wait_for_slow_ones(tmp_path: Path, model: Path, corpus: Path) -> None:
    """Ten minutes, after which a collective of training is given up, are little beside a pass over a corpus."""
    with mock.patch("megagrow.parallel.mesh.init_distributed", return_value=1) as init:
        assert run_here(*arguments_for(model, corpus, tmp_path / "scores")) == 0
    (seconds,) = init.call_args.args
    assert seconds >= 24 * 3600


def test_it_runs_on_several_ranks(tmp_path: Path, model: Path, corpus: Path) -> None:
    """One process, then two tensor x two data ranks."""
    for name, tensor, world in (("one", 1, 1), ("four", 2, 4)):
        arguments = arguments_for(model, corpus, tmp_path / name)
        codes = run_ranks(run_here, world, *arguments, "--tensor", tensor, "--batch-size", 3)
        assert codes == [0] * world
    read = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("one", "four")]
    assert read[0]["identity"] == read[1]["identity"]


def test_a_model_that_does_not_fit(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = random_corpus(tmp_path / "random", 20, SEQ_LENGTH)
    arguments = arguments_for(model, corpus, tmp_path / "scores")
    assert run_here(*arguments) == 3
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ") and "do not fit this data" in message
    assert "\n" not in message
    assert run_here(*arguments, "--skip-source-check") == 0


def test_tokens_outside_the_vocabulary(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = random_corpus(tmp_path / "other", 20, SEQ_LENGTH, vocab=300)
    assert run_here(*arguments_for(model, corpus, tmp_path / "scores")) == 3
    assert "vocab_size is 29" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (["--model", "nowhere"], 4, "nowhere: no such folder"),
        (["--data", "nowhere"], 3, "nowhere.idx: no such file"),
        (["--seq-length", "1000000"], 3, "too few for one sample"),
        (["--seq-length", "0"], 2, "seq_length=0 must be positive"),
        (["--top-k", "0"], 2, "top_k=0 must be positive"),
        (["--tensor", "2"], 2, "--tensor 2 does not divide the 1 launched ranks"),
        (["--precision", "fp8"], 2, "--precision"),
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
    assert run_here(*arguments_for(model, corpus, tmp_path / "scores"), *change) == code
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not (tmp_path / "scores").exists()
