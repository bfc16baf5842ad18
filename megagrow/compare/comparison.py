"""One comparison from its name to its report."""

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megagrow.compare.corpus import Corpus, make_corpus
from megagrow.compare.experiment import Experiment
from megagrow.compare.report import write_report
from megagrow.compare.results import Results
from megagrow.compare.runner import Runner, Start, in_another_process
from megagrow.compare.suite import Suite
from megagrow.compare.suites import suite
from megagrow.compare.sweep import RECORDED, Sweep, record, recorded
from megagrow.config import require
from megagrow.report.build import commit, machine

MACHINES = {"core": "cpu", "full": "cpu"}  # sizes that share their runs


@dataclass(frozen=True)
class Comparison:
    """What is asked for.

    Attributes:
        suite, size: see suites.
        data: folder of text; None: the built-in corpus.
        output: folder of corpora, runs and reports.
        parallel: processes at a time.
        minutes: after which no run is begun any more; 0: there is no end.
        sweeps: whether arms are tuned although a sweep is recorded.
        records: whether the sweep is recorded.
        fixed: learning rate of all arms, which are not tuned then; 0: they are.
        only_reports: whether nothing is run.
        rates: the file of recorded sweeps.
    """

    suite: str
    size: str = "core"
    data: Path | None = None
    output: Path = Path("runs/compare")
    parallel: int = 2
    minutes: float = 0.0
    sweeps: bool = False
    records: bool = False
    fixed: float = 0.0
    only_reports: bool = False
    rates: Path = RECORDED

    def __post_init__(self) -> None:
        require(self.parallel > 0, f"--jobs {self.parallel} must be positive")
        require(self.minutes >= 0, f"--minutes {self.minutes} must not be negative")
        require(self.fixed >= 0, f"--lr {self.fixed} must not be negative")
        require(
            not (self.fixed and (self.sweeps or self.records)), "--lr leaves no sweep that could be run or recorded"
        )


def compare(asked: Comparison, start: Start = in_another_process, tell: Callable[[str], None] = print) -> Path:
    """Runs what is missing and writes the report; returns the folder of it.

    Args:
        asked: see `Comparison`.
        start: how a run is begun.
        tell: prints a line for the user.

    Raises:
        ConfigError, DataError: the suite, the text or a file of runs is not what it should be.
        FailedRun: a run failed otherwise than by diverging.
        Preempted: time is up; the same call goes on.
    """
    chosen = suite(asked.suite, asked.size)
    corpus = make_corpus(asked.data, asked.output / "corpora", chosen.vocab_size)
    name = f"{chosen.name}-{MACHINES.get(chosen.size, chosen.size)}-{corpus.sha256[:12]}"
    folder = asked.output / name
    runner = Runner(asked.parallel, start, 60 * asked.minutes, tell)
    experiment = Experiment(chosen, corpus, folder, runner, _sweep(asked, chosen))
    if not asked.only_reports:
        _run(experiment, asked, tell)
    write_report(Results.of(experiment), folder / chosen.size, asked.parallel)
    return folder / chosen.size


def _sweep(asked: Comparison, chosen: Suite) -> Sweep:
    if asked.fixed:
        return Sweep(fixed=asked.fixed)
    return (None if asked.sweeps else recorded(chosen.label, asked.rates)) or Sweep()


def _run(experiment: Experiment, asked: Comparison, tell: Callable[[str], None]) -> None:
    for arm, reason in experiment.refused.items():
        tell(f"{arm} is left out: {reason}")
    experiment.tune()
    if asked.records:
        record(experiment.suite.label, experiment.sweep, _facts(experiment.corpus), asked.rates)
    experiment.run_seeds()


def _facts(corpus: Corpus) -> dict[str, str]:
    """Where and when a sweep was made."""
    host, today = machine(), datetime.datetime.now(datetime.UTC).date()
    on = f"{host['accelerator'] or host['cpu']}, torch {host['torch']}"
    return {"corpus": corpus.sha256, "kind": corpus.kind, "date": today.isoformat(), "commit": commit(), "machine": on}
