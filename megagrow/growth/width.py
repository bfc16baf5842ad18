"""Width methods: which source units each unit of an axis copies, what readers divide by, and what new entries become.

Axes grow separately: hidden, FFN neurons, query heads, key/value heads. Heads are units; query heads are only copied
to places that share a copy of their own key/value head, so that every group of the target is made of one group.
"""

# Legend of the diagrams: rows are outputs, columns are inputs; a, b, … are source entries, r random ones.

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megagrow.config import ModelConfig, require
from megagrow.growth.maps import (
    NEW,
    AxisMap,
    Scale,
    SparseMap,
    first_copies,
    interleave,
    interleave_queries,
    replica_count,
    replica_rank,
    to_elements,
)
from megagrow.growth.recipe import Fill, Use
from megagrow.model.transformer import name_seed

WIDTHS = ("hidden_size", "num_heads", "num_kv_heads", "ffn_size")
WRITERS: frozenset[Use] = frozenset((name, "out") for name in ("hidden", "ffn", "query", "key", "value"))
READERS: frozenset[Use] = frozenset((name, "in") for name in ("hidden", "ffn", "heads"))

Pick = Callable[[str, int, int], Tensor]  # (axis, source units, more target units) -> index of units


@dataclass(frozen=True)
class Width:
    """How the axes grow.

    Attributes:
        axes, fill, next_rows, norm_scale: as in `recipe.Recipe`.
        keeps_function: whether they keep it, layers aside.
        eps_scale: what the target's norm_eps must be, relative to the source's.
    """

    axes: dict[str, AxisMap]
    keeps_function: bool = False
    fill: Fill = field(default_factory=Fill)
    next_rows: dict[str, SparseMap] | None = None
    norm_scale: float = 1.0
    eps_scale: float = 1.0


def clone(source: ModelConfig, target: ModelConfig, seed: int) -> Width:
    """Every unit is copied, replicas side by side, and readers divide by the number of copies. Exact.

               a b              a/2 a/2 b/2 b/2
        W  =   c d     ->       a/2 a/2 b/2 b/2        (×2 on both axes)
                                c/2 c/2 d/2 d/2
                                c/2 c/2 d/2 d/2

    FFN neurons and heads are copied unequally often where the sizes do not divide. The hidden axis cannot be, since
    norms weigh all its units equally: there each unit is copied n = ⌊H / h⌋ times, and no norm sees the rest:

        RMSNorm      x' = [x … x, 0]             writers 0 in the rest, readers free
        LayerNorm    x' = [x … x, mean of x]     writers the mean of their rows, readers free; pre-norm models only
        both         gain' = √(n h / H) · gain      eps' = n h / H · eps

    Source: Net2WiderNet (Chen et al., 2016); HyperCloning (Samragh et al., 2024, arXiv 2409.12903, section 3); for the
    rest LEMON (Wang et al., 2024, arXiv 2310.07999, section 4).
    """
    h, H = source.hidden_size, target.hidden_size
    copied = H // h * h

    def pick(axis: str, num_source: int, num_target: int) -> Tensor:
        if axis != "hidden":
            return interleave(num_source, num_target)
        return torch.cat([interleave(h, copied), torch.full((H - copied,), NEW)])

    axes = unit_axes(source, target, pick)
    if copied == H:
        return Width(axes, keeps_function=True)
    require(
        target.norm == "rms_norm" or target.norm_place == "before",
        f"growth.method=clone has no exact answer for hidden_size={H}, no multiple of the source's {h}, with LayerNorm "
        f"after each residual sum (norm_place=after); use hidden_size={copied} or {copied + h}",
    )
    average: frozenset[Use] = frozenset({("hidden", "out")} if target.norm == "layer_norm" else {})
    fill = Fill(frozenset({("hidden", "in")}), average)
    return Width(axes, True, fill, norm_scale=math.sqrt(copied / H), eps_scale=copied / H)


def net2net(source: ModelConfig, target: ModelConfig, seed: int) -> Width:
    """Every old unit stays, new ones copy units drawn at random, and readers divide by the number of copies. Exact.

               a b              a  b/2 b/2             (2 -> 3 on both axes, the second unit drawn)
        W  =   c d     ->       c  d/2 d/2
                                c  d/2 d/2

    On the hidden axis norms weigh all units equally, so that each must be copied equally often: whole multiples only.

    Source: Net2WiderNet (Chen et al., 2016, arXiv 1511.05641, section 3.1).
    """
    require(
        target.hidden_size % source.hidden_size == 0,
        f"growth.method=net2net copies each hidden unit equally often, as norms ask, but hidden_size="
        f"{target.hidden_size} is no multiple of the source's {source.hidden_size}; use method clone or fpi",
    )
    return Width(unit_axes(source, target, _drawn(seed)), keeps_function=True)


