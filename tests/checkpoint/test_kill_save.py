"""A part of the kill matrix of tests/faults/kill_save.py (`make faults`): background saves, some of the calls."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.doomed import Doom, Job
from tests.faults.kill_save import KEPT, assert_killed, assert_survives, assert_told, calls_of, copy

EVERY = 4  # calls between two faults


@pytest.fixture(scope="module")
def doom(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doom]:
    with Doom(tmp_path_factory.mktemp("doom")) as doom:
        yield doom


@pytest.fixture(scope="module")
def saved(doom: Doom, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks' checkpoints of steps 1 and 2."""
    root = tmp_path_factory.mktemp("saved")
    for step in (1, 2):
        assert [outcome.code for outcome in doom.run(Job("save", str(root), step))] == [0, 0]
    return root


def test_death_of_the_first_rank(doom: Doom, saved: Path, tmp_path: Path) -> None:
    job = Job("save", "", 3, rank=0, action="kill")
    num_calls = calls_of(doom, saved, tmp_path, job)
    seen = []
    for call in range(1, num_calls + 1, EVERY):
        root = copy(saved, tmp_path, str(call))
        assert_killed(doom.run(replace(job, root=str(root), call=call)), 0)
        seen.append(assert_survives(doom, root, KEPT))
    assert seen[0] == [2, 1] and 3 in seen[-1], "deaths before and after the commit"


@pytest.mark.parametrize("action", ["kill", "fail"])
def test_the_second_rank_dies_or_has_a_full_disk(doom: Doom, saved: Path, tmp_path: Path, action: str) -> None:
    job = Job("save", str(copy(saved, tmp_path, "root")), 3, rank=1, call=2, action=action)
    outcomes = doom.run(job)
    if action == "kill":
        assert_killed(outcomes, 1)
    else:
        assert_told(outcomes, Path(job.root))
    assert assert_survives(doom, Path(job.root), KEPT) == [2, 1]
