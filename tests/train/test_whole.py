"""One run that does all: the small model learns, grows, teaches what it has become, picks its data, and leaves."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from megagrow import flops, presets
from megagrow.config import CheckpointConfig, Config
from tests.ranks import run_ranks
from tests.train.resumed import in_new_processes, train_on_rank
from tests.train.runs import LARGE, SMALL, make_config, metrics
from tests.train.test_resume import assert_equal_runs, without_times
from tests.train.test_run import assert_same_run, cut_back, ledger

RANKS = 2
PHASES = ["small"] * 3 + ["ligo"] * 2 + ["salt"] * 3 + ["train"] * 2
TOKENS, LENGTH = 4 * 16, 16  # of a step, of a sample


def whole(corpus: Path, directory: Path) -> Config:
    """The preset on smaller models, for fewer steps: stage 1 takes two batches of four, and one of the next four."""
    given, plain = presets.get("quickstart_whole"), make_config(corpus, directory, steps=8)
    return dataclasses.replace(
        plain,
        model=LARGE,
        growth=dataclasses.replace(given.growth, source=SMALL, at_step=3, ligo_steps=2, rewarmup_steps=2),
        salt=dataclasses.replace(given.salt, steps=3, online_buffer=4),
        checkpoint=CheckpointConfig(interval=1, keep_last=0),
    )


@pytest.fixture(scope="module")
def unbroken(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    assert in_new_processes(whole(corpus, directory), RANKS) == [0] * RANKS
    return directory


def without_identity(state: Any) -> Any:
    """Nor times: two copies of the kept teacher have the same weights, but not the same files."""
    plain = without_times(state)
    (teacher,) = plain["ledger"]["inherited"]
    assert teacher.pop("identity")
    return plain


def test_every_phase_is_seen_and_paid_for(unbroken: Path) -> None:
    """Two buffers of four batches are scored; nothing comes from outside of the run."""
    lines, found = metrics(unbroken), ledger(unbroken)
    assert [line["phase"] for line in lines] == PHASES
    assert [bool(line["kd"]) for line in lines] == [phase == "salt" for phase in PHASES]
    step = flops.training_flops(LARGE, TOKENS, LENGTH)
    learning = flops.ligo_step_flops(SMALL, LARGE, TOKENS, LENGTH)
    teaching = flops.forward_flops(SMALL, TOKENS, LENGTH)
    expected = {
        "small": 3 * flops.training_flops(SMALL, TOKENS, LENGTH),
        "growth": flops.ligo_generation_flops(SMALL, LARGE),
        "ligo": 2 * learning,
        "scoring": 8 * teaching,
        "teacher": 3 * teaching,
        "salt": 3 * step,
        "train": 2 * step,
    }
    spent = dict.fromkeys(expected, 0.0)
    for phase in found["phases"]:
        if phase["phase"] != "evaluation":
            spent[phase["phase"]] += phase["flops"]
    assert spent == pytest.approx(expected)
    assert found["totals"]["all_in"]["flops"] == pytest.approx(sum(expected.values()))
    outside_papers = expected["small"] + expected["scoring"]
    assert found["totals"]["papers_convention"]["flops"] == pytest.approx(sum(expected.values()) - outside_papers)


def test_a_stop_in_every_phase_changes_nothing(corpus: Path, tmp_path: Path, unbroken: Path) -> None:
    """Each time in new processes: when the small model is to grow, while maps are learned, within a buffer of stage 1,
    and in stage 2."""
    config = whole(corpus, tmp_path)
    for stop in (3, 4, 6, 9):
        assert in_new_processes(config, RANKS, stop) == [7] * RANKS
        assert [line["phase"] for line in metrics(tmp_path)] == PHASES[:stop]
    assert in_new_processes(config, RANKS) == [0] * RANKS
    assert_equal_runs(tmp_path, unbroken, RANKS, without_identity)


@pytest.mark.parametrize("step", [2, 7])
def test_a_kill_costs_the_steps_since_the_last_checkpoint(
    corpus: Path, tmp_path: Path, unbroken: Path, step: int
) -> None:
    """Before the growth, whose teacher is kept already, and between two buffers."""
    directory = tmp_path / "broken"
    shutil.copytree(unbroken, directory)
    cut_back(directory, step)
    assert run_ranks(train_on_rank, RANKS, whole(corpus, directory), None) == [0] * RANKS
    assert_same_run(directory, unbroken)
