"""One run from start to exit.json."""

import os
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from megagrow.config import Config, check, dump
from megagrow.data.files import write_atomically
from megagrow.errors import ConfigError, MegagrowError
from megagrow.metrics import clear_exit, write_exit
from megagrow.parallel.mesh import Mesh, init_distributed, make_mesh
from megagrow.train.trainer import Trainer

SHARED_ERROR_SECONDS = 3.0


def run(config: Config) -> int:
    """Trains as the configuration says, resuming from `run.dir` if it holds a checkpoint.

    Returns:
        The exit code (DESIGN section 8); `exit.json` holds it too, because torchrun turns every other code into 1.
    """
    rank, directory = int(os.environ.get("RANK", "0")), Path(config.run.dir)
    trainer: Trainer | None = None
    code, reason = 0, "done"
    try:
        check(config, int(os.environ.get("WORLD_SIZE", "1")))
        mesh = _prepare(config)
        trainer = Trainer(config, mesh)
        if mesh.is_main:
            write_atomically(directory / "config.json", dump(config).encode())
        trainer.run()
    except MegagrowError as error:
        code, reason = error.exit_code, str(error)
        _show(error, rank, config.run.debug)
    except Exception as error:
        code, reason = 1, f"{type(error).__name__}: {error}"
        _show(error, rank, debug=True)
    finally:
        _finish(directory, code, reason, trainer, rank)
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


def _finish(directory: Path, code: int, reason: str, trainer: Trainer | None, rank: int) -> None:
    step = trainer.state.step if trainer else 0
    if directory.is_dir() and (rank == 0 or code):
        write_exit(directory, code, reason, step, rank, socket.gethostname())
    if dist.is_initialized() and code != 1:
        dist.destroy_process_group()
