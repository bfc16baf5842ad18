"""What a grown model must satisfy, as numbers: for tests, and for users who want to see it on their own model.

    function     logits on a batch stay                            exact methods: rounding
    gradients    of what is copied are R(grad)/n_out               exact methods without a breaker: rounding
    step         AdamW of the grown model = grown AdamW            policy `exact`: rounding
    replicas     how far copies are apart, at once and later       0 for ever without a breaker: nothing new is learned
    rank         effective rank of the matrices, at once and later    grows with what replicas learn

All of them run in one process on whole tensors; `tools/verify_growth.py` prints them.
"""

# Shape suffix legend: B = batch, S = sequence, V = vocabulary.

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megagrow.config import OptimConfig
from megagrow.growth.grow import grow_into, grow_whole
from megagrow.growth.maps import NEW, AxisMap, LayerMap, SparseMap, first_copies
from megagrow.growth.moments import grow_multipliers, grow_optimizer, rule_problem
from megagrow.growth.recipe import Recipe
from megagrow.model import Transformer
from megagrow.optim import MOMENTS, Optimizer
from megagrow.roles import parameter_names, role_of, split_name

VERIFY_STEP = OptimConfig(lr=1e-3, eps=1e-6, clip_norm=0.0)  # clipping is outside the rule for moments


def report(recipe: Recipe, small: Transformer, ids_BS: Tensor, steps: int = 5) -> dict[str, float | None]:
    """All figures of one growth by name; None where the method makes no such promise.

    Args:
        recipe: one that copies.
        small: the source, whole.
        ids_BS: tokens to compute on.
        steps: of AdamW, after which replicas are looked at again.
    """
    grown = grow_model(recipe, small)
    start = _largest(replica_distances(recipe, _parameters(grown)))
    rank = effective_ranks(_parameters(small)), effective_ranks(_parameters(grown))
    gradients = None
    if promises_gradients(recipe):
        gradients = _largest(gradient_errors(recipe, gradients_of(small, ids_BS), gradients_of(grown, ids_BS)))
    function, step = function_change(small, grown, ids_BS), step_error(recipe, small, ids_BS)
    train(grown, Optimizer(dict(grown.named_parameters()), VERIFY_STEP), ids_BS, steps)
    return {
        "function_change": function,
        "gradient_error": gradients,
        "step_error": step,
        "replica_distance": start,
        "replica_distance_later": _largest(replica_distances(recipe, _parameters(grown))),
        "effective_rank_source": sum(rank[0].values()) / len(rank[0]),
        "effective_rank": sum(rank[1].values()) / len(rank[1]),
        "effective_rank_later": sum(effective_ranks(_parameters(grown)).values()) / len(rank[1]),
    }


def grow_model(recipe: Recipe, small: Transformer) -> Transformer:
    """The target model in one process, in the small one's dtype."""
    tensors = _parameters(small)
    grown = Transformer(recipe.target).to(next(iter(tensors.values())).dtype)
    grow_into(recipe, tensors.__getitem__, _parameters(grown))
    return grown


def function_change(small: Transformer, grown: Transformer, ids_BS: Tensor) -> float:
    """Largest difference of the old tokens' logits, relative to the largest logit; 0 when the function is kept."""
    with torch.no_grad():
        small_BSV, grown_BSV = small.logits(ids_BS), grown.logits(ids_BS)
    return _distance(grown_BSV[..., : small_BSV.shape[-1]], small_BSV)


def promises_gradients(recipe: Recipe) -> bool:
    """Whether the gradients of what is copied are R(grad)/n_out: equal copies that keep the function, and no more.

    Cancelling noise changes what flows back; so do unequal shares of the residual stream, and means beside its units,
    through every norm. Copies of a key/value head that share out its queries get the gradients of their own ones, as do
    those that the query heads of a group read in unequal shares.
    """
    hidden = recipe.axes.get("hidden")
    shares = hidden.in_scale if isinstance(hidden, SparseMap) else 1.0
    is_even = not isinstance(shares, Tensor) or bool((shares == shares[0]).all())
    has_means = ("hidden", "out") in recipe.fill.average
    is_even = is_even and _groups_are_even(recipe)
    return recipe.keeps_function and not (recipe.noise or recipe.splits_groups or has_means) and is_even


def _groups_are_even(recipe: Recipe) -> bool:
    """Whether every copy of a key/value head is read in one share by all query heads of its group."""
    heads, source, target = recipe.axes.get("heads"), recipe.source, recipe.target
    if not isinstance(heads, SparseMap) or not isinstance(heads.in_scale, Tensor):
        return True
    by_head = heads.in_scale.view(target.num_heads, -1)[:, 0], heads.index.view(target.num_heads, -1)[:, 0]
    share_KG, index_KG = (x.view(target.num_kv_heads, -1) for x in by_head)
    read_KN = share_KG.new_zeros(target.num_kv_heads, source.num_heads)
    head_KG = index_KG.clamp(min=0) // source.head_dim
    read_KN.scatter_add_(1, head_KG, share_KG.where(index_KG >= 0, 0.0))
    return all(torch.allclose(row[row != 0], row.max()) for row in read_KN)


