"""A folder of text and its corpus, made once; and one small comparison, run once in this process."""

import inspect
import json
import random
import statistics
import tokenize
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from megagrow.compare.corpus import Corpus, make_corpus
from megagrow.compare.experiment import Experiment
from megagrow.compare.job import DIVERGED, DONE, Job
from megagrow.compare.record import Record
from megagrow.compare.runner import InThisProcess, Runner
from megagrow.compare.suites import suite
from megagrow.compare.sweep import Sweep
from megagrow.config_file import dump
from megagrow.ledger import Ledger
from megagrow.metrics import Metrics, write_exit

ARMS = (
    "rms_random",
    "salt",
    "ligo_salt",
    "ligo_taught",
    "progressive",
    "mslt",
    "bootstrap",
    "selected",
    "ki",
    "clone_zero_pad",
)
VOCAB = suite("llama_both", "tiny").vocab_size


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that says what is held out, with two kinds of files."""
    folder = tmp_path_factory.mktemp("text")
    for name in ("train", "valid"):
        (folder / name).mkdir()
    (folder / "train" / "a.txt").write_text(inspect.getsource(random))
    lines = [json.dumps({"text": inspect.getsource(module)}) for module in (statistics, tokenize)]
    (folder / "train" / "b.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "valid" / "c.txt").write_text(inspect.getsource(inspect)[:60_000])
    (folder / "README.md").write_text("about this folder")
    return folder


@pytest.fixture(scope="session")
def corpus(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The text as tokens."""
    return make_corpus(text, tmp_path_factory.mktemp("corpora"), VOCAB)


@dataclass
class Counting:
    """Carries jobs out here and remembers which."""

    names: list[str]

    def __call__(self, job: Job) -> InThisProcess:
        self.names.append(job.name)
        return InThisProcess(job)


@dataclass
class Pretending(Counting):
    """Leaves in no time what a run of the job would: the lower its rates, the lower its loss.

    Attributes:
        worse: what is added to the loss, by how names begin; None: those runs diverge.
    """

    worse: dict[str, float | None] = field(default_factory=dict)

    def __call__(self, job: Job) -> InThisProcess:
        self.names.append(job.name)
        config, step = job.config, job.config.train.steps
        (job.directory / "checkpoints").mkdir(parents=True)
        (job.directory / "config.json").write_text(dump(config))
        ledger = Ledger()
        ledger.add("train", flops=step * 1e6, tokens=step, seconds=step)
        ledger.save(job.directory / "ledger.json")
        more = next((more for start, more in self.worse.items() if job.name.startswith(start)), 0.0)
        code = DIVERGED if more is None else DONE
        loss = 3.0 + config.optim.lr + config.growth.ligo_lr + (more or 0.0)
        Metrics(job.directory, config).log(step=step, phase="train", validation_loss=loss)
        write_exit(job.directory, code, "as told", step, 0, "host")
        return Ended(code)


@dataclass
class Ended(InThisProcess):
    """A process that has ended."""

    code: int


@pytest.fixture(scope="session")
def finished(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A comparison of one seed without tuning."""
    small = replace(suite("llama_both", "tiny"), arms=ARMS)
    folder = tmp_path_factory.mktemp("comparison")
    runner = Runner(Record(folder / "record.jsonl"), 1, Counting([]), tell=lambda line: None)
    made = Experiment(small, corpus, folder, runner, Sweep(fixed=5e-3))
    made.tune()
    made.run_seeds()
    return made
