"""One part of a job in processes of its own, as a preemption leaves it, and which samples it learned from."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from megagrow.config import Config
from megagrow.data.loader import Stream
from megagrow.salt.online import OnlineStream
from megagrow.train import run, trainer
from tests.ranks import forking, fresh_state, run_ranks, shutdown

SECONDS = 120


def in_new_processes(config: Config, num_ranks: int, stop_after: int | None = None) -> list[int]:
    """Runs the job in processes that have not trained before; returns their exit codes.

    Args:
        stop_after: step (those that learn LiGO's maps included) after which SIGTERM comes; None: to the end.
    """
    if num_ranks > 1:
        shutdown()
        return run_ranks(train_on_rank, num_ranks, config, stop_after)
    process = forking().Process(target=train_and_exit, args=(config, stop_after))
    process.start()
    process.join(SECONDS)
    assert process.exitcode is not None, "the job hangs"
    return [process.exitcode]


def train_and_exit(config: Config, stop_after: int | None) -> None:
    fresh_state()
    sys.exit(train_on_rank(config, stop_after))


def train_on_rank(config: Config, stop_after: int | None) -> int:
    with ExitStack() as stack:
        stack.enter_context(samples_noted(Path(config.run.dir)))
        if stop_after is not None:
            stack.enter_context(stopping(stop_after))
        return run(config)


@contextmanager
def samples_noted(directory: Path) -> Iterator[None]:
    """Every batch leaves a line in DIR/samples-RANK.jsonl: dataset and id of this rank's samples, in their order."""
    rank = os.environ.get("RANK", "0")

    def noting(batch: Callable[..., Any]) -> Callable[..., Any]:
        def noted(self: Any, *args: Any) -> Any:
            drawn = batch(self, *args)
            with (directory / f"samples-{rank}.jsonl").open("a") as file:
                file.write(json.dumps([drawn.which.tolist(), drawn.ids.tolist()]) + "\n")
            return drawn

        return noted

    with ExitStack() as stack:
        for kind in (Stream, OnlineStream):
            stack.enter_context(mock.patch.object(kind, "batch", noting(kind.batch)))
        yield


@contextmanager
def stopping(step: int) -> Iterator[None]:
    """SIGTERM comes as from a scheduler, once `step` steps are done."""
    count = trainer.Trainer._count

    def counted(self: trainer.Trainer, *args: Any) -> None:
        count(self, *args)
        if self.state.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(trainer.Trainer, "_count", counted):
        yield
