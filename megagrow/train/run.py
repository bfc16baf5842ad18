"""One run from start to exit.json."""

import os
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megagrow.checks import check
from megagrow.config import Config
from megagrow.config_file import dump
from megagrow.data.files import write_atomically
from megagrow.errors import CheckpointError, ConfigError, DataError, HangError, MegagrowError, Preempted
from megagrow.metrics import clear_exit, read_exit, write_exit
from megagrow.parallel import heartbeat
from megagrow.parallel.board import Ending
from megagrow.parallel.mesh import Mesh, init_distributed, make_mesh
from megagrow.parallel.watchdog import Watchdog, limit_collectives
from megagrow.train.stop import StopRequest
from megagrow.train.trainer import Trainer

SHARED_ERROR_SECONDS = 3.0
JOIN_SECONDS = (
    60.0  # which ranks may be apart at least when they meet, however short `run.timeout` is: they import first
)


@dataclass(frozen=True)
class End:
    """How a run ends in this rank; `agreed`: all ranks come to it together."""

    code: int
    reason: str
    agreed: bool = False


def run(config: Config) -> int:
    """Trains as the configuration says, resuming from `run.dir` if it holds a checkpoint.

    Does not return where the watchdog ends the process (exit code 6).

    Returns:
        The exit code (DESIGN section 8); `exit.json` holds it too, because torchrun turns every other code into 1.
    """
    directory = Path(config.run.dir)
    heartbeat.reset()
    watchdog, stop = Watchdog(config.run.timeout, directory, partial(_tell, directory)), StopRequest()
    end, error = End(1, "interrupted"), None  # what holds when ctrl-C comes before the loop, which would save
    try:
        _join(config, watchdog)
        stop.listen()
        _train(config, watchdog, stop)
        end = End(0, "done", agreed=True)
    except Exception as caught:
        stop.wait_for_end()
        end, error = _end_of(caught, stop, watchdog), caught
    finally:
        stop.wait_for_end()
        _leave(end, error, config, watchdog)
        stop.restore()
    return end.code


def _join(config: Config, watchdog: Watchdog) -> None:
    """Meets the other ranks; from here on the watchdog watches."""
    check(config, int(os.environ.get("WORLD_SIZE", "1")))
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    seconds = max(config.run.timeout, JOIN_SECONDS)
    try:
        init_distributed(seconds)
    except dist.DistError as error:
        raise HangError(f"rank {watchdog.rank} did not meet the others within {seconds:g} s: {error}") from None
    watchdog.start()


def _train(config: Config, watchdog: Watchdog, stop: StopRequest) -> None:
    mesh = _prepare(config, watchdog)
    trainer = Trainer(config, mesh)
    if mesh.is_main:
        write_atomically(Path(config.run.dir) / "config.json", dump(config).encode())
    trainer.run(stop)


def _prepare(config: Config, watchdog: Watchdog) -> Mesh:
    if watchdog.rank == 0:
        _make_directory(Path(config.run.dir))
    mesh = make_mesh(config.parallel)
    limit_collectives(config.run.timeout)
    if dist.is_initialized():
        dist.barrier(group=mesh.checkpoint_group)
    return mesh


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        clear_exit(directory)
    except OSError as error:
        raise ConfigError(f"run.dir={directory} cannot be used ({error.strerror}); choose another --run.dir") from None


def _end_of(error: Exception, stop: StopRequest, watchdog: Watchdog) -> End:
    """What an error means for this rank: its own end, or a consequence of another rank's."""
    agreed = isinstance(error, Preempted) and stop.is_stepping
    broken = isinstance(error, RuntimeError)  # as a collective is when a peer has gone
    if broken or (isinstance(error, CheckpointError | Preempted) and not agreed):
        ending = watchdog.explanation(suspicious=broken)
        if broken and ending is not None:
            return End(1, ending.reason)
    if isinstance(error, MegagrowError):
        return End(error.exit_code, str(error), agreed)
    return End(1, f"{type(error).__name__}: {error}")


def _leave(end: End, error: Exception | None, config: Config, watchdog: Watchdog) -> None:
    """Tells the user and exit.json how the run ends, if that is this rank's part."""
    directory = Path(config.run.dir)
    if watchdog.leave(end.code, end.reason, end.agreed):
        if watchdog.rank != 0 and not watchdog.has_peers:
            # What ends all ranks before they meet is told by the first; its end makes torchrun end us meanwhile.
            time.sleep(SHARED_ERROR_SECONDS)
        if error is not None:
            _show(error, end, config.run.debug)
        if directory.is_dir():
            where = (heartbeat.here.step, watchdog.rank, socket.gethostname())
            write_exit(directory, end.code, end.reason, *where)
    # After anything else ranks may still wait for each other, and leaving in order could hang.
    if dist.is_initialized() and end.agreed:
        dist.destroy_process_group()
    watchdog.stop()


def _show(error: Exception, end: End, debug: bool) -> None:
    """One line; the full traceback for our own bugs or when asked for."""
    if debug or not isinstance(error, MegagrowError):
        traceback.print_exception(error)
    print(f"megagrow: error: {end.reason}", file=sys.stderr, flush=True)


def _tell(directory: Path, ending: Ending) -> None:
    """Says why the watchdog ends the job, unless a rank has said before why it ends."""
    print(f"megagrow: error: {ending.reason}", file=sys.stderr, flush=True)
    try:
        if read_exit(directory) is None:
            write_exit(directory, ending.code, ending.reason, ending.step, ending.rank, ending.host)
    except DataError as error:
        print(f"megagrow: warning: {error}", file=sys.stderr, flush=True)
