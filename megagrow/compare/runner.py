"""Carries out what is missing of a list of jobs, a few processes at a time."""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from megagrow.compare.job import DIVERGED, DONE, Job, carry_out
from megagrow.compare.record import Record
from megagrow.errors import MegagrowError, Preempted
from megagrow.metrics import duration
from megagrow.report.build import commit

POLL_SECONDS = 0.2
LAST_LINES = 5  # of the log, shown when a run fails


class Process(Protocol):
    """A job that is being carried out: `subprocess.Popen`, or what looks like it."""

    def poll(self) -> int | None: ...

    def terminate(self) -> None: ...

    def wait(self) -> int: ...


Start = Callable[[Job], Process]


class InThisProcess:
    """A job that is carried out at once, here."""

    def __init__(self, job: Job) -> None:
        self.code = carry_out(job)

    def poll(self) -> int:
        """The exit code."""
        return self.code

    def terminate(self) -> None:
        """Nothing is left to end."""

    def wait(self) -> int:
        """The exit code."""
        return self.code


def in_another_process(job: Job) -> Process:
    """Starts a job; a signal from the terminal does not reach it, its end is the runner's to tell."""
    threads = {"OMP_NUM_THREADS": str(job.config.train.threads)} if job.config.train.threads else {}
    environment = {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(_our_places())}
    command = [sys.executable, "-m", "megagrow.compare.job", str(job.file)]
    with job.log.open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def _our_places() -> list[str]:
    """Where Python finds our packages, installed or not, and what the user added."""
    specs = (importlib.util.find_spec(name) for name in ("megagrow", "megagrow_kernels"))
    ours = [str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin]
    return [*ours, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


class FailedRun(MegagrowError):
    """Runs of a comparison failed for reasons of their own, which their logs tell.

    Args:
        failures: jobs and their exit codes.
    """

    def __init__(self, failures: Sequence[tuple[Job, int]]) -> None:
        super().__init__("; ".join(_end_of_log(job, code) for job, code in failures))
        code = failures[0][1]
        self.exit_code = code if code > 0 else 1


def _end_of_log(job: Job, code: int) -> str:
    lines = job.log.read_text(errors="replace").strip().splitlines() if job.log.is_file() else []
    said = " | ".join(line.strip() for line in lines[-LAST_LINES:])
    return f"{job.name} ended with exit code {code}; {job.log} ends: {said}"


class Runner:
    """Carries out jobs and puts them on record.

    Args:
        record: of ended runs; what stands there is not carried out.
        parallel: processes at a time.
        start: how a job is begun.
        seconds: from the first job on, in which all has to end; what would not, going by the slowest run so far, is not
            begun. 0: there is no end.
        tell: prints a line for the user.
    """

    def __init__(
        self,
        record: Record,
        parallel: int = 1,
        start: Start = in_another_process,
        seconds: float = 0.0,
        tell: Callable[[str], None] = print,
    ) -> None:
        self.record, self.parallel, self.start, self.tell = record, parallel, start, tell
        self._seconds = seconds
        self._since: float | None = None  # the first job
        self._slowest = 0.0  # seconds for a FLOP of a job so far
        self._failures: dict[Job, int] = {}

    def make_models(self, jobs: Sequence[Job]) -> None:
        """Carries jobs out whose models are needed, also those of which no more than the figures are left."""
        missing = [job for job in jobs if not job.has_model and not self._has_diverged(job)]
        for job in missing:
            if job.has_ended:
                shutil.rmtree(job.directory)
        self._carry_out(missing)

    def _has_diverged(self, job: Job) -> bool:
        line = self.record.find(job.key)
        return line is not None and line.loss is None

    def carry_out(self, jobs: Sequence[Job]) -> None:
        """Does what is left to do; in the order given, so that the longest ones had better come first.

        A run that fails otherwise than by diverging is no reason to stop the others; see `raise_failures`.

        Raises:
            Preempted: time is up; the same comparison goes on from there.
        """
        self._carry_out([job for job in jobs if self.record.find(job.key) is None])

    def raise_failures(self) -> None:
        """Raises FailedRun if runs have failed; the same comparison tries them again."""
        if self._failures:
            raise FailedRun(list(self._failures.items()))

    def _carry_out(self, jobs: Sequence[Job]) -> None:
        waiting = [job for job in jobs if job not in self._failures]
        running: dict[Job, tuple[Process, _Begun]] = {}
        total = len(waiting)
        if waiting and self._since is None:
            self._since = time.monotonic()
        try:
            while running or self._fitting(waiting):
                while len(running) < self.parallel and (job := self._fitting(waiting)):
                    waiting.remove(job)
                    job.write()
                    begun = _Begun(time.monotonic(), commit())
                    running[job] = self.start(job), begun
                for job, (process, begun) in list(running.items()):
                    if (code := process.poll()) is not None:
                        del running[job]
                        self._note(job, code, f"{total - len(waiting) - len(running)}/{total}", begun)
                if running:
                    time.sleep(POLL_SECONDS)
        finally:
            _stop([process for process, _ in running.values()])
        if waiting:
            raise Preempted(
                f"{self._seconds / 60:g} minutes are over and {len(waiting)} runs are left; the same command goes on"
            )

    def _fitting(self, waiting: Sequence[Job]) -> Job | None:
        """The first job that will have ended in time."""
        if not self._seconds or self._since is None:
            return waiting[0] if waiting else None
        left = self._since + self._seconds - time.monotonic()
        return next((job for job in waiting if job.flops * self._slowest < left), None)

    def _note(self, job: Job, code: int, place: str, begun: "_Begun") -> None:
        took = time.monotonic() - begun.at
        if code in (DONE, DIVERGED):
            self._slowest = max(self._slowest, took / job.flops if job.flops else 0.0)
            line = job.line(self.parallel, begun.commit)
            self.record.add(line)
            ended = "diverged" if line.loss is None else f"loss {line.loss:.4f}"
        else:
            self._failures[job] = code
            ended = f"failed with exit code {code}, see {job.log}"
        self.tell(f"{place}  {job.name}: {ended}, {duration(took)}")


class _Begun(NamedTuple):
    """When a run began, or went on, and the commit of the code then, which may have changed by its end."""

    at: float
    commit: str


def _stop(processes: list[Process]) -> None:
    """Ends what still runs; each saves itself at its next step."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()
