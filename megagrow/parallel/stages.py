"""Which layers stand on which pipeline stage, and which rank runs it."""

from dataclasses import dataclass

from megagrow.config import ParallelConfig
from megagrow.parallel.mesh import Mesh


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline.

    Attributes:
        index: its place, from 0.
        num_stages: stages of the whole pipeline.
        rank: the pipeline rank that runs it.
        layers: the layers that it holds, by their number in the model.
    """

    index: int
    num_stages: int
    rank: int
    layers: range

    @property
    def is_first(self) -> bool:
        """Whether it embeds the tokens."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether it normalises and computes the loss."""
        return self.index == self.num_stages - 1


def pipeline_stages(num_layers: int, parallel: ParallelConfig) -> list[Stage]:
    """All stages of a model, in order.

    The layers are split as `layers_per_stage` says where that matches the model, else evenly, embedding and head
    weighing as one layer each. Stage s runs on rank s mod pipeline; in the V-shaped schedules the second half of the
    stages comes back over the ranks, so that rank 0 has both ends.
    """
    count = parallel.num_stages
    counts = parallel.layers_per_stage
    if len(counts) != count or sum(counts) != num_layers:
        counts = _even_split(num_layers, count)
    starts = [sum(counts[:i]) for i in range(count)]
    return [Stage(i, count, parallel.rank_of_stage(i), range(starts[i], starts[i] + counts[i])) for i in range(count)]


def own_stages(num_layers: int, mesh: Mesh) -> list[Stage]:
    """The stages of this rank, in order."""
    return [stage for stage in pipeline_stages(num_layers, mesh.parallel) if stage.rank == mesh.pp.rank]


def _even_split(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Layers per stage when embedding and head count as layers; what is left over goes to the middle stages first."""
    base, extra = divmod(num_layers + 2, num_stages)
    middle_first = [*range(1, num_stages - 1), 0, num_stages - 1] if num_stages > 2 else range(num_stages)
    longer = set(list(middle_first)[:extra])
    counts = [base + (i in longer) for i in range(num_stages)]
    counts[0] -= 1
    counts[-1] -= 1
    assert min(counts) >= 0, "checks.check_model bounds the number of stages"
    return tuple(counts)
