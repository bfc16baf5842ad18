"""A tiny run in which something happens to one rank at one step; test_liveness.py starts it, alone or under torchrun.

    faulty.py CORPUS DIRECTORY TIMEOUT FAULT RANK STEP

The fault comes after the batch has been read, when STEP steps are done. DIRECTORY.fault is as old as the last progress
before it.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from megagrow.config import CheckpointConfig, Config, RunConfig
from megagrow.parallel import heartbeat
from megagrow.parallel.watchdog import PUBLISH_SECONDS
from megagrow.train import run, trainer
from megagrow.train.stop import StopRequest
from tests.train.runs import make_config

STEPS = 8
noted = threading.Event()


def signal_launcher(number: int) -> None:
    """Sends a signal to torchrun and waits until torchrun has passed it on."""
    os.kill(os.getppid(), number)
    assert noted.wait(20), "the signal has not arrived"


FAULTS = {
    "none": lambda: None,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleeps": lambda: time.sleep(1000),
    "holds the interpreter": lambda: ctypes.PyDLL(None).sleep(1000),
    "launcher stopped": lambda: (os.kill(os.getppid(), signal.SIGSTOP), time.sleep(1000)),
    "SIGTERM to torchrun": lambda: signal_launcher(signal.SIGTERM),
    "SIGUSR1 to torchrun": lambda: signal_launcher(signal.SIGUSR1),
    "SIGUSR1 to one worker": lambda: os.kill(os.getpid(), signal.SIGUSR1),
}


def faulty_config(corpus: Path, directory: Path, timeout: float) -> Config:
    """The run; it saves when it is stopped and at its end."""
    checkpoint, where = CheckpointConfig(interval=0), RunConfig(dir=str(directory), timeout=timeout)
    return make_config(corpus, directory, steps=STEPS, checkpoint=checkpoint, run=where)


def faulty_run(config: Config, fault: str, rank: int, step: int) -> int:
    """Runs, with the fault in the process of that rank; returns the exit code."""
    make_batch, note = trainer.make_batch, StopRequest._note

    def faulty(*args: Any, **kwargs: Any) -> Any:
        batch = make_batch(*args, **kwargs)
        if heartbeat.here.step == step and int(os.environ.get("RANK", "0")) == rank:
            Path(f"{config.run.dir}.fault").touch()  # now: the last mark is as old as this
            time.sleep(2 * PUBLISH_SECONDS)  # what others will say of this rank is what it has told them
            FAULTS[fault]()
        return batch

    def noticed(self: StopRequest, *args: Any) -> None:
        note(self, *args)
        noted.set()

    trainer.make_batch, StopRequest._note = faulty, noticed  # type: ignore[assignment, method-assign]
    try:
        return run(config)
    finally:
        trainer.make_batch, StopRequest._note = make_batch, note  # type: ignore[method-assign]


def main(corpus: str, directory: str, timeout: str, fault: str, rank: str, step: str) -> int:
    return faulty_run(faulty_config(Path(corpus), Path(directory), float(timeout)), fault, int(rank), int(step))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
