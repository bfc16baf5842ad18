"""Ten steps are five, the end of the process, and five in a new one, bit for bit, whatever the run is doing."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megagrow.checkpoint import store
from megagrow.config import CheckpointConfig, Config, GrowthConfig, OptimConfig, ParallelConfig, SaltConfig
from megagrow.data.dataset import PackedDataset
from megagrow.salt.score_files import DTYPES, Cost, identity_of, write_scores
from tests.train.resumed import in_new_processes
from tests.train.runs import LARGE, SMALL, make_config, metrics

STEPS, STOP = 10, 5


@pytest.fixture(scope="module")
def scores(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of the training tokens that differ from sample to sample."""
    dataset = PackedDataset(corpus / "train", 16)
    folder, generator = tmp_path_factory.mktemp("scores"), np.random.default_rng(1)
    arrays = {name: generator.random(dataset.num_samples).astype(dtype) for name, dtype in DTYPES.items()}
    write_scores(folder, arrays, identity_of(dataset, "model", 10, "float32"), Cost(1.0, 1.0, 1))
    return folder


def job(corpus: Path, directory: Path, **sections: Any) -> Config:
    """Ten steps with dropout, document masks, four microbatches per step and a watch for spikes."""
    plain = make_config(corpus, directory, STEPS, checkpoint=CheckpointConfig(interval=0))
    return dataclasses.replace(
        plain,
        data=dataclasses.replace(plain.data, mask_documents=True),
        train=dataclasses.replace(plain.train, dropout=0.1, microbatch_size=1),
        optim=OptimConfig(lr=1e-2, warmup_steps=2, spike_sigma=20.0, spike_window=8),
        **sections,
    )


def growing(method: str, **fields: Any) -> dict[str, Any]:
    optimizer = "reset" if method == "ligo" else "exact"
    growth = GrowthConfig(
        method, source=SMALL, at_step=3, optimizer=optimizer, ligo_steps=4, rewarmup_steps=4, **fields
    )
    return {"model": LARGE, "growth": growth}


def taught(steps: int) -> dict[str, Any]:
    """Stage 1 of so many steps; the fixtures fill in who teaches and who has picked the data."""
    return {"salt": SaltConfig(steps=steps, weight=0.5, temperature=2.0, keep_fraction=0.3, score="mean_nll")}


PLAIN: dict[str, Any] = {}
CASES = {
    "dropout and accumulation": (PLAIN, STOP, {}),
    "bf16": ({"precision": "bf16"}, STOP, {}),
    "within stage 1": (taught(8), STOP, {}),
    "at the stage switch": (taught(STOP), STOP, {}),
    "across the stage switch": (taught(STOP + 2), STOP, {}),
    "while maps are learned": (growing("ligo"), STOP, {}),
    "when learning ends": (growing("ligo"), 7, {}),
    "after growth with moments": (growing("clone"), STOP, {}),
    "tensor 2, while maps are learned": (growing("ligo"), STOP, {"tensor": 2}),
    "data 2, across the stage switch": (taught(STOP + 2), STOP, {}),
    "pipeline 2, after growth": (growing("clone"), STOP, {"pipeline": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_new_process_goes_on_bit_for_bit(
    corpus: Path, trained: Path, scores: Path, tmp_path: Path, case: str
) -> None:
    fields, stop, parallel = CASES[case]
    num_ranks = 2 if "2," in case else 1
    sections = {name: value for name, value in fields.items() if name != "precision"}
    if "salt" in sections:
        sections["salt"] = dataclasses.replace(sections["salt"], teacher=str(trained), scores=str(scores))

    def config(name: str) -> Config:
        made = job(corpus, tmp_path / name, parallel=ParallelConfig(**parallel), **sections)
        precision = fields.get("precision", "fp32")
        return dataclasses.replace(made, train=dataclasses.replace(made.train, precision=precision))

    assert in_new_processes(config("whole"), num_ranks) == [0] * num_ranks
    assert in_new_processes(config("broken"), num_ranks, stop) == [7] * num_ranks
    assert len(metrics(tmp_path / "broken")) == stop
    assert in_new_processes(config("broken"), num_ranks) == [0] * num_ranks
    assert_equal_runs(tmp_path / "broken", tmp_path / "whole", num_ranks)


def without_times(state: Any) -> Any:
    if isinstance(state, dict):
        return {name: without_times(value) for name, value in state.items() if not name.startswith("seconds")}
    return [without_times(value) for value in state] if isinstance(state, list) else state


def assert_equal_runs(
    found: Path, expected: Path, num_ranks: int, of_state: Callable[[Any], Any] = without_times
) -> None:
    """Losses and all else of metrics.jsonl, sample ids, state, weights and optimizer: `==`, but for times."""
    assert metrics(found) == metrics(expected)
    for rank in range(num_ranks):
        ids = [(folder / f"samples-{rank}.jsonl").read_text() for folder in (found, expected)]
        assert ids[0] == ids[1] and ids[0].count("\n") >= STEPS
    ours, theirs = (store.candidates(folder / "checkpoints")[0] for folder in (found, expected))
    manifests = [store.read_manifest(path) for path in (ours, theirs)]
    assert manifests[0].step == manifests[1].step == len(metrics(expected))
    assert of_state(manifests[0].state) == of_state(manifests[1].state)
    assert manifests[0].tensors == manifests[1].tensors
    assert any("exp_avg" in name for name in manifests[0].tensors)
    left, right = (store.read_full(path, manifests[0].tensors) for path in (ours, theirs))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_the_comparison_sees_one_bit(corpus: Path, tmp_path: Path) -> None:
    """Another seed of dropout, one loss in its last bit and one sample more are each seen."""
    assert in_new_processes(job(corpus, tmp_path / "one"), 1) == [0]
    other = job(corpus, tmp_path / "two")
    other = dataclasses.replace(other, train=dataclasses.replace(other.train, seed=4321))
    assert in_new_processes(other, 1) == [0]
    with pytest.raises(AssertionError):
        assert_equal_runs(tmp_path / "two", tmp_path / "one", 1)
    lines = [json.loads(line) for line in (tmp_path / "one/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
