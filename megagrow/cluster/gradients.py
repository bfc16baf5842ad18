"""Do the ranks together compute what one process computes? A step of a reduced model, every gradient compared.

Initial weights depend on (seed, parameter name) only, so that every rank computes the whole step by itself as well and
compares the pieces that it stores: nothing but a few numbers has to travel for it.
"""

# Shape suffix legend: B = samples, S = tokens of a sample.

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megagrow.checkpoint.agreement import Ranks
from megagrow.cluster.reduced import reduce
from megagrow.cluster.report import Row, place
from megagrow.cluster.watch import Watch
from megagrow.config import Config, ParallelConfig
from megagrow.errors import InexactError
from megagrow.optim import clip_gradients
from megagrow.parallel.context import cut
from megagrow.parallel.mesh import Mesh
from megagrow.parallel.pipeline import Batch
from megagrow.parallel.shards import box, local
from megagrow.train.part import Part, build_part, initialize_part

BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-10}
FLOOR = 1e-3  # of the largest gradient: key biases have a true gradient of zero
CLIP_NORM = 1e-3  # small enough that clipping is at work
MOST_SAMPLES_AT_ONCE = 128
GRADIENT_SECONDS = 60.0
HARDWARE = "a memory or arithmetic error, or another library: test the devices of these ranks, or leave them out"
LAYOUT = "do not train: find the axis by setting its size to 1, and report it"


@dataclass(frozen=True)
class Outcome:
    """What one rank found.

    Attributes:
        loss, norm: of the sharded step.
        one_loss, one_norm: of the step that this rank computed alone.
        deviation: the largest of its gradients, relative.
        parameter: the one that it belongs to.
    """

    loss: float
    norm: float
    one_loss: float
    one_norm: float
    deviation: float
    parameter: str


def check_gradients(config: Config, mesh: Mesh, watch: Watch) -> list[Row]:
    """One training step in the run's layout, at reduced width, in float64 and float32; rows by precision."""
    small, rows = reduce(config, mesh.world.size), list[Row]()
    for dtype in (torch.float64, torch.float32):
        name = str(dtype).removeprefix("torch.")
        with watch.step(f"a training step in {name}", GRADIENT_SECONDS), _default_dtype(dtype):
            own = outcome(small, mesh)
        rows += compare(name, Ranks(None).gather(own), BOUNDS[dtype], watch.hosts)
    return rows


def outcome(small: Config, mesh: Mesh) -> Outcome:
    """Runs the reduced configuration on the mesh and alone."""
    alone = replace(small, parallel=ParallelConfig(), train=replace(small.train, microbatch_size=_share(small)))
    found, loss = step(small, replace(mesh, parallel=small.parallel))
    expected, one_loss = step(alone, Mesh.single(mesh.device))
    deviation, parameter = worst(found.parameters, expected.parameters)
    norms = [clip_gradients(part.parameters, CLIP_NORM, part.mesh) for part in (found, expected)]
    return Outcome(loss, norms[0], one_loss, norms[1], deviation, parameter)


def step(config: Config, mesh: Mesh) -> tuple[Part, float]:
    """A part with the gradients of one batch, and the loss."""
    part = build_part(config.model, config, mesh)
    initialize_part(part, config.train.seed)
    return part, float(part.engine.train_step(uneven_batch(config, mesh))[0])


def uneven_batch(config: Config, mesh: Mesh) -> Batch:
    """This rank's share of one and the same batch; the tokens that count differ in number from sample to sample."""
    size, length = config.train.global_batch_size, config.data.seq_length
    generator = torch.Generator().manual_seed(config.train.seed)
    tokens = torch.randint(0, config.model.vocab_size, (size, length + 1), generator=generator)
    lengths_B = (torch.arange(size) * 7 + 3) % (length + 1)  # 0 is among them, and the whole length
    counts_BS = (torch.arange(length) < lengths_B[:, None]).to(torch.get_default_dtype())

    def share(x_BS: Tensor) -> Tensor:
        return cut(x_BS.chunk(mesh.dp.size)[mesh.dp.rank], mesh.cp).contiguous().to(mesh.device)

    return Batch(share(tokens[:, :-1]), share(tokens[:, 1:]), share(counts_BS / counts_BS.sum()))


