"""What the time and the memory of single steps go to: a trace of the operations, a snapshot of the GPU's memory.

    DIR/profile/rank-N.json            for chrome://tracing or https://ui.perfetto.dev
    DIR/profile/summary.txt            the operations of rank 0 that took longest
    DIR/profile/memory-rank-N.pickle   for https://docs.pytorch.org/memory_viz

Steps are counted as training counts them before they are taken: step s comes after checkpoint step-s.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile, record_function

from megagrow.config import RunConfig
from megagrow.errors import ConfigError

TRACED_STEPS = 3
WARMUP_STEPS = 1  # traced and thrown away: the first one also pays for starting the profiler
SUMMARY_ROWS = 20
MEMORY_EVENTS = 100_000  # allocations and frees, the latest ones; a step of a large model makes some ten thousand


def check_profiling(config: RunConfig, device: torch.device) -> None:
    """Raises ConfigError when a memory snapshot is asked for where there is no GPU."""
    if config.memory_snapshot_at >= 0 and device.type != "cuda":
        raise ConfigError(
            f"run.memory_snapshot_at={config.memory_snapshot_at} records the memory of a GPU, this run computes on the "
            f"{device.type}; leave it out, or start the run where a GPU is visible"
        )


class Profiling:
    """Watches the steps that the configuration names, each once.

    Use it as a context: what is still being recorded when it ends, however it ends, is written then.

    Args:
        config: says which steps; `profile_at` and `memory_snapshot_at`, -1 for none.
        rank: of the whole job.
        device: of compute.
    """

    def __init__(self, config: RunConfig, rank: int, device: torch.device) -> None:
        self.directory, self.rank, self.device = Path(config.dir) / "profile", rank, device
        self.trace_at, self.memory_at = config.profile_at, config.memory_snapshot_at
        self._profiler: profile | None = None
        self._steps_left = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop_trace()

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """The context to take a step in."""
        if self._profiler is not None:
            self._profiler.step()
        elif max(self.trace_at - WARMUP_STEPS, 0) <= step <= self.trace_at:
            self._start_trace(warmup=self.trace_at - step)
        named = nullcontext() if self._profiler is None else record_function(f"step {step}")
        recorded = self._memory_recorded() if step == self.memory_at else nullcontext()
        with named, recorded:
            yield
        self._steps_left -= 1
        if self._steps_left == 0:
            self._stop_trace()

    def _start_trace(self, warmup: int) -> None:
        actions = [ProfilerAction.WARMUP] * warmup + [ProfilerAction.RECORD] * TRACED_STEPS
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
        # Without `acc_events` it warns that events are cleared after every cycle; there is one.
        self._profiler = profile(
            activities=activities, schedule=actions.__getitem__, on_trace_ready=self._write_trace, acc_events=True
        )
        self._steps_left = len(actions)
        self._profiler.start()

    def _stop_trace(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler, self.trace_at = None, -1

    def _write_trace(self, profiler: profile) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.directory / f"rank-{self.rank}.json"))
        if self.rank == 0:
            key = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
            table = profiler.key_averages().table(sort_by=key, row_limit=SUMMARY_ROWS)
            title = f"Rank 0, {TRACED_STEPS} steps from {self.trace_at} on, by the time in each operation itself"
            (self.directory / "summary.txt").write_text(f"{title}\n{table}\n")

    @contextmanager
    def _memory_recorded(self) -> Iterator[None]:
        torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        try:
            yield
        finally:  # when memory runs out in this step, too
            self.memory_at = -1
            self.directory.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(self.directory / f"memory-rank-{self.rank}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
