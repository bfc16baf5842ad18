"""`make faults`: a rank is killed, or the disk is full, at every write, fsync, rename and deletion of a save.

After each fault all older checkpoints are whole, the newest is either whole or not there, none is a mix of two steps,
and two new ranks load it and save the next. Ten minutes at most; tests/checkpoint/test_kill_save.py takes a part of it.
"""

import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megagrow import checkpoint
from tests.faults.doomed import HANGS, Doom, Job, Outcome
from tests.train.runs import make_corpus, metrics

NUM_MOMENTS = 50
TRAIN_STEPS = 8
KEPT = [[2, 1], [3, 2, 1], [3, 2]]  # steps that may be there when saving step 3 beside 1 and 2 was cut short
FILES = [".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "manifest.sha256"]


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


def copy(source: Path, folder: Path, name: str) -> Path:
    return Path(shutil.copytree(source, folder / name))


def calls_of(doom: Doom, saved: Path, folder: Path, job: Job) -> int:
    """How many calls the job's rank makes in its save."""
    root = copy(saved, folder, f"count-{job.rank}-{job.asynchronous}")
    outcome = doom.run(replace(job, root=str(root), action="count"))[job.rank]
    writes, fsyncs, names = outcome.calls
    print(f"rank {job.rank}: {writes} writes, {fsyncs} fsyncs, {names} renames and deletions")
    assert outcome.code == 0 and writes > 2 and fsyncs > 0
    return sum(outcome.calls)


def assert_survives(doom: Doom, root: Path, allowed: list[list[int]]) -> list[int]:
    """What is there is whole, new ranks go on from it; returns its steps."""
    steps = [int(path.name.removeprefix("step-")) for path in checkpoint.candidates(root)]
    assert steps in allowed
    for path in checkpoint.candidates(root):
        checkpoint.verify(path)
    for outcome in doom.run(Job("resume", str(root))):
        assert outcome.code == 0, outcome.output
        assert list(outcome.found) == steps and not outcome.problems
    return steps


def assert_killed(outcomes: list[Outcome], rank: int) -> None:
    assert outcomes[rank].code == -9
    assert outcomes[1 - rank].code not in (0, HANGS), outcomes[1 - rank]


def assert_told(outcomes: list[Outcome], root: Path) -> None:
    """Both ranks say which file is to blame and why; a failure to delete the old ones is a warning."""
    assert {outcome.code for outcome in outcomes} in ({0}, {4}), outcomes
    if outcomes[0].code == 4:
        first, second = (outcome.error for outcome in outcomes)
        assert first == second
        assert re.search(rf"cannot save step 3 in {root}: (rank \d: )?{root}\S*: No space left on device", first)
        assert not [*root.glob("step-3.tmp-*")]
    else:
        assert "cannot delete the old checkpoint" in outcomes[0].output


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("rank", [0, 1])
def test_death_at_every_call(doom: Doom, saved: Path, tmp_path: Path, rank: int, asynchronous: bool) -> None:
    job = Job("save", "", 3, asynchronous, rank=rank, action="kill")
    seen = []
    for call in range(1, calls_of(doom, saved, tmp_path, job) + 1):
        root = copy(saved, tmp_path, str(call))
        assert_killed(doom.run(replace(job, root=str(root), call=call)), rank)
        seen.append(assert_survives(doom, root, KEPT))
    assert seen[0] == [2, 1]
    assert rank == 1 or [3, 2] in seen and [3, 2, 1] in seen, "deaths before and after the commit"


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_at_every_call(doom: Doom, saved: Path, tmp_path: Path, rank: int, asynchronous: bool) -> None:
    job = Job("save", "", 3, asynchronous, rank=rank, action="fail")
    codes = set()
    for call in range(1, calls_of(doom, saved, tmp_path, job) + 1):
        root = copy(saved, tmp_path, str(call))
        outcomes = doom.run(replace(job, root=str(root), call=call))
        assert_told(outcomes, root)
        assert_survives(doom, root, KEPT)
        codes.add(outcomes[0].code)
    assert 4 in codes


def test_death_at_every_call_of_saving_a_damaged_step_again(doom: Doom, saved: Path, tmp_path: Path) -> None:
    broken = copy(saved, tmp_path, "broken")
    damage("flipped")(broken / "step-2/__1_0.distcp")
    job = Job("save", "", 2, rank=0, action="kill")
    for call in range(1, calls_of(doom, broken, tmp_path, job) + 1):
        root = copy(broken, tmp_path, str(call))
        assert_killed(doom.run(replace(job, root=str(root), call=call)), 0)
        first, second = doom.run(Job("resume", str(root)))
        assert (first.code, second.code) == (0, 0), first.output + second.output
        assert list(first.found) in ([1], [2, 1])
        assert all("step-2/__1_0.distcp" in problem for problem in first.problems)


def test_an_intact_step_is_not_written_again(doom: Doom, saved: Path, tmp_path: Path) -> None:
    root = copy(saved, tmp_path, "root")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    for outcome in doom.run(Job("save", str(root), 2)):
        assert outcome.code == 4 and "step-2 exists and is intact" in outcome.error
    assert before == {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("asynchronous", [True, False])
def test_death_at_random_moments(doom: Doom, saved: Path, tmp_path: Path, asynchronous: bool) -> None:
    job = Job("save", "", 3, asynchronous)
    outcome = doom.run(replace(job, root=str(copy(saved, tmp_path, "timed"))))[0]
    moments, seen, killed = random.Random(3), [], 0
    for number in range(NUM_MOMENTS):
        root, rank = copy(saved, tmp_path, str(number)), number % 2
        delay = moments.uniform(0, outcome.seconds)
        outcomes = doom.run(replace(job, root=str(root), action="moment", rank=rank, delay=delay))
        assert HANGS not in {outcome.code for outcome in outcomes}, "".join(each.output for each in outcomes)
        killed += outcomes[rank].code == -9
        seen.append(assert_survives(doom, root, KEPT))
    committed = sum(3 in steps for steps in seen)
    print(f"{killed} of {NUM_MOMENTS} ranks were killed; step 3 was there after {committed}")
    assert killed >= NUM_MOMENTS / 2, "most moments came when the rank had ended"
    assert 0 < committed < NUM_MOMENTS, "all deaths came before the commit, or all after it"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def trained(doom: Doom, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that nothing has disturbed."""
    root = tmp_path_factory.mktemp("trained") / "run"
    for outcome in doom.run(Job("train", str(root), TRAIN_STEPS, corpus=str(corpus))):
        assert outcome.code == 0, outcome.output
    return root


def damage(kind: str) -> Callable[[Path], Any]:
    def flip(path: Path) -> None:
        raw = bytearray(path.read_bytes())
        raw[random.Random(5).randrange(len(raw))] ^= 4
        path.write_bytes(raw)

    def cut(path: Path) -> None:
        os.truncate(path, path.stat().st_size // 2)

    return {"flipped": flip, "cut": cut, "deleted": Path.unlink}[kind]


def test_the_list_of_files_is_complete(trained: Path) -> None:
    newest = trained / f"checkpoints/step-{TRAIN_STEPS}"
    assert sorted(path.name for path in newest.iterdir()) == FILES
    assert [path.name for path in newest.parent.iterdir() if path.is_file()] == ["latest"]


@pytest.mark.parametrize("kind", ["flipped", "cut", "deleted"])
@pytest.mark.parametrize("file", [*FILES, "latest"])
def test_a_run_goes_on_before_damage(
    doom: Doom, corpus: Path, trained: Path, tmp_path: Path, file: str, kind: str
) -> None:
    run = copy(trained, tmp_path, "run")
    newest = run / f"checkpoints/step-{TRAIN_STEPS}"
    damage(kind)(newest.parent / file if file == "latest" else newest / file)
    outcomes = doom.run(Job("train", str(run), TRAIN_STEPS, corpus=str(corpus)))
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].output
    told = [line for line in outcomes[0].output.splitlines() if str(newest) in line and "resuming" not in line]
    if file != "latest":
        assert any(file in line for line in told), outcomes[0].output
        assert f"resuming from {newest.with_name(f'step-{TRAIN_STEPS - 2}')}" in outcomes[0].output
        assert [*newest.parent.glob(f"{newest.name}.damaged-*")], "kept, to be looked at"
    checkpoint.verify(newest)
    assert metrics(run) == metrics(trained)


def test_a_run_that_dies_fifty_times_is_the_same_run(doom: Doom, corpus: Path, tmp_path: Path) -> None:
    steps, moments = 200, random.Random(4)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    job = Job("train", "", steps, corpus=str(corpus))
    first, again = (doom.run(replace(job, root=str(whole)))[0] for _ in range(2))
    assert (first.code, again.code) == (0, 0), first.output + again.output
    # Each life begins where the last one has saved, and takes as long to begin as a run that has nothing left to do:
    # all of them together train for less than the run takes.
    start, training = again.seconds, max(first.seconds - again.seconds, 1.0)
    newest = []  # checkpoint after each life, 0 for none
    for number in range(NUM_MOMENTS):
        delay = moments.uniform(0.5 * start, start + 1.6 * training / NUM_MOMENTS)
        outcomes = doom.run(replace(job, root=str(broken), action="moment", rank=number % 2, delay=delay))
        assert HANGS not in {outcome.code for outcome in outcomes}, "".join(each.output for each in outcomes)
        assert outcomes[number % 2].code == -9, outcomes[number % 2].output
        found = checkpoint.candidates(broken / "checkpoints")
        newest.append(int(found[0].name.removeprefix("step-")) if found else 0)
    print(f"newest checkpoints after {NUM_MOMENTS} deaths: {newest}")
    assert newest == sorted(newest), "a life has lost what another one had saved"
    assert newest[-1] < steps, "nothing is left for the last life"
    assert len(set(newest) - {0}) >= NUM_MOMENTS / 10, "hardly a life has saved anything"
    outcomes = doom.run(replace(job, root=str(broken)))
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].output
    assert metrics(broken) == metrics(whole)
