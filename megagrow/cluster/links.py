"""How fast the mesh axes are: the collectives of a training step, at the run's own sizes, each axis by itself.

All groups of an axis talk at the same time, as they do in training. A group is as slow as its slowest rank. Sizes and
bandwidths are counted as nccl-tests does: the size is that of the whole message, the bus bandwidth what each link
carries if the algorithm is the best one.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from megagrow.checkpoint.agreement import Ranks
from megagrow.cluster.report import Row, place
from megagrow.cluster.watch import REMEDY, Watch
from megagrow.errors import HangError
from megagrow.parallel.collectives import max_over, start_all_gather, start_reduce_scatter
from megagrow.parallel.mesh import Axis, Mesh
from megagrow.plan.layout import AxisName, Layout
from megagrow.plan.weights import block_unit

Operation = Literal["all-reduce", "all-gather", "reduce-scatter", "send-receive"]

SLOW = 1.15  # a group that takes this much longer than the median one is called slow
LARGEST = 256 * 2**20  # bytes; larger messages are no faster
REPEATS, SECONDS_OF_REPEATS = (3, 30), 0.5
LINK_SECONDS = 30.0  # the first collective of an axis also builds its connections


@dataclass(frozen=True)
class Transfer:
    """One collective of the run.

    Attributes:
        axis: between which ranks.
        operation: which collective; send-receive is a shift along the axis.
        size: "small": latency counts; "large": bandwidth does.
        elements: of the whole message.
        dtype: of the elements.
    """

    axis: AxisName
    operation: Operation
    size: Literal["small", "large"]
    elements: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.elements * self.dtype.itemsize

    @property
    def name(self) -> str:
        return f"{self.axis} axis, {self.operation} of {_in_words(self.num_bytes)}"

    def bus_share(self, ranks: int) -> float:
        """Bus bandwidth over algorithm bandwidth."""
        around = (ranks - 1) / ranks
        return {"all-reduce": 2 * around, "send-receive": 1.0}.get(self.operation, around)


def check_links(layout: Layout, mesh: Mesh, watch: Watch) -> list[Row]:
    """Times every transfer of the layout; one row each, which names the slowest group.

    Raises:
        HangError: a link failed.
    """
    todo, sizes = list(transfers(layout)), layout.axes
    seconds = []
    for transfer in todo:
        with watch.step(transfer.name, LINK_SECONDS, groups(layout, transfer.axis)):
            try:
                seconds.append(seconds_of(transfer, own_axis(transfer.axis, mesh), mesh))
            except RuntimeError as error:
                cause = " ".join(str(error).split())
                here = place([mesh.world.rank], watch.hosts)
                raise HangError(f"{transfer.name}: failed on {here}: {cause}; {REMEDY}") from error
    by_rank = Ranks(None).gather(seconds)
    return [
        compare(transfer, [one[i] for one in by_rank], groups(layout, transfer.axis), watch.hosts, sizes[transfer.axis])
        for i, transfer in enumerate(todo)
    ]


def transfers(layout: Layout) -> Iterator[Transfer]:
    """What the axes carry, small (one hidden vector) and large, on axes of more than one rank."""
    sizes, dtypes = layout.axes, {2: torch.bfloat16, 4: torch.float32}
    compute = dtypes[layout.width]
    block = block_unit(layout).gathered
    around: tuple[Operation, ...] = ("all-gather", "reduce-scatter")
    tensor = around if layout.sequence_parallel else ("all-reduce",)
    carried: list[tuple[AxisName, Operation, int, torch.dtype]] = [
        *(("tensor", operation, layout.tokens * layout.model.hidden_size, compute) for operation in tensor),
        *(("context", operation, _key_value_elements(layout), compute) for operation in around),
        ("pipeline", "send-receive", layout.activation // layout.width, compute),
        ("shard", "all-gather", block, dtypes[layout.gathered_width]),
        ("shard", "reduce-scatter", block, torch.float32),
        ("replicate", "all-reduce", block // layout.shard, torch.float32),
    ]
    for axis, operation, elements, dtype in carried:
        if sizes[axis] > 1:
            large = max(min(elements, LARGEST // dtype.itemsize), 1)
            for size, count in (("small", min(layout.model.hidden_size, large)), ("large", large)):
                whole = math.ceil(count / sizes[axis]) * sizes[axis]
                yield Transfer(axis, operation, size, whole, dtype)  # type: ignore[arg-type]


def groups(layout: Layout, axis: AxisName) -> list[list[int]]:
    """The ranks of every group of an axis, as `mesh.make_mesh` lays them out."""
    samples = (layout.pipeline, layout.data, layout.context, layout.tensor)
    storage = (layout.pipeline, layout.replicate, layout.shard, layout.tensor)
    shape, dim = {
        "pipeline": (samples, 0),
        "context": (samples, 2),
        "tensor": (samples, 3),
        "replicate": (storage, 1),
        "shard": (storage, 2),
    }[axis]
    found: list[list[int]] = torch.arange(layout.world_size).view(shape).movedim(dim, -1).flatten(0, -2).tolist()
    return found


def own_axis(name: AxisName, mesh: Mesh) -> Axis:
    """This rank's place on an axis of more than one rank."""
    if name in ("shard", "replicate"):
        assert mesh.device_mesh is not None, "one process has no groups"
        part = mesh.device_mesh[name]
        return Axis(part.get_group(), part.get_local_rank(), part.size())
    return {"tensor": mesh.tp, "context": mesh.cp, "pipeline": mesh.pp}[name]


