"""Parameters of megagrow <-> tensors of a Hugging Face folder, as the family's table says.

The rotary layout is that of transformers on both sides (the first half of a head turns with the
second), and query heads of one key/value head stand together in both, so rows are regrouped but
never permuted inside a head.
"""

# Shape legend: U = units (heads, neurons), E = elements of each, P = parts, I = in dim (matrices), N = heads,
# D = head_dim.

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megagrow.checkpoint.hf_family import Block, Family
from megagrow.config import ModelConfig
from megagrow.roles import (
    Role,
    axis_unit,
    parameter_names,
    role_of,
    shape_of,
    split_name,
)


@dataclass(frozen=True)
class Place:
    """Where one part of a parameter lies in a Hugging Face folder.

    Attributes:
        tensor: full name of the tensor.
        index, of: which of how many equal blocks along the out dim it is.
        transposed: whether the tensor is stored in x out.
        by_head: whether the blocks are those of each head: rows are laid out (head, block, element).
    """

    tensor: str
    index: int
    of: int
    transposed: bool
    by_head: bool = False

    @property
    def out_dim(self) -> int:
        return int(self.transposed)


def places(family: Family, name: str) -> tuple[Place, ...]:
    """Where the parts of a parameter lie, one place per part."""
    layer, leaf = split_name(name)
    module, suffix = _module_of(leaf)
    if layer is None:
        return (Place(family.names.get(name) or f"{family.outside[module]}.{suffix}", 0, 1, False),)
    transposed = family.transposed and role_of(name).in_ is not None
    return tuple(
        Place(_tensor_in_layer(family, layer, block, suffix), block.index, block.of, transposed, block.by_head)
        for block in family.inside[module]
    )


def place_shape(place: Place, name: str, model: ModelConfig) -> tuple[int, ...]:
    """Shape that the tensor of a place must have as a whole."""
    role = role_of(name)
    rows, *rest = shape_of(role, model)
    shape = (rows // len(role.parts) * place.of, *rest)
    return shape[::-1] if place.transposed else shape


def expected_tensors(family: Family, model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields name and shape of every tensor that a folder must hold, in the order of the model."""
    seen: set[str] = set()
    for name in parameter_names(model):
        for place in places(family, name):
            if place.tensor not in seen:
                seen.add(place.tensor)
                yield place.tensor, place_shape(place, name, model)


def written_tensors(family: Family, model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields name and shape of every tensor of an export: those of `expected_tensors` and copies of some."""
    for name, shape in expected_tensors(family, model):
        for written in (name, *copies_of(family, model, name)):
            yield written, shape


def copies_of(family: Family, model: ModelConfig, tensor: str) -> list[str]:
    """The tensors that repeat this one in an export."""
    return [] if model.tied_embeddings else [copy for copy, of in family.copies.items() if of == tensor]


def unexpected_tensors(names: Iterable[str], family: Family, model: ModelConfig) -> list[str]:
    """The tensors of a folder that hold nothing of the model and are not known to be harmless."""
    known = {tensor for tensor, _ in expected_tensors(family, replace(model, num_layers=1))}
    in_layer = re.compile(re.escape(family.layers) + r"(0|[1-9]\d{0,8})\.(.+)")

    def is_expected(name: str) -> bool:
        match = in_layer.fullmatch(name)
        if match is None:
            return name in known
        return int(match[1]) < model.num_layers and f"{family.layers}0.{match[2]}" in known

    return [name for name in names if not (is_expected(name) or re.fullmatch(family.ignored, name))]


def fuse(pieces: Sequence[Tensor], role: Role, model: ModelConfig) -> Tensor:
    """Joins the parts of a parameter, each [U·E, I], into [U·P·E, I], as roles.py lays them out."""
    if len(pieces) == 1:
        return pieces[0].contiguous()
    unit = axis_unit(role.out, model)
    return torch.stack([piece.unflatten(0, (-1, unit)) for piece in pieces], dim=1).flatten(0, 2)


def split(tensor: Tensor, role: Role, model: ModelConfig) -> list[Tensor]:
    """The inverse of `fuse`: the parts of a parameter, each [U·E, I]."""
    if len(role.parts) == 1:
        return [tensor]
    unit = axis_unit(role.out, model)
    grouped = tensor.unflatten(0, (-1, len(role.parts), unit))
    return [grouped[:, part].flatten(0, 1) for part in range(len(role.parts))]


def block_of_heads(whole: Tensor, place: Place, head_dim: int) -> Tensor:
    """The rows [N·D, I] of a place in a tensor [N·P·D, I] whose blocks are those of each head."""
    return whole.unflatten(0, (-1, place.of, head_dim))[:, place.index].flatten(0, 1)


class FamilyTensors:
    """Turns parameters into the family's tensors, one parameter at a time.

    A tensor that holds parts of several parameters waits for the last of them.
    """

    def __init__(self, family: Family, model: ModelConfig) -> None:
        self._family, self._model = family, model
        self._waiting: dict[str, dict[int, Tensor]] = {}

    def completed_by(self, name: str, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yields name and value of the tensors that this whole parameter completes."""
        parts = split(parameter, role_of(name), self._model)
        for place, part in zip(places(self._family, name), parts, strict=True):
            blocks = self._waiting.setdefault(place.tensor, {})
            blocks[place.index] = part
            if len(blocks) == place.of:
                del self._waiting[place.tensor]
                whole = self._joined([blocks[index] for index in range(place.of)], place)
                for written in (place.tensor, *copies_of(self._family, self._model, place.tensor)):
                    yield written, whole.T if place.transposed else whole

    def _joined(self, blocks: Sequence[Tensor], place: Place) -> Tensor:
        if len(blocks) == 1:
            return blocks[0]
        if not place.by_head:
            return torch.cat(list(blocks))
        return torch.stack([block.unflatten(0, (-1, self._model.head_dim)) for block in blocks], dim=1).flatten(0, 2)


def _module_of(leaf: str) -> tuple[str, str]:
    """Splits a name into module and `weight` or `bias`; embeddings have no module of their own."""
    if leaf.startswith("embedding."):
        return leaf, "weight"
    module, _, suffix = leaf.rpartition(".")
    return module, suffix


def _tensor_in_layer(family: Family, layer: int, block: Block, suffix: str) -> str:
    return f"{family.layers}{layer}.{block.module}.{suffix}"
