"""This rank's share of a model: its shards, and the engine that runs batches through them."""

# Shape suffix legend: M = samples of a microbatch, S = sequence, H = hidden.

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from megagrow.config import Config, ModelConfig, microbatch_size
from megagrow.model import Transformer
from megagrow.model.transformer import initialize
from megagrow.parallel.fsdp import materialize
from megagrow.parallel.mesh import Mesh
from megagrow.parallel.pipeline import Engine
from megagrow.parallel.shards import fill


@dataclass
class Part:
    """A model's shards on this rank and their engine."""

    model: Transformer
    engine: Engine
    mesh: Mesh

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """This rank's parameters by global name."""
        return dict(self.model.named_parameters())

    def tensors(self) -> dict[str, Tensor]:
        """The parameters by the names that checkpoints use."""
        return {f"model.{name}": parameter.detach() for name, parameter in self.parameters.items()}


def build_part(model: ModelConfig, config: Config, mesh: Mesh) -> Part:
    """Builds a model on the meta device, shards it, and allocates this rank's pieces, uninitialised."""
    dtype = compute_dtype(config)
    with torch.device("meta"):
        stage = Transformer(model, mesh, dtype)
    materialize(stage, list(stage.layers.values()), mesh, dtype)
    samples = microbatch_size(config, mesh.world.size)
    share = config.train.global_batch_size // mesh.dp.size
    activation_MSH = torch.empty(
        (samples, config.data.seq_length, model.hidden_size),
        dtype=dtype or torch.get_default_dtype(),
        device="meta",
        requires_grad=True,
    )
    return Part(stage, Engine(stage, mesh, share // samples, activation_MSH), mesh)


def compute_dtype(config: Config) -> torch.dtype | None:
    """The dtype of activations; None: that of the parameters."""
    return torch.bfloat16 if config.train.precision == "bf16" else None


def initialize_part(part: Part, seed: int) -> None:
    """Gives the parameters their initial values."""
    initialize(part.model, seed)


def load_part(part: Part, fetch: Callable[[str], Tensor]) -> None:
    """Fills the parameters from a source that reads whole tensors by name."""
    for name, parameter in part.parameters.items():
        fill(parameter, fetch(name).to(parameter.device))


def gradients(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The gradients by name; every parameter must have one."""
    return {name: cast(Tensor, parameter.grad) for name, parameter in parameters.items()}