def fpi(source: ModelConfig, target: ModelConfig, seed: int) -> Width:
    """Net2WiderNet through a whole transformer, heads as units: bert2BERT's function-preserving initialisation.

        in:   U_i = W_g(i) / C_g(i)          g(i) = i for old i, else drawn;  C: how often a unit is copied
        out:  W'_j = U_g(j)                  one g for the residual stream, one for each kind of head and neuron

    As in the paper norms are copied whatever the counts, so that the function is kept only if the hidden size is
    multiplied by a whole number.

    Source: bert2BERT (Chen et al., 2022, arXiv 2110.07143, section 3.3).
    """
    is_exact = target.hidden_size % source.hidden_size == 0
    return Width(unit_axes(source, target, _drawn(seed)), keeps_function=is_exact)


def aki(source: ModelConfig, target: ModelConfig, seed: int) -> Width:
    """As `fpi`, but new rows come from the next layer: bert2BERT's advanced knowledge initialisation. Not exact.

        W'_j = U^l_j for old j, U^(l+1)_g(j) for new ones          the last layer reads itself; norms stay with layer l

    New units differ from the old ones from the start, so that no symmetry has to be broken.

    Source: bert2BERT (Chen et al., 2022, arXiv 2110.07143, section 3.4).
    """
    width = fpi(source, target, seed)
    copies = {name: axis for name, axis in width.axes.items() if isinstance(axis, SparseMap)}
    rows = {name: _from_next(axis) for name, axis in copies.items()}
    return replace(width, next_rows=rows, keeps_function=not rows)


def zero_pad(source: ModelConfig, target: ModelConfig, seed: int) -> Width:
    """New units beside the old ones, one side of each is 0: nothing is read from them, or nothing is written. Exact.

                       W 0       hidden -> hidden        new hidden units: writers 0, readers random
        writers of     . .       rows of new units 0     new neurons and heads: their rows random, their readers 0
        hidden

        RMSNorm over H instead of h units:  gain' = √(h / H) · gain      eps' = h / H · eps

    Refused on the hidden axis under LayerNorm, whose mean and variance see the zeros, and with norms over queries and
    keys (qk_norm), which would share the changed eps.

    Source: Gesmundo & Maile, 2023 (arXiv 2308.06103, sections 3.1 to 3.5); the rule for eps is ours.
    """
    h, H = source.hidden_size, target.hidden_size
    require(
        h == H or target.norm == "rms_norm",
        f"growth.method=zero_pad has no exact answer for the hidden axis under LayerNorm, whose mean and variance "
        f"would count the {H - h} zeros; keep hidden_size={h}, or use method clone",
    )
    free: frozenset[Use] = frozenset({("hidden", "in"), *WRITERS}) - {("hidden", "out")}
    axes = unit_axes(source, target, _padded)
    return Width(axes, True, Fill(free), norm_scale=math.sqrt(h / H), eps_scale=h / H)


def direct_copy(source: ModelConfig, target: ModelConfig, seed: int) -> Width:
    """The old block stays in its corner, all other entries are drawn as for a new model. Not exact.

        W   ->   W r
                 r r          r: normal, std of the target's initialisation; norm gains: the mean of the old ones

    Source: Wei et al., 2016 (arXiv 1603.01670), as "direct copy" in LiGO's comparison.
    """
    axes = unit_axes(source, target, _padded)
    return Width(axes, not axes, Fill(WRITERS | READERS))


def rms_random(source: ModelConfig, target: ModelConfig, seed: int) -> Width:
    """The old block and random new entries of its size, scaled so that outputs stay as large as inputs. Not exact.

        W   ->   √(d / d') ·  W r          d, d': old and new number of inputs
                              r r          r: normal, std the root mean square of W; norm gains: mean of the old ones

    A sum over d' independent inputs is √(d' / d) times as large as one over d: RMS(y) / RMS(x) stays. Embeddings read
    no axis that grows, hence have no factor; with a tied head the norm before it takes the head's.

    Source: SPARKLING (2026, arXiv 2602.02472), its rule for independent new inputs.
    """
    axes = unit_axes(source, target, _padded)
    scaled = {name: _rms_scaled(axis) for name, axis in axes.items() if isinstance(axis, SparseMap)}
    if axes.get("heads") is axes.get("value") and "value" in scaled:
        scaled["heads"] = scaled["value"]
    return Width(dict(scaled), not axes, Fill(WRITERS | READERS, std="source"))


