"""Garbage is collected between steps and in no other thread."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from megagrow.train import run, trainer
from megagrow.train.garbage import INTERVAL, collect_if_due, collected_between_steps
from tests.train.runs import make_config

Collections = list[int]  # generations


@pytest.fixture
def collections() -> Iterator[Collections]:
    found: Collections = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            found.append(info["generation"])

    gc.callbacks.append(note)
    yield found
    gc.callbacks.remove(note)


def make_garbage() -> None:
    for _ in range(5000):
        cycle: list[object] = []
        cycle.append(cycle)


def test_nothing_is_collected_but_between_steps(collections: Collections) -> None:
    with collected_between_steps():
        collections.clear()
        make_garbage()
        collect_if_due(INTERVAL - 1)
        assert collections == []
        collect_if_due(INTERVAL)
        assert collections == [1]
    make_garbage()
    assert len(collections) > 1


def test_a_run_trains_so_and_leaves_the_interpreter_as_it_was(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, bool]] = []
    monkeypatch.setattr(trainer, "collect_if_due", lambda step: asked.append((step, gc.isenabled())))
    assert run(make_config(corpus, tmp_path, steps=3)) == 0
    assert asked == [(1, False), (2, False), (3, False)]
    assert gc.isenabled()
