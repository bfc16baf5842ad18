"""Ten steps are five, the end of the process, and five in a new one, bit for bit, whatever the run is doing."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megagrow.checkpoint import store
from megagrow.config import CheckpointConfig, Config, GrowthConfig, OptimConfig, ParallelConfig, SaltConfig
from megagrow.config_file import to_dict
from megagrow.data.dataset import PackedDataset
from megagrow.errors import CheckpointError
from megagrow.salt.score_files import DTYPES, Cost, identity_of, write_scores
from megagrow.train.saving import allowed_changes
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


# The sections in which runs differ from `job`, and their layouts.
RUNS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "dropout and accumulation": ({}, {}),
    "bf16": ({"precision": "bf16"}, {}),
    "taught": (taught(STOP + 2), {}),
    "learned": (growing("ligo"), {}),
    "grown": (growing("clone"), {}),
    "learned, tensor 2": (growing("ligo"), {"tensor": 2}),
    "taught, data 2": (taught(STOP + 2), {}),
    "grown, pipeline 2": (growing("clone"), {"pipeline": 2}),
}
CASES = {
    "dropout and accumulation": ("dropout and accumulation", STOP),
    "bf16": ("bf16", STOP),
    "within stage 1": ("taught", STOP - 2),
    "at the stage switch": ("taught", STOP + 2),
    "across the stage switch": ("taught", STOP),
    "while maps are learned": ("learned", STOP),
    "when learning ends": ("learned", 7),
    "after growth with moments": ("grown", STOP),
    "tensor 2, while maps are learned": ("learned, tensor 2", STOP),
    "data 2, across the stage switch": ("taught, data 2", STOP),
    "pipeline 2, after growth": ("grown, pipeline 2", STOP),
}


@dataclass(frozen=True)
class Whole:
    """A run in one go, and the same with another directory."""

    directory: Path
    num_ranks: int
    config: Callable[[Path], Config]


@pytest.fixture(scope="module")
def whole(
    corpus: Path, trained: Path, scores: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Whole]:
    """The run of this name, trained when it is first asked for."""

    @cache
    def train(name: str) -> Whole:
        fields, parallel = RUNS[name]
        sections = {section: value for section, value in fields.items() if section != "precision"}
        if "salt" in sections:
            sections["salt"] = dataclasses.replace(sections["salt"], teacher=str(trained), scores=str(scores))

        def config(directory: Path) -> Config:
            made = job(corpus, directory, parallel=ParallelConfig(**parallel), **sections)
            precision = fields.get("precision", "fp32")
            return dataclasses.replace(made, train=dataclasses.replace(made.train, precision=precision))

        found = Whole(tmp_path_factory.mktemp("whole"), 2 if name.endswith(" 2") else 1, config)
        assert in_new_processes(config(found.directory), found.num_ranks) == [0] * found.num_ranks
        return found

    return train


@pytest.mark.parametrize("case", CASES)
def test_a_new_process_goes_on_bit_for_bit(whole: Callable[[str], Whole], tmp_path: Path, case: str) -> None:
    name, stop = CASES[case]
    expected = whole(name)
    config, num_ranks = expected.config(tmp_path), expected.num_ranks
    assert in_new_processes(config, num_ranks, stop) == [7] * num_ranks
    assert len(metrics(tmp_path)) == stop
    assert in_new_processes(config, num_ranks) == [0] * num_ranks
    assert_equal_runs(tmp_path, expected.directory, num_ranks)


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


def test_the_comparison_sees_one_bit(whole: Callable[[str], Whole], tmp_path: Path) -> None:
    """Another seed of dropout, one loss in its last bit and one sample more are each seen."""
    plain = whole("dropout and accumulation")
    config = plain.config(tmp_path / "seed")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=4321))
    assert in_new_processes(config, 1) == [0]
    for name in ("same", "loss", "sample"):
        shutil.copytree(plain.directory, tmp_path / name)
    file = tmp_path / "loss/metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    lines[-1]["loss"] = math.nextafter(lines[-1]["loss"], math.inf)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with (tmp_path / "sample/samples-0.jsonl").open("a") as samples:
        samples.write("[[0], [0]]\n")
    assert_equal_runs(tmp_path / "same", plain.directory, 1)
    for name in ("seed", "loss", "sample"):
        with pytest.raises(AssertionError):
            assert_equal_runs(tmp_path / name, plain.directory, 1)


def test_a_run_saved_when_maps_began_at_copies_by_name_goes_on(tmp_path: Path) -> None:
    tied: Any = {"ligo_variant": "tied", "ligo_init": "clone", "ligo_lr": 3e-3}  # the defaults, once
    for growth in (GrowthConfig(), GrowthConfig("stack")):  # which learn no maps
        config = Config(growth=growth)
        saved = to_dict(config)
        saved["growth"] |= tied
        assert allowed_changes(saved, config, tmp_path) == []
    learns = Config(growth=GrowthConfig("ligo", ligo_variant="tied"))
    saved = to_dict(learns)
    saved["growth"]["ligo_init"] = "clone"
    assert allowed_changes(saved, learns, tmp_path) == []
    by_default = Config(growth=GrowthConfig("ligo"))
    saved = to_dict(by_default)
    saved["growth"] |= tied
    with pytest.raises(CheckpointError, match="ligo_variant was tied there and is full_rank"):
        allowed_changes(saved, by_default, tmp_path)
