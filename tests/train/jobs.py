"""Runs of faulty.py under torchrun, and how they ended."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HOST = socket.gethostname()
SECONDS = 120  # after which a job that should have ended is killed


@dataclass
class Job:
    """A run under one torchrun that meets a fault."""

    directory: Path
    output_file: Path
    process: "subprocess.Popen[bytes]"
    code: int | None = None
    ended: float = 0.0

    @property
    def seconds_after_fault(self) -> float:
        """From the fault to the end of torchrun."""
        return self.ended - self.directory.with_suffix(".fault").stat().st_mtime

    @property
    def output(self) -> str:
        return self.output_file.read_text()

    @property
    def errors(self) -> list[str]:
        """Our own lines that say why the run ended."""
        return [line for line in self.output.splitlines() if line.startswith("megagrow: error:")]

    @property
    def exit(self) -> dict[str, Any]:
        return dict(json.loads((self.directory / "exit.json").read_text()))

    def stacks(self, rank: int) -> str:
        """What the rank wrote when it was asked for its stacks."""
        return (self.directory / f"stacks/rank-{rank}.txt").read_text()

    def wait(self) -> None:
        """Waits until torchrun has ended."""
        with self.process:
            try:
                self.code = self.process.wait(SECONDS)
            finally:
                self.process.kill()
        self.ended = time.time()


def start(
    corpus: Path,
    directory: Path,
    timeout: float,
    fault: str,
    rank: int,
    step: int,
    *options: str,
    where: tuple[str, ...] = ("--standalone", "--nproc-per-node=2"),
    name: str = "",
) -> Job:
    """Starts a torchrun; what it prints goes to DIRECTORY.NAMEoutput."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", *where, *options]
    what = map(str, (ROOT / "tests/train/faulty.py", corpus, directory, timeout, fault, rank, step))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    output_file = directory.with_suffix(f".{name}output")
    with output_file.open("ab") as output:
        process = subprocess.Popen([*torchrun, *what], stdout=output, stderr=output, env=environment)
    return Job(directory, output_file, process)


def wait(*jobs: Job) -> None:
    """Waits for jobs that run at the same time, so that the end of each is noted when it comes."""
    threads = [threading.Thread(target=job.wait) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def assert_ended_with_one_line(job: Job, begins: str) -> None:
    """The job failed because of rank 1 after step 3, one line says why, and exit.json says the same."""
    assert job.code == 1, job.output
    (line,) = job.errors
    assert line.startswith(f"megagrow: error: rank 1 (host {HOST}) {begins}"), job.output
    assert "phase data, last step 3" in line
    assert "RuntimeError" not in job.output and "closed by peer" not in job.output
    assert job.exit == {"code": 6, "reason": line[len("megagrow: error: ") :], "step": 3, "rank": 1, "host": HOST}
