"""A recipe: everything that says how one model becomes another, linear in the source's parameters."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from megagrow.config import ModelConfig
from megagrow.growth.maps import AxisMap, Form, LayerMap, LayerMix, SparseMap
from megagrow.roles import layer_name, role_of, split_name

Use = tuple[str, Form]  # an axis map, and the way in which a parameter uses its axis


@dataclass(frozen=True)
class Fill:
    """What the entries become that have no source element (`maps.NEW`) on one of their dims; 0 unless said here.

    Gains of norms become the mean of the old ones, other vectors 0, whatever stands here. Random entries depend on
    (seed, parameter name, global index) only, so that any shard of them can be made alone.

    Attributes:
        free: uses of axes whose new elements get random entries; an entry is random if all of its new dims are free.
        average: uses of axes whose new elements become the mean of the old ones.
        std: of random entries: that of the target's initialisation, or the root mean square of the source's tensor,
            scaled as the copies are.
        ratio: what `std` is multiplied by.
    """

    free: frozenset[Use] = frozenset()
    average: frozenset[Use] = frozenset()
    std: Literal["initial", "source"] = "initial"
    ratio: float = 1.0


@dataclass(frozen=True, eq=False)
class Recipe:
    """One way from a source model to a target model.

    Attributes:
        method: its name.
        source, target: the two models.
        layers: w of the formula.
        axes: map name of `roles.Role` -> O and I of the formula; an axis that does not grow is absent. Under multi-head
            attention `heads` and `value` are the same object.
        keeps_function: whether the target computes exactly what the source does.
        layer_axes: target layer -> maps that replace all of `axes` there.
        source_axes: source layer -> maps that replace all of `axes` for its parameters, which are widened before layers
            are mixed.
        first_layers: where learned layer maps started, as copies: random entries of a target layer that go by the
            source's size (`Fill.std`) are as large as this source layer. None: as what they stand beside.
        fill_scales: leaf of a layer, or parameter outside the layers -> learned factors of its random entries, which
            are added to what the maps give then; None: they stand alone.
        next_rows: maps of the rows inside layers that point into the rows of a source layer and of the next one, laid
            end to end (the last layer stands for its own next); they replace those of `axes` for rows of matrices and
            biases. None: rows come from one layer.
        silent: target layers that begin as the identity: what their matrices add to the residual stream is 0.
        fill: what entries without a source become.
        norm_scale: what the gains of norms over the hidden axis are multiplied by.
        noise: standard deviation of the noise that tells replicas apart, relative to the copies around it. It is added
            to the columns of one of two replicas and taken from those of the other, so that their sum stays.
        seed: of everything random.
    """

    method: str
    source: ModelConfig
    target: ModelConfig
    layers: LayerMap | LayerMix
    axes: Mapping[str, AxisMap]
    keeps_function: bool = False
    layer_axes: Mapping[int, Mapping[str, AxisMap]] | None = None
    source_axes: Mapping[int, Mapping[str, AxisMap]] | None = None
    first_layers: LayerMap | None = None
    fill_scales: Mapping[str, Tensor] | None = None
    next_rows: Mapping[str, SparseMap] | None = None
    silent: frozenset[int] = frozenset()
    fill: Fill = field(default_factory=Fill)
    norm_scale: float = 1.0
    noise: float = 0.0
    seed: int = 0

    @property
    def copies(self) -> bool:
        """Whether every target entry is a scaled copy of one source entry or has none, as Adam's rule needs."""
        maps = [self.axes, *(self.layer_axes or {}).values()]
        return isinstance(self.layers, LayerMap) and all(
            isinstance(m, SparseMap) for axes in maps for m in axes.values()
        )

    @property
    def splits_groups(self) -> bool:
        """Whether key/value heads grow alone, so that each copy of one gets the gradients of some of its queries."""
        return "value" in self.axes and "heads" not in self.axes

    def source_name(self, name: str) -> str:
        """The source parameter that a target parameter copies; of copied layers only."""
        layer, leaf = split_name(name)
        if layer is None:
            return name
        assert isinstance(self.layers, LayerMap), "a mixed layer has no single source"
        return layer_name(self.layers.index[layer], leaf)

    def source_names(self, name: str) -> list[str]:
        """The source parameters whose entries a target parameter copies."""
        layer, leaf = split_name(name)
        if layer is None or not self.reads_next(name):
            return [self.source_name(name)]
        assert isinstance(self.layers, LayerMap), "a mixed layer has no single source"
        following = min(self.layers.index[layer] + 1, self.source.num_layers - 1)
        return [self.source_name(name), layer_name(following, leaf)]

    def axes_of(self, name: str) -> Mapping[str, AxisMap]:
        """The maps that grow the axes of a target parameter."""
        layer, _ = split_name(name)
        return self.axes if layer is None else (self.layer_axes or {}).get(layer, self.axes)

    def fill_scale(self, name: str) -> Tensor:
        """The learned factor of a parameter's random entries, 0-dimensional."""
        assert self.fill_scales is not None, "they have none"
        layer, leaf = split_name(name)
        return self.fill_scales[leaf][layer or 0]

    def reads_next(self, name: str) -> bool:
        """Whether rows of a target parameter come from two source layers, see `next_rows`."""
        role, (layer, _) = role_of(name), split_name(name)
        has_rows = any(map_name in (self.next_rows or {}) for map_name in role.out_maps)
        return layer is not None and has_rows and role.kind in ("matrix", "bias")

    def is_silent(self, name: str) -> bool:
        """Whether a target parameter is one of an identity layer that would write to the residual stream."""
        role, (layer, _) = role_of(name), split_name(name)
        writes = role.writes_residual or (role.kind == "bias" and role.out == "hidden")
        return layer in self.silent and writes

    def scales_gain(self, name: str) -> bool:
        """Whether `norm_scale` applies to a parameter."""
        role = role_of(name)
        return role.kind == "norm_gain" and role.out == "hidden"
