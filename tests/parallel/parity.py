"""Trains a layout and one process on the same batches, and says how far apart they are.

What is compared: every rank's piece of the gradient of every parameter in the first step, of every weight after some
AdamW steps, and losses, gradient norms and the evaluation. Errors are relative to the largest entry of the one process'
whole tensor. A gradient's scale is at least a thousandth of the largest of all gradients: that of a key bias under
learned positions is zero but for rounding.

The batches are chosen so that a wrong denominator shows: the number of tokens that count differs between data ranks,
between context ranks and between microbatches, and the gradients are clipped in every step.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagrow.checks import check
from megagrow.config import Config
from megagrow.data.mlm import Masking
from megagrow.evaluate import make_batch, make_masked_batch
from megagrow.model.dropout import token_keys
from megagrow.optim import Optimizer, clip_gradients
from megagrow.parallel.context import cut
from megagrow.parallel.mesh import Axis, Mesh, make_mesh
from megagrow.parallel.pipeline import Batch
from megagrow.parallel.shards import Box, box, local
from megagrow.train.part import build_part, initialize_part
from tests.parallel.layouts import BATCH, SEQ, Layout
from tests.ranks import run_ranks

CLIP = 0.05  # well below the gradient norm of every step
LR = 1e-2
NUM_UPDATES = 20  # of the whole table
GRADIENT_BOUND = {torch.float64: 1e-10, torch.float32: 1e-5}
WEIGHT_BOUND = 1e-9  # after NUM_UPDATES in float64
COUNTS_SEED = 3820  # no two ranks, and no two microbatches of a rank, have equally many tokens that count
SMALLEST_SCALE = 1e-3  # of a parameter's gradient, relative to the largest entry of all gradients


@dataclass(frozen=True)
class Piece:
    """A rank's piece of a tensor, and where in the whole it stands."""

    box: Box
    values: Tensor


@dataclass(frozen=True)
class Trace:
    """What a training gave on one rank.

    Attributes:
        gradients: by name, of the first step, before clipping.
        weights: by name, after all updates.
        losses: [updates] global loss of every step.
        norms: [updates] gradient norm of every step, before clipping.
        evaluated: [2] loss of the batch by the evaluation's path, after half of the updates and after all.
    """

    gradients: dict[str, Piece]
    weights: dict[str, Piece]
    losses: Tensor
    norms: Tensor
    evaluated: Tensor


@dataclass(frozen=True, order=True)
class Error:
    """The largest relative error, and where it is."""

    value: float
    where: str


@dataclass(frozen=True)
class Errors:
    """How far a layout is from one process.

    Attributes:
        gradient: of all parameters' gradients, and of the first step's loss and norm.
        weight: of all weights after the updates, of all losses and norms, and of the evaluation.
    """

    gradient: Error
    weight: Error


def parity(layout: Layout, dtype: torch.dtype, num_updates: int = NUM_UPDATES) -> Errors:
    """Trains the layout in ranks of its own and compares each of them with one process of the same dtype."""
    found = run_ranks(train_rank, layout.ranks, layout.config, dtype, num_updates)
    return compare(found, one_process(layout.one_process, dtype, num_updates))


@cache
def one_process(config: Config, dtype: torch.dtype, num_updates: int) -> Trace:
    """The training that the layouts are compared with: no mesh, the whole batch at once."""
    return train(config, Mesh.single(), dtype, num_updates)


def train_rank(config: Config, dtype: torch.dtype, num_updates: int) -> Trace:
    """One rank of a layout, for `run_ranks`."""
    check(config, dist.get_world_size())
    return train(config, make_mesh(config.parallel), dtype, num_updates)


