"""Moves between ranks exactly what growth by copies needs: of each source tensor, the range that a rank's shards copy.

Every rank tells once which boxes it stores of source and target. From then on all of them know, for each source tensor,
who needs which range of it and who has it: what a rank has itself is copied, the rest is sent from rank to rank. So
`clone` on evenly divided axes sends nothing but the layers that change their stage. Where random numbers are drawn as
large as a tensor, its root mean square comes from sums over all ranks.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from megagrow.checkpoint.agreement import Ranks
from megagrow.growth.dims import Quantity
from megagrow.growth.grow import Fetch, Ranges, is_counted
from megagrow.growth.noise import root_mean_squares_over
from megagrow.growth.operator import copied_box, needs_rms
from megagrow.growth.recipe import Recipe
from megagrow.parallel import heartbeat
from megagrow.parallel.mesh import Mesh
from megagrow.parallel.shards import Box, box, local
from megagrow.roles import parameter_names, parameter_shapes

Key = tuple[tuple[int, int], ...]  # a box that can be looked up
Boxes = Sequence[Mapping[str, Box]]  # by rank: what it holds, or needs, of each tensor


class Exchange:
    """Who needs what of a source model that lives in this job; making one is a collective over all ranks.

    Args:
        recipe: one that copies.
        sources: this rank's tensors of the source by name; its moments are laid out alike.
        targets: this rank's tensors of the target, likewise.
        mesh: where the rank stands.
    """

    def __init__(
        self, recipe: Recipe, sources: Mapping[str, Tensor], targets: Mapping[str, Tensor], mesh: Mesh
    ) -> None:
        assert recipe.copies, "learned maps need whole tensors: see mesh_fetch"
        self.mesh, self._names = mesh, parameter_names(recipe.source)
        self._ranks, stored = Ranks(mesh.world.group, alone=mesh.world.size == 1), _boxes(targets)
        self._has: Boxes = self._ranks.gather(_boxes(sources))
        kinds: tuple[Quantity, ...] = ("value", "gradient")  # what is new in moments is 0, and needs nothing
        drawn_from = {recipe.source_name(n) for n in parameter_names(recipe.target) if needs_rms(recipe, n)}
        shapes = parameter_shapes(recipe.source)
        self._drawn_sizes = {name: prod(shape) for name, shape in shapes.items() if name in drawn_from}
        self._needs = {kind: self._ranks.gather(_needed(recipe, stored, kind)) for kind in kinds}

    def fetch(self, tensors: Mapping[str, Tensor], quantity: Quantity = "value") -> Fetch:
        """Reads parameters of the source, or one of their moments; every call is a collective.

        What it gives is the range that this rank needs, a view of its own piece where that holds it.

        Args:
            tensors: this rank's, by parameter name, of one dtype.
            quantity: what they are, as in `grow.grow_into`.
        """
        dtype, needs = next(iter(tensors.values())).dtype, self._needs["value" if quantity == "value" else "gradient"]
        needed = needs[self.mesh.world.rank]

        def read(name: str) -> Tensor:
            piece = local(tensors[name]).detach().to(self.mesh.device) if name in tensors else None
            region = self._region(name, piece, needed.get(name, ()), dtype)
            self._fill(name, region, piece, needs)
            heartbeat.progress()
            return region

        found = self._root_mean_squares(tensors) if quantity == "value" and self._drawn_sizes else {}
        return Ranges(read, lambda name: tuple(each.start for each in needed[name]), found.get)

    def moves(self) -> Iterator[tuple[int, int, int]]:
        """(sender, receiver, elements) of all that weights and both moments move, also from a rank to itself."""
        for name in self._names:
            for needs, times in (self._needs["value"], 1), (self._needs["gradient"], 2):
                for sender, receiver, part in self._moves(name, needs):
                    yield sender, receiver, times * _size(part)

    def _root_mean_squares(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        """Those of the whole tensors that random numbers are as large as, the same bits in every layout."""
        counted = {name: local(tensors[name]) for name in self._drawn_sizes if is_counted(name, tensors, self.mesh)}
        return root_mean_squares_over(counted, self._drawn_sizes, self.mesh.world, self.mesh.device)

    def _moves(self, name: str, all_needs: Boxes, of: int | None = None) -> Iterator[tuple[int, int, Box]]:
        """(sender, receiver, range) of what is needed of a tensor: all, or what rank `of` may send or receive."""
        holders: dict[Key, list[int]] = {}
        for rank, boxes in enumerate(self._has):
            if name in boxes:
                holders.setdefault(_key(boxes[name]), []).append(rank)
        sent = {key: ranks for key, ranks in holders.items() if of in ranks}
        for receiver, needs in enumerate(all_needs):
            for key, ranks in (holders if of in (None, receiver) else sent).items() if name in needs else ():
                part = tuple(_overlap(slice(*k), need) for k, need in zip(key, needs[name], strict=True))
                if _size(part):
                    yield receiver if receiver in ranks else ranks[receiver % len(ranks)], receiver, part

    def _region(self, name: str, piece: Tensor | None, need: Box, dtype: torch.dtype) -> Tensor:
        """What is needed here, or memory for it."""
        own = self._has[self.mesh.world.rank].get(name)
        if piece is not None and own is not None and need and _covers(own, need):
            return piece[_within(need, own)]
        shape = [each.stop - each.start for each in need]
        return torch.empty(shape if need else 0, dtype=dtype, device=self.mesh.device)

    def _fill(self, name: str, region: Tensor, piece: Tensor | None, needs: Boxes) -> None:
        """Puts what is needed here into its place, and sends from `piece` what others need."""
        me, operations, arrived = self.mesh.world.rank, [], []
        own, need = self._has[me].get(name, ()), needs[me].get(name, ())
        is_here = bool(own and need) and _covers(own, need)
        for sender, receiver, part in self._moves(name, needs, of=me):
            if sender == receiver == me and not is_here:
                assert piece is not None
                region[_within(part, need)] = piece[_within(part, own)]
            elif sender == me != receiver:
                assert piece is not None
                sent = piece[_within(part, own)].contiguous()
                operations.append(dist.P2POp(dist.isend, sent, group=self._group, group_peer=receiver))
            elif receiver == me != sender:
                target = region[_within(part, need)]
                buffer = target if target.is_contiguous() else target.new_empty(target.shape)
                operations.append(dist.P2POp(dist.irecv, buffer, group=self._group, group_peer=sender))
                arrived.append((target, buffer))
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
        for target, buffer in arrived:
            if buffer is not target:
                target.copy_(buffer)

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return self.mesh.world.group


def _boxes(tensors: Mapping[str, Tensor]) -> dict[str, Box]:
    return {name: box(tensor) for name, tensor in tensors.items() if local(tensor).numel()}


def _needed(recipe: Recipe, targets: Mapping[str, Box], quantity: Quantity) -> dict[str, Box]:
    """The smallest box of each source tensor that holds all that a rank's boxes of the target copy."""
    needed: dict[str, list[Box]] = {}
    for name, target in targets.items():
        for source_name in recipe.source_names(name):
            needed.setdefault(source_name, []).append(copied_box(recipe, name, target, quantity))
    return {name: reduce(_hull, boxes) for name, boxes in needed.items()}


def _hull(one: Box, other: Box) -> Box:
    if _size(one) == 0 or _size(other) == 0:
        return one if _size(other) == 0 else other
    return tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(one, other, strict=True))


def _overlap(one: slice, other: slice) -> slice:
    start = max(one.start, other.start)
    return slice(start, max(start, min(one.stop, other.stop)))


def _covers(own: Box, need: Box) -> bool:
    return all(a.start <= b.start and b.stop <= a.stop for a, b in zip(own, need, strict=True))


def _within(part: Box, whole: Box) -> Box:
    """A box as counted from the start of another one."""
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(part, whole, strict=True))


def _key(part: Box) -> Key:
    return tuple((each.start, each.stop) for each in part)


def _size(part: Box) -> int:
    return prod(each.stop - each.start for each in part)
