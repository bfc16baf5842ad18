"""Tests megagrow/generate.py and tools/generate.py."""

import dataclasses
import runpy
import sys
from pathlib import Path

import pytest

from megagrow.checkpoint import hf
from megagrow.data.tokenizer import ByteTokenizer
from megagrow.errors import DataError
from megagrow.generate import generate
from tests.growth.models import LLAMA, make, tensors_of

TOOL = Path(__file__).parents[1] / "tools" / "generate.py"
BYTES = dataclasses.replace(LLAMA, vocab_size=ByteTokenizer.vocab_size)


def generate_command(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(SystemExit) as ended:
        monkeypatch.syspath_prepend(str(TOOL.parent))
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        runpy.run_path(str(TOOL), run_name="__main__")
    return int(ended.value.code or 0)


def test_a_prompt_is_continued_the_same_way_each_time() -> None:
    model = make(BYTES).float()
    texts = [generate(model, ByteTokenizer(), "def ", 5, 0.8, seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("def ")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused() -> None:
    with pytest.raises(DataError, match="the tokenizer has 257 tokens, more than the model's vocab_size="):
        generate(make(LLAMA), ByteTokenizer(), "", 1)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--tokenizer", "byte", "--tokens", "3"], 0, ""),
        ([], 3, "give it with --tokenizer"),
        (["--tokenizer", "byte", "--tokens", "-3"], 2, "--tokens -3 must not be negative"),
        (["--tokenizer", "byte", "--temperature", "-1"], 2, "--temperature -1.0 must not be negative"),
    ],
)
def test_the_tool(
    tmp_path: Path, options: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hf.write_hf_folder(
        tmp_path / "model", BYTES, {n: t.float() for n, t in tensors_of(make(BYTES)).items()}.__getitem__
    )
    assert generate_command(tmp_path / "model", *options) == code
    shown = capsys.readouterr()
    assert words in shown.err
    assert shown.err.count("\n") == (code != 0)
    assert shown.out.startswith("def ") == (code == 0)
