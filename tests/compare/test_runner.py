"""Tests ../../megagrow/compare/runner.py and job.py: processes, their ends, and what is said of them."""

import fcntl
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread

import pytest

from megagrow.compare.experiment import Experiment
from megagrow.compare.job import Job, carry_out
from megagrow.compare.record import Record
from megagrow.compare.runner import FailedRun, Runner, Start, in_another_process
from megagrow.config import Config, OptimConfig, RunConfig
from megagrow.errors import ConfigError, Preempted
from megagrow.metrics import write_exit


@dataclass
class Fake:
    """A process that ends with a code after some polls, and leaves what a run would."""

    job: Job
    code: int
    polls: int
    terminated: bool = False

    def poll(self) -> int | None:
        self.polls -= 1
        if self.polls > 0:
            return None
        self.job.directory.mkdir(parents=True, exist_ok=True)
        (self.job.directory / "config.json").write_text("{}")
        write_exit(self.job.directory, self.code, "test", 1, 0, "host")
        return self.code

    def terminate(self) -> None:
        self.terminated = True

    def wait(self) -> int:
        return 7


@dataclass
class Starts:
    """Starts fakes; `codes` are those of the jobs in their order."""

    codes: list[int]
    polls: int = 2
    begun: list[Fake] = field(default_factory=list)
    most: int = 0

    def __call__(self, job: Job) -> Fake:
        self.begun.append(Fake(job, self.codes[len(self.begun)], self.polls))
        self.most = max(self.most, sum(fake.polls > 0 for fake in self.begun))
        return self.begun[-1]


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megagrow.compare.runner.POLL_SECONDS", 0.0)


def jobs(folder: Path, count: int) -> list[Job]:
    places = [RunConfig(dir=str(folder / "runs" / f"run{i}")) for i in range(count)]
    return [Job(Config(run=place), settings={"number": number}) for number, place in enumerate(places)]


def runner(folder: Path, parallel: int, start: Start, tell: Callable[[str], object] = str) -> Runner:
    """Its record lies in the folder."""
    return Runner(Record(folder / "record.jsonl"), parallel, start, tell=tell)


def test_as_many_run_beside_each_other_as_are_allowed(tmp_path: Path) -> None:
    starts = Starts([5] * 5)
    told: list[str] = []
    runner(tmp_path, 2, starts, told.append).carry_out(jobs(tmp_path, 5))
    assert starts.most == 2
    assert [line.split()[0] for line in told] == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    assert all(": diverged, " in line for line in told)


