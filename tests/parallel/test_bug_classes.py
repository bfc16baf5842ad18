"""The classes of bugs that parallel trainers have had, put back one by one: the comparison with one process sees each.

Most of them leave the loss as it was. A bug is a patch of the library inside the ranks; a test names the gradients that
must then be wrong by far more than rounding, and those that must still be right. Without the patch all are right.
"""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from megagrow.config import Config, ModelConfig
from megagrow.model import Transformer, transformer
from megagrow.parallel import collectives, context, gradients, layers, pipeline, shards
from megagrow.parallel.mesh import Axis, Mesh, make_mesh
from megagrow.roles import role_of
from megagrow.train.part import build_part, initialize_part
from tests.parallel import parity
from tests.parallel.layouts import BERT, GPT2, LLAMA, QWEN, SCHEDULES, SP, TIED, Layout, make_layout
from tests.parallel.parity import GRADIENT_BOUND, gradient_errors, local_batch, one_process, train_rank
from tests.ranks import run_ranks

RIGHT = GRADIENT_BOUND[torch.float64]
WRONG = 1000 * RIGHT
HEAD_NORMS = {"attention.query_norm.weight", "attention.key_norm.weight"}

Bug = Callable[[], AbstractContextManager[Any]]


def no_partial_sums() -> AbstractContextManager[Any]:
    return mock.patch.object(pipeline, "sum_partial_gradients", lambda *_: None)


def no_sums_of_shared_kv_heads() -> AbstractContextManager[Any]:
    original = gradients.has_partial_gradient
    return mock.patch.object(
        gradients, "has_partial_gradient", lambda name, *rest: role_of(name).out != "kv_heads" and original(name, *rest)
    )


def no_sums_of_head_norms() -> AbstractContextManager[Any]:
    original = gradients.has_partial_gradient
    return mock.patch.object(
        gradients, "has_partial_gradient", lambda name, *rest: role_of(name).out != "head_dim" and original(name, *rest)
    )


def divided_by_microbatches() -> AbstractContextManager[Any]:
    """torch's default."""
    original = pipeline.get_schedule_class

    def scaling(name: str) -> Callable[..., Any]:
        return lambda stages, count, **options: original(name)(stages, count, **{**options, "scale_grads": True})

    return mock.patch.object(pipeline, "get_schedule_class", scaling)


def multiplied_by_tokens() -> AbstractContextManager[Any]:
    """The loss that is reported is divided by the number of tokens, the one that is differentiated is not."""
    return mock.patch.object(pipeline, "_loss_of", lambda output, _: output.sum() * int(parity.make_counts().sum()))


