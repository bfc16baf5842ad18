"""The transformer, or the part of it that one pipeline stage holds.

Parameter names are those of `roles.py` and keep their global layer number on every stage, so that checkpoints and
growth see the same `layers.17.mlp.down.weight` in every layout.
"""

# Shape suffix legend: B = batch, S = this context rank's tokens, T = tokens of the whole sequence, H = hidden,
# L = tokens of the activations between sharded regions (S, or S / tp where they are cut along the sequence).

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from megagrow import ops
from megagrow.config import ModelConfig, TrainConfig
from megagrow.model.attention import Attention
from megagrow.model.dropout import add_dropped, dropout
from megagrow.model.mlm_head import MLMHead
from megagrow.model.mlp import make_mlp
from megagrow.model.norm import Norm
from megagrow.model.recompute import recompute
from megagrow.model.rotary import rotary_table
from megagrow.model.tokens import Tokens
from megagrow.parallel import heartbeat
from megagrow.parallel.cached_loss import CachedTargets
from megagrow.parallel.context import document_masks, local_positions
from megagrow.parallel.layers import Embedding, Head, TensorParallel
from megagrow.parallel.loss import (
    LossOptions,
    cache_size,
    token_scores,
    tokens_at_once,
    vocab_parallel_loss,
    whole_logits,
)
from megagrow.parallel.mesh import Mesh
from megagrow.parallel.shards import fill, local
from megagrow.parallel.stages import Stage, pipeline_stages
from megagrow.parallel.vocab_shard import VocabShard
from megagrow.roles import Role, axis_size, role_of