def train(config: Config, mesh: Mesh, dtype: torch.dtype, num_updates: int) -> Trace:
    """Trains on this rank's share of the same samples in every step."""
    torch.set_default_dtype(dtype)
    try:
        part = build_part(config.model, config, mesh)
        torch.set_default_dtype(torch.float32)  # of initial values: the same in both dtypes
        initialize_part(part, seed=3)
        torch.set_default_dtype(dtype)
        optimizer = Optimizer(part.parameters, config.optim)
        gradients: dict[str, Piece] = {}
        losses, norms, evaluated = [], [], []
        for update in range(num_updates):
            if update == num_updates // 2:
                evaluated.append(part.engine.evaluate(local_batch(config, mesh, dtype, update))[0])
            losses.append(part.engine.train_step(local_batch(config, mesh, dtype, update))[0])
            if update == 0:
                gradients = {name: _gradient(p) for name, p in part.parameters.items()}
            norms.append(clip_gradients(part.parameters, CLIP, mesh))
            optimizer.step(LR)
        evaluated.append(part.engine.evaluate(local_batch(config, mesh, dtype, num_updates))[0])
        weights = {name: _piece(p) for name, p in part.parameters.items()}
        scalars = (torch.tensor(values, dtype=torch.float64) for values in (losses, norms, evaluated))
        return Trace(gradients, weights, *scalars)
    finally:
        torch.set_default_dtype(torch.float32)


def _gradient(parameter: nn.Parameter) -> Piece:
    """NaN where there is none: other ranks' copies of the parameter must not stand in for it."""
    return _piece(torch.full_like(parameter, torch.nan) if parameter.grad is None else parameter.grad)


def _piece(tensor: Tensor) -> Piece:
    return Piece(box(tensor), local(tensor.detach()).clone())


def local_batch(config: Config, mesh: Mesh, dtype: torch.dtype, update: int) -> Batch:
    """This rank's samples, and of each its part of the sequence; dropout's masks differ between updates."""
    mine = torch.arange(BATCH).chunk(mesh.dp.size)[mesh.dp.rank]
    how = config.data.mask_documents, config.data.reset_positions
    documents = make_documents()[mine] if any(how) else None
    if config.model.is_causal:
        batch = make_batch(make_tokens(config.model.vocab_size)[mine], BATCH, mesh, documents, *how)
        counts = share(make_counts(), mesh.dp, mesh.cp)
        weights = batch.weights.to(dtype) * counts.to(dtype) * (BATCH * SEQ / float(make_counts().sum()))
    else:
        tokens, masking = make_masked_tokens(config.model.vocab_size)
        batch = make_masked_batch(tokens[mine], torch.arange(BATCH)[mine], masking, mesh, documents, *how)
        weights = batch.weights.to(dtype)
    keys = token_keys(5, update, torch.arange(BATCH), torch.arange(SEQ)) if config.train.dropout else None
    return replace(batch, weights=weights, dropout_keys=None if keys is None else share(keys, mesh.dp, mesh.cp))


def share(x: Tensor, dp: Axis, cp: Axis) -> Tensor:
    """[BATCH, SEQ] -> the samples of a data rank, the positions of a context rank."""
    return cut(x.chunk(dp.size)[dp.rank], cp).contiguous()


def make_tokens(vocab_size: int) -> Tensor:
    """Random samples [BATCH, SEQ + 1]."""
    return torch.randint(0, vocab_size, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(7))


def make_masked_tokens(vocab_size: int) -> tuple[Tensor, Masking]:
    """Samples for an encoder, and a masking that chooses those of their tokens that count: the others are special."""
    counts = torch.cat([make_counts(), torch.zeros(BATCH, 1)], dim=1)
    tokens = torch.where(counts > 0, 1 + make_tokens(vocab_size) % (vocab_size - 2), 0)
    return tokens, Masking(mask_id=vocab_size - 1, special_ids=(0,), vocab_size=vocab_size, seed=7, rate=1.0)


def make_counts() -> Tensor:
    """[BATCH, SEQ] 1 for the tokens that count, drawn with another density in every sample, else 0; float64."""
    generator = torch.Generator().manual_seed(COUNTS_SEED)
    density = torch.randperm(BATCH, generator=generator).double() / (BATCH - 1)
    return (torch.rand(BATCH, SEQ, generator=generator, dtype=torch.float64) < density[:, None]).double()


