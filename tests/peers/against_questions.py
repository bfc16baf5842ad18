"""Questions made from held-out text, judged by lm_eval and by ours: the same shares, and the same perplexity."""

import inspect
import math
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from megagrow.compare.downstream import score
from megagrow.compare.questions import PREFIX, TASKS, make_questions, read_questions
from megagrow.data.tokenizer import ByteTokenizer
from megagrow.evaluate.tasks import TaskSettings, evaluate_tasks
from megagrow.evaluate.transformers_tokenizer import load_transformers_tokenizer
from tests.evaluate.samples import shared_model, write_texts
from tests.growth.models import LLAMA

MODEL = replace(LLAMA, vocab_size=ByteTokenizer.vocab_size, num_kv_heads=4, max_seq_length=400)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a network is looked for")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_lm_eval_judges_the_questions_as_we_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    held_out = write_texts(tmp_path / "held_out", [inspect.getsource(inspect), inspect.getsource(socket)])
    folder = make_questions(str(held_out), ByteTokenizer.name, tmp_path / "questions", 30)
    shared = shared_model(MODEL)
    tokenizer = load_transformers_tokenizer(ByteTokenizer.name)
    settings = TaskSettings([PREFIX + task for task in TASKS], include_path=str(folder))
    theirs = (evaluate_tasks(shared, tokenizer, settings) or {})["results"]
    ours = {task: score(shared, ByteTokenizer(), read_questions(folder, task)) for task in TASKS}
    assert ours["choice"]["acc"] == theirs[f"{PREFIX}choice"]["acc,none"]
    assert ours["choice"]["acc_norm"] == theirs[f"{PREFIX}choice"]["acc_norm,none"]
    assert ours["cloze"]["acc"] == theirs[f"{PREFIX}cloze"]["acc,none"]
    assert math.log(ours["cloze"]["perplexity"]) == pytest.approx(
        math.log(theirs[f"{PREFIX}cloze"]["perplexity,none"]), rel=1e-9
    )
    assert 0 < ours["choice"]["acc"] < 1
