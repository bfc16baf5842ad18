"""The transformer, or the part of it that one pipeline stage holds.

Parameter names are those of `roles.py` and keep their global layer number on every stage, so that checkpoints and
growth see the same `layers.17.mlp.down.weight` in every layout.
"""

# Shape suffix legend: B = batch, S = sequence, H = hidden, T = B·S tokens, V = vocabulary (local shard).

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megagrow.config import ModelConfig
from megagrow.model.attention import Attention
from megagrow.model.mlp import make_mlp
from megagrow.model.norm import Norm
from megagrow.parallel.layers import Embedding, Head
from megagrow.parallel.loss import LossOptions, vocab_parallel_loss
from megagrow.parallel.mesh import Axis, Mesh
from megagrow.parallel.shards import fill, local
from megagrow.roles import Role, role_of


class Block(nn.Module):
    """One pre-norm layer: attention, then MLP, each added to the residual stream."""

    def __init__(self, model: ModelConfig, tp: Axis) -> None:
        super().__init__()
        self.attention_norm = Norm(model)
        self.attention = Attention(model, tp)
        self.mlp_norm = Norm(model)
        self.mlp = make_mlp(model, tp)

    def forward(self, x_BSH: Tensor) -> Tensor:
        y_BSH, x_BSH = self.mlp_norm.add(self.attention(self.attention_norm(x_BSH)), x_BSH)
        return x_BSH + self.mlp(y_BSH)


@dataclass
class Teacher:
    """What the last stage holds of a distillation teacher: its output matrix, and how it is mixed into the loss."""

    head_VH: Tensor
    options: LossOptions


class Transformer(nn.Module):
    """The layers `stage` of a model; the first stage embeds, the last one normalises and computes the loss.

    Args:
        model: the whole model's configuration.
        mesh: where the rank stands; the pipeline axis picks the layers.
        dtype: of the activations; None: that of the parameters.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        mesh = mesh or Mesh.single()
        self.config, self.tp, self.dtype = model, mesh.tp, dtype
        self.is_first, self.is_last = mesh.pp.is_first, mesh.pp.is_last
        self.teacher: Teacher | None = None
        self.loss_sums: list[Tensor] = []  # one [loss, ce, kd] per microbatch, detached; emptied by the reader
        if self.is_first:
            positions = model.max_seq_length if model.positions == "learned" else 0
            self.embedding = Embedding(model.vocab_size, positions, model.hidden_size, mesh.tp)
        self.layers = nn.ModuleDict({str(i): Block(model, mesh.tp) for i in stage_layers(model, mesh.pp)})
        if self.is_last:
            self.final_norm = Norm(model)
            if not model.tied_embeddings:
                self.head = Head(model.vocab_size, model.hidden_size)
            elif not self.is_first:
                self.embedding = Embedding(model.vocab_size, 0, model.hidden_size, mesh.tp)

    def forward(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        weights: Tensor | None = None,
        teacher_hidden: Tensor | None = None,
    ) -> Tensor:
        """Runs this stage.

        Args:
            x: token ids [B, S] on the first stage, else the previous stage's activations [B, S, H].
            labels: [B, S] token ids; None: no loss.
            weights: [B, S] weight of each token in the loss sum, 0 for tokens that do not count.
            teacher_hidden: [B, S, H_teacher] the teacher's states after its final norm, for distillation.

        Returns:
            Activations [B, S, H]; on the last stage the states after the final norm or, with labels, the weighted sum
            of the token losses (one element).
        """
        if self.is_first:
            x = self.embedding(x)
            x = x if self.dtype is None else x.to(self.dtype)
        for layer in self.layers.values():
            x = layer(x)
        if not self.is_last:
            return x
        x = self.final_norm(x)
        return x if labels is None else self._loss(x, labels, weights, teacher_hidden)

    @property
    def head_VH(self) -> Tensor:
        """This rank's rows of the output matrix: the head, or the tied embedding."""
        return local(self.embedding.tokens if self.config.tied_embeddings else self.head.weight)

    def logits(self, ids_BS: Tensor) -> Tensor:
        """Logits [B, S, local vocabulary], for one pipeline stage (tests, generation, conversion)."""
        x_BSH = self(ids_BS)
        return x_BSH @ self.head_VH.to(x_BSH.dtype).T

    def _loss(self, x_BSH: Tensor, labels: Tensor, weights: Tensor | None, teacher_hidden: Tensor | None) -> Tensor:
        teacher = self.teacher if teacher_hidden is not None else None
        weights = torch.ones_like(labels, dtype=torch.float32) if weights is None else weights
        loss, sums = vocab_parallel_loss(
            x_BSH.flatten(0, 1),
            self.head_VH,
            labels.flatten(),
            weights.flatten(),
            self.config.vocab_size,
            self.tp,
            teacher_hidden=None if teacher_hidden is None else teacher_hidden.flatten(0, 1),
            teacher_head=teacher.head_VH if teacher else None,
            options=teacher.options if teacher else LossOptions(),
        )
        self.loss_sums.append(sums)
        return loss


def stage_layers(model: ModelConfig, pp: Axis) -> range:
    """The layers of this rank's stage: contiguous, the first stages one longer when they do not divide evenly."""
    base, extra = divmod(model.num_layers, pp.size)
    start = pp.rank * base + min(pp.rank, extra)
    return range(start, start + base + (pp.rank < extra))


def initialize(model: Transformer, seed: int) -> None:
    """Fills the parameters with initial values that depend on (seed, parameter name) only, never on the layout."""
    for name, parameter in model.named_parameters():
        fill(parameter, initial_value(name, tuple(parameter.shape), model.config, seed).to(parameter.device))


def initial_value(name: str, shape: tuple[int, ...], model: ModelConfig, seed: int) -> Tensor:
    """The whole initial value of one parameter, float32.

    Matrices: normal with std √(2 / (5·hidden)) (Nguyen & Salazar, 2019, arXiv 1910.05895), divided by √(2·layers) where
    they write to the residual stream (Radford et al., 2019). Norm gains 1, biases 0.
    """
    role = role_of(name)
    if role.kind == "norm_gain":
        return torch.ones(shape)
    if role.kind in ("norm_bias", "bias"):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(name_seed(seed, name))
    return torch.randn(shape, generator=generator) * initial_std(role, model)


def initial_std(role: Role, model: ModelConfig) -> float:
    """Standard deviation of a matrix's initial entries."""
    std = math.sqrt(2 / (5 * model.hidden_size))
    return std / math.sqrt(2 * model.num_layers) if role.writes_residual else std


def name_seed(seed: int, name: str) -> int:
    """A 63-bit seed from (seed, name), the same on every machine."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