def test_only_what_will_end_in_time_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock runs from the first job on: a second for a FLOP."""
    now = [1000.0]
    monkeypatch.setattr("megagrow.compare.runner.time.monotonic", lambda: now[0])
    made = [replace(job, flops=flops) for job, flops in zip(jobs(tmp_path, 4), (20.0, 30.0, 90.0, 50.0), strict=True)]
    begun: list[float] = []

    @dataclass
    class Timed(Fake):
        def poll(self) -> int | None:
            now[0] += self.job.flops
            return super().poll()

    def start(job: Job) -> Timed:
        begun.append(job.flops)
        return Timed(job, 5, 1)

    one = Runner(Record(tmp_path / "record.jsonl"), 1, start, seconds=110.0, tell=str)
    now[0] += 500  # such as tokenizing takes
    with pytest.raises(Preempted, match="1 runs are left"):
        one.carry_out(made)
    assert begun == [20.0, 30.0, 50.0]


def test_what_is_done_is_not_begun(tmp_path: Path) -> None:
    made = jobs(tmp_path, 3)
    runner(tmp_path, 1, Starts([5, 5])).carry_out(made[:2])
    starts = Starts([5])
    runner(tmp_path, 1, starts).carry_out(made)
    assert [fake.job for fake in starts.begun] == made[2:]


def test_a_run_that_fails_leaves_the_others_alone_and_is_told_at_the_end(tmp_path: Path) -> None:
    made = jobs(tmp_path, 3)
    made[0].log.parent.mkdir(parents=True)
    made[0].log.write_text("begins\nmegagrow: error: data/train.bin: no such file\n")
    starts, told = Starts([3, 5, 5]), []
    one = runner(tmp_path, 1, starts, told.append)
    one.carry_out(made)
    assert [fake.job for fake in starts.begun] == made
    assert "run0: failed with exit code 3, see " in told[0]
    one.carry_out(made)  # it is not tried twice by one comparison
    with pytest.raises(FailedRun, match=r"run0 ended with exit code 3; .*no such file") as caught:
        one.raise_failures()
    assert caught.value.exit_code == 3
    starts = Starts([5])
    runner(tmp_path, 1, starts).carry_out(made)
    assert [fake.job for fake in starts.begun] == made[:1]


def test_a_job_waits_for_another_process_that_carries_it_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does that a killed comparison has left behind."""
    (job,) = jobs(tmp_path, 1)
    begun: list[Config] = []
    monkeypatch.setattr("megagrow.compare.job.run", lambda config: begun.append(config) or 5)
    job.write()
    waits = Thread(target=carry_out, args=[job])
    with job.file.with_suffix(".lock").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        waits.start()
        waits.join(0.3)
        assert waits.is_alive() and not begun
    waits.join()
    assert begun == [job.config]


def test_ctrl_c_stops_what_runs(tmp_path: Path) -> None:
    starts = Starts([5, 5], polls=99)

    def interrupt(job: Job) -> Fake:
        if starts.begun:
            raise KeyboardInterrupt
        return starts(job)

    with pytest.raises(KeyboardInterrupt):
        runner(tmp_path, 2, interrupt).carry_out(jobs(tmp_path, 2))
    assert [fake.terminated for fake in starts.begun] == [True]


@pytest.mark.parametrize("damage", [lambda text: "[]", lambda text: text.replace("keeps_model", "keeps")])
def test_a_file_that_is_no_job_is_refused(damage: Callable[[str], str], tmp_path: Path) -> None:
    (job,) = jobs(tmp_path, 1)
    job.write()
    assert Job.read(job.file) == job
    job.file.write_text(damage(job.file.read_text()))
    with pytest.raises(ConfigError, match=r"run0\.json"):
        Job.read(job.file)


def test_runs_in_other_processes_end_as_those_in_this_one(finished: Experiment, tmp_path: Path) -> None:
    """Two at a time: one as in this process, one that diverges."""
    model = finished.job(finished.sweep.best("scratch-0.6"), 1)
    moved = [replace(model.config, run=RunConfig(dir=str(tmp_path / "runs" / name))) for name in ("same", "diverged")]
    moved[1] = replace(moved[1], optim=OptimConfig(lr=1e30, clip_norm=0.0, warmup_steps=0, max_bad_steps=1))
    same, diverged = (replace(model, config=config, settings={"lr": config.optim.lr}) for config in moved)
    record = Record(tmp_path / "record.jsonl")
    Runner(record, 2, in_another_process, tell=str).carry_out([same, diverged])
    assert record.find(same.key).loss == finished.runner.record.find(model.key).loss
    assert (same.directory / "downstream.json").read_bytes() == (model.directory / "downstream.json").read_bytes()
    assert record.find(diverged.key).loss is None
    assert record.find(diverged.key).reason.startswith("it ended with exit code 5")


def test_a_small_model_that_has_diverged_is_no_model(tmp_path: Path) -> None:
    job = Job(replace(Config(), run=RunConfig(dir=str(tmp_path / "runs" / "small"))))
    (job.directory / "checkpoints").mkdir(parents=True)
    for code, is_model in ((0, True), (5, False)):
        write_exit(job.directory, code, "as it was", 1, 0, "here")
        assert job.has_ended and job.has_model is is_model
