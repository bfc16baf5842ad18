"""Ranks that are killed, or told that the disk is full, at a call of the C library or at a moment of their choice.

    doomed.py          serves jobs: one JSON object per line, in and out; ranks are forked from it, which takes 10 ms

It is started by `Doom` under calls.so (LD_PRELOAD), which counts the calls: nothing in megagrow knows of the faults.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from megagrow import checkpoint
from megagrow.checkpoint import store
from megagrow.checkpoint.saver import Saver
from megagrow.errors import CheckpointError
from tests.train.runs import make_config, run_on_ranks

ROOT = Path(__file__).parents[2]
ACTIONS = {"count": 0, "kill": 1, "fail": 2}
SECONDS = 60.0  # after which ranks count as hanging
WORLD_SIZE = 2
HANGS = 999  # the code of a rank that has not ended in time


@dataclass(frozen=True)
class Job:
    """What the ranks do, and what happens to one of them.

    Attributes:
        what: a key of JOBS.
        root: where it saves.
        step: that is saved, or how many are trained.
        asynchronous: how it saves.
        corpus: of training.
        action: of ACTIONS, at the `call`-th call of `rank`; or "moment": SIGKILL `delay` seconds after it was ready.
    """

    what: str
    root: str
    step: int = 0
    asynchronous: bool = True
    corpus: str = ""
    action: str = "count"
    rank: int = 0
    call: int = 0
    delay: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """How a rank ended.

    Attributes:
        code: as waitpid has it, negative for a signal.
        error: of the save, if there was one.
        calls: writes, fsyncs and names changed by this rank.
        seconds: that the job took since the rank was ready, which is when the `delay` of a death begins.
        found: steps of the checkpoints that resuming could load.
        problems: why it could not load the others.
        output: what the rank printed.
    """

    code: int
    error: str = ""
    calls: tuple[int, ...] = (0, 0, 0)
    seconds: float = 0.0
    found: tuple[int, ...] = ()
    problems: tuple[str, ...] = ()
    output: str = ""


class Doom:
    """The server as its caller sees it; a context."""

    def __init__(self, folder: Path) -> None:
        self.library = folder / "calls.so"
        source = Path(__file__).with_name("calls.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-Wall", "-o", self.library, source, "-ldl"], check=True)

    def __enter__(self) -> "Doom":
        paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
        environment = {**os.environ, "PYTHONPATH": paths, "LD_PRELOAD": str(self.library), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.doomed"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self.process:
            self.process.kill()

    def run(self, job: Job) -> list[Outcome]:
        """The ranks' outcomes."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(asdict(job)) + "\n")
        self.process.stdin.flush()
        return [Outcome(**outcome) for outcome in json.loads(self.process.stdout.readline())]


def serve() -> None:
    """Runs the jobs that come in."""
    torch.set_num_threads(1)
    library = ctypes.CDLL(None)
    for line in sys.stdin:
        job = Job(**json.loads(line))
        with tempfile.TemporaryDirectory() as folder:
            outcomes = run_ranks(job, Path(folder), library)
        print(json.dumps([asdict(outcome) for outcome in outcomes]), flush=True)


def run_ranks(job: Job, folder: Path, library: ctypes.CDLL) -> list[Outcome]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    store = start(lambda: hold_store(port))  # as torchrun does: it outlives the ranks
    processes = [start(lambda rank=rank: live(job, rank, port, folder, library)) for rank in range(WORLD_SIZE)]
    if job.action == "moment":
        wait_for(lambda: all((folder / f"ready-{rank}").exists() for rank in range(WORLD_SIZE)))
        time.sleep(job.delay)
        os.kill(processes[job.rank], signal.SIGKILL)
    codes: dict[int, int] = {}
    wait_for(lambda: len(reap(processes, codes)) == WORLD_SIZE)
    for process in set(processes) - set(codes):
        os.kill(process, signal.SIGUSR2)  # its stacks, into its output
        time.sleep(1.0)
        os.kill(process, signal.SIGKILL)
        codes[os.waitpid(process, 0)[0]] = HANGS
    os.kill(store, signal.SIGKILL)
    os.waitpid(store, 0)
    return [outcome_of(folder, rank, codes[process]) for rank, process in enumerate(processes)]


def hold_store(port: int) -> int:
    """The process in which the ranks find each other."""
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    time.sleep(10 * SECONDS)
    del store
    return 0


def start(function: Callable[[], int]) -> int:
    process = os.fork()
    if process == 0:
        code = 1
        try:
            code = function()
        finally:
            os._exit(code)
    return process


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)


