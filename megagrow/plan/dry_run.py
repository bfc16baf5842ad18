"""Builds the real model of a rank without memory or other ranks: its parameters on the meta device, under torch's fake
process group, which has any number of ranks in one process."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from rich.table import Table
from torch.testing._internal.distributed.fake_pg import FakeStore

from megagrow.parallel.mesh import make_mesh
from megagrow.parallel.shards import local
from megagrow.plan.layout import Layout
from megagrow.train.part import Part, build_part


@dataclass(frozen=True)
class BuiltStage:
    """A stage as it was built.

    Attributes:
        index: its place in the pipeline.
        layers: their numbers in the model.
        parameters: elements that the rank stores.
        num_bytes: the same in bytes.
    """

    index: int
    layers: list[int]
    parameters: int
    num_bytes: int


def built_stages(layout: Layout, rank: int) -> list[BuiltStage]:
    """The stages of the rank with this number in the whole world, built as a run would build them."""
    with fake_ranks(layout.world_size, rank):
        part = build_on_meta(layout)
        return [
            _built(stage.index, list(stage.layers), dict(module.named_parameters()))
            for stage, module in zip(part.engine.stages, part.stages, strict=True)
        ]


def build_on_meta(layout: Layout) -> Part:
    """The part of the process group's rank, with parameters that have no memory."""
    mesh = make_mesh(layout.config.parallel)
    return build_part(layout.model, layout.config, replace(mesh, device=torch.device("meta")))


@contextmanager
def fake_ranks(world_size: int, rank: int) -> Iterator[None]:
    """A process group in which this process is `rank` and nobody else exists; nothing is sent."""
    if world_size == 1:
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def first_ranks(layout: Layout) -> list[int]:
    """For each place of the pipeline, its first rank."""
    return [place * layout.world_size // layout.pipeline for place in range(layout.pipeline)]


def tables(layout: Layout) -> Iterator[Table]:
    """What was built, for one rank at each place of the pipeline."""
    table = Table(title=f"built without memory: {layout.world_size} ranks, the first at each place of the pipeline")
    for name in ("rank", "stage", "layers", "parameters stored", "MiB"):
        table.add_column(name, justify="right")
    for rank in first_ranks(layout):
        for stage in built_stages(layout, rank):
            ends = f"{stage.layers[0]}-{stage.layers[-1]}" if stage.layers else "none"
            size = f"{stage.num_bytes / 2**20:,.1f}"
            table.add_row(str(rank), str(stage.index), ends, f"{stage.parameters:,}", size)
    yield table


def _built(index: int, layers: list[int], parameters: dict[str, torch.nn.Parameter]) -> BuiltStage:
    pieces = [local(parameter.detach()) for parameter in parameters.values()]
    return BuiltStage(
        index,
        layers,
        sum(piece.numel() for piece in pieces),
        sum(piece.numel() * piece.element_size() for piece in pieces),
    )
