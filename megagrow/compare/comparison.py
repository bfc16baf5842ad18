"""One comparison from its name to its report."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from megagrow.compare.agreement import disagreements
from megagrow.compare.corpus import make_corpus
from megagrow.compare.experiment import Experiment
from megagrow.compare.record import Record
from megagrow.compare.report import write_report
from megagrow.compare.results import Results
from megagrow.compare.runner import Runner, Start, in_another_process
from megagrow.compare.suites import suite
from megagrow.compare.sweep import Sweep
from megagrow.config import require
from megagrow.errors import DataError
from megagrow.report.build import commit

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
        fixed: learning rate of all arms, which are not tuned then; 0: they are.
        only_reports: whether nothing is run.
        results: folder of the records of ended runs, which are kept with the project.
    """

    suite: str
    size: str = "core"
    data: Path | None = None
    output: Path = Path("runs/compare")
    parallel: int = 2
    minutes: float = 0.0
    fixed: float = 0.0
    only_reports: bool = False
    results: Path = Path("benchmarks/results/compare")

    def __post_init__(self) -> None:
        require(self.parallel > 0, f"--jobs {self.parallel} must be positive")
        require(self.minutes >= 0, f"--minutes {self.minutes} must not be negative")
        require(self.fixed >= 0, f"--lr {self.fixed} must not be negative")


def compare(asked: Comparison, start: Start = in_another_process, tell: Callable[[str], None] = print) -> Path:
    """Runs what is missing and writes the report; returns the folder of it.

    Args:
        asked: see `Comparison`.
        start: how a run is begun.
        tell: prints a line for the user.

    Raises:
        ConfigError, DataError: the suite, the text, the record or a file of runs is not what it should be.
        FailedRun: runs failed otherwise than by diverging; the others have been carried out.
        Preempted: time is up; the same call goes on.
    """
    experiment = _experiment(asked, start, tell)
    for arm, reason in experiment.refused.items():
        tell(f"{arm} is left out: {reason}")
    experiment.tune()
    experiment.run_seeds()
    output = experiment.folder / experiment.suite.size
    write_report(Results.of(experiment), output)
    experiment.runner.raise_failures()
    return output


def check(asked: Comparison, start: Start = in_another_process, tell: Callable[[str], None] = print) -> list[str]:
    """Runs the reported seeds of a finished comparison again; returns what lies outside of what is on record.

    Args:
        asked, start, tell: see `compare`.

    Raises:
        DataError: not all of the comparison is on record for this corpus.
        ConfigError, FailedRun, Preempted: see `compare`.
    """
    recorded = _experiment(replace(asked, only_reports=True), start, tell)
    recorded.tune()
    known = Results.of(recorded)
    tuned = set(recorded.arms) - set(recorded.sweep.diverging(recorded.arms))
    missing = [each for each in known.outcomes if each.line is None and not known.is_starved(each)]
    if not known.names or missing or not recorded.sweep.knows(tuned):
        raise DataError(f"{recorded.runner.record.path}: holds no whole comparison to check against; run it first")
    folder = recorded.folder / f"again-{commit()[:8]}"
    for other in set(recorded.folder.glob("again-*")) - {folder}:
        shutil.rmtree(other)  # what another commit has run says nothing of this one
    runner = Runner(Record(folder / "record.jsonl"), asked.parallel, start, 60 * asked.minutes, tell)
    again = replace(recorded, folder=folder, runner=runner, only_reads=False)
    again.run_seeds()
    runner.raise_failures()
    found = disagreements(known, Results.of(again))
    shutil.rmtree(folder)
    return found


def _experiment(asked: Comparison, start: Start, tell: Callable[[str], None]) -> Experiment:
    chosen = suite(asked.suite, asked.size)
    corpus = make_corpus(asked.data, asked.output / "corpora", chosen.vocab_size)
    name = f"{chosen.name}-{MACHINES.get(chosen.size, chosen.size)}-{corpus.sha256[:12]}"
    runner = Runner(Record(asked.results / f"{name}.jsonl"), asked.parallel, start, 60 * asked.minutes, tell)
    return Experiment(chosen, corpus, asked.output / name, runner, Sweep(fixed=asked.fixed or None), asked.only_reports)