def seconds_of(transfer: Transfer, axis: Axis, mesh: Mesh) -> float:
    """The median time of a transfer on this rank; a collective over the world, which agrees on the repetitions."""
    run = _prepare(transfer, axis, mesh.device)
    for _ in range(2):  # connections, buffers
        once = _timed(run, mesh.device)
    slowest = float(max_over(torch.tensor(once), mesh.world))
    repeats = min(max(int(SECONDS_OF_REPEATS / slowest), REPEATS[0]), REPEATS[1])
    return statistics.median(_timed(run, mesh.device) for _ in range(repeats))


def _prepare(transfer: Transfer, axis: Axis, device: torch.device) -> Callable[[], object]:
    whole = torch.zeros(transfer.elements, dtype=transfer.dtype, device=device)
    piece, group = whole[: transfer.elements // axis.size].clone(), axis.group
    received = torch.zeros_like(whole)

    def shift() -> None:
        there, here = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
        both = [
            dist.P2POp(dist.isend, whole, group=group, group_peer=there),
            dist.P2POp(dist.irecv, received, group=group, group_peer=here),
        ]
        for request in dist.batch_isend_irecv(both):
            request.wait()

    return {
        "all-reduce": lambda: dist.all_reduce(whole, group=group),
        "all-gather": lambda: start_all_gather(piece, 0, axis).wait(),
        "reduce-scatter": lambda: start_reduce_scatter(whole, 0, axis).wait(),
        "send-receive": shift,
    }[transfer.operation]


def _timed(run: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(
    transfer: Transfer, seconds: Sequence[float], groups: Sequence[Sequence[int]], hosts: Sequence[str], ranks: int
) -> Row:
    """The row of a transfer: the median group's figures, and the slowest group by name.

    Args:
        transfer: what was timed.
        seconds: by rank.
        groups: the ranks of each group.
        hosts: the host of every rank.
        ranks: in a group.
    """
    by_group = [max(seconds[rank] for rank in group) for group in groups]
    typical, slowest = statistics.median_low(by_group), max(by_group)
    ratio, gigabytes = slowest / typical, transfer.num_bytes / typical / 1e9
    bus = gigabytes * transfer.bus_share(ranks)
    is_judged = len(groups) > 1 and transfer.size == "large"  # jitter of short messages is no verdict on a host
    return Row(
        check="links",
        what=transfer.name,
        found=f"{typical * 1e6:,.0f} us, {gigabytes:.3g} GB/s, bus {bus:.3g} GB/s",
        where=f"slowest ({ratio:.2f} x the median group): {place(groups[by_group.index(slowest)], hosts)}",
        bound=f"slowest group <= {SLOW} x the median group" if is_judged else "",
        holds=ratio <= SLOW if is_judged else None,
        remedy="look at the links of these hosts",
        figures={
            "bytes": transfer.num_bytes,
            "ranks": ranks,
            "seconds": typical,
            "algorithm_gb_per_second": gigabytes,
            "bus_gb_per_second": bus,
            "slowest_over_median": ratio,
        },
    )


def _key_value_elements(layout: Layout) -> int:
    heads = max(layout.model.num_kv_heads // layout.tensor, 1)
    return 2 * layout.microbatch * layout.config.data.seq_length * heads * layout.model.head_dim


def _in_words(num_bytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes} B"
