"""How fast the ranks compute: the same matrix product on all of them at once, and who is slower than most."""

import statistics
import time
from collections.abc import Sequence

import torch

from megagrow.checkpoint.agreement import Ranks
from megagrow.cluster.links import SLOW, synchronize
from megagrow.cluster.report import Row, place
from megagrow.cluster.watch import Watch
from megagrow.config import Config
from megagrow.parallel.mesh import Mesh
from megagrow.train.part import compute_dtype

SIDE = {"cuda": 8192, "cpu": 512}
SECONDS_OF_PRODUCTS, LEAST_PRODUCTS = 2.0, 5  # long enough for a GPU to grow warm and lower its clock
COMPUTE_SECONDS = 20.0


def check_compute(config: Config, mesh: Mesh, watch: Watch) -> list[Row]:
    """Times a square product in the run's precision; one row, which names the slowest rank and all stragglers."""
    side, dtype = SIDE[mesh.device.type], compute_dtype(config) or torch.float32
    name = f"product of {side} x {side} matrices, {str(dtype).removeprefix('torch.')}"
    with watch.step(name, COMPUTE_SECONDS):
        seconds = product_seconds(side, dtype, mesh.device)
    return [compare(name, 2.0 * side**3, Ranks(None).gather(seconds), watch.hosts)]


def product_seconds(side: int, dtype: torch.dtype, device: torch.device) -> float:
    """The median time of one product on this rank."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out, times = torch.empty_like(a), list[float]()
    began = time.perf_counter()
    while len(times) < LEAST_PRODUCTS or time.perf_counter() - began < SECONDS_OF_PRODUCTS:
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def compare(name: str, flops: float, seconds: Sequence[float], hosts: Sequence[str]) -> Row:
    """The row of a product.

    Args:
        name: what was computed.
        flops: of one product.
        seconds: by rank.
        hosts: the host of every rank.
    """
    typical, slowest = statistics.median_low(seconds), max(seconds)
    ratio, rate = slowest / typical, flops / typical / 1e12
    late = [rank for rank, value in enumerate(seconds) if value > SLOW * typical]
    where = f"slowest ({ratio:.2f} x the median rank): {place([list(seconds).index(slowest)], hosts)}"
    return Row(
        check="compute",
        what=name,
        found=f"{typical * 1e3:.3g} ms, {rate:.3g} TFLOP/s",
        where=where + (f"; all that are late: {place(late, hosts)}" if len(late) > 1 else ""),
        bound=f"slowest rank <= {SLOW} x the median rank",
        holds=not late,
        remedy="look at clocks, temperature and other jobs there, or leave these hosts out",
        figures={"seconds": typical, "tflops_per_second": rate, "slowest_over_median": ratio},
    )