def padded_vocabulary() -> AbstractContextManager[Any]:
    """Every tensor rank has equally many rows, the last ones zero; they take part in the softmax."""
    original: Any = Transformer.head_VH.fget

    def padded(model: Transformer) -> Tensor:
        rows_VH = original(model)
        return F.pad(rows_VH, (0, 0, 0, -(-model.config.vocab_size // model.tp.axis.size) - len(rows_VH)))

    return mock.patch.object(Transformer, "head_VH", property(padded))


def untied_ends() -> AbstractContextManager[Any]:
    return mock.patch.object(pipeline, "sum_tied_gradients", lambda *_: None)


def untied_copies_of_one_rank() -> AbstractContextManager[Any]:
    original = pipeline.Engine._complete_gradients

    def forget(engine: pipeline.Engine) -> None:
        if engine.ties_here:
            shards.local(engine._tied_copies()[1].grad).zero_()
        original(engine)

    return mock.patch.object(pipeline.Engine, "_complete_gradients", forget)


def copies_counted() -> AbstractContextManager[Any]:
    return mock.patch("megagrow.optim.counted_here", lambda _: True)


def tied_copy_counted() -> AbstractContextManager[Any]:
    return mock.patch("megagrow.optim.TIED_EMBEDDING", "")


def loss_per_rank() -> AbstractContextManager[Any]:
    """Each rank divides by its own tokens, and the ranks' means are averaged."""
    original = parity.local_batch

    def per_rank(config: Config, mesh: Mesh, *rest: Any) -> pipeline.Batch:
        batch = original(config, mesh, *rest)
        return replace(batch, weights=batch.weights / batch.weights.sum() / mesh.tokens.size)

    return mock.patch.object(parity, "local_batch", per_rank)


def remote_queries_dropped() -> AbstractContextManager[Any]:
    """Keys and values get their gradients from the queries of their own rank alone."""

    def own_piece(x: Tensor, dim: int, axis: Axis) -> Tensor:
        whole = collectives.gather_from(x.detach(), dim, axis)
        pieces = list(whole.chunk(axis.size, dim))
        pieces[axis.rank] = x
        return torch.cat(pieces, dim)

    return mock.patch.object(context, "gather_from", own_piece)


def positions_from_zero() -> AbstractContextManager[Any]:
    """Every context rank rotates as if it held the start of the sequence."""
    original = transformer.rotary_table

    def from_zero(model: ModelConfig, seq_length: int, rank: int, size: int, *rest: Any) -> tuple[Tensor, Tensor]:
        return original(model, seq_length // size, 0, 1, *rest)

    return mock.patch.object(transformer, "rotary_table", from_zero)


def averaged_over_ranks() -> AbstractContextManager[Any]:
    """FSDP2's default."""
    return mock.patch.object(FSDPModule, "set_gradient_divide_factor", lambda *_: None)


def loss_through_all_reduce() -> AbstractContextManager[Any]:
    """The loss goes through a differentiable sum over the tensor axis, whose backward sums equal gradients."""
    original = transformer.vocab_parallel_loss

    def summed(
        hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor, size: int, tp: Axis, **options: Any
    ) -> Any:
        loss, sums = original(hidden, head, labels, weights, size, tp, **options)
        return loss.detach() + (loss - loss.detach()) * tp.size, sums

    return mock.patch.object(transformer, "vocab_parallel_loss", summed)


def no_sums_into_sharded_regions() -> AbstractContextManager[Any]:
    """The column-parallel layers' input gets its gradient from this rank's heads and neurons alone."""

    return mock.patch.object(layers, "start_sum_over", lambda x, _: mock.Mock(wait=lambda: x))


def rank_without_a_gradient() -> AbstractContextManager[Any]:
    """One of the ranks that hold a copy of the last norm's gain has no gradient of it."""
    original = pipeline.Engine._complete_gradients

    def drop(engine: pipeline.Engine) -> None:
        original(engine)
        if engine.mesh.tp.rank == 1:
            engine.parameters["final_norm.weight"].grad = None

    return mock.patch.object(pipeline.Engine, "_complete_gradients", drop)


def every_microbatch_reduced() -> AbstractContextManager[Any]:
    original = FSDPModule.set_requires_gradient_sync
    return mock.patch.object(
        FSDPModule, "set_requires_gradient_sync", lambda module, _, **options: original(module, True, **options)
    )


def rank_with_bug(bug: Bug, config: Config) -> parity.Trace:
    with bug():
        return train_rank(config, torch.float64, 1)


@cache
def errors_of(bug: Bug, layout: Layout) -> dict[str, float]:
    """By parameter, how far its gradient is from that of one process; also `loss` and `norm`."""
    found = run_ranks(rank_with_bug, layout.ranks, bug, layout.config)
    return gradient_errors(found, one_process(layout.one_process, torch.float64, 1))


def matching(names: set[str], wanted: set[str]) -> set[str]:
    """Names that are wanted, or wanted without the number of their layer."""
    return {name for name in names if name in wanted or re.sub(r"^layers\.\d+\.", "", name) in wanted}


SEQUENCE, TENSOR, PIPELINE = make_layout(2, **SP), make_layout(2, tensor=2), make_layout(2, pipeline=2)
CONTEXT, DATA, HYBRID = make_layout(2, context=2), make_layout(2), make_layout(4, replicate=2)
V_PIPELINE = make_layout(2, pipeline=2, schedule="ZBVZeroBubble")
ONE_KV_HEAD = replace(LLAMA, num_kv_heads=1)
TIED_V = make_layout(2, pipeline=2, schedule="ZBVZeroBubble", model=TIED)
ODD = make_layout(2, tensor=2, model=replace(LLAMA, vocab_size=101))
EMPTY = make_layout(4, tensor=4, model=replace(LLAMA, vocab_size=9, num_kv_heads=4))

NORMS = {"attention_norm.weight", "mlp_norm.weight", "final_norm.weight"}
ADDED_OUTSIDE = {"attention.output.bias", "mlp.down.bias", "embedding.positions"}
NORM_BIASES = {"attention_norm.bias", "mlp_norm.bias", "final_norm.bias"}
ENCODERS_OUTSIDE = {"embedding.token_types", "embedding_norm.weight", "embedding_norm.bias"}
ENCODERS_OUTSIDE |= {f"mlm_head.{module}.{leaf}" for module in ("dense", "norm") for leaf in ("weight", "bias")}
LAST_MLP = {"layers.3.mlp.down.weight", "layers.3.mlp.gate_up.weight"}
AFTER_LAST_MLP = {"final_norm.weight", "head.weight", "loss"}
AFTER_LAST_KEYS = {*AFTER_LAST_MLP, *LAST_MLP, "layers.3.mlp_norm.weight", "layers.3.attention.output.weight"}

# What a bug makes wrong; `norm` is the one that clips. All else must stay right.
SOME_WRONG = [
    (no_partial_sums, SEQUENCE, {*NORMS, "norm"}),
    (no_partial_sums, make_layout(2, **SP, model=GPT2), {*NORMS, *NORM_BIASES, *ADDED_OUTSIDE, "norm"}),
    (
        no_partial_sums,
        make_layout(2, **SP, model=BERT),
        {*NORMS, *NORM_BIASES, *ADDED_OUTSIDE, *ENCODERS_OUTSIDE, "norm"},
    ),
    (no_sums_of_head_norms, make_layout(2, tensor=2, model=QWEN), {*HEAD_NORMS, "norm"}),
    (no_sums_of_shared_kv_heads, make_layout(2, tensor=2, model=ONE_KV_HEAD), {"attention.key_value.weight", "norm"}),
    (no_sums_of_shared_kv_heads, make_layout(2, **SP, model=ONE_KV_HEAD), {"attention.key_value.weight", "norm"}),
    (untied_ends, make_layout(2, pipeline=2, model=TIED), {"embedding.tokens", "norm"}),
    (untied_ends, make_layout(4, **SP, pipeline=2, model=TIED), {"embedding.tokens", "norm"}),
    (untied_copies_of_one_rank, TIED_V, {"embedding.tokens", "norm"}),
    (tied_copy_counted, make_layout(2, pipeline=2, model=TIED), {"norm"}),
    (copies_counted, TENSOR, {"norm"}),
    (rank_without_a_gradient, TENSOR, {"final_norm.weight"}),
    (copies_counted, make_layout(2, tensor=2, model=ONE_KV_HEAD), {"norm"}),
    (copies_counted, make_layout(2, replicate=2), {"norm"}),
]

# What a bug leaves right. All else must become wrong.
SOME_RIGHT = [
    (divided_by_microbatches, PIPELINE, {"loss"}),
    (divided_by_microbatches, V_PIPELINE, {"loss"}),
    (multiplied_by_tokens, PIPELINE, {"loss"}),
    (averaged_over_ranks, DATA, {"loss"}),
    (averaged_over_ranks, CONTEXT, {"loss"}),
    (averaged_over_ranks, HYBRID, {"loss"}),
    (loss_per_rank, DATA, set()),
    (loss_per_rank, CONTEXT, set()),
    (loss_through_all_reduce, TENSOR, {"loss"}),
    (padded_vocabulary, ODD, set()),
    (padded_vocabulary, EMPTY, set()),
    (remote_queries_dropped, CONTEXT, {*AFTER_LAST_KEYS, "layers.3.attention.query.weight"}),
    (positions_from_zero, CONTEXT, set()),
    (no_sums_into_sharded_regions, TENSOR, {*AFTER_LAST_MLP, *LAST_MLP}),
]


def check_bug(bug: Bug, layout: Layout, wrong: set[str]) -> None:
    errors = errors_of(bug, layout)
    assert {name for name, error in errors.items() if not error <= RIGHT} == wrong
    assert min(errors[name] for name in wrong) > WRONG


def layout_id(value: object) -> str | None:
    return value.name if isinstance(value, Layout) else None


@pytest.mark.parametrize(("bug", "layout", "wrong"), SOME_WRONG, ids=layout_id)
def test_a_bug_makes_its_own_gradients_wrong(bug: Bug, layout: Layout, wrong: set[str]) -> None:
    check_bug(bug, layout, matching(set(errors_of(bug, layout)), wrong))


@pytest.mark.parametrize(("bug", "layout", "right"), SOME_RIGHT, ids=layout_id)
def test_a_bug_makes_nearly_all_gradients_wrong(bug: Bug, layout: Layout, right: set[str]) -> None:
    names = set(errors_of(bug, layout))
    check_bug(bug, layout, names - matching(names, right))


@pytest.mark.parametrize("layout", dict.fromkeys(layout for _, layout, _ in SOME_WRONG + SOME_RIGHT), ids=layout_id)
def test_without_a_bug_all_gradients_are_right(layout: Layout) -> None:
    errors = errors_of(nullcontext, layout)
    assert max(errors.values()) <= RIGHT, errors


class Reductions(TorchDispatchMode):
    """Counts what FSDP2 reduces over the shard axis, and over the axis of copies."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))

    def count(self, part: str) -> int:
        """Collectives whose name contains `part`."""
        return sum(part in name for name in self.names)


def reductions(bug: Bug, config: Config) -> tuple[int, int, int]:
    """FSDP2 units of this rank; reduce-scatters of one step; all-reduces of one step but for the one of the loss."""
    mesh = make_mesh(config.parallel)
    part = build_part(config.model, config, mesh)
    initialize_part(part, seed=3)
    units = sum(_has_own_parameters(module) for stage in part.stages for module in stage.modules())
    with bug(), Reductions() as counted:
        part.engine.train_step(local_batch(config, mesh, torch.float32, 0))
    return units, counted.count("reduce_scatter"), counted.count("allreduce") - 1


def _has_own_parameters(module: nn.Module) -> bool:
    """Whether FSDP2 reduces something for it; a stage in the middle of a pipeline has all of it in its layers."""
    units = [unit for unit in module.modules() if isinstance(unit, FSDPModule) and unit is not module]
    inner = {parameter for unit in units for parameter in unit.parameters()}
    return isinstance(module, FSDPModule) and any(p not in inner for p in module.parameters())


@pytest.mark.parametrize(
    "layout",
    [
        make_layout(2),
        make_layout(2, microbatches=8),
        make_layout(2, context=2, microbatches=4),
        make_layout(4, replicate=2, microbatches=4),
        *(make_layout(4, pipeline=2, schedule=name, microbatches=8) for name in ("1F1B", *SCHEDULES)),
    ],
    ids=lambda layout: f"{layout.name} of {layout.num_microbatches}",
)
def test_each_unit_is_reduced_once_a_step(layout: Layout) -> None:
    for units, scattered, summed in run_ranks(reductions, layout.ranks, nullcontext, layout.config):
        assert scattered == units > 0
        assert summed == (units if layout.config.parallel.replicate > 1 else 0)


@pytest.mark.parametrize("layout", [make_layout(2, microbatches=8), make_layout(4, pipeline=2, microbatches=8)])
def test_a_reduction_for_every_microbatch_is_counted(layout: Layout) -> None:
    for units, scattered, _ in run_ranks(reductions, layout.ranks, every_microbatch_reduced, layout.config):
        assert scattered == 8 * units