def worst(found: dict[str, nn.Parameter], expected: dict[str, nn.Parameter]) -> tuple[float, str]:
    """The largest relative deviation of this rank's pieces of the gradients, and the parameter that it is in.

    Relative to the largest entry of the parameter's whole gradient, or `FLOOR` times that of all gradients.
    """
    sizes = {name: float(_gradient(parameter).abs().max()) for name, parameter in expected.items()}
    floor, deviations = FLOOR * max(sizes.values()), dict[str, float]()
    for name, parameter in found.items():
        if parameter.grad is None:
            return math.inf, name
        piece = local(parameter.grad)
        if piece.numel():
            difference = (piece - _gradient(expected[name])[box(parameter)]).abs().max()
            deviations[name] = _finite(float(difference) / max(sizes[name], floor))
    name = max(deviations, key=lambda name: deviations[name], default="")
    return deviations.get(name, 0.0), name


def compare(name: str, outcomes: Sequence[Outcome], bound: float, hosts: Sequence[str]) -> list[Row]:
    """The rows of one precision.

    Args:
        name: of the precision.
        outcomes: by rank.
        bound: of all relative deviations.
        hosts: the host of every rank.
    """
    one_loss, one_norm = (statistics.median_low(values) for values in _columns(outcomes))
    alone = [max(_relative(o.one_loss, one_loss), _relative(o.one_norm, one_norm)) for o in outcomes]
    losses = [_relative(o.loss, one_loss) for o in outcomes]
    norms = [_relative(o.norm, one_norm) for o in outcomes]
    gradients = [o.deviation for o in outcomes]
    parameter = outcomes[gradients.index(max(gradients))].parameter
    return [
        _row(f"each rank alone, {name}", alone, bound, hosts, HARDWARE),
        _row(f"loss, {name}", losses, bound, hosts, LAYOUT),
        _row(f"gradients, {name}", gradients, bound, hosts, LAYOUT, f" in {parameter}"),
        _row(f"gradient norm, {name}", norms, bound, hosts, LAYOUT),
    ]


def _row(what: str, deviations: Sequence[float], bound: float, hosts: Sequence[str], remedy: str, of: str = "") -> Row:
    largest = max(deviations)
    beyond = [rank for rank, deviation in enumerate(deviations) if deviation > bound]
    where = f"largest on {place([deviations.index(largest)], hosts)}"
    return Row(
        check="gradients",
        what=what,
        found=f"deviates by {largest:.1e}{of}",
        where=where + (f"; beyond the bound on {place(beyond, hosts)}" if beyond else ""),
        bound=f"<= {bound:g} relative to one process",
        holds=not beyond,
        remedy=remedy,
        error=InexactError,
        figures={"deviation": largest, "bound": bound, "ranks_beyond": len(beyond)},
    )


def _columns(outcomes: Sequence[Outcome]) -> Iterator[list[float]]:
    yield [_finite(o.one_loss) for o in outcomes]
    yield [_finite(o.one_norm) for o in outcomes]


def _relative(value: float, expected: float) -> float:
    return _finite(abs(value - expected) / abs(expected)) if math.isfinite(expected) else math.inf


def _finite(value: float) -> float:
    """NaN compares as false with everything: here it is as wrong as can be."""
    return math.inf if math.isnan(value) else value


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "one process has all gradients"
    return parameter.grad


def _share(small: Config) -> int:
    size = small.train.global_batch_size
    return max(n for n in range(1, MOST_SAMPLES_AT_ONCE + 1) if size % n == 0)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