class Block(nn.Module):
    """One pre-norm layer: attention, then MLP, each added to the residual stream.

    Args:
        model: the whole model's configuration.
        mesh: where the rank stands.
        train: dropout, recompute, compile.
        index: the layer's number in the model.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh, train: TrainConfig, index: int) -> None:
        super().__init__()
        self.attention_norm = Norm(model)
        self.attention = Attention(model, mesh, train)
        self.mlp_norm = Norm(model)
        self.mlp = make_mlp(model, mesh)
        self.dropout, self.index = train.dropout, index
        self.adds_only = train.dropout == 0 and self.attention.output.bias is None  # then the norm adds on the way
        self.recompute, self.compiled = train.recompute, train.compile

    def forward(self, x_BLH: Tensor, tokens: Tokens) -> Tensor:
        tokens = tokens.in_layer(self.index)  # what differs between layers stays out of the function that they share
        if not self.compiled:
            return recompute(self.compute, self.recompute, x_BLH, tokens)
        if self.recompute == "selective":  # has to see the single operations
            return ops.compiled(recompute)(self.compute, self.recompute, x_BLH, tokens)
        # Outside: inside, torch 2.13 would keep the mesh of a DTensor among the tensors, and fail.
        return recompute(ops.compiled(type(self).compute), self.recompute, self, x_BLH, tokens)

    def compute(self, x_BLH: Tensor, tokens: Tokens) -> Tensor:
        keys_BL, dtype = tokens.dropout_keys_BL, x_BLH.dtype
        y_BLH = self.attention(self.attention_norm(x_BLH), tokens)
        if self.adds_only:
            y_BLH, x_BLH = self.mlp_norm.add(y_BLH, x_BLH)
        else:
            bias_H = self.attention.output.bias_operand(dtype)
            x_BLH = add_dropped(x_BLH, y_BLH, bias_H, self.dropout, keys_BL, 1)
            y_BLH = self.mlp_norm(x_BLH)
        return add_dropped(x_BLH, self.mlp(y_BLH), self.mlp.down.bias_operand(dtype), self.dropout, keys_BL, 2)


class ParallelBlock(Block):
    """One layer whose attention and MLP read the same residual stream, each through a norm of its own.

    Source: Wang & Komatsuzaki, 2021 (GPT-J), with one norm; Black et al., 2022 (GPT-NeoX, arXiv 2204.06745), with two.
    """

    def compute(self, x_BLH: Tensor, tokens: Tokens) -> Tensor:
        keys_BL, dtype = tokens.dropout_keys_BL, x_BLH.dtype
        y_BLH, bias_H = self.attention(self.attention_norm(x_BLH), tokens), self.attention.output.bias_operand(dtype)
        z_BLH = self.mlp(self.mlp_norm(x_BLH))
        x_BLH = add_dropped(x_BLH, y_BLH, bias_H, self.dropout, keys_BL, 1)
        return add_dropped(x_BLH, z_BLH, self.mlp.down.bias_operand(dtype), self.dropout, keys_BL, 2)


class PostNormBlock(Block):
    """One post-norm layer: the sums of the residual stream with attention, then with MLP, are normalised (BERT)."""

    def compute(self, x_BLH: Tensor, tokens: Tokens) -> Tensor:
        keys_BL, dtype = tokens.dropout_keys_BL, x_BLH.dtype
        y_BLH, bias_H = self.attention(x_BLH, tokens), self.attention.output.bias_operand(dtype)
        x_BLH = self.attention_norm(add_dropped(x_BLH, y_BLH, bias_H, self.dropout, keys_BL, 1))
        y_BLH, bias_H = self.mlp(x_BLH), self.mlp.down.bias_operand(dtype)
        return self.mlp_norm(add_dropped(x_BLH, y_BLH, bias_H, self.dropout, keys_BL, 2))


def make_block(model: ModelConfig, mesh: Mesh, train: TrainConfig, index: int) -> Block:
    """The kind of layer that the configuration names."""
    if model.parallel_residual:
        return ParallelBlock(model, mesh, train, index)
    kind = PostNormBlock if model.norm_place == "after" else Block
    return kind(model, mesh, train, index)


@dataclass
class Teacher:
    """What the last stage holds of a distillation teacher.

    Attributes:
        head_VH: the rows of its output matrix that go with this rank's rows of the student's; None: the teacher is not
            here, but left targets behind.
        options: how it is mixed into the loss.
        num_common: tokens, from the first on, that both vocabularies have; None: all.
        is_sample: whether those targets are drawn.
    """

    head_VH: Tensor | None
    options: LossOptions
    num_common: int | None = None
    is_sample: bool = False


class Transformer(nn.Module):
    """The layers of one stage of a model; the first stage embeds, the last one computes the loss.

    Args:
        model: the whole model's configuration.
        mesh: where the rank stands.
        dtype: of the activations; None: that of the parameters.
        stage: which layers; None: all of them.
        train: dropout, recompute, compile, the attention's back end.
    """

    def __init__(
        self,
        model: ModelConfig,
        mesh: Mesh | None = None,
        dtype: torch.dtype | None = None,
        stage: Stage | None = None,
        train: TrainConfig | None = None,
    ) -> None:
        super().__init__()
        mesh, train = mesh or Mesh.single(), train or TrainConfig()
        stage = stage or pipeline_stages(model.num_layers, Mesh.single().parallel)[0]
        self.config, self.dtype, self.train_config = model, dtype, train
        self.tp, self.cp = TensorParallel.of(mesh), mesh.cp
        self.is_first, self.is_last = stage.is_first, stage.is_last
        self.is_post_norm = model.norm_place == "after"
        self.frozen_layers = 0  # of the whole model, from the first on: these and the embedding get no gradients
        self.teacher: Teacher | None = None
        self.loss_sums: list[Tensor] = []  # sums of each microbatch, detached; emptied by the reader
        if self.is_first:
            positions = axis_size("positions", model) if model.positions == "learned" else 0
            sizes = model.vocab_size, model.hidden_size
            self.embedding = Embedding(*sizes, self.tp, positions, model.num_token_types)
            if self.is_post_norm:
                self.embedding_norm = Norm(model)
        self.layers = nn.ModuleDict({str(i): make_block(model, mesh, train, i) for i in stage.layers})
        if self.is_last:
            self._add_end(model)

    def _add_end(self, model: ModelConfig) -> None:
        """What follows the layers."""
        self.final_norm = None if self.is_post_norm else Norm(model)
        self.mlm_head = None if model.is_causal else MLMHead(model, self.tp)
        if model.tied_embeddings and not self.is_first:
            self.embedding = Embedding(model.vocab_size, model.hidden_size, self.tp)
        self.head = Head(model.vocab_size, model.hidden_size, not model.tied_embeddings, not model.is_causal)

    def forward(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        weights: Tensor | None = None,
        teacher_hidden: Tensor | None = None,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        dropout_keys: Tensor | None = None,
        token_types: Tensor | None = None,
        target_ids: Tensor | None = None,
        target_masses: Tensor | None = None,
    ) -> Tensor:
        """Runs this stage.

        Args:
            x: token ids [B, S] on the first stage, else the previous stage's activations [B, L, H].
            labels: [B, S] token ids; None: no loss.
            weights: [B, S] weight of each token in the loss sum, 0 for tokens that do not count.
            teacher_hidden: [B, S, H_teacher] the teacher's states after its final norm, for distillation.
            documents: [B, T] the document of every token of the whole sequences; None: attention crosses documents.
            positions: [B, S] the position of every token; None: counted from each sequence's first token on.
            dropout_keys: [B, S] from `dropout.token_keys`; None: nothing is dropped.
            token_types: [B, S] rows of the table of token types; None: all tokens are of type 0.
            target_ids, target_masses: [B, S, K] and [B, S, K + 1] of a teacher that is not here, see `CachedTargets`.

        Returns:
            Activations [B, L, H]; on the last stage the states [B, S, H] that the output matrix takes or, with labels,
            the weighted sum of the token losses (one element).
        """
        keys_BL = None if dropout_keys is None else self.tp.cut(dropout_keys)
        is_frozen = self.frozen_layers > 0 and torch.is_grad_enabled()
        if self.is_first:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen):
                x = self._embed(x, token_types, positions, keys_BL)
        masks = None if documents is None else document_masks(documents, self.cp, self.config.is_causal)
        tokens = Tokens(self._rotary(x, positions), masks, keys_BL)
        count = sum(int(index) < self.frozen_layers for index in self.layers) if is_frozen else 0
        layers = list(self.layers.values())
        if count:
            x = self._without_gradients(x, layers[:count], tokens)
        for layer in layers[count:]:
            x = layer(x, tokens)
        if not self.is_last:
            return x
        for module in (self.final_norm, self.mlm_head):  # on this rank's own tokens
            x = x if module is None else module(x)
        x = self.tp.enter(x)
        if labels is None:
            return x
        return self._loss(x, labels, weights, teacher_hidden, self._targets(target_ids, target_masses))

    def _without_gradients(self, x_BLH: Tensor, frozen: list[nn.Module], tokens: Tokens) -> Tensor:
        """Frozen layers: nothing is kept for a backward pass, and none goes through them.

        A pipeline sends gradients from every stage to the one before, whatever that does with them: such a stage sends
        zeros, and takes what it gets.
        """
        with torch.no_grad():
            y_BLH = x_BLH
            for layer in frozen:
                y_BLH = layer(y_BLH, tokens)
        if x_BLH.requires_grad:
            return cast(Tensor, _NoGradient.apply(x_BLH, y_BLH))
        sends_nothing_back = len(frozen) == len(self.layers) and not self.is_last
        return y_BLH.detach().requires_grad_(sends_nothing_back)

    @property
    def head_VH(self) -> Tensor:
        """This rank's rows of the output matrix: the head, or the tied embedding."""
        return local(self.embedding.tokens if self.head.weight is None else self.head.weight)

    @property
    def head_bias_V(self) -> Tensor | None:
        """The bias of this rank's rows of the output matrix, or None."""
        return None if self.head.bias is None else local(self.head.bias)

    def logits(self, ids_BS: Tensor, token_types_BS: Tensor | None = None) -> Tensor:
        """Logits [B, S, local vocabulary], for one pipeline stage (tests, generation, conversion)."""
        x_BSH = self(ids_BS, token_types=token_types_BS)
        bias_V = self.head_bias_V
        return ops.linear(x_BSH, self.head_VH.to(x_BSH.dtype), None if bias_V is None else bias_V.to(x_BSH.dtype))

    def next_logits(self, ids_BS: Tensor, lengths_B: Tensor) -> Tensor:
        """Logits [B, whole vocabulary] after the last token of each row, the same on every tensor rank.

        Args:
            ids_BS: of the whole model's first stage; each row is filled up on the right.
            lengths_B: tokens of each row without what fills it up.
        """
        x_BSH = self(ids_BS)
        last_BH = x_BSH[torch.arange(len(x_BSH), device=x_BSH.device), lengths_B - 1]
        return whole_logits(last_BH, self.head_VH, self.config.vocab_size, self.tp.axis)

    def token_scores(
        self,
        ids_BS: Tensor,
        labels_BS: Tensor,
        documents: Tensor | None = None,
        chosen_BS: Tensor | None = None,
        ties_by_id: bool = False,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Negative log-likelihoods and ranks of labels, see `loss.token_scores`, for one pipeline stage.

        Args:
            ids_BS: inputs.
            labels_BS: what follows each.
            documents, positions: as in `forward`.
            chosen_BS: which labels are scored; None: all.
            ties_by_id: see `loss.token_scores`.

        Returns:
            nll_T and rank_T of the chosen labels, row by row.
        """
        with torch.no_grad():
            hidden_BSH = self(ids_BS, documents=documents, positions=positions)
        hidden_TH, labels_T = (x.flatten(0, 1) if chosen_BS is None else x[chosen_BS] for x in (hidden_BSH, labels_BS))
        return token_scores(
            hidden_TH,
            self.head_VH,
            labels_T,
            self.config.vocab_size,
            self.tp.axis,
            head_bias=self.head_bias_V,
            ties_by_id=ties_by_id,
            compiled=self.train_config.compile,
        )

    def _embed(
        self, ids_BS: Tensor, types_BS: Tensor | None, positions_BS: Tensor | None, keys_BL: Tensor | None
    ) -> Tensor:
        if positions_BS is None:
            length = ids_BS.shape[1] * self.cp.size
            positions_BS = local_positions(length, self.cp.rank, self.cp.size, ids_BS.device)[None]
        x_BLH = self.embedding(ids_BS, positions_BS + self.config.position_offset, types_BS)
        x_BLH = x_BLH if self.dtype is None else x_BLH.to(self.dtype)
        x_BLH = self.embedding_norm(x_BLH) if self.is_post_norm else x_BLH
        return dropout(x_BLH, self.train_config.dropout, keys_BL, 0)

    def _rotary(self, x_BLH: Tensor, positions_BS: Tensor | None) -> tuple[Tensor, Tensor] | None:
        model, cp = self.config, self.cp
        if model.positions != "rope":
            return None
        length = x_BLH.shape[1] * cp.size * (self.tp.axis.size if self.tp.sequence else 1)
        rank, size = (cp.rank, cp.size) if positions_BS is None else (0, 1)
        cos_SR, sin_SR = rotary_table(model, length, rank, size, x_BLH.dtype, x_BLH.device)
        return (cos_SR, sin_SR) if positions_BS is None else (cos_SR[positions_BS], sin_SR[positions_BS])

    def _targets(self, ids_BSK: Tensor | None, masses_BSK1: Tensor | None) -> CachedTargets | None:
        if self.teacher is None or ids_BSK is None or masses_BSK1 is None:
            return None
        return CachedTargets(ids_BSK.flatten(0, 1).long(), masses_BSK1.flatten(0, 1), self.teacher.is_sample)

    def _loss(
        self,
        x_BSH: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        teacher_hidden: Tensor | None,
        targets: CachedTargets | None,
    ) -> Tensor:
        teacher = self.teacher if teacher_hidden is not None or targets is not None else None
        head_VH = self.head_VH
        if self.frozen_layers and self.config.tied_embeddings:
            head_VH = head_VH.detach()  # it is the embedding, which stands still
        weights = torch.ones_like(labels, dtype=torch.float32) if weights is None else weights
        options = teacher.options if teacher else LossOptions()
        train, cache = self.train_config, cache_size(x_BSH.device)
        most_rows = VocabShard(self.tp.axis, self.config.vocab_size).most_rows  # ranks go through the chunks together
        options = replace(
            options,
            chunk_tokens=tokens_at_once(train.loss_chunk, most_rows, x_BSH.element_size(), cache),
            compiled=train.compile,
            label_smoothing=train.label_smoothing,
            z_loss=train.z_loss,
        )
        loss, sums = vocab_parallel_loss(
            x_BSH.flatten(0, 1),
            head_VH,
            labels.flatten(),
            weights.flatten(),
            self.config.vocab_size,
            self.tp.axis,
            teacher_hidden=None if teacher_hidden is None else teacher_hidden.flatten(0, 1),
            teacher_head=teacher.head_VH if teacher else None,
            options=options,
            head_bias=self.head_bias_V,
            num_common=teacher.num_common if teacher else None,
            targets=targets,
        )
        self.loss_sums.append(sums)
        return loss


class _NoGradient(torch.autograd.Function):
    """Gives y, as if it were x; the gradient of x is zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.zeros_like(grad), None


def initialize(parameters: Mapping[str, nn.Parameter], model: ModelConfig, seed: int) -> None:
    """Fills parameters with initial values that depend on (seed, parameter name) only, never on the layout."""
    for name, parameter in parameters.items():
        fill(parameter, initial_value(name, tuple(parameter.shape), model, seed))
        heartbeat.progress()


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
