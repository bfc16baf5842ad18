"""One run from start to exit.json."""

import os
import shutil
import socket
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Timer

import torch
import torch.distributed as dist

from megagrow.checks import check
from megagrow.config import Config
from megagrow.config_file import dump
from megagrow.data.files import write_atomically
from megagrow.errors import (
    SHARED_ERROR_SECONDS,
    CheckpointError,
    ConfigError,
    HangError,
    MegagrowError,
    Preempted,
)
from megagrow.growth.bootstrap import bootstrapped
from megagrow.metrics import EXIT_FILE, clear_exit, read_exit, write_exit
from megagrow.parallel import heartbeat
from megagrow.parallel.board import Ending
from megagrow.parallel.mesh import Mesh, init_distributed, make_mesh
from megagrow.parallel.watchdog import STACKS, Watchdog, limit_collectives, problem_with
from megagrow.salt.schedule import with_stage_one_steps
from megagrow.train import saving
from megagrow.train.stop import StopRequest
from megagrow.train.trainer import Trainer

END_SECONDS = 60.0  # which this process gets to end once it has said why
EXIT_SECONDS = 3.0  # which a file system gets for exit.json, which launchers read: a busy disk may need more than one
# Which ranks may be apart at least when they meet, however short `run.timeout` is: they import first.
JOIN_SECONDS = 60.0


@dataclass(frozen=True)
class End:
    """How a run ends in this rank.

    Attributes:
        code, reason: what exit.json says.
        agreed: all ranks come to it together.
        foreign: it began elsewhere, and others may have told it already.
    """

    code: int
    reason: str
    agreed: bool = False
    foreign: bool = False


def run(config: Config) -> int:
    """Trains as the configuration says, resuming from `run.dir` if it holds a checkpoint.

    Does not return where the watchdog ends the process (exit code 6).

    Returns:
        The exit code (docs/design.md, section 8), which `exit.json` holds too: torchrun turns every other code into 1.
    """
    directory = Path(config.run.dir)
    heartbeat.reset()
    watchdog, stop = Watchdog(config.run.timeout, directory, partial(_tell, directory)), StopRequest()
    end, error = End(1, "interrupted"), None  # what holds when ctrl-C comes before the loop, which would save
    try:
        given, config = config, with_stage_one_steps(bootstrapped(config))
        _join(config, watchdog)
        stop.listen()
        _train(given, config, watchdog, stop)
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
    if watchdog.rank == 0:
        _forget_the_end(Path(config.run.dir))  # nobody meets the others before rank 0 does
    seconds = max(config.run.timeout, JOIN_SECONDS)
    try:
        init_distributed(seconds)
    except dist.DistError as error:
        raise HangError(f"rank {watchdog.rank} did not meet the others within {seconds:g} s: {error}") from None
    watchdog.start()


def _train(given: Config, config: Config, watchdog: Watchdog, stop: StopRequest) -> None:
    mesh = _prepare(config, watchdog)
    if config != given:
        config = _as_begun(given, config, mesh)
    trainer = Trainer(config, mesh)
    if mesh.is_main:
        write_atomically(Path(config.run.dir) / "config.json", dump(config).encode())
    trainer.run(stop)


def _as_begun(given: Config, config: Config, mesh: Mesh) -> Config:
    """With the steps that `growth.bootstrap` and `salt.share` gave as the run began, however long it has become."""
    at_step, salt_steps = saving.saved_steps(config, mesh)
    if config.growth != given.growth and not (given.growth.at_step or given.growth.at_tokens) and at_step is not None:
        config = replace(config, growth=replace(config.growth, at_step=at_step))
    if given.salt.share and salt_steps is not None and salt_steps < config.salt.steps:
        if mesh.is_main:
            kept = f"stage 1 keeps its {salt_steps} steps, as the run began; --salt.share 0 --salt.steps N changes that"
            print(f"salt.share={given.salt.share:g}: {kept}", file=sys.stderr, flush=True)
        config = replace(config, salt=replace(config.salt, steps=salt_steps))
    check(config, mesh.world.size)
    return config


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
    except OSError as error:
        raise ConfigError(f"run.dir={directory} cannot be used ({error.strerror}); choose another --run.dir") from None


