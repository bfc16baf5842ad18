"""Live tensor memory on a CPU, measured: what the plan's figures are compared with."""

import gc
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

MEMORY = "[memory]"


def peak_memory(run: Callable[[], Any], since: str = "") -> int:
    """The most bytes of tensors that live at a time, as `torch.cuda.max_memory_allocated` gives it on GPUs.

    Every allocation of `run` counts, whatever library makes it through torch's allocator; memory from before does not.
    What other threads free counts as live: with gloo that are inputs of collectives over tensor ranks.

    Args:
        run: what is measured, from the making of its first tensor on.
        since: name of a `record_function` region; what came before its first entry adds to the live bytes, not to the
            peak.
    """
    events = _record(run)
    began = min((event.start_ns() for event in events if event.name() == since), default=0)
    live = peak = 0
    for event in events:
        if event.name() == MEMORY:
            live += event.nbytes()
            peak = max(peak, live) if event.start_ns() >= began else 0
    return peak


def kept_memory(run: Callable[[], Any]) -> int:
    """Bytes that are live when `run` has returned and its result is still held."""
    return sum(event.nbytes() for event in _record(run) if event.name() == MEMORY)


def _record(run: Callable[[], Any]) -> list[Any]:
    gc.collect()  # what an earlier recording has seen would count when it is freed in this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:  # 2.11 warns
        result = run()
    events = recorded.profiler.kineto_results.events()
    del result
    return events
