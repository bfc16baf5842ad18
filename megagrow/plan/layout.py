"""The sizes that follow from a configuration and a number of ranks; every other file of the plan starts from them."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

from megagrow.config import Config, ModelConfig, data_ranks, microbatch_size
from megagrow.parallel.stages import Stage, pipeline_stages

AxisName = Literal["tensor", "context", "pipeline", "shard", "replicate"]


@dataclass(frozen=True)
class Layout:
    """A configuration on a number of ranks; it must have passed `checks` for them.

    Attributes:
        config: the run's configuration.
        world_size: all ranks.
    """

    config: Config
    world_size: int

    @cached_property
    def model(self) -> ModelConfig:
        return self.config.model

    @cached_property
    def tensor(self) -> int:
        return self.config.parallel.tensor

    @cached_property
    def context(self) -> int:
        return self.config.parallel.context

    @cached_property
    def pipeline(self) -> int:
        return self.config.parallel.pipeline

    @cached_property
    def data(self) -> int:
        """Ranks that read different samples."""
        return data_ranks(self.config, self.world_size)

    @cached_property
    def replicate(self) -> int:
        return self.config.parallel.replicate

    @cached_property
    def shard(self) -> int:
        """Ranks that the rows of every parameter are cut over."""
        return self.data * self.context // self.replicate

    @cached_property
    def uses_fsdp(self) -> bool:
        """Whether FSDP2 wraps the model; it also casts weights to the dtype of compute, once per gathering."""
        return self.data * self.context > 1

    @cached_property
    def microbatch(self) -> int:
        """Samples per forward pass of a data rank."""
        return microbatch_size(self.config, self.world_size)

    @cached_property
    def num_microbatches(self) -> int:
        """Forward passes of a data rank per step."""
        return self.config.train.global_batch_size // self.data // self.microbatch

    @cached_property
    def axes(self) -> dict[AxisName, int]:
        """Ranks along each axis on which something travels."""
        return {name: getattr(self, name) for name in get_args(AxisName)}

    @cached_property
    def step_tokens(self) -> int:
        """Tokens of an optimizer step, over all ranks."""
        return self.config.train.global_batch_size * self.config.data.seq_length

    @cached_property
    def sequence_parallel(self) -> bool:
        return self.config.parallel.sequence_parallel and self.tensor > 1

    @cached_property
    def tokens(self) -> int:
        """Tokens of a microbatch that this rank computes with inside sharded regions."""
        return self.microbatch * self.config.data.seq_length // self.context

    @cached_property
    def cut_tokens(self) -> int:
        """Tokens of a microbatch between sharded regions: fewer where activations are cut along the sequence."""
        return self.tokens // self.tensor if self.sequence_parallel else self.tokens

    @cached_property
    def width(self) -> int:
        """Bytes of an element in the dtype of compute."""
        return 2 if self.config.train.precision == "bf16" else 4

    @cached_property
    def gathered_width(self) -> int:
        """Bytes of an element of what FSDP2 gathers: float32 where the backward pass is in two halves."""
        return 4 if self.config.parallel.splits_backward else self.width

    @cached_property
    def casts_at_use(self) -> bool:
        """Whether every microbatch casts the weights that it multiplies by."""
        return self.width == 2 and not (self.uses_fsdp and self.gathered_width == 2)

    @cached_property
    def activation(self) -> int:
        """Bytes of the residual stream of one microbatch: what travels between stages."""
        return self.cut_tokens * self.model.hidden_size * self.width

    @cached_property
    def stages(self) -> list[Stage]:
        """All pipeline stages, in order."""
        return pipeline_stages(self.model.num_layers, self.config.parallel)

    def rank_stages(self, rank: int) -> list[Stage]:
        """The stages of a pipeline rank, in order."""
        return [stage for stage in self.stages if stage.rank == rank]

    def of_model(self, model: ModelConfig) -> "Layout":
        """The same layout of another model: a source that grows."""
        return Layout(replace(self.config, model=model), self.world_size)