def _forget_the_end(directory: Path) -> None:
    """Removes what an earlier run said when it ended; a directory that cannot be used is told later."""
    with suppress(MegagrowError, OSError):
        clear_exit(directory)
        shutil.rmtree(directory / STACKS, ignore_errors=True)


def _end_of(error: Exception, stop: StopRequest, watchdog: Watchdog) -> End:
    """What an error means for this rank: its own end, or a consequence of another rank's."""
    agreed = isinstance(error, Preempted) and stop.is_stepping
    # As a collective is when a peer has gone.
    broken = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
    if broken or (isinstance(error, CheckpointError | Preempted) and not agreed):
        own = "".join(traceback.format_exception(error)) if broken and not _is_of_connection(error) else ""
        ending = watchdog.explanation(suspicious=broken, last_words=own)
        if broken and ending is not None:
            print(own, end="", file=sys.stderr, flush=True)
            return End(ending.code, ending.reason, foreign=True)
    if isinstance(error, CheckpointError) and stop.name and not stop.is_stepping:
        return End(Preempted.exit_code, str(error))  # whatever the signal has become on its way
    if isinstance(error, MegagrowError):
        return End(error.exit_code, str(error), agreed)
    return End(1, f"{type(error).__name__}: {error}")


def _is_of_connection(error: Exception) -> bool:
    """Whether it says nothing but that a peer or the store is gone."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "nccl", "connection", "tcpstore"))


def _leave(end: End, error: Exception | None, config: Config, watchdog: Watchdog) -> None:
    """Tells the user and exit.json how the run ends, if that is this rank's part."""
    directory = Path(config.run.dir)
    if watchdog.leave(end.code, end.reason, end.agreed):
        if watchdog.rank != 0 and not watchdog.has_peers:
            # What ends all ranks before they meet is told by the first; its end makes torchrun end us meanwhile.
            time.sleep(SHARED_ERROR_SECONDS)
        if error is not None:
            _show(error, end, config.run.debug)
        if directory.is_dir() and not (end.foreign and (directory / EXIT_FILE).exists()):
            where = (heartbeat.here.step, watchdog.rank, socket.gethostname())
            write_exit(directory, end.code, end.reason, *where)
    limit = end_within_limit(end.code)
    # After anything else ranks may still wait for each other, and leaving in order could hang.
    if dist.is_initialized() and end.agreed:
        dist.destroy_process_group()
    watchdog.stop()
    limit.cancel()


def end_within_limit(code: int) -> Timer:
    """Ends this process with `code` in `END_SECONDS`, whatever still hangs then: it must not hold the machines."""
    limit = Timer(END_SECONDS, os._exit, [code])
    limit.daemon = True
    limit.start()
    return limit


def _show(error: Exception, end: End, debug: bool) -> None:
    """One line; the full traceback for our own bugs or when asked for."""
    if debug or not (isinstance(error, MegagrowError) or end.foreign):
        traceback.print_exception(error)
    print(f"megagrow: error: {end.reason}", file=sys.stderr, flush=True)


def _tell(directory: Path, ending: Ending) -> None:
    """Says why the watchdog ends the job, unless a rank has said before why it ends."""
    print(f"megagrow: error: {ending.reason}", file=sys.stderr, flush=True)

    def write() -> None:
        if read_exit(directory) is None:
            write_exit(directory, ending.code, ending.reason, ending.step, ending.rank, ending.host)

    if problem := problem_with(write, EXIT_SECONDS):
        print(f"megagrow: warning: {directory}: {problem}; exit.json may be missing", file=sys.stderr, flush=True)
