"""The stream of sample ids is one global sequence, whatever the data-parallel degree and wherever a run stops.

Both orders, one dataset and blends, and a blend that changes on the way. No model is needed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megagrow.config import Config, DataConfig, ModelConfig, TrainConfig
from megagrow.data.blend import BlendStart, DatasetIdentity
from megagrow.errors import CheckpointError
from megagrow.train.streams import blend_weights, continue_blend, identities, open_stream, open_training_data

MakeDataset = Callable[..., Path]
BATCH, STEPS = 12, 40
WORLDS = (1, 2, 3, 6)
CHANGED = "2 {b} 1 {c}"

Sample = tuple[str, int, bytes]


@pytest.fixture
def prefixes(make_dataset: MakeDataset) -> dict[str, str]:
    random = np.random.default_rng(0)

    def documents(count: int) -> list[list[int]]:
        return [random.integers(0, 1000, random.integers(1, 30)).tolist() for _ in range(count)]

    return {name: str(make_dataset(documents(40 + 20 * i), name=name)) for i, name in enumerate("abc")}


def make_config(train: str, order: Any, change: bool = False) -> Config:
    data = DataConfig(train=train, seq_length=7, seed=5, order=order, change_blend=change)
    return Config(
        model=ModelConfig(vocab_size=1000), data=data, train=TrainConfig(steps=STEPS, global_batch_size=BATCH)
    )


def take(config: Config, begun: BlendStart | None, steps: range, world: int) -> tuple[list[Sample], BlendStart]:
    """What the ranks of a process group that was started anew read in some steps, in the global order."""
    datasets = open_training_data(config)
    cursor = steps.start * BATCH
    begun = continue_blend(
        begun, blend_weights(config, datasets), identities(datasets), cursor, config.data.change_blend
    )
    stream, taken = open_stream(datasets, begun, config), list[Sample]()
    for _ in steps:
        for rank in range(world):
            drawn = stream.batch(cursor, BATCH, rank, world)
            for which, index, tokens in zip(drawn.which, drawn.ids, drawn.tokens, strict=True):
                taken.append((datasets[which].prefix, int(index), tokens.numpy().tobytes()))
        cursor += BATCH
    return taken, begun


def run(configs: list[tuple[int, Config]], stops: list[int], seed: int) -> list[Sample]:
    """A run that stops after some steps, each time starting again with another number of ranks.

    `configs` says from which step on which configuration holds.
    """
    random = np.random.default_rng(seed)
    edges = sorted({0, *stops, *(step for step, _ in configs), STEPS})
    taken, begun = list[Sample](), None
    for first, end in zip(edges[:-1], edges[1:], strict=True):
        config = [config for step, config in configs if step <= first][-1]
        more, begun = take(config, begun, range(first, end), int(random.choice(WORLDS)))
        taken += more
    return taken


@pytest.mark.parametrize("train", ["{a}", "0.7 {a} 0.3 {b}", "{a} {b} {c}"])
@pytest.mark.parametrize("order", ["megagrow", "megatron"])
def test_the_stream_is_the_same_for_all_worlds_and_stops(prefixes: dict[str, str], order: str, train: str) -> None:
    config = make_config(train.format(**prefixes), order)
    if order == "megatron" and train.count("{") == 3:  # without weights it ends with the data, as Megatron's does
        config = make_config("1 {a} 1 {b} 1 {c}".format(**prefixes), order)
    whole = run([(0, config)], [], 0)
    assert len(whole) == STEPS * BATCH
    for world in WORLDS:
        assert take(config, None, range(STEPS), world)[0] == whole
    for seed in range(4):
        stops = np.random.default_rng(seed).integers(1, STEPS, 5).tolist()
        assert run([(0, config)], stops, seed) == whole


def test_a_changed_blend_goes_on_where_each_dataset_was(prefixes: dict[str, str]) -> None:
    before = make_config("0.7 {a} 0.3 {b}".format(**prefixes), "megagrow")
    after = make_config(CHANGED.format(**prefixes), "megagrow", change=True)
    again = make_config("1 {a} 1 {b}".format(**prefixes), "megagrow", change=True)
    configs = [(0, before), (13, after), (31, again)]
    whole = run(configs, [], 0)
    for seed in range(4):
        stops = np.random.default_rng(seed).integers(1, STEPS, 5).tolist()
        assert run(configs, stops, seed) == whole
    for name, prefix in prefixes.items():
        ids = [index for where, index, _ in whole if where == prefix]
        alone = take(make_config(prefix, "megagrow"), None, range(STEPS), 1)[0]
        assert ids == [index for _, index, _ in alone][: len(ids)], name
        assert len(ids) > 20


def test_epochs_lose_and_repeat_nothing(prefixes: dict[str, str]) -> None:
    config = make_config(prefixes["a"], "megagrow")
    (dataset,) = open_training_data(config)
    ids = [index for _, index, _ in run([(0, config)], [3, 17], 1)]
    assert len(ids) > 2 * len(dataset)
    for epoch in range(len(ids) // len(dataset)):
        part = ids[epoch * len(dataset) : (epoch + 1) * len(dataset)]
        assert sorted(part) == list(range(len(dataset)))


def test_a_dataset_is_the_same_under_another_spelling(
    prefixes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cursor is not lost, whether the blend changes or not."""
    folder = Path(prefixes["a"]).parent
    monkeypatch.chdir(folder)
    plain = run([(0, make_config("1 a 1 b", "megagrow"))], [9], 0)
    for spelling in ("./a", prefixes["a"]):
        respelled = run(
            [(0, make_config("1 a 1 b", "megagrow")), (9, make_config(f"1 {spelling} 1 b", "megagrow"))], [], 0
        )
        assert [sample[1:] for sample in respelled] == [sample[1:] for sample in plain]
    known = {name: DatasetIdentity(9, name * 64) for name in "ab"}
    begun = BlendStart({"a": 1.0}, 3, {"a": 7, "b": 2}, known)
    respelled = {prefixes["a"]: known["a"], "./b": known["b"]}
    changed = continue_blend(begun, {"./b": 1.0, prefixes["a"]: 2.0}, respelled, 13, True)
    assert changed.firsts == {prefixes["a"]: 17, "./b": 2} and changed.datasets == respelled
    with pytest.raises(CheckpointError, match=r"^\./b: is not the dataset that the run was saved with"):
        continue_blend(begun, {"./b": 1.0}, {"./b": known["a"]}, 13, True)
