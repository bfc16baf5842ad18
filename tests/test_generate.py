"""Tests megagrow/generate.py and tools/generate.py."""

import dataclasses
import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers

from megagrow.checkpoint import hf
from megagrow.data.tokenizer import END_OF_DOCUMENT, ByteTokenizer, load_tokenizer
from megagrow.errors import ConfigError, DataError
from megagrow.generate import Sampling, continuations, generate
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


class Words(ByteTokenizer):
    """As sentencepiece's default: a word begins with a space, which is left out where it begins a text."""

    vocab_size = 3
    eod_id: int | None = None

    def encode(self, text: str) -> list[int]:
        return [["one", "two", "three"].index(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(["one", "two", "three"][i] for i in ids)


def test_a_continuation_that_begins_with_a_space_keeps_it() -> None:
    model = make(dataclasses.replace(BYTES, vocab_size=3)).float()
    text = generate(model, Words(), "one two", 2)
    assert len(text.split()) == 4 and text.startswith("one two ")


def test_a_hugging_face_folder_is_prompted_as_transformers_does(tmp_path: Path) -> None:
    """Llama's and Mistral's models have seen no text without the token that begins it."""
    ByteTokenizer().save(tmp_path)
    plain = load_tokenizer(tmp_path)
    assert plain.begin_ids == ()
    stated = json.loads((tmp_path / "tokenizer.json").read_text())
    begin = {"SpecialToken": {"id": END_OF_DOCUMENT, "type_id": 0}}
    entry = {"id": END_OF_DOCUMENT, "ids": [256], "tokens": [END_OF_DOCUMENT]}
    stated["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {END_OF_DOCUMENT: entry},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(stated))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.begin_ids == (256,) and tokenizer.encode("ab") == [97, 98]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("ab")["input_ids"] == [256, 97, 98]
    model = make(BYTES).float()
    (new,) = continuations(model, [[256, *b"def "]], 5, [0], Sampling(), lambda new: False)
    assert generate(model, tokenizer, "def ", 5, 0, begin_ids=(256,)) == "def " + tokenizer.decode(new)
    assert generate(model, plain, "def ", 5, 0) != generate(model, plain, "def ", 5, 0, begin_ids=(256,))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused() -> None:
    with pytest.raises(DataError, match="the tokenizer has 257 tokens, more than the model's vocab_size="):
        generate(make(LLAMA), ByteTokenizer(), "", 1)


def test_prompts_do_not_touch_each_other() -> None:
    """Nor does the order in which they end, nor contexts longer than the model's."""
    model, prompts = make(BYTES), [[1], [2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [12, 13, 14]]
    sampling = Sampling(1.0, top_k=20, top_p=0.9)

    def added(places: list[int]) -> list[list[int]]:
        chosen = [prompts[i] for i in places]
        return continuations(model, chosen, 9, places, sampling, lambda ids: ids[-1] % 4 == 0)

    alone = [added([i])[0] for i in range(3)]
    assert added([0, 1, 2]) == alone and len({len(ids) for ids in alone}) > 1
    assert added([2, 0]) == [alone[2], alone[0]]


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1.0), [0, 1, 2, 3]),
        (Sampling(0.5), [0, 1, 2, 3]),
        (Sampling(1.0, top_k=2), [1, 3]),
        (Sampling(1.0, top_p=0.65), [1, 3]),
        (Sampling(1.0, top_p=0.6), [1]),
        (Sampling(1.0, top_k=3, top_p=0.97), [1, 2, 3]),
        (Sampling(), [1]),
    ],
)
def test_tokens_are_drawn_with_their_probabilities(sampling: Sampling, kept: list[int]) -> None:
    probabilities_V = torch.tensor([0.04, 0.61, 0.13, 0.22])
    drawn, generator = 4000, torch.Generator().manual_seed(0)
    counts_V = torch.zeros(4)
    for _ in range(drawn):
        counts_V[sampling.pick(probabilities_V.log(), generator)] += 1
    expected_V = torch.zeros(4)
    expected_V[kept] = probabilities_V[kept] ** (1 / (sampling.temperature or 1))
    expected_V /= expected_V.sum()
    assert (counts_V / drawn - expected_V).abs().max() < 5 * 0.5 / drawn**0.5  # five standard deviations at most
    assert (counts_V[expected_V == 0] == 0).all()


def test_sampling_that_makes_no_sense_is_refused() -> None:
    for wrong in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Sampling(**wrong)


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
