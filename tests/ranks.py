"""Runs a function in several ranks; the rank processes are kept alive between tests.

    results = run_ranks(fn, world_size, *args, **kwargs)

Every call gets a fresh gloo process group on a fresh store, the environment that torchrun would
set, the caller's working directory, environment variables and warning filters, and fixed seeds.
Ranks are forked from a server that has imported torch and megagrow and has a single thread: 10 ms
for a rank instead of 2 s. Results travel as plain bytes, so that no shared memory and no file descriptor
outlives a call.
"""

import copy
import faulthandler
import functools
import gc
import multiprocessing
import os
import pickle
import random
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

MAX_RANKS = 8
GRACE_SECONDS = 1.0  # what the other ranks get to answer in, once one of them has failed
STACK_SECONDS = 0.5  # what ranks that hang get to write their stacks in
GLOO_SECONDS = 60.0  # how much later than our deadline gloo's own comes, so that ours names the ranks
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
# What a rank would import before or within its first step; the last is torch's compiler, which optimizers ask for.
PRELOAD = ["torch.distributed.checkpoint", "torch.distributed.pipelining", "megagrow.train", "torch._dynamo"]


class RankError(RuntimeError):
    """A rank died, did not answer in time, or raised what cannot travel between processes."""


@dataclass(frozen=True)
class Call:
    """What every rank is told to run; `deadline` is on the monotonic clock, which they share."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    world_size: int
    timeout: float
    deadline: float
    folder: str
    cwd: str = field(default_factory=os.getcwd)
    environ: dict[str, str] = field(default_factory=lambda: dict(os.environ), repr=False)
    filters: list[Any] = field(default_factory=lambda: list(warnings.filters), repr=False)


@dataclass(frozen=True)
class Failure:
    """Stands in the place of a result; `when` (same clock) tells cause from consequence."""

    error: BaseException
    trace: str
    when: float


@dataclass(frozen=True)
class Worker:
    """One rank and our end of its pipe."""

    process: BaseProcess
    connection: Connection


_pool: list[Worker] = []


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120, **kwargs: Any) -> list[Any]:
    """Runs `fn(*args, **kwargs)` in the ranks of a gloo process group; returns its results by rank.

    `fn` is a module-level function; arguments and results are plain data and CPU tensors. The
    exception that was raised first, in any rank, is raised here, with a note that names the rank
    and holds its traceback. Ranks that do not follow within a second are killed with the pool;
    the next call starts a new one.

    Raises:
        RankError: a rank died, or some did not answer in `timeout` seconds (with their stacks).
    """
    __tracebackhide__ = True
    if not 1 <= world_size <= MAX_RANKS:
        raise ValueError(f"world_size={world_size} is not between 1 and {MAX_RANKS}")
    _grow_pool(world_size)
    deadline = time.monotonic() + timeout
    folder = tempfile.mkdtemp(dir=_all_folders().name)
    call = Call(fn, args, kwargs, world_size, timeout, deadline, folder)
    message = pickle.dumps(call)
    try:
        for worker in _pool[:world_size]:
            worker.connection.send_bytes(message)
        replies = _receive(call)
    except BaseException:
        shutdown()
        raise
    if len(replies) < world_size or any(not worker.process.is_alive() for worker in _pool):
        shutdown()
    return _results(call, replies)


@functools.cache
def _all_folders() -> tempfile.TemporaryDirectory[str]:
    """Until this process ends: a rank whose store is collected late opens its file again, and dies if it is gone."""
    return tempfile.TemporaryDirectory(prefix="ranks-")


def shutdown() -> None:
    """Kills the ranks; the next `run_ranks` starts new ones."""
    for worker in _pool:
        worker.process.kill()
    for worker in _pool:
        worker.process.join()
        worker.connection.close()
    _pool.clear()


def fresh_state() -> None:
    """Gives torch, numpy and random the state that every test and every rank starts from.

    Deterministic algorithms also fill `torch.empty` with NaN, so that memory which is read before
    it is written shows.
    """
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(True)


def forking() -> ForkServerContext:
    """The context whose processes are forked from a server that has imported PRELOAD."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _grow_pool(world_size: int) -> None:
    context = forking()
    while len(_pool) < world_size:
        rank = len(_pool)
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(rank, theirs), name=f"rank{rank}", daemon=True)
        with mock.patch.dict(os.environ, ONE_THREAD):
            process.start()
        theirs.close()
        _pool.append(Worker(process, ours))


