"""`tools/evaluate.py` as it is called from a shell."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest

from megagrow.checkpoint import hf
from megagrow.checkpoint.source import open_source
from megagrow.errors import DataError
from megagrow.evaluate import write_result
from tests.evaluate.samples import BYTES, TEXTS, write_texts
from tests.growth.models import make, tensors_of
from tests.ranks import run_ranks

TOOL = Path(__file__).parents[2] / "tools" / "evaluate.py"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tensors = {name: tensor.float() for name, tensor in tensors_of(make(BYTES)).items()}
    hf.write_hf_folder(tmp_path / "model", BYTES, tensors.__getitem__)
    return tmp_path / "model"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "corpus", TEXTS)


def run_tool(*arguments: object) -> int:
    """Runs the tool as the command line does; returns the exit code."""
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(SystemExit) as ended:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        monkeypatch.syspath_prepend(str(TOOL.parent))
        runpy.run_path(str(TOOL), run_name="__main__")
    return int(ended.value.code or 0)


def test_perplexity_is_shown_and_written(
    tmp_path: Path, model: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "found" / "result.json"
    given = [model, "--data", corpus, "--tokenizer", "byte", "--stride", 5, "--output", output]
    assert run_tool(*given) == 0
    shown, found = capsys.readouterr(), json.loads(output.read_text())
    assert f"perplexity {found['perplexity']:.4f} ({found['loss']:.4f} nats per token)" in shown.out
    assert "76 tokens of 5 documents" in shown.out and "perplexity step 76/76" in shown.err and "tok/s" in shown.err
    assert found["perplexity"] == pytest.approx(math.exp(found["nll"] / 76))
    assert found["bits_per_byte"] == pytest.approx(found["nll"] / math.log(2) / found["num_bytes"])
    assert found["model_identity"] == open_source(model).identity
    assert found["settings"]["stride"] == 5 and found["settings"]["data"] == str(corpus)


def test_it_runs_on_several_ranks(tmp_path: Path, model: Path, corpus: Path) -> None:
    outputs = [tmp_path / "one.json", tmp_path / "four.json"]
    given = [model, "--data", corpus, "--precision", "fp64", "--packed", "--mask-documents", "--output"]
    assert run_tool(*given, outputs[0]) == 0
    assert run_ranks(run_tool, 4, *given, outputs[1], "--tensor", 2) == [0] * 4
    one, four = (json.loads(output.read_text()) for output in outputs)
    assert four.pop("nll") == pytest.approx(one.pop("nll"), rel=1e-12)
    assert four.pop("perplexity") == pytest.approx(one.pop("perplexity"), rel=1e-12)
    assert four.pop("loss") == pytest.approx(one.pop("loss"), rel=1e-12)
    assert four == one


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere", "--data", "CORPUS"], 4, "nowhere: no such folder"),
        (["MODEL", "--data", "nowhere"], 3, "nowhere.idx: no such file"),
        (["MODEL"], 2, "one of the arguments --data --tasks is required"),
        (["MODEL", "--data", "CORPUS", "--tasks", "x"], 2, "not allowed with"),
        (["MODEL", "--data", "CORPUS", "--stride", "-1"], 2, "stride=-1 must not be negative"),
        (["MODEL", "--data", "CORPUS", "--stride", "99"], 2, "stride=99 exceeds length=12"),
        (["MODEL", "--data", "CORPUS", "--mask-documents"], 2, "set packed too"),
        (["MODEL", "--data", "CORPUS", "--batch-size", "0"], 2, "batch_size=0 must be positive"),
        (["MODEL", "--data", "CORPUS", "--tensor", "2"], 2, "--tensor 2 does not divide the 1 launched ranks"),
        (["MODEL", "--tasks", "x", "--limit", "-1"], 2, "limit=-1 must not be negative"),
        (["MODEL", "--data", "CORPUS", "--limit", "5"], 2, "--limit has no effect with --data"),
        (["MODEL", "--tasks", "x", "--packed"], 2, "--packed has no effect with --tasks"),
        (["MODEL", "--data", "CORPUS", "--prefix", "300"], 2, "prefix=300 is no token of the model"),
        (["MODEL", "--tasks", "x"], 2, "tasks need the package lm_eval, which is not installed; pip install"),
    ],
)
def test_wrong_arguments(
    tmp_path: Path,
    model: Path,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # what an import makes of a package that is not there
    places = {"MODEL": str(model), "CORPUS": str(corpus)}
    assert run_tool(*[places.get(word, word) for word in arguments], "--output", tmp_path / "result.json") == code
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not (tmp_path / "result.json").exists()


def test_a_result_file_is_strict_json(tmp_path: Path, model: Path) -> None:
    found = {"results": {"a": [1.5, math.nan, {"b": math.inf}], 3: "text"}}
    write_result(tmp_path / "result.json", open_source(model), {}, found)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    read = json.loads((tmp_path / "result.json").read_text(), parse_constant=refuse)
    assert read["results"] == {"a": [1.5, None, {"b": None}], "3": "text"}


def test_a_result_is_shown_even_if_it_cannot_be_written(
    tmp_path: Path, model: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A place where nothing can be written is told before the work."""
    assert run_tool(model, "--data", corpus, "--output", tmp_path) == 3
    shown = capsys.readouterr()
    assert "Is a directory" in shown.err and not shown.out

    def fail(path: Path, content: bytes) -> None:
        raise DataError(f"{path}: No space left on device")

    monkeypatch.setattr("megagrow.evaluate.result_file.write_atomically", fail)
    assert run_tool(model, "--data", corpus, "--output", tmp_path / "result.json") == 3
    shown = capsys.readouterr()
    assert "No space left on device" in shown.err and "perplexity" in shown.out