def ligo(source: ModelConfig, target: ModelConfig, seed: int) -> Width:
    """Learned linear maps; this is where they start, `ligo.Ligo` makes them dense and learns.

        Θ'_k  =   O  ·  Σ_j w_kj Θ_j  ·  Iᵀ          I = (source size / target size) · O

                 1 .                    1 . . .        layers stacked, plus small weights for the other layers
        O =      x x             w =    . 1 . .        units interleaved (`clone` without its rule that sizes divide),
                 . 1                    1 . . .        plus noise x on the rows that are no first copies
                 x x                    . 1 . .

    Source: LiGO (Wang et al., 2023, arXiv 2303.00980), Algorithm 1: maps tied over layers. Departures: docs/ligo.md.
    """
    return Width(copied_axes(source, target))


WIDTH_METHODS: dict[str, Callable[[ModelConfig, ModelConfig, int], Width]] = {
    "clone": clone,
    "net2net": net2net,
    "fpi": fpi,
    "aki": aki,
    "zero_pad": zero_pad,
    "direct_copy": direct_copy,
    "rms_random": rms_random,
    "ligo": ligo,
}
REPLICATING = ("clone", "net2net", "fpi")  # what has replicas that do the same, which a breaker can tell apart


def unit_axes(source: ModelConfig, target: ModelConfig, pick: Pick) -> dict[str, AxisMap]:
    """Maps of every axis that grows, out of a rule for units; readers divide by the number of copies."""
    axes: dict[str, AxisMap] = {}
    if target.hidden_size > source.hidden_size:
        axes["hidden"] = copies(pick("hidden", source.hidden_size, target.hidden_size), source.hidden_size)
    if target.ffn_size > source.ffn_size:
        axes["ffn"] = copies(pick("ffn", source.ffn_size, target.ffn_size), source.ffn_size)
    return axes | _head_axes(source, target, pick)


def copies(index: Tensor, num_source: int, unit: int = 1) -> SparseMap:
    """A map whose readers divide by the number of copies, from an index of units."""
    elements = to_elements(index, unit)
    return SparseMap(elements, num_source * unit, in_scale=_as_scale(1 / replica_count(elements).double(), elements))


def split_unequally(
    axes: dict[str, AxisMap], source: ModelConfig, target: ModelConfig, spread: float
) -> dict[str, AxisMap]:
    """The same copies, whose n readers take shares 1/n · (1 - spread … 1 + spread) instead of 1/n each.

    The function stays, since the shares sum to 1; gradients and the copies' later courses differ.

    Source: LEMON (Wang et al., 2024, arXiv 2310.07999, section 4.2).
    """
    even = {name: axis for name, axis in axes.items() if isinstance(axis, SparseMap)}
    split = {name: _split(axis, spread) for name, axis in even.items()}
    if "value" in split and "heads" not in split:  # key/value heads alone: nothing reads several copies
        split |= {name: even[name] for name in ("key", "value")}
    elif "value" in split:  # a value's gradient is shared out by the query heads that read it
        shares = torch.as_tensor(split["heads"].in_scale).expand(len(split["heads"].index))
        by_group = shares.view(target.num_kv_heads, -1, target.head_dim).sum(1).flatten()
        by_copy = by_group * source.num_kv_heads / source.num_heads
        split["value"] = replace(split["value"], in_scale=by_copy)
        split["key"] = replace(split["key"], in_scale=by_copy)
        if axes["heads"] is axes["value"]:
            split["heads"] = split["value"]
    return dict(split)


def copied_axes(source: ModelConfig, target: ModelConfig) -> dict[str, AxisMap]:
    """Interleaved copies on every axis that grows, I = (source size / target size) · O."""
    d = target.head_dim
    axes: dict[str, AxisMap] = {}
    if target.hidden_size > source.hidden_size:
        axes["hidden"] = _even_copies(interleave(source.hidden_size, target.hidden_size), source.hidden_size)
    if target.ffn_size > source.ffn_size:
        axes["ffn"] = _even_copies(interleave(source.ffn_size, target.ffn_size), source.ffn_size)
    if target.num_kv_heads > source.num_kv_heads:
        kv_heads = to_elements(interleave(source.num_kv_heads, target.num_kv_heads), d)
        axes["key"], axes["value"] = (_even_copies(kv_heads, source.num_kv_heads * d) for _ in range(2))
    if target.num_heads > source.num_heads:
        heads = interleave_queries(source.num_heads, source.num_kv_heads, target.num_heads, target.num_kv_heads)
        axes["query"], axes["heads"] = (_even_copies(to_elements(heads, d), source.num_heads * d) for _ in range(2))
        if _is_multi_head(source, target):
            axes["heads"] = axes["value"]
    return axes


