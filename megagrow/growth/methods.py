"""Named growth methods: each is a short recipe that says which map grows each axis and the layers."""

# Legend of the diagrams: rows are outputs, columns are inputs; A, B, … are source layers or units.

from collections.abc import Callable

from torch import Tensor

from megagrow.checks import check_growable
from megagrow.config import ModelConfig, require
from megagrow.errors import ConfigError
from megagrow.growth.maps import (
    AxisMap,
    LayerMap,
    SparseMap,
    interleave,
    interleave_queries,
    to_elements,
)
from megagrow.growth.recipe import Recipe

WIDTHS = ("hidden_size", "num_heads", "num_kv_heads", "ffn_size")


def make_recipe(method: str, source: ModelConfig, target: ModelConfig) -> Recipe:
    """The recipe of a named method.

    Raises:
        ConfigError: no such method; the models are of different kinds, or the target is smaller somewhere; the method
            cannot reach these sizes.
    """
    if method not in METHODS:
        raise ConfigError(f"growth.method={method} does not exist; use one of {', '.join(METHODS)}")
    check_growable(source, target)
    has_last_norm = not target.is_causal or target.norm_place == "before"
    require(
        has_last_norm or not target.tied_embeddings or source.hidden_size == target.hidden_size,
        f"growth.method={method} widens the embedding, which is the output matrix too: its scale goes into the norm "
        "before the output, and with model.norm_place=after and objective=clm there is none; grow other axes, or use a "
        "model with an untied head",
    )
    return METHODS[method](source, target)


def stack(source: ModelConfig, target: ModelConfig) -> Recipe:
    """Depth: the whole stack of layers is repeated, the rest copied. Not function preserving.

        A            A B A B        source layers A B; target layer k copies layer k mod 2
        B     ->

    Source: StackBERT (Gong et al., 2019); G_stack (Du et al., 2024, arXiv 2405.15319, section 3).
    """
    for name in WIDTHS:
        old, new = getattr(source, name), getattr(target, name)
        require(
            old == new,
            f"growth.method=stack grows depth only, but {name} is {old} in the source and {new} in the target; "
            "make them equal or use clone or ligo",
        )
    return Recipe("stack", source, target, _stacked(source, target), {}, source.num_layers == target.num_layers)


def clone(source: ModelConfig, target: ModelConfig) -> Recipe:
    """Width: every unit of an axis is copied equally often, readers divide by the number of copies. Exact.

               a b              a/2 a/2 b/2 b/2
        W  =   c d     ->       a/2 a/2 b/2 b/2        (×2 on both axes)
                                c/2 c/2 d/2 d/2
                                c/2 c/2 d/2 d/2

    Replicas stand side by side (`maps.interleave`); query heads are copied inside the groups of their key/value heads.
    Layers are stacked as in `stack` when their number differs, and then the function changes.

    Source: Net2WiderNet (Chen et al., 2016); HyperCloning (Samragh et al., 2024, arXiv 2409.12903, section 3).
    """
    for name in WIDTHS:
        old, new = getattr(source, name), getattr(target, name)
        require(
            new % old == 0,
            f"growth.method=clone copies each unit equally often, but {name}={new} is no multiple of the source's "
            f"{old}; use {new // old * old} or {-(-new // old) * old}, or method ligo",
        )
    query_copies, kv_copies = target.num_heads // source.num_heads, target.num_kv_heads // source.num_kv_heads
    require(
        query_copies % kv_copies == 0,
        f"growth.method=clone makes {query_copies} copies of each query head and {kv_copies} of each key/value head, "
        f"but every copied group needs whole copies of its queries; use num_heads={source.num_heads * kv_copies} "
        f"or num_kv_heads={source.num_kv_heads}",
    )
    keeps_function = source.num_layers == target.num_layers
    return Recipe("clone", source, target, _stacked(source, target), copied_axes(source, target), keeps_function)


def ligo(source: ModelConfig, target: ModelConfig) -> Recipe:
    """Width and depth by learned linear maps; this is where the maps start, `ligo.Ligo` makes them dense and learns.

        Θ'_k  =   O  ·  Σ_j w_kj Θ_j  ·  Iᵀ          I = (source size / target size) · O

                 1 .                    1 . . .        layers stacked, plus small weights for the other layers
        O =      x x             w =    . 1 . .        units interleaved (`clone` without its rule that sizes divide),
                 . 1                    1 . . .        plus noise x on the rows that are no first copies
                 x x                    . 1 . .

    Source: LiGO (Wang et al., 2023, arXiv 2303.00980), Algorithm 1: maps tied over layers. Departures: docs/ligo.md.
    """
    return Recipe("ligo", source, target, _stacked(source, target), copied_axes(source, target))


METHODS: dict[str, Callable[[ModelConfig, ModelConfig], Recipe]] = {"stack": stack, "clone": clone, "ligo": ligo}


def copied_axes(source: ModelConfig, target: ModelConfig) -> dict[str, AxisMap]:
    """Interleaved copies on every axis that grows, I = (source size / target size) · O."""
    d = target.head_dim
    axes: dict[str, AxisMap] = {}
    if target.hidden_size > source.hidden_size:
        axes["hidden"] = _copies(interleave(source.hidden_size, target.hidden_size), source.hidden_size)
    if target.ffn_size > source.ffn_size:
        axes["ffn"] = _copies(interleave(source.ffn_size, target.ffn_size), source.ffn_size)
    if target.num_kv_heads > source.num_kv_heads:
        kv_heads = to_elements(interleave(source.num_kv_heads, target.num_kv_heads), d)
        axes["key"], axes["value"] = (_copies(kv_heads, source.num_kv_heads * d) for _ in range(2))
    if target.num_heads > source.num_heads:
        heads = interleave_queries(source.num_heads, source.num_kv_heads, target.num_heads, target.num_kv_heads)
        axes["query"], axes["heads"] = (_copies(to_elements(heads, d), source.num_heads * d) for _ in range(2))
        if all(model.num_heads == model.num_kv_heads for model in (source, target)):
            axes["heads"] = axes["value"]
    return axes


def _copies(index: Tensor, num_source: int) -> SparseMap:
    return SparseMap(index, num_source, in_scale=num_source / len(index))


def _stacked(source: ModelConfig, target: ModelConfig) -> LayerMap:
    return LayerMap(tuple(k % source.num_layers for k in range(target.num_layers)))
