"""How axes and layers grow: of which source units each target unit is made.

An axis map M [target elements, source elements] acts in two forms, one for each way that a parameter can use an axis:

    O = diag(out_scale) · M    builds what is written to the axis: rows of a matrix, an embedding, a norm's gains
    I = diag(in_scale) · M     builds what reads from the axis: columns of the next matrix

A small model's activation x becomes O x, and a reader W becomes W Iᵀ; so W x is kept wherever Iᵀ O is the identity.
"""

# Shape suffix legend: T = target elements, S = source elements of an axis.

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from megagrow.growth.noise import mean

Scale = float | Tensor  # one number for the whole axis, or one per target element [T]
Form = Literal["out", "in"]  # O or I
Elements = slice | Tensor  # target elements of an axis: a range, or indices

NEW = -1  # in an index: a target element without a source element


@dataclass(frozen=True, eq=False)
class SparseMap:
    """Copies: target element t is source element index[t], or has none (`NEW`). A gather, never a matrix product.

    Attributes:
        index: [T] int64.
        num_source: S.
        out_scale, in_scale: diagonals of O and I.
    """

    index: Tensor
    num_source: int
    out_scale: Scale = 1.0
    in_scale: Scale = 1.0

    @cached_property
    def has_new(self) -> bool:
        """Whether some target elements have no source element."""
        return bool((self.index == NEW).any())

    def spread(self, x: Tensor, dim: int, elements: Elements, average: bool = False) -> Tensor:
        """The rows `elements` of M applied to dim `dim` of x; new elements are 0, or the mean of all old ones."""
        index = self.index[elements]
        new = (index == NEW).nonzero().flatten() if self.has_new else index[:0]
        grown = x.index_select(dim, (index.clamp(min=0) if len(new) else index).to(x.device))
        if not len(new):
            return grown
        rest = mean(x, dim) if average else torch.zeros((), dtype=x.dtype, device=x.device)
        shape = [len(new) if d == dim else size for d, size in enumerate(x.shape)]
        return grown.index_copy_(dim, new.to(x.device), rest.expand(shape))


@dataclass(frozen=True, eq=False)
class DenseMap:
    """Learned combinations: target element t is Σ_s matrix[t, s] · (source element s).

    Attributes:
        matrix: [T, S].
        out_scale, in_scale: diagonals of O and I.
    """

    matrix: Tensor
    out_scale: Scale = 1.0
    in_scale: Scale = 1.0

    def spread(self, x: Tensor, dim: int, elements: Elements, average: bool = False) -> Tensor:
        """The rows `elements` of M applied to dim `dim` of x, in the map's dtype; only these rows are multiplied."""
        rows, x = self.matrix[elements], x.to(self.matrix.dtype)
        return rows @ x if dim == 0 else x @ rows.T


AxisMap = SparseMap | DenseMap


@dataclass(frozen=True)
class LayerMap:
    """Copies: target layer k is source layer index[k] (one 1 in each row of w)."""

    index: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class LayerMix:
    """Weighted sums of layers: w [target layers, source layers] for each leaf of `roles.leaves`."""

    weights: Mapping[str, Tensor]


def interleave(num_source: int, num_target: int) -> Tensor:
    """The unit that each target unit copies, replicas side by side: 0 0 1 1 2 2.

    Side by side rather than laid end to end, so that growing a contiguous shard gives the shard of what has grown. When
    the sizes do not divide, the spare copies are spread evenly.
    """
    return torch.arange(num_target) * num_source // num_target


def interleave_queries(source_heads: int, source_kv: int, target_heads: int, target_kv: int) -> Tensor:
    """The query head that each target query head copies, given that kv heads are interleaved.

    A query head may only be copied to places that share a copy of its own key/value head. Every copy of a group gets
    all of the group's heads equally often if the numbers allow, so that the copies also get equal gradients:

        2 kv heads of 2 queries -> 4 kv heads of 4:    0 0 1 1 | 0 0 1 1 | 2 2 3 3 | 2 2 3 3
    """
    kv_of_target = interleave(source_kv, target_kv)
    source_group, target_group = source_heads // source_kv, target_heads // target_kv
    heads = []
    for kv in range(source_kv):
        num_places = int((kv_of_target == kv).sum()) * target_group
        place = torch.arange(num_places)
        if target_group >= source_group:
            within = place % target_group * source_group // target_group
        else:  # a copy has too few places for all heads: they take turns over the copies
            within = place % source_group
        heads.append(kv * source_group + within)
    return torch.cat(heads)


def to_elements(units: Tensor, unit_size: int) -> Tensor:
    """An index of units (heads) as an index of their elements."""
    elements = units[:, None] * unit_size + torch.arange(unit_size)
    return torch.where(units[:, None] == NEW, NEW, elements).flatten()


def first_copies(index: Tensor) -> Tensor:
    """[T] bool: whether a target element is the first copy of its source element."""
    return (replica_rank(index) == 0) & (index != NEW)


def replica_rank(index: Tensor) -> Tensor:
    """[T] which copy of its source element each target element is: 0 for the first one."""
    order = index.argsort(stable=True)
    ordered = index[order]
    rank = torch.empty_like(index)
    rank[order] = torch.arange(len(index)) - torch.searchsorted(ordered, ordered)
    return rank


def replica_count(index: Tensor) -> Tensor:
    """[T] how many copies there are of each target element's source element; 1 for those without."""
    counts = torch.bincount(index[index != NEW], minlength=1)
    return torch.where(index == NEW, 1, counts[index])


def replica_pairs(index: Tensor) -> tuple[Tensor, Tensor]:
    """Replicas two by two: the target element that comes first in each one's pair [T], and +1, -1, or 0 without one."""
    order, rank, count = index.argsort(stable=True), replica_rank(index), replica_count(index)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(index))
    is_second = rank % 2 == 1
    first = order[place - is_second.long()]
    is_paired = (is_second | (rank + 1 < count)) & (index != NEW)
    return first, torch.where(is_paired, 1 - 2 * is_second.long(), 0)