def gradient_errors(recipe: Recipe, small: Mapping[str, Tensor], grown: Mapping[str, Tensor]) -> dict[str, float]:
    """How far each gradient of the grown model is from the grown gradient R(grad)/n_out; 0 for exact methods.

    Entries without a source and identity layers have no such rule and are left out. Methods that keep the function by
    other means than equal copies do not keep the rule (see `promises_gradients`).

    Args:
        recipe: one that copies and keeps the function.
        small, grown: gradients of the two models on the same batch, by parameter name.
    """
    errors = {}
    for name in parameter_names(recipe.target):
        if split_name(name)[0] in recipe.silent:
            continue
        expected = grow_whole(recipe, small.__getitem__, name, "gradient")
        has_source = grow_whole(recipe, lambda n: torch.ones_like(small[n]), name, "gradient") != 0
        errors[name] = _distance(grown[name] * has_source, expected)
    return errors


def step_error(recipe: Recipe, small: Transformer, ids_BS: Tensor) -> float | None:
    """How far one AdamW step of the grown model is from the grown step of the small one; None without an exact rule.

    The small model makes a first step, so that there are moments to grow.
    """
    if rule_problem(recipe, "exact") is not None:
        return None
    small = copy.deepcopy(small)
    old = Optimizer(dict(small.named_parameters()), VERIFY_STEP)
    train(small, old, ids_BS, 1)
    grown = grow_model(recipe, small)
    new = Optimizer(dict(grown.named_parameters()), VERIFY_STEP, grow_multipliers(recipe, "exact"))
    moments = old.moments()
    sources = {moment: moments[moment].__getitem__ for moment in MOMENTS}
    new.step_count = grow_optimizer(recipe, "exact", sources, new.moments(), old.step_count)
    train(small, old, ids_BS.flip(0, 1), 1)
    train(grown, new, ids_BS.flip(0, 1), 1)
    expected, found = _parameters(grow_model(recipe, small)), _parameters(grown)
    return max(_distance(found[name], expected[name]) for name in expected)


def replica_distances(recipe: Recipe, grown: Mapping[str, Tensor]) -> dict[str, float]:
    """How far the copies of each unit are from computing the same, by parameter: 0 right after copying.

    What reads several copies counts by its sum over them. While the distance stays 0, copies remain copies, and the
    grown model learns nothing that the small one could not.
    """
    to_first = _first_replicas(recipe)
    summed = {name: _with_equal_readers(recipe, name, grown[name]) for name in parameter_names(recipe.target)}
    return {name: _distance(x, grow_whole(to_first, summed.__getitem__, name)) for name, x in summed.items()}


def effective_ranks(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """exp(entropy of the normalised singular values) of every matrix inside the layers.

    Source: Roy & Vetterli, 2007, The effective rank.
    """
    matrices = {n: t for n, t in tensors.items() if t.ndim == 2 and role_of(n).kind == "matrix"}
    return {name: _effective_rank(matrix) for name, matrix in matrices.items()}


def gradients_of(model: Transformer, ids_BS: Tensor) -> dict[str, Tensor]:
    """Gradients of the mean loss on a batch, by parameter name."""
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(_loss(model, ids_BS), list(parameters.values()))
    return dict(zip(parameters, gradients, strict=True))


def train(model: Transformer, optimizer: Optimizer, ids_BS: Tensor, steps: int) -> None:
    """AdamW steps on one batch."""
    for _ in range(steps):
        _loss(model, ids_BS).backward()
        optimizer.step(VERIFY_STEP.lr)
        optimizer.drop_gradients()


def _loss(model: Transformer, ids_BS: Tensor) -> Tensor:
    """Mean cross-entropy of each token's follower; of encoders too, for whom it is a loss like any other."""
    logits_BSV = model.logits(ids_BS[:, :-1])
    return nn.functional.cross_entropy(logits_BSV.flatten(0, 1), ids_BS[:, 1:].flatten())


def _parameters(model: Transformer) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _first_replicas(recipe: Recipe) -> Recipe:
    """From the target to itself: every unit becomes the first copy of the source unit that it is a copy of."""
    axes: dict[str, AxisMap] = {}
    for name, copies in recipe.axes.items():
        assert isinstance(copies, SparseMap), "only copies have replicas"
        places = first_copies(copies.index).nonzero().flatten()
        first_place = torch.zeros(copies.num_source, dtype=torch.long)
        first_place[copies.index[places]] = places
        itself = torch.arange(len(copies.index))
        axes[name] = SparseMap(torch.where(copies.index == NEW, itself, first_place[copies.index]), len(copies.index))
    same_layers = LayerMap(tuple(range(recipe.target.num_layers)))
    return Recipe(recipe.method, recipe.target, recipe.target, same_layers, axes)


def _with_equal_readers(recipe: Recipe, name: str, x: Tensor) -> Tensor:
    """A matrix whose columns that read copies of one unit are all replaced by their mean."""
    role = role_of(name)
    copies = recipe.axes.get(role.in_map)
    if role.kind not in ("matrix", "head") or not isinstance(copies, SparseMap):
        return x
    unit = torch.where(copies.index == NEW, copies.num_source + torch.arange(len(copies.index)), copies.index)
    sums = x.new_zeros(len(x), copies.num_source + len(unit)).index_add_(1, unit, x)
    return (sums / torch.bincount(unit, minlength=sums.shape[1]).clamp(min=1))[:, unit]


def _effective_rank(matrix: Tensor) -> float:
    values = torch.linalg.svdvals(matrix.double())
    shares = values / values.sum()
    return math.exp(float(torch.special.entr(shares).sum())) if values.sum() else 0.0


def _largest(values: Mapping[str, float]) -> float:
    return max(values.values())


def _distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    scale = max(found.abs().max().item(), expected.abs().max().item())
    return (found - expected).abs().max().item() / scale if scale else 0.0