def _receive(call: Call) -> dict[int, Any]:
    """Result or Failure by rank; without the ranks that did not answer."""
    replies: dict[int, Any] = {}
    waiting = {worker.connection: rank for rank, worker in enumerate(_pool[: call.world_size])}
    deadline = call.deadline + STACK_SECONDS
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            rank = waiting.pop(connection)
            replies[rank] = _reply(_pool[rank])
            if isinstance(replies[rank], Failure):
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    return replies


def _reply(worker: Worker) -> Any:
    try:
        return worker.connection.recv()
    except (EOFError, ConnectionError):
        worker.process.join(GRACE_SECONDS)
        return Failure(RankError(f"the process ended with code {worker.process.exitcode}"), "", 0.0)
    except Exception as error:
        return Failure(RankError(f"its result cannot be read here: {error!r}"), "", 0.0)


def _results(call: Call, replies: dict[int, Any]) -> list[Any]:
    __tracebackhide__ = True
    failures = {rank: reply for rank, reply in replies.items() if isinstance(reply, Failure)}
    if failures:
        rank, first = min(failures.items(), key=lambda item: item[1].when)
        first.error.add_note(f"in rank {rank} of {call.world_size}\n{first.trace}")
        raise first.error
    hung = [rank for rank in range(call.world_size) if rank not in replies]
    if hung:
        stacks = "".join(f"\nrank {rank}:\n{_stack_file(call, rank).read_text()}" for rank in hung)
        raise RankError(f"no answer from ranks {hung} within {call.timeout:g} s{stacks}")
    return [replies[rank] for rank in range(call.world_size)]


def _stack_file(call: Call, rank: int) -> Path:
    return Path(call.folder) / f"stack{rank}"


def _serve(rank: int, connection: Connection) -> None:
    """The life of a rank: answers calls until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    gc.freeze()
    while True:
        try:
            call = connection.recv()
        except EOFError:
            return
        except Exception as error:
            connection.send_bytes(_failure(error))
            continue
        connection.send_bytes(_answer(rank, call))
        del call
        gc.collect()


def _answer(rank: int, call: Call) -> bytes:
    with _stack_file(call, rank).open("w") as stack:
        faulthandler.dump_traceback_later(max(0.01, call.deadline - time.monotonic()), file=stack)
        try:
            return _run(rank, call)
        except BaseException as error:
            return _failure(error)
        finally:
            faulthandler.cancel_dump_traceback_later()


def _failure(error: BaseException) -> bytes:
    trace, when = "".join(traceback.format_exception(error)), time.monotonic()
    try:
        copy.copy(error)  # as unpickling will: fails where the class wants other arguments than its message
        return pickle.dumps(Failure(error, trace, when))
    except Exception:
        return pickle.dumps(Failure(RankError(f"{type(error).__name__}: {error}"), trace, when))


def _run(rank: int, call: Call) -> bytes:
    os.chdir(call.cwd)
    os.environ.clear()
    os.environ.update(call.environ | ONE_THREAD | _torchrun_environ(rank, call.world_size))
    fresh_state()
    # Meshes of two calls are equal when their shapes are, but the cached one's groups are gone.
    _clear_sharding_prop_cache()
    with warnings.catch_warnings():
        warnings.resetwarnings()
        warnings.filters.extend(call.filters)
        _init_process_group(rank, call)
        try:
            result = call.fn(*call.args, **call.kwargs)
            if dist.is_initialized():
                dist.barrier()
            return pickle.dumps(result)
        except BaseException as error:
            return _failure(error)  # stamped before the group goes, which makes other ranks fail
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _init_process_group(rank: int, call: Call) -> None:
    store = dist.FileStore(f"{call.folder}/store", call.world_size)
    timeout = timedelta(seconds=call.timeout + GLOO_SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=call.world_size, timeout=timeout)
    # Without this, a rank that fails at once destroys the group while another still connects, and
    # then a later init hangs in both: 9 of 400 times (torch 2.13, two busy cores); with it 0 of 2400.
    dist.barrier()


def _torchrun_environ(rank: int, world_size: int) -> dict[str, str]:
    size, index = str(world_size), str(rank)
    return {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
