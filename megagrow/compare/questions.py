"""Downstream tasks without a download: questions made from held-out text.

    cloze     the last word of a passage, which the passage has used before (as in LAMBADA, Paperno et al., 2016)
    choice    which of four texts goes on where a passage ends; the others go on elsewhere (as in HellaSwag, Zellers et
              al., 2019, without its adversarial filter)

A folder of them is one that lm_eval takes (--include-path): NAME.jsonl with the questions, NAME.yaml with the task.
"""

import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megagrow.data.files import os_errors_as_data_errors, write_atomically
from megagrow.data.indexed import IndexedDataset
from megagrow.data.tokenizer import load_tokenizer
from megagrow.errors import DataError
from megagrow.json_file import parse_object

TASKS = ("cloze", "choice")
PREFIX = "megagrow_"  # of the names under which lm_eval knows the tasks
CONTEXT = 240  # characters of a passage, at most
LEAST = 120  # at least
CONTINUATION = 8  # words of an answer of `choice`
ANSWER_BYTES = 64  # of an answer at most, and so of its tokens
NUM_CHOICES = 4
TRIES = 40  # passages that are looked at for one question
_WORD = re.compile(r"[A-Za-z]{4,}$")

_YAML = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{context}}}}"
doc_to_target: {target}
{choices}target_delimiter: ""
metric_list: [{metrics}]
"""


@dataclass(frozen=True)
class Question:
    """A passage and how it may go on; answers begin with the white space between."""

    context: str
    choices: list[str]
    gold: int

    @property
    def is_cloze(self) -> bool:
        """Whether there is one answer, which must be what greedy decoding gives."""
        return len(self.choices) == 1


def make_questions(prefix: str, tokenizer: str, folder: Path, count: int) -> Path:
    """Writes both tasks into `folder`, unless they are there.

    Args:
        prefix: of the held-out token files.
        tokenizer: that made them.
        folder: of the tasks.
        count: questions of each.

    Raises:
        DataError: the text gives fewer.
    """
    done = folder / "questions.json"
    facts = {"text": IndexedDataset(prefix).fingerprint(), "count": count}
    if done.is_file() and parse_object(done.read_bytes(), done, DataError, "remove its folder") == facts:
        return folder
    passages = _Passages(prefix, tokenizer)
    for task in TASKS:
        questions = list(passages.questions(task, count))
        lines = "".join(json.dumps(_record(task, each)) + "\n" for each in questions)
        write_atomically(folder / f"{task}.jsonl", lines.encode())
        write_atomically(folder / f"{task}.yaml", _task_file(task, folder).encode())
    write_atomically(done, (json.dumps(facts) + "\n").encode())
    return folder


def read_questions(folder: Path, task: str) -> list[Question]:
    """The questions of one task.

    Raises:
        DataError: the file is not there or not what `make_questions` writes.
    """
    path, remedy = folder / f"{task}.jsonl", "remove its folder"
    with os_errors_as_data_errors(path):
        lines = path.read_bytes().splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        fields = parse_object(line, f"{path}: line {number}", DataError, remedy)
        choices = fields.get("choices", [fields.get("word")])
        holds = isinstance(fields.get("context"), str) and all(isinstance(each, str) for each in choices)
        if not holds or fields.get("gold", 0) not in range(len(choices)):
            raise DataError(f"{path}: line {number} is no question; {remedy}")
        found.append(Question(fields["context"], choices, fields.get("gold", 0)))
    return found


class _Passages:
    """Held-out documents as text, and questions from them; the same for the same text."""

    def __init__(self, prefix: str, tokenizer: str) -> None:
        dataset, known = IndexedDataset(prefix), load_tokenizer(tokenizer)
        texts = (known.decode(dataset.document(i)[:-1].tolist()) for i in range(dataset.num_documents))
        self.prefix = prefix
        self.texts = [text for text in texts if len(text) > 2 * CONTEXT]
        if not self.texts:
            raise DataError(f"{prefix}: no document has the {2 * CONTEXT} characters that questions are made from")

    def questions(self, task: str, count: int) -> Iterator[Question]:
        seen: set[str] = set()
        draw = random.Random(int.from_bytes(hashlib.sha256(task.encode()).digest()[:4], "big"))
        for _ in range(TRIES * count):
            if len(seen) == count:
                return
            made = self._cloze(draw) if task == "cloze" else self._choice(draw)
            if made is not None and made.context not in seen:
                seen.add(made.context)
                yield made
        if len(seen) < count:
            raise DataError(f"{self.prefix}: gives {len(seen)} questions of {task}, not {count}; hold out more text")

    def _cloze(self, draw: random.Random) -> Question | None:
        """A passage whose last word is one that it has used before."""
        passage = self._passage(draw)
        found = _WORD.search(passage or "")
        if passage is None or found is None:
            return None
        word, context = found[0], passage[: found.start()]
        if not context[-1:].isspace() or word.lower() not in re.findall(r"[a-z]{4,}", context.lower()):
            return None
        answer = context[len(context.rstrip()) :] + word
        if len(answer) > ANSWER_BYTES:
            return None
        return Question(context.rstrip(), [answer], 0)

    def _choice(self, draw: random.Random) -> Question | None:
        """A passage, the words after it, and words that come after others."""
        pairs: dict[str, str] = {}
        for _ in range(TRIES):
            if len(pairs) < NUM_CHOICES and (found := self._continued(draw)):
                pairs.setdefault(*found)
        if len(pairs) < NUM_CHOICES:
            return None
        gold = draw.randrange(NUM_CHOICES)
        return Question(list(pairs.values())[gold], list(pairs), gold)

    def _continued(self, draw: random.Random) -> tuple[str, str] | None:
        """The next words after a passage that ends with one, and the passage."""
        text = draw.choice(self.texts)
        end = _word_end(text, draw.randrange(LEAST, len(text) - LEAST))
        match = re.match(rf"(\s+\S+){{{CONTINUATION}}}", text[end : end + 2 * ANSWER_BYTES])
        context = text[max(0, end - CONTEXT) : end]
        if match is None or len(match[0].encode()) > ANSWER_BYTES or len(context) < LEAST:
            return None
        return match[0], context

    def _passage(self, draw: random.Random) -> str | None:
        text = draw.choice(self.texts)
        end = _word_end(text, draw.randrange(LEAST, len(text) - LEAST))
        passage = text[max(0, end - CONTEXT) : end]
        return passage if len(passage) >= LEAST else None


def _word_end(text: str, place: int) -> int:
    """Where the word ends that stands at a place."""
    match = re.compile(r"\s").search(text, place)
    return match.start() if match else len(text)


def _record(task: str, question: Question) -> dict[str, object]:
    if task == "cloze":
        return {"context": question.context, "word": question.choices[0]}
    return asdict(question)


def _task_file(task: str, folder: Path) -> str:
    is_cloze = task == "cloze"
    return _YAML.format(
        name=f"{PREFIX}{task}",
        data=json.dumps(str((folder / f"{task}.jsonl").resolve())),
        kind="loglikelihood" if is_cloze else "multiple_choice",
        target='"{{word}}"' if is_cloze else "gold",
        choices="" if is_cloze else 'doc_to_choice: "{{choices}}"\n',
        metrics="{metric: acc}, {metric: perplexity}" if is_cloze else "{metric: acc}, {metric: acc_norm}",
    )
