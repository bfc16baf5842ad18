"""How gpu_kernels.py measures: device time with a cold cache, and errors against float64 beside the twin's own.

Device time lies between two events. Before the first one the L2 cache is filled with something else, and the device is
kept busy for as long as the host needs to launch what is measured: what a kernel waits for its launch is no part of it.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from megagrow.cluster.compute import product_seconds

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"

WARM_UP, REPETITIONS = (3, 25) if ON_GPU else (1, 2)
COPY_BYTES = 2**31 if ON_GPU else 2**16
MATRIX_SIDE = 8192 if ON_GPU else 64
CYCLES_PER_SECOND = 2e9  # of a fast clock: at a slower one the device is kept busy for longer
LONGEST_WAIT = 0.05

# As in tests/kernels/accuracy.py: a kernel's error may be 1.5 times its twin's, and besides, relative to the largest
# element, two units in the last place of float32, a quarter of one of the 16-bit types.
FACTOR = 1.5
EPS = {torch.float32: 2**-22, torch.float16: 2**-12, torch.bfloat16: 2**-9}
WRONG = 1e9  # the error of what is not a number
TWIN_EPS = 64  # a twin that is further off than so many EPS excuses nothing: it is wrong itself


class Times(TypedDict):
    """Seconds on the device, seconds until the host has launched it, bytes allocated meanwhile at most."""

    median: float
    low: float  # 20 % are faster
    high: float  # 20 % are slower
    host: float
    peak: int


class Work(NamedTuple):
    """What is measured of one provider; what comes before each repetition is not."""

    forward: Callable[[], object]
    backward: Callable[[], object] | None = None
    before_forward: Callable[[], object] | None = None
    before_backward: Callable[[], object] | None = None


class Timer:
    """Times what runs on this machine's device."""

    def __init__(self) -> None:
        size = 0
        if ON_GPU:
            size = max(2**28, 4 * getattr(torch.cuda.get_device_properties(DEVICE), "L2_cache_size", 0))
        self._other = torch.empty(size, dtype=torch.int8, device=DEVICE)

    def __call__(self, run: Callable[[], object], before: Callable[[], object] | None = None) -> Times:
        before = before or (lambda: None)
        host, peak = self._warm_up(run, before)
        seconds = (self._on_gpu if ON_GPU else self._on_cpu)(run, before, host)
        low, *_, high = statistics.quantiles(seconds, n=5)
        return Times(median=statistics.median(seconds), low=low, high=high, host=host, peak=peak)

    def _warm_up(self, run: Callable[[], object], before: Callable[[], object]) -> tuple[float, int]:
        hosts, peak = list[float](), 0
        for _ in range(WARM_UP):
            before()
            if ON_GPU:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                peak = -torch.cuda.memory_allocated()
            began = time.perf_counter()
            run()
            hosts.append(time.perf_counter() - began)
            if ON_GPU:
                torch.cuda.synchronize()
                peak += torch.cuda.max_memory_allocated()
        return min(hosts), peak

    def _on_gpu(self, run: Callable[[], object], before: Callable[[], object], host: float) -> list[float]:
        cycles = int(min(1.5 * host + 1e-4, LONGEST_WAIT) * CYCLES_PER_SECOND)
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPETITIONS)]
        for start, end in pairs:
            before()
            self._other.zero_()
            torch.cuda._sleep(cycles)
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]

    def _on_cpu(self, run: Callable[[], object], before: Callable[[], object], host: float) -> list[float]:
        seconds = []
        for _ in range(REPETITIONS):
            before()
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
        return seconds


def measure(work: Work, timer: Timer) -> dict[str, Times | float]:
    """Forward, backward if there is one, and the sum of both medians."""
    found = {"forward": timer(work.forward, work.before_forward)}
    if work.backward is not None:
        found["backward"] = timer(work.backward, work.before_backward)
    return {**found, "total": sum(each["median"] for each in found.values())}


class Machine:
    """What the device can do at most: bytes per second of a copy, read and written, and FLOP/s of bf16 products."""

    def __init__(self, timer: Timer) -> None:
        self._timer, self._seconds = timer, dict[int, float]()
        self._pair = torch.empty(2, COPY_BYTES, dtype=torch.uint8, device=DEVICE).random_()  # zeros copy faster
        dtype = torch.bfloat16 if ON_GPU else torch.float32
        self.matrix = 2.0 * MATRIX_SIDE**3 / product_seconds(MATRIX_SIDE, dtype, DEVICE)  # first: it warms the GPU up
        self.copy = 2 * COPY_BYTES / self.copy_seconds(2 * COPY_BYTES)

    def copy_seconds(self, num_bytes: float) -> float:
        """Of a copy that moves so many bytes, the larger ones at the speed of the largest."""
        size = min(max(int(num_bytes) // 2, 1), COPY_BYTES)
        if size not in self._seconds:
            source, target = (each[:size] for each in self._pair)
            self._seconds[size] = self._timer(lambda: target.copy_(source))["median"]
        return self._seconds[size] * num_bytes / (2 * size)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New memory holds NaN: what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Accuracy:
    """The largest error of every result in units of what is allowed, row by row over the last dimension."""

    def __init__(self) -> None:
        self.worst: dict[str, float] = {}

    def add(self, name: str, actual: Tensor, twin: Tensor, truth: Tensor) -> None:
        """A part of a result, the same of the twin's, and the truth in float64."""
        if actual.dtype != twin.dtype or not actual.shape == twin.shape == truth.shape:
            self.worst[name] = WRONG
            return
        eps = EPS[actual.dtype] * truth.abs().amax(-1)
        error = (actual.double() - truth).abs().amax(-1)
        allowed = (FACTOR * (twin.double() - truth).abs().amax(-1)).clamp(max=TWIN_EPS * eps) + eps
        share = (error / allowed).nan_to_num(WRONG, WRONG).where(error != 0, 0.0).max()
        self.worst[name] = max(self.worst.get(name, 0.0), float(share))

    def holds(self, names: Iterable[str]) -> bool:
        """Whether just these results were seen, and none of them is further off than allowed."""
        return self.worst.keys() == set(names) and max(self.worst.values(), default=0.0) <= 1
