"""The first rank asks, all ranks answer: log-likelihoods, greedy flags and texts as one process would give them."""

from typing import Any

import pytest
import torch

from megagrow.errors import DataError
from megagrow.evaluate.service import Generation, Service
from megagrow.generate import Sampling
from tests.evaluate.samples import BYTES, BYTES_GPT2, shared_model
from tests.growth.models import make
from tests.ranks import run_ranks

MODELS = {"llama": BYTES, "gpt2": BYTES_GPT2}
LAYOUTS = {"tensor 2": (2, 2), "data 2": (2, 1), "tensor 2 x data 2": (4, 2)}
SEQUENCES = [([1, 2, 3, 4], 2), ([5, 6], 1), ([7, 8, 9, 10, 11, 12, 13], 6), ([1, 2, 3, 9], 1), ([4], 0)]
PROMPTS = [[1, 2, 3], [100], [7, 8, 9, 10, 11], [200, 3]]


class Characters:
    """A tokenizer whose token i is the character i."""

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def ask(name: str, tensor: int, sampling: Sampling) -> Any:
    """What the first rank gets; the others say how they ended."""
    with Service(shared_model(MODELS[name], tensor, batch_size=2), Characters()) as service:
        if not service.is_first:
            service.serve()
            return "served"
        settings = Generation(6, 256, (), sampling)
        return service.score(SEQUENCES), service.generate(PROMPTS, range(len(PROMPTS)), settings)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, 5, 0.9)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("name", MODELS)
def test_every_layout_answers_as_one_process(name: str, sampling: Sampling) -> None:
    scores, texts = ask(name, 1, sampling)
    for world, tensor in LAYOUTS.values():
        (found_scores, found_texts), *others = run_ranks(ask, world, name, tensor, sampling)
        assert [greedy for _, greedy in found_scores] == [greedy for _, greedy in scores]
        assert [x for x, _ in found_scores] == pytest.approx([x for x, _ in scores], rel=1e-12)
        assert found_texts == texts
        assert others == ["served"] * (world - 1)


def test_scores_are_those_of_the_logits() -> None:
    model = make(BYTES)
    greedy_next = int(model.logits(torch.tensor([[1, 2, 3]]))[0, -1].argmax())
    sequences = [*SEQUENCES, ([1, 2, 3, greedy_next], 1), ([1, 2, 3, greedy_next], 2)]
    with Service(shared_model(BYTES), Characters()) as service:
        found = service.score(sequences)
    for (tokens, num_scored), (value, greedy) in zip(sequences, found, strict=True):
        logits_SV = model.logits(torch.tensor([tokens]))[0]
        labels = range(len(tokens) - num_scored, len(tokens))
        expected = [logits_SV[i - 1].log_softmax(-1)[tokens[i]].item() for i in labels]
        assert value == pytest.approx(sum(expected), rel=1e-12, abs=1e-12)
        assert greedy == all(int(logits_SV[i - 1].argmax()) == tokens[i] for i in labels)
    assert [greedy for _, greedy in found[-2:]] == [True, False]


def test_a_text_ends_where_it_should() -> None:
    model, prompt = make(BYTES), [1, 2, 3]
    free = list[int]()
    for _ in range(6):
        free.append(int(model.logits(torch.tensor([prompt + free]))[0, -1].argmax()))

    def generated(length: int, end: int, stops: tuple[str, ...]) -> list[int]:
        with Service(shared_model(BYTES), Characters()) as service:
            return service.generate([prompt, [9]], [0, 0], Generation(length, end, stops))[0]

    assert generated(6, -1, ()) == free
    assert generated(2, -1, ()) == free[:2]
    assert generated(6, free[3], ()) == free[: free.index(free[3]) + 1]
    pair = Characters().decode(free[2:4])
    assert generated(6, -1, ("never", pair)) == free[: Characters().decode(free).index(pair) + 2]
    assert generated(0, -1, ()) == []


def test_where_a_text_stops() -> None:
    settings = Generation(1, 0, ("bc", "d", "ab"))
    assert settings.where_it_stops("xxabcd") == 2
    assert settings.where_it_stops("xx") is None
    assert Generation(1, 0).where_it_stops("anything") is None


def fail_on_the_first_rank() -> str:
    try:
        with Service(shared_model(BYTES), Characters()) as service:
            if service.is_first:
                raise DataError("no such task")
            service.serve()
    except DataError as error:
        return str(error)
    return "served"


def test_the_others_end_when_the_first_rank_fails() -> None:
    """Rather than wait for ever."""
    assert run_ranks(fail_on_the_first_rank, 3, timeout=60) == ["no such task", "served", "served"]


def generate_beside_a_damaged_token() -> str:
    """Each of two ranks continues one prompt; in one of them stands a token whose embedding is not a number."""
    shared = shared_model(BYTES, batch_size=1)
    shared.model.embedding.tokens[200] = torch.nan
    try:
        shared.generate([[1, 2, 3], [200]], 2, [0, 0], Sampling(), lambda ids: False)
    except DataError as error:
        return str(error)
    return "generated"


def test_logits_that_are_not_finite_end_the_ranks_that_have_not_seen_them_too() -> None:
    first, second = run_ranks(generate_beside_a_damaged_token, 2, timeout=60)
    assert first == second and "logits are not finite" in first


def fail_in_the_middle() -> None:
    """The others are then inside the model, where nothing can be told to them."""
    with Service(shared_model(BYTES, tensor=2), Characters()) as service:
        if not service.is_first:
            return service.serve()
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(service.shared, "_score_batch", fail)
            service.score(SEQUENCES)


def fail(windows: object) -> None:
    raise MemoryError("no memory left")


def test_a_failure_while_all_work_is_told_at_once() -> None:
    with pytest.raises(MemoryError, match="no memory left"):
        run_ranks(fail_in_the_middle, 2, timeout=60)