def reap(processes: list[int], codes: dict[int, int]) -> dict[int, int]:
    for process in set(processes) - set(codes):
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            codes[process] = os.waitstatus_to_exitcode(status)
    return codes


def outcome_of(folder: Path, rank: int, code: int) -> Outcome:
    told = folder / f"told-{rank}"
    record = json.loads(told.read_text()) if told.exists() else {}
    return Outcome(code, **record, output=(folder / f"output-{rank}").read_text())


def live(job: Job, rank: int, port: int, folder: Path, library: ctypes.CDLL) -> int:
    """The life of a rank; returns its exit code."""
    with (folder / f"output-{rank}").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    faulthandler.register(signal.SIGUSR2, file=sys.__stderr__)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    who = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE), "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(address | who)

    began = time.monotonic()

    def ready() -> None:
        nonlocal began
        if rank == job.rank and job.action != "moment":
            library.faults_arm(os.fsencode(job.root), job.call, ACTIONS[job.action])
        (folder / f"ready-{rank}").touch()
        began = time.monotonic()

    told: dict[str, Any] = {}
    code = JOBS[job.what](job, ready, told)
    told["seconds"] = time.monotonic() - began
    told["calls"] = [library.faults_calls(kind) for kind in range(3)]
    temporary = folder / f"telling-{rank}"
    temporary.write_text(json.dumps(told))
    temporary.rename(folder / f"told-{rank}")
    return code


def join() -> None:
    """Meets the other rank. Gloo has missed a peer's death (once in 200); in a run the watchdog sees it at once."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=SECONDS / 3))


def tensors_at(step: int) -> dict[str, Tensor]:
    """Sharded and replicated tensors, one of them larger than a file's buffer; every element tells the step."""
    mesh = init_device_mesh("cpu", (WORLD_SIZE,), mesh_dim_names=("tp",))
    return {
        "up": distribute_tensor(torch.full((256, 64), float(step)), mesh, [Shard(0)]),
        "down": distribute_tensor(torch.full((9, 3), float(step)), mesh, [Shard(0)]),
        "norm": torch.full((5,), step, dtype=torch.bfloat16),
    }


def holds(tensors: dict[str, Tensor], step: int) -> bool:
    """Whether every element is of the step."""
    return all((t.to_local() if isinstance(t, DTensor) else t).eq(step).all() for t in tensors.values())


def save(job: Job, ready: Callable[[], None], told: dict[str, Any]) -> int:
    """Saves one step, two of them kept."""
    join()
    saver, tensors = Saver(None, job.asynchronous, keep_last=2), tensors_at(job.step)
    dist.barrier()
    ready()
    try:
        saver.save(Path(job.root), job.step, lambda: store.snapshot(tensors, {"step": job.step}, {}, {}))
        if job.asynchronous:
            for tensor in tensors.values():
                tensor.fill_(-1)  # the next step
        saver.wait()
    except (CheckpointError, RuntimeError) as error:
        told["error"] = f"{type(error).__name__}: {error}"
        return 4
    return 0


def resume(job: Job, ready: Callable[[], None], told: dict[str, Any]) -> int:
    """Loads all checkpoints that it can, and saves the step after the newest."""
    join()
    root, tensors = Path(job.root), tensors_at(0)
    told["found"], told["problems"] = [], []
    for path in checkpoint.candidates(root):
        step = int(path.name.removeprefix("step-"))
        try:
            state = checkpoint.load(path, tensors)
        except CheckpointError as error:
            told["problems"].append(str(error))
            continue
        assert state == {"step": step} and holds(tensors, step), f"{path} is a mix"
        told["found"].append(step)
    return save_next(root, max(told["found"]) + 1)


def save_next(root: Path, step: int) -> int:
    """The save after a fault: it succeeds, and clears away what the dead one has left."""
    saver, tensors = Saver(None), tensors_at(step)
    saver.save(root, step, lambda: store.snapshot(tensors, {"step": step}, {}, {}))
    saver.wait()
    assert checkpoint.load(root / f"step-{step}", tensors) == {"step": step} and holds(tensors, step)
    assert dist.get_rank() or not [path for path in root.iterdir() if ".tmp-" in path.name or ".trash-" in path.name]
    return 0


def train(job: Job, ready: Callable[[], None], told: dict[str, Any]) -> int:
    """A tiny run on two tensor ranks that saves every second step."""
    random.seed(0)
    config = make_config(Path(job.corpus), Path(job.root), steps=job.step)
    ready()
    with contextlib.suppress(SystemExit):
        return run_on_ranks(config, tensor=WORLD_SIZE)
    return 1


JOBS = {"save": save, "resume": resume, "train": train}

if __name__ == "__main__":
    serve()
