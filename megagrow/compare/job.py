"""One run of a comparison, as a file that another process can carry out.

    python -m megagrow.compare.job FILE

trains what the file says, resuming what was begun, then asks the model its questions. A run that has been carried out
is left alone, so that a comparison goes on where it was.
"""

import datetime
import fcntl
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megagrow.compare import downstream
from megagrow.compare.questions import TASKS
from megagrow.compare.record import Line, key_of
from megagrow.config import Config
from megagrow.config_file import from_dict, to_dict
from megagrow.data.files import os_errors_as_data_errors, write_atomically
from megagrow.errors import CheckpointError, ConfigError, MegagrowError, NonFiniteError
from megagrow.json_file import parse_object
from megagrow.metrics import read_exit
from megagrow.report.build import machine
from megagrow.report.run import Json, Run, load_run
from megagrow.train import run
from megagrow.train.growing import maps_file

DONE, DIVERGED = 0, NonFiniteError.exit_code


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        config: of the run.
        questions: folder of downstream tasks; empty: none are asked.
        keeps_model: whether others start from its model; else the checkpoints are removed at the end.
        keeps_curve: whether the record has more than the end of the run.
        flops: that the run takes, to foretell its seconds; 0: not known.
        settings: what decides the run, see `record.settings_of`; the process that carries it out need not know.
    """

    config: Config
    questions: str = ""
    keeps_model: bool = False
    keeps_curve: bool = field(default=True, compare=False)
    flops: float = field(default=0.0, compare=False)
    settings: Json = field(default_factory=dict, compare=False)

    @property
    def directory(self) -> Path:
        """Of the run."""
        return Path(self.config.run.dir)

    @property
    def key(self) -> str:
        """What the run is known by on record."""
        return key_of(self.settings)

    @property
    def name(self) -> str:
        """Of the run's directory."""
        return self.directory.name

    @property
    def file(self) -> Path:
        """Where the job is written, for the process that carries it out."""
        return self.directory.parent.with_name("jobs") / f"{self.name}.json"

    @property
    def log(self) -> Path:
        """Where that process says what it does."""
        return self.file.with_suffix(".log")

    @property
    def has_ended(self) -> bool:
        """Whether it is trained, or has diverged."""
        return self._code in (DONE, DIVERGED)

    @property
    def has_model(self) -> bool:
        """Whether the checkpoint of the trained model is there; one that has diverged is no model."""
        return self._code == DONE and (self.directory / "checkpoints").is_dir()

    @property
    def _code(self) -> int | None:
        ended = read_exit(self.directory) if self.directory.is_dir() else None
        return None if ended is None else int(ended["code"])

    def line(self, parallel: int, commit: str) -> Line:
        """The ended run as the record keeps it.

        Args:
            parallel: runs that shared the machine.
            commit: of the code when it began.
        """
        run, host = load_run(self.directory), machine()
        return Line(
            key=self.key,
            name=self.name,
            steps=int((run.exit or {})["step"]),
            loss=run.final_loss,
            reason=run.unfinished,
            ledger=_rounded(run.ledger.to_dict()),
            curve=_curve(run) if self.keeps_curve else [],
            scores=self._scores(),
            settings=self.settings,
            machine=f"{host['accelerator'] or host['cpu']}, torch {host['torch']}",
            parallel=parallel,
            commit=commit,
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        )

    def write(self) -> None:
        """Writes the file."""
        content = {"config": to_dict(self.config), "questions": self.questions, "keeps_model": self.keeps_model}
        write_atomically(self.file, (json.dumps(content, indent=1) + "\n").encode())

    def _scores(self) -> dict[str, float] | None:
        path = self.directory / downstream.FILE
        if not path.is_file():
            return None
        found = parse_object(path.read_bytes(), path, CheckpointError, "remove the file")
        return {task: float(found[task][downstream.SCORES[task]]) for task in TASKS}

    @classmethod
    def read(cls, path: Path) -> "Job":
        """What `write` wrote.

        Raises:
            ConfigError: the file is not there, or holds something else.
        """
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
        fields = parse_object(raw, path, ConfigError, "run the comparison again")
        if set(fields) != {"config", "questions", "keeps_model"}:
            raise ConfigError(f"{path}: is not the file of a job; run the comparison again")
        config = from_dict(fields["config"], Config, str(path), "config")
        return cls(config, str(fields["questions"]), bool(fields["keeps_model"]))


def carry_out(job: Job) -> int:
    """Does what is left to do of a job; returns the exit code."""
    with _alone(job):
        code = DONE if job._code == DONE else run(job.config)
        if code != DONE:
            return code
        if job.questions and not (job.directory / downstream.FILE).is_file():
            tokenizer, precision = job.config.data.tokenizer, job.config.train.precision
            downstream.evaluate_run(job.directory, Path(job.questions), tokenizer, precision)
        if not job.keeps_model:
            shutil.rmtree(job.directory / "checkpoints", ignore_errors=True)
            (job.directory / maps_file(0, job.config)).unlink(missing_ok=True)
        return code


@contextmanager
def _alone(job: Job) -> Iterator[None]:
    """Waits for a process that carries the job out already: a comparison that was killed leaves its runs behind."""
    path = job.file.with_suffix(".lock")
    with os_errors_as_data_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _curve(run: Run) -> list[list[float]]:
    """[step, loss, FLOPs, seconds] of each evaluation but the last, rounded to what a picture shows."""
    names = "validation_loss", "flops_total", "seconds_total"
    points = [(line["step"], *(line[name] for name in names)) for line in run.lines[:-1]]
    return [
        [step, round(loss, 4), float(f"{flops:.5g}"), round(seconds, 2)]
        for step, loss, flops, seconds in points
        if None not in (loss, flops, seconds)
    ]


def _rounded(value: Any) -> Any:
    """A ledger as plain data, its seconds in whole milliseconds."""
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {k: round(v, 3) if k.startswith("seconds") and v is not None else _rounded(v) for k, v in value.items()}


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    try:
        return carry_out(Job.read(Path(arguments[0])))
    except MegagrowError as error:
        print(f"megagrow: error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
