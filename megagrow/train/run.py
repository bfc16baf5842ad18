"""One run from start to exit.json."""

import os
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from megagrow.checks import check
from megagrow.config import Config
from megagrow.config_file import dump
from megagrow.data.files import write_atomically
from megagrow.errors import ConfigError, MegagrowError, Preempted
from megagrow.metrics import clear_exit, read_exit, write_exit
from megagrow.parallel.mesh import Mesh, init_distributed, make_mesh
from megagrow.train.trainer import Trainer

SHARED_ERROR_SECONDS = 3.0
AGREED_CODES = (0, Preempted.exit_code)  # ends that all ranks reach together


def run(config: Config) -> int:
    """Trains as the configuration says, resuming from `run.dir` if it holds a checkpoint.

    Returns:
        The exit code (DESIGN section 8); `exit.json` holds it too, because torchrun turns every other code into 1.
    """
    rank, directory = int(os.environ.get("RANK", "0")), Path(config.run.dir)
    trainer: Trainer | None = None
    mesh: Mesh | None = None
    code, reason = 1, "interrupted"  # what holds when ctrl-C comes before the loop, which would save
    try:
        check(config, int(os.environ.get("WORLD_SIZE", "1")))
        mesh = _prepare(config)
        trainer = Trainer(config, mesh)
        if mesh.is_main:
            write_atomically(directory / "config.json", dump(config).encode())
        trainer.run()
        code, reason = 0, "done"
    except MegagrowError as error:
        code, reason = error.exit_code, str(error)
        _show(error, rank, config.run.debug)
    except Exception as error:
        code, reason = 1, f"{type(error).__name__}: {error}"
        _show(error, rank, debug=True)
    finally:
        # A rank that fails because another one has left must not cover what that one wrote since `_prepare`.
        told = code == 1 and mesh is not None and mesh.world.size > 1 and read_exit(directory) is not None
        if directory.is_dir() and (rank == 0 or code) and not told:
            write_exit(directory, code, reason, trainer.state.step if trainer else 0, rank, socket.gethostname())
        # After anything else ranks may still wait for each other, and leaving in order could hang.
        if dist.is_initialized() and code in AGREED_CODES:
            dist.destroy_process_group()
    return code


def _prepare(config: Config) -> Mesh:
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    init_distributed(config.run.timeout)
    mesh = make_mesh(config.parallel)
    if mesh.is_main:
        _make_directory(Path(config.run.dir))
    if dist.is_initialized():
        dist.barrier(group=mesh.checkpoint_group)
    return mesh


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        clear_exit(directory)
    except OSError as error:
        raise ConfigError(f"run.dir={directory} cannot be used ({error.strerror}); choose another --run.dir") from None


def _show(error: Exception, rank: int, debug: bool) -> None:
    """One line; the full traceback for our own bugs or when asked for."""
    if rank != 0:
        # An error that all ranks share is told by the first of them, and its end makes torchrun end us while we wait.
        time.sleep(SHARED_ERROR_SECONDS)
    if debug:
        traceback.print_exc()
    print(f"megagrow: error: {error}", file=sys.stderr, flush=True)
