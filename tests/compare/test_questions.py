"""Tests ../../megagrow/compare/questions.py and downstream.py: questions from text, and how answers are judged."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megagrow.compare.corpus import Corpus
from megagrow.compare.downstream import score
from megagrow.compare.questions import TASKS, Question, make_questions, read_questions
from megagrow.config import ModelConfig
from megagrow.data.indexed import IndexedDataset
from megagrow.data.tokenizer import ByteTokenizer, load_tokenizer
from megagrow.errors import DataError
from tests.evaluate.samples import write_texts

COUNT = 25


@pytest.fixture(scope="module")
def folder(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_questions(corpus.validation, corpus.tokenizer, tmp_path_factory.mktemp("questions"), COUNT)


@pytest.fixture(scope="module")
def held_out(corpus: Corpus) -> str:
    dataset = IndexedDataset(corpus.validation)
    return load_tokenizer(corpus.tokenizer).decode(dataset.document(0)[:-1].tolist())


def test_a_cloze_asks_for_a_word_that_the_passage_has_used(folder: Path, held_out: str) -> None:
    questions = read_questions(folder, "cloze")
    assert len({question.context for question in questions}) == COUNT
    for question in questions:
        (answer,) = question.choices
        assert question.context + answer in held_out
        assert answer[0].isspace() and answer.strip().isalpha() and len(answer.strip()) >= 4
        assert answer.strip().lower() in question.context.lower()


def test_one_of_four_texts_goes_on_where_the_passage_ends(folder: Path, held_out: str) -> None:
    questions = read_questions(folder, "choice")
    assert len(questions) == COUNT and {question.gold for question in questions} == {0, 1, 2, 3}
    for question in questions:
        assert [question.context + choice in held_out for choice in question.choices].count(True) == 1
        assert question.context + question.choices[question.gold] in held_out
        assert {len(choice.split()) for choice in question.choices} == {8}


def test_the_same_text_gives_the_same_questions_once(folder: Path, corpus: Corpus, tmp_path: Path) -> None:
    other = make_questions(corpus.validation, corpus.tokenizer, tmp_path, COUNT)
    for task in TASKS:
        assert (other / f"{task}.jsonl").read_bytes() == (folder / f"{task}.jsonl").read_bytes()
    before = (folder / "cloze.jsonl").stat().st_mtime_ns
    make_questions(corpus.validation, corpus.tokenizer, folder, COUNT)
    assert (folder / "cloze.jsonl").stat().st_mtime_ns == before


def test_the_folder_is_one_of_lm_eval(folder: Path) -> None:
    """tests/peers/against_lm_eval.py runs them."""
    for task in TASKS:
        fields = yaml.safe_load((folder / f"{task}.yaml").read_text())
        assert fields["task"] == f"megagrow_{task}"
        assert Path(fields["dataset_kwargs"]["data_files"]["test"]).is_file()


def test_too_little_text_is_told(tmp_path: Path) -> None:
    held_out = write_texts(tmp_path / "held_out", ["some words that come again " * 30])
    with pytest.raises(DataError, match="questions of cloze, not 200; hold out more text"):
        make_questions(str(held_out), "byte", tmp_path, 200)
    with pytest.raises(DataError, match="no document has the 480 characters"):
        make_questions(str(write_texts(tmp_path / "short", ["short"])), "byte", tmp_path, 1)


@pytest.mark.parametrize("line", ["{}", '{"context": "a", "choices": ["b"], "gold": 1}', '{"context": 1, "word": "b"}'])
def test_a_damaged_question_is_told_by_its_line(line: str, tmp_path: Path) -> None:
    (tmp_path / "cloze.jsonl").write_text('{"context": "a", "word": "b"}\n' + line + "\n")
    with pytest.raises(DataError, match="line 2 is no question"):
        read_questions(tmp_path, "cloze")


class Oracle:
    """Stands for a model that gives every byte of some texts a likelihood of one half, and others one of 1/256."""

    def __init__(self, *likely: str) -> None:
        self.likely = [text.encode() for text in likely]
        self.model: Any = type("Model", (), {"config": ModelConfig(max_seq_length=64)})

    def score(self, windows: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        scored = [(bytes(window.tokens[-window.num_scored :].tolist()), window.num_scored) for window in windows]
        knows = [text in self.likely for text, _ in scored]
        each = [math.log(2) if known else math.log(256) for known in knows]
        nll = [one * count for one, (_, count) in zip(each, scored, strict=True)]
        return torch.tensor(nll, dtype=torch.float64), torch.tensor(knows)


def test_a_cloze_is_answered_by_what_greedy_decoding_gives() -> None:
    questions = [Question("a cat and a", [" cat"], 0), Question("the dog, the", [" dog"], 0)]
    found = score(Oracle(" cat"), ByteTokenizer(), questions)
    assert (found["questions"], found["acc"]) == (2, 0.5)
    assert found["perplexity"] == pytest.approx(math.exp((4 * math.log(2) + 4 * math.log(256)) / 2))


def test_a_choice_is_judged_by_likelihood_and_by_likelihood_per_character() -> None:
    """The short answer wins by its length alone."""
    questions = [Question("one", [" two and three and four", " x"], 0)]
    found = score(Oracle(" two and three and four"), ByteTokenizer(), questions)
    assert (found["acc"], found["acc_norm"]) == (0.0, 1.0)


def test_an_answer_longer_than_the_model_sees_is_refused() -> None:
    with pytest.raises(DataError, match="has 65 tokens, which the model's max_seq_length=64 does not hold"):
        score(Oracle(), ByteTokenizer(), [Question("a", ["b" * 65], 0)])
