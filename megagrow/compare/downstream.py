"""How well a model answers questions: the scores of lm_eval's `loglikelihood` and `multiple_choice` tasks."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megagrow.checkpoint.source import open_source
from megagrow.compare.questions import TASKS, Question, read_questions
from megagrow.data.files import write_atomically
from megagrow.data.tokenizer import Tokenizer, load_tokenizer
from megagrow.errors import DataError, shown
from megagrow.evaluate import SharedModel, Window, load_shared_model
from megagrow.parallel.mesh import make_inference_mesh

FILE = "downstream.json"  # of a run directory
BATCH = 32
SCORES = {"cloze": "acc", "choice": "acc_norm"}  # of each task, the one that tables show


def evaluate_run(directory: Path, questions: Path, tokenizer: str, precision: str) -> None:
    """Asks the finished model of a run and leaves the scores in its directory.

    Args:
        directory: of the run.
        questions: folder of `make_questions`.
        tokenizer: of the model.
        precision: `fp32` or `bf16`.

    Raises:
        CheckpointError, DataError: the model or the questions cannot be read.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    shared = load_shared_model(open_source(directory), make_inference_mesh(1), BATCH, dtype)
    known = load_tokenizer(tokenizer)
    scores = {task: score(shared, known, read_questions(questions, task)) for task in TASKS}
    write_atomically(directory / FILE, (json.dumps(scores, indent=1) + "\n").encode())


def score(shared: SharedModel, tokenizer: Tokenizer, questions: list[Question]) -> dict[str, Any]:
    """{"questions", "acc", …}: shares of the questions that are answered correctly.

    A cloze is, where greedy decoding gives the word; `perplexity` is that of the words. Of several answers the one with
    the highest log-likelihood is the model's (`acc`), or that with the highest per character (`acc_norm`).
    """
    windows = [window for question in questions for window in _windows(question, tokenizer, shared)]
    nll_N, greedy_N = shared.score(windows)
    answers = iter(zip(nll_N.tolist(), greedy_N.tolist(), strict=True))
    judged = [(question, [next(answers) for _ in question.choices]) for question in questions]
    count = {"questions": len(questions)}
    if questions[0].is_cloze:
        loss = sum(nll for _, [(nll, _)] in judged) / len(judged)
        return {**count, "acc": _share(greedy for _, [(_, greedy)] in judged), "perplexity": math.exp(min(loss, 700))}
    return {
        **count,
        "acc": _share(_best([-nll for nll, _ in found]) == question.gold for question, found in judged),
        "acc_norm": _share(
            _best([-nll / len(text) for (nll, _), text in zip(found, question.choices, strict=True)]) == question.gold
            for question, found in judged
        ),
    }


def _windows(question: Question, tokenizer: Tokenizer, shared: SharedModel) -> Iterator[Window]:
    """Of each answer: what the model can see of passage and answer, of which the answer counts."""
    context, longest = tokenizer.encode(question.context), shared.model.config.max_seq_length + 1
    for answer in question.choices:
        whole = tokenizer.encode(question.context + answer)
        num_scored = len(whole) - len(context)
        if not 0 < num_scored < longest:
            raise DataError(
                f"the answer {shown(answer)} has {num_scored} tokens, which the model's max_seq_length={longest - 1} "
                "does not hold; use longer sequences"
            )
        yield Window(np.array(whole[-longest:], np.int64), num_scored)


def _best(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _share(holds: Iterator[bool]) -> float:
    found = list(holds)
    return sum(found) / len(found)