def _head_axes(source: ModelConfig, target: ModelConfig, pick: Pick) -> dict[str, AxisMap]:
    """Maps of query and key/value heads: groups are picked, then query heads alike in each group."""
    if (source.num_heads, source.num_kv_heads) == (target.num_heads, target.num_kv_heads):
        return {}
    if source.num_heads == target.num_heads:
        return _split_groups(source, target, pick)
    old_group, new_group = (model.num_heads // model.num_kv_heads for model in (source, target))
    require(
        new_group >= old_group,
        f"the target has {new_group} query heads for each key/value head, the source {old_group}, but every group "
        f"needs all of its queries; use model.num_heads={old_group * target.num_kv_heads} or "
        f"num_kv_heads={source.num_kv_heads}",
    )
    kv_K = _pick(pick, "kv_heads", source.num_kv_heads, target.num_kv_heads)
    within_Q = _pick(pick, "query_heads", old_group, new_group)
    is_new_KQ = (kv_K[:, None] == NEW) | (within_Q == NEW)
    heads = torch.where(is_new_KQ, NEW, kv_K[:, None] * old_group + within_Q).flatten()
    d, axes = target.head_dim, dict[str, AxisMap]()
    if target.num_kv_heads > source.num_kv_heads:
        axes["key"], axes["value"] = (copies(kv_K, source.num_kv_heads, d) for _ in range(2))
    axes["query"], axes["heads"] = (copies(heads, source.num_heads, d) for _ in range(2))
    if _is_multi_head(source, target):
        axes["heads"] = axes["value"]
    return axes


def _split_groups(source: ModelConfig, target: ModelConfig, pick: Pick) -> dict[str, AxisMap]:
    """Maps of key/value heads that grow alone: queries stay where they are, and each copy serves some of its group's.

    query heads     0 1 2 3 | 4 5 6 7          0 1 | 2 3 | 4 5 | 6 7
    kv heads           0    |    1       ->     0  |  0  |  1  |  1          their place decides, not `pick`
    """
    old, new = source.num_kv_heads, target.num_kv_heads
    has_new = bool((pick("kv_heads", old, new) == NEW).any())
    require(
        new % old == 0 and not has_new,
        f"the target has {new} key/value heads for the same {target.num_heads} query heads, the source {old}: queries "
        f"find what they know only in copies of their own key/value head, equally many of each; use a multiple of "
        f"{old} with method clone, net2net, fpi, aki, or ligo from growth.ligo_init=clone, or "
        f"model.num_heads={source.num_heads // old * new}",
    )
    index = interleave(old, new)
    return {name: copies(index, old, target.head_dim) for name in ("key", "value")}


def _pick(pick: Pick, axis: str, num_source: int, num_target: int) -> Tensor:
    return pick(axis, num_source, num_target) if num_target > num_source else torch.arange(num_source)


def _padded(axis: str, num_source: int, num_target: int) -> Tensor:
    return torch.cat([torch.arange(num_source), torch.full((num_target - num_source,), NEW)])


def _drawn(seed: int) -> Pick:
    """Old units in their places; new ones copy units drawn at random, on the hidden axis in rounds of all units."""

    def pick(axis: str, num_source: int, num_target: int) -> Tensor:
        generator = torch.Generator().manual_seed(name_seed(seed, f"growth.{axis}"))
        num_new = num_target - num_source
        if axis != "hidden":
            drawn = torch.randint(0, num_source, (num_new,), generator=generator)
        else:
            rounds = [torch.randperm(num_source, generator=generator) for _ in range(-(-num_new // num_source))]
            drawn = torch.cat(rounds)[:num_new]
        return torch.cat([torch.arange(num_source), drawn])

    return pick


def _even_copies(index: Tensor, num_source: int) -> SparseMap:
    return SparseMap(index, num_source, in_scale=num_source / len(index))


def _from_next(axis: SparseMap) -> SparseMap:
    """The same copies of rows, new ones from the second of two layers laid end to end."""
    index = torch.where(first_copies(axis.index), axis.index, axis.index + axis.num_source)
    return SparseMap(index, 2 * axis.num_source, axis.out_scale, axis.in_scale)


def _rms_scaled(axis: SparseMap) -> SparseMap:
    return replace(axis, in_scale=math.sqrt(axis.num_source / len(axis.index)))


def _split(axis: SparseMap, spread: float) -> SparseMap:
    rank, count = replica_rank(axis.index).double(), replica_count(axis.index).double()
    tilt = torch.where(count > 1, 2 * rank / (count - 1).clamp(min=1) - 1, 0.0)
    return replace(axis, in_scale=_as_scale((1 + spread * tilt) / count, axis.index))


def _as_scale(scale: Tensor, index: Tensor) -> Scale:
    """One number where all elements that have a source share it."""
    kept = scale[index != NEW]
    return float(kept[0]) if bool((kept == kept[0]).all()) else scale


def _is_multi_head(*models: ModelConfig) -> bool:
    return all(model.num_heads == model.num_kv_heads for model in models)
