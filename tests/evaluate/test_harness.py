"""What lm_eval asks for becomes tokens and settings, and answers come back in its order; without lm_eval."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megagrow.data.tokenizer import ByteTokenizer
from megagrow.errors import ConfigError, DataError
from megagrow.evaluate.harness import HarnessModel
from megagrow.evaluate.service import Generation, Service
from megagrow.evaluate.transformers_tokenizer import load_transformers_tokenizer
from tests.evaluate.samples import BYTES, shared_model
from tests.ranks import run_ranks


class Characters:
    """A tokenizer of transformers whose token i is the character i; the one that ends texts is 256."""

    eos_token_id, bos_token_id, name_or_path = 256, None, "a/b"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(map(ord, text))

    def decode(self, ids: int | list[int], skip_special_tokens: bool = False) -> str:
        ids = [ids] if isinstance(ids, int) else ids
        return "".join(chr(i) for i in ids if not (skip_special_tokens and i == 256))


@contextmanager
def harness(service: Service | None = None) -> Iterator[HarnessModel]:
    with service or Service(shared_model(BYTES), Characters()) as service:
        model = HarnessModel(service)
        model.cache_hook = SimpleNamespace(add_partial=lambda *_: None)
        yield model


def scores(*pairs: tuple[list[int], list[int]]) -> list[tuple[float, bool]]:
    with harness() as model:
        return model._loglikelihood_tokens([(("a", "b"), *pair) for pair in pairs])


def texts(*requests: tuple[str, dict[str, Any]]) -> list[str]:
    with harness() as model:
        return model.generate_until([SimpleNamespace(args=request) for request in requests])


def test_contexts_are_cut_on_the_left() -> None:
    long = [*range(50), 1, 2, 3]
    assert scores((long, [7, 8])) == scores((long[-(BYTES.max_seq_length - 1) :], [7, 8]))
    assert scores((long, [7, 8])) != scores((long[-(BYTES.max_seq_length - 2) :], [7, 8]))
    with pytest.raises(DataError, match="a continuation of 13 tokens exceeds the model's max_seq_length=12"):
        scores(([1], [2] * 13))
    settings = {"max_gen_toks": 3}
    assert texts(("x" * 40 + "abcdefghi", settings)) == texts(("abcdefghi", settings))
    with pytest.raises(ConfigError, match="max_gen_toks=12 leaves no room"):
        texts(("a", {"max_gen_toks": 12}))


def test_answers_come_in_the_order_of_the_requests() -> None:
    """They are asked for by length, and texts by settings too."""
    pairs = [([1], [2]), ([3, 4, 5], [6, 7]), ([8, 9], [1]), ([1], [3])]
    found = [value for value, _ in scores(*pairs)]
    assert found == pytest.approx([scores(pair)[0][0] for pair in pairs])
    kinds: list[dict[str, Any]] = [{"max_gen_toks": 2}, {"max_gen_toks": 4}, {"max_gen_toks": 4, "until": "e"}]
    requests = [(prompt, kinds[i % 3]) for i, prompt in enumerate(["a", "bcd", "ef", "ghij", "k", "lm", "nop"])]
    answers = texts(*requests)
    assert answers == [texts(request)[0] for request in requests]
    assert [len(text) for text in answers[0::3]] == [2, 2, 2] and [len(text) for text in answers[1::3]] == [4, 4]


def test_a_rolling_text_counts_every_token_once() -> None:
    text = "a text that is longer than one window"
    with harness() as model:
        (total,) = model.loglikelihood_rolling([SimpleNamespace(args=(text,))])
        windows = list(model._rolling(model.tok_encode(text)))
        assert sum(num_scored for _, num_scored in windows) == len(text)
        assert total == pytest.approx(sum(value for value, _ in model.service.score(windows)))


@pytest.mark.parametrize("name", ["num_beams", "repetition_penalty"])
def test_settings_that_are_not_done_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"generation_kwargs: {name} is not done here"):
        texts(("a", {name: 2}))


def test_a_tokenizer_must_end_texts() -> None:
    tokenizer = Characters()
    tokenizer.eos_token_id = None  # type: ignore[assignment]
    with Service(shared_model(BYTES), tokenizer) as service, pytest.raises(DataError, match="names no eos_token"):
        HarnessModel(service)


OUTSIDE: dict[str, Callable[[Service], Any]] = {
    "input": lambda service: service.score([([1, 300, 3], 1)]),
    "label": lambda service: service.score([([1, 2, 300], 1)]),
    "prompt": lambda service: service.generate([[1, 300]], [0], Generation(1, 256)),
}


def ask_for_what_is_outside(where: str) -> str:
    try:
        with Service(shared_model(BYTES, tensor=2), Characters()) as service:
            if service.is_first:
                OUTSIDE[where](service)
            service.serve()
    except DataError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("where", OUTSIDE)
def test_a_token_that_the_model_has_not_ends_all_ranks(where: str) -> None:
    expected = "token 300 is outside of the model's vocab_size=257; use the tokenizer that the model was trained with"
    assert run_ranks(ask_for_what_is_outside, 4, where) == [expected] * 4


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_damaged_model_gets_no_score(value: float) -> None:
    """With NaN no logit is greater than that of a label, which looks like a perfect answer."""
    shared = shared_model(BYTES)
    shared.model.head_VH.fill_(value)
    with harness(Service(shared, Characters())) as model:
        with pytest.raises(DataError, match="log-likelihoods are not finite: its weights are damaged or overflow"):
            model._loglikelihood_tokens([(("a", "b"), [1, 2], [3])])
        for how in ({}, {"temperature": 1.0}):
            with pytest.raises(DataError, match="logits are not finite: its weights are damaged or overflow"):
                model.generate_until([SimpleNamespace(args=("a", {"max_gen_toks": 1, **how}))])


def replace(name: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))

    return change


DAMAGE: dict[str, Callable[[Path], None]] = {
    "empty": lambda folder: (folder / "tokenizer.json").write_text("{}") and None,
    "no object": lambda folder: (folder / "tokenizer_config.json").write_text("[]") and None,
    "unknown model": replace("tokenizer.json", model={"type": "Nope"}),
    "token of another type": replace("tokenizer_config.json", eos_token=5),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_tokenizer_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    ByteTokenizer().save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert load_transformers_tokenizer(tmp_path).encode("ab") == ByteTokenizer().encode("ab")
    DAMAGE[damage](tmp_path)
    with pytest.raises(DataError) as refused:
        load_transformers_tokenizer(tmp_path)
    message = str(refused.value)
    assert message.startswith(str(tmp_path)) and "\n" not in message and len(message) < len(str(tmp_path)) + 200