def make_documents() -> Tensor:
    """[BATCH, SEQ] the document of every token; they are five tokens long on average."""
    starts = torch.rand(BATCH, SEQ, generator=torch.Generator().manual_seed(9), dtype=torch.float64) < 0.2
    return starts.cumsum(1)


def token_counts(layout: Layout) -> list[list[int]]:
    """How many tokens count, for every rank with tokens of its own, in each of its microbatches."""
    parallel = layout.config.parallel
    num_data, num_context = layout.ranks // parallel.model_ranks, parallel.context
    shares = [
        share(make_counts(), Axis(rank=data, size=num_data), Axis(rank=context, size=num_context))
        for data in range(num_data)
        for context in range(num_context)
    ]
    return [[int(microbatch.sum()) for microbatch in share.chunk(layout.num_microbatches)] for share in shares]


def compare(found: list[Trace], expected: Trace) -> Errors:
    """The worst errors of all ranks.

    Raises:
        AssertionError: some element of a gradient or weight is on no rank, or the gradients were not clipped.
    """
    assert expected.norms.min() > 2 * CLIP, f"gradients of norm {expected.norms.min():.3f} are hardly clipped"
    return Errors(_worst(gradient_errors(found, expected)), _worst(weight_errors(found, expected)))


def gradient_errors(found: list[Trace], expected: Trace) -> dict[str, float]:
    """The largest error on any rank of each parameter's gradient, and of the first step's `loss` and `norm`."""
    _assert_complete([trace.gradients for trace in found], expected.gradients)
    floor = SMALLEST_SCALE * max(float(g.values.abs().max()) for g in expected.gradients.values())
    errors = {
        name: _piece_error([t.gradients for t in found], name, g, floor) for name, g in expected.gradients.items()
    }
    for name, of in (("loss", lambda trace: trace.losses[0]), ("norm", lambda trace: trace.norms[0])):
        errors[name] = max(_error(of(trace), of(expected)) for trace in found)
    return errors


def weight_errors(found: list[Trace], expected: Trace) -> dict[str, float]:
    """The largest error on any rank of each weight, and of `losses`, `norms` and `evaluation`."""
    _assert_complete([trace.weights for trace in found], expected.weights)
    errors = {name: _piece_error([t.weights for t in found], name, w) for name, w in expected.weights.items()}
    errors["losses"] = max(_error(trace.losses, expected.losses) for trace in found)
    errors["norms"] = max(_error(trace.norms, expected.norms) for trace in found)
    errors["evaluation"] = max(_error(trace.evaluated, expected.evaluated) for trace in found)
    return errors


def _worst(errors: dict[str, float]) -> Error:
    return max(Error(value, where) for where, value in errors.items())


def _assert_complete(found: list[dict[str, Piece]], expected: dict[str, Piece]) -> None:
    assert set().union(*found) == set(expected)
    for name, whole in expected.items():
        held = torch.zeros_like(whole.values, dtype=torch.bool)
        for pieces in found:
            if name in pieces:
                held[pieces[name].box] = True
        assert held.all(), f"{int((~held).sum())} elements of {name} are on no rank"


def _piece_error(found: list[dict[str, Piece]], name: str, whole: Piece, floor: float = 0.0) -> float:
    scale = max(float(whole.values.abs().max()), floor)
    pieces = [rank[name] for rank in found if name in rank]
    return max(_error(piece.values, whole.values[piece.box], scale) for piece in pieces)


def _error(found: Tensor, expected: Tensor, scale: float | None = None) -> float:
    """max|found - expected| / scale, by default the largest entry of expected; infinite where found is not finite."""
    if found.numel() == 0:
        return 0.0
    error = float((found.double() - expected.double()).abs().max() / (scale or expected.abs().max()))
    return error if error < float("inf") else float("inf")
