"""One run of a comparison, as a file that another process can carry out.

    python -m megagrow.compare.job FILE

trains what the file says, resuming what was begun, then asks the model its questions. A run that has been carried out
is left alone, so that a comparison goes on where it was.
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from megagrow.compare import downstream
from megagrow.config import Config
from megagrow.config_file import from_dict, to_dict
from megagrow.data.files import write_atomically
from megagrow.errors import ConfigError, MegagrowError, NonFiniteError
from megagrow.json_file import parse_object
from megagrow.metrics import read_exit
from megagrow.report.run import Run, load_run
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
    """

    config: Config
    questions: str = ""
    keeps_model: bool = False

    @property
    def directory(self) -> Path:
        """Of the run."""
        return Path(self.config.run.dir)

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
    def is_done(self) -> bool:
        """Whether nothing is left to do: it is trained, or has diverged, and has answered."""
        ended = read_exit(self.directory) if self.directory.is_dir() else None
        if ended is None or ended["code"] not in (DONE, DIVERGED):
            return False
        return ended["code"] == DIVERGED or not self.questions or (self.directory / downstream.FILE).is_file()

    @property
    def has_model(self) -> bool:
        """Whether its checkpoint is there."""
        return self.is_done and (self.directory / "checkpoints").is_dir()

    def result(self) -> Run | None:
        """The finished run; None: it has diverged."""
        found = load_run(self.directory)
        return None if found.unfinished else found

    def write(self) -> None:
        """Writes the file.

        Raises:
            ConfigError: the same run was begun with other settings.
        """
        content = {
            "config": to_dict(self.config),
            "questions": self.questions,
            "keeps_model": self.keeps_model,
        }
        text = (json.dumps(content, indent=1) + "\n").encode()
        if self.directory.is_dir() and self.file.is_file() and self.file.read_bytes() != text:
            raise ConfigError(
                f"{self.directory} was begun with other settings than {self.name} has now; remove it, or use another "
                "--output"
            )
        write_atomically(self.file, text)

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
    ended = read_exit(job.directory) if job.directory.is_dir() else None
    code = DONE if ended is not None and ended["code"] == DONE else run(job.config)
    if code != DONE:
        return code
    if job.questions and not (job.directory / downstream.FILE).is_file():
        tokenizer, precision = job.config.data.tokenizer, job.config.train.precision
        downstream.evaluate_run(job.directory, Path(job.questions), tokenizer, precision)
    if not job.keeps_model:
        shutil.rmtree(job.directory / "checkpoints", ignore_errors=True)
        (job.directory / maps_file(0, job.config)).unlink(missing_ok=True)
    return code


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    try:
        return carry_out(Job.read(Path(arguments[0])))
    except MegagrowError as error:
        print(f"megagrow: error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
