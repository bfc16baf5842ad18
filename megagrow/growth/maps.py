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

    @cached_property
    def is_new(self) -> Tensor:
        """[T] bool: which target elements have no source element."""
        return self.index == NEW

    def spread(self, x: Tensor, dim: int, elements: Elements, average: bool = False) -> Tensor:
        """The rows `elements` of M applied to dim `dim` of x; new elements are 0, or the mean of all old ones."""
        index = self.index[elements]
        new = (index == NEW).nonzero().flatten() if self.has_new else index[:0]
        grown = x.index_select(dim, index.clamp(min=0).to(x.device))
        if not len(new):
            return grown
        rest = mean(x, dim) if average else torch.zeros((), dtype=x.dtype, device=x.device)
        shape = [len(new) if d == dim else size for d, size in enumerate(x.shape)]
        return grown.index_copy_(dim, new.to(x.device), rest.expand(shape))


@dataclass(frozen=True, eq=False)
class DenseMap:
    """Learned combinations: target element t is Σ_s matrix[t, s] · (source element s).

    Attributes:
        matrix: [T, S], on any device: what is needed of it goes to that of the tensor which grows.
        out_scale, in_scale: diagonals of O and I.
    """

    matrix: Tensor
    out_scale: Scale = 1.0
    in_scale: Scale = 1.0

    def spread(self, x: Tensor, dim: int, elements: Elements, average: bool = False) -> Tensor:
        """The rows `elements` of M applied to dim `dim` of x, in the map's dtype; only these rows are multiplied."""
        rows, x = self.matrix[elements].to(x.device), x.to(self.matrix.dtype)
        return rows @ x if dim == 0 else x @ rows.T


@dataclass(frozen=True, eq=False)
class ExtendedMap:
    """[I; C] up to the order of its rows: some target elements copy a source element for good, the others are learned.

    Attributes:
        index: [T] int64, the source element of each kept element; NEW for the learned ones.
        matrix: [N, S] the rows of the learned elements, in their order: C; on any device.
        is_new: [T] bool, learned elements that get what a recipe gives to those without a source besides.
        out_scale, in_scale: diagonals of O and I.
    """

    index: Tensor
    matrix: Tensor
    is_new: Tensor
    out_scale: Scale = 1.0
    in_scale: Scale = 1.0

    @cached_property
    def has_new(self) -> bool:
        """Whether there are elements that `is_new` marks."""
        return bool(self.is_new.any())

    @cached_property
    def is_appended(self) -> bool:
        """Whether the rows are those of [I; C] in this order."""
        num_kept = len(self.index) - len(self.matrix)
        kept = torch.arange(num_kept)
        return num_kept == self.matrix.shape[1] and torch.equal(self.index[:num_kept], kept)

    @cached_property
    def row_of_C(self) -> Tensor:
        """[T] the row of `matrix` of each learned element."""
        return (self.index == NEW).cumsum(0) - 1

    def spread(self, x: Tensor, dim: int, elements: Elements, average: bool = False) -> Tensor:
        """The rows `elements` of M applied to dim `dim` of x, in C's dtype; only rows of C are multiplied."""
        index, x = self.index[elements], x.to(self.matrix.dtype)
        is_learned = index == NEW
        rows = self.matrix[_as_range(self.row_of_C[elements][is_learned])].to(x.device)
        learned = rows @ x if dim == 0 else x @ rows.T
        if average and self.has_new:
            is_new = self.is_new[elements][is_learned].to(x.device, x.dtype)
            learned = learned + mean(x, dim) * (is_new if dim == x.ndim - 1 else is_new[:, None])
        kept = x.index_select(dim, index[~is_learned].to(x.device))
        places = torch.cat((torch.where(~is_learned)[0], torch.where(is_learned)[0])).argsort()
        joined = torch.cat((kept, learned), dim)
        return joined if isinstance(_as_range(places), slice) else joined.index_select(dim, places.to(x.device))


AxisMap = SparseMap | DenseMap | ExtendedMap


@dataclass(frozen=True)
class LayerMap:
    """Copies: target layer k is source layer index[k] (one 1 in each row of w)."""

    index: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class LayerMix:
    """Weighted sums of layers: w [parts, target layers, source layers] for each leaf of `roles.leaves`.

    What is fused in a leaf (key and value, gate and up) has weights of its own.
    """

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


def _as_range(places: Tensor) -> slice | Tensor:
    """Consecutive places as a slice, which copies nothing."""
    if len(places) == 0:
        return slice(0, 0)
    first = int(places[0])
    return slice(first, first + len(places)) if bool((places.diff() == 1).all()) else places
