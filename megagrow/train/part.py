"""This rank's share of a model: its shards, and the engine that runs batches through them."""

# Shape suffix legend: M = samples of a microbatch, S = this context rank's tokens, L = tokens of the activations
# between sharded regions, H = hidden.

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from megagrow.config import Config, ModelConfig, microbatch_size
from megagrow.model import Transformer
from megagrow.model.transformer import initialize
from megagrow.parallel import heartbeat
from megagrow.parallel.fsdp import materialize
from megagrow.parallel.mesh import Mesh
from megagrow.parallel.pipeline import Engine
from megagrow.parallel.shards import fill
from megagrow.parallel.stages import own_stages


@dataclass
class Part:
    """A model's stages on this rank and their engine."""

    config: ModelConfig
    stages: list[Transformer]
    engine: Engine
    mesh: Mesh

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """This rank's parameters by global name."""
        return self.engine.parameters

    @property
    def last_stage(self) -> Transformer | None:
        """The stage that computes the loss, if it is on this rank."""
        return self.stages[-1] if self.engine.has_last else None

    def freeze(self, layers: int) -> None:
        """Makes so many layers, from the first on, and what is below them stand still in training; 0: none."""
        for stage in self.stages:
            stage.frozen_layers = layers

    def tensors(self) -> dict[str, Tensor]:
        """The parameters by the names that checkpoints use."""
        return {f"model.{name}": parameter.detach() for name, parameter in self.parameters.items()}


def build_part(model: ModelConfig, config: Config, mesh: Mesh) -> Part:
    """Builds a model on the meta device, shards it, and allocates this rank's pieces, uninitialised."""
    dtype = compute_dtype(config)
    with torch.device("meta"):
        stages = [Transformer(model, mesh, dtype, s, config.train) for s in own_stages(model.num_layers, mesh)]
    for stage in stages:
        materialize(stage, list(stage.layers.values()), model, mesh, dtype)
    samples = microbatch_size(config, mesh.world.size)
    num_microbatches = config.train.global_batch_size // mesh.dp.size // samples
    length = config.data.seq_length // mesh.cp.size
    ids_MS = torch.empty(samples, length, dtype=torch.long, device="meta")
    activation_MLH = torch.empty(
        (samples, length // (mesh.tp.size if mesh.sequence_parallel else 1), model.hidden_size),
        dtype=dtype or torch.get_default_dtype(),
        device="meta",
        requires_grad=True,
    )
    engine = Engine(stages, model, mesh, num_microbatches, activation_MLH, ids_MS)
    return Part(model, stages, engine, mesh)


def compute_dtype(config: Config) -> torch.dtype | None:
    """The dtype of activations; None: that of the parameters."""
    return torch.bfloat16 if config.train.precision == "bf16" else None


def initialize_part(part: Part, seed: int) -> None:
    """Gives the parameters their initial values."""
    initialize(part.parameters, part.config, seed)


def load_part(part: Part, fetch: Callable[[str], Tensor]) -> None:
    """Fills the parameters from a source that reads whole tensors by name, one at a time in host memory.

    Of a tensor that is mapped from a file only the rows of this rank's shard are read.
    """
    for name, parameter in part.parameters.items():
        fill(parameter, fetch(name))
        heartbeat.progress()


def gradients(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The gradients by name; every parameter must have one."""
    return {name: cast(Tensor, parameter.grad) for name, parameter in parameters.items()}
