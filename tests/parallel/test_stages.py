"""Which layers stand on which stage, and which rank runs it."""

import pytest

from megagrow.config import ParallelConfig
from megagrow.parallel.stages import pipeline_stages


def layers(num_layers: int, **parallel: object) -> list[list[int]]:
    return [list(s.layers) for s in pipeline_stages(num_layers, ParallelConfig(**parallel))]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_layers", "pipeline", "sizes"),
    [
        (8, 1, [8]),
        (8, 2, [4, 4]),
        (10, 4, [2, 3, 3, 2]),  # with embedding and head three units each
        (3, 2, [2, 1]),
        (4, 4, [0, 2, 2, 0]),
        (6, 3, [2, 3, 1]),
        (2, 4, [0, 1, 1, 0]),
    ],
)
def test_embedding_and_head_weigh_as_layers(num_layers: int, pipeline: int, sizes: list[int]) -> None:
    split = layers(num_layers, pipeline=pipeline)
    assert [len(stage) for stage in split] == sizes
    assert [layer for stage in split for layer in stage] == list(range(num_layers))


@pytest.mark.parametrize("pipeline", [2, 3, 4, 8])
@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B", "DualPipeV"])
def test_no_stage_is_more_than_one_unit_heavier(schedule: str, pipeline: int) -> None:
    for num_layers in range(14, 40):
        split = layers(num_layers, pipeline=pipeline, schedule=schedule)
        units = [len(stage) + (i == 0) + (i == len(split) - 1) for i, stage in enumerate(split)]
        assert max(units) - min(units) <= 1
        assert sum(split, []) == list(range(num_layers))


@pytest.mark.parametrize(
    ("schedule", "ranks"),
    [
        ("1F1B", [0, 1, 2]),
        ("Interleaved1F1B", [0, 1, 2, 0, 1, 2]),
        ("InterleavedZeroBubble", [0, 1, 2, 0, 1, 2]),
        ("ZBVZeroBubble", [0, 1, 2, 2, 1, 0]),
        ("DualPipeV", [0, 1, 2, 2, 1, 0]),
    ],
)
def test_v_schedules_come_back(schedule: str, ranks: list[int]) -> None:
    stages = pipeline_stages(12, ParallelConfig(pipeline=3, schedule=schedule))  # type: ignore[arg-type]
    assert [stage.rank for stage in stages] == ranks
    assert [stage.is_first for stage in stages].index(True) == 0
    assert [stage.is_last for stage in stages].index(True) == len(stages) - 1


def test_an_explicit_split_holds_for_the_model_that_it_matches() -> None:
    split = {"pipeline": 3, "layers_per_stage": (1, 4, 2)}
    assert layers(7, **split) == [[0], [1, 2, 3, 4], [5, 6]]
    assert [len(stage) for stage in layers(4, **split)] == [1, 2, 1]  # a smaller source is split evenly
