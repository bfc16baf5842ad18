"""Layers that stand still, and learn again, in compiled blocks: what uncompiled ones give."""

import dataclasses
from functools import cache, partial
from typing import Any, Literal
from unittest import mock

import pytest
import torch
from torch import Tensor

from megagrow import ops
from megagrow.config import Config, ModelConfig
from megagrow.evaluate import make_batch
from megagrow.optim import Optimizer, StepGuard
from megagrow.parallel.mesh import Mesh, make_mesh
from megagrow.parallel.shards import full
from megagrow.train.learner import ModelLearner
from megagrow.train.part import build_part, initialize_part
from tests.ranks import run_ranks
from tests.train.test_freezing import FROZEN, MODEL, TIED, settings, stands_still

STEPS = (FROZEN, FROZEN, 0, 0)  # how many layers stand still


def course(config: Config, backend: str) -> list[dict[str, Tensor]]:
    """The whole parameters of this rank before the first step and after each one, in float64.

    The second step of a kind must find all that it runs compiled, and nothing may be left to run uncompiled.
    """
    torch._dynamo.reset()
    with mock.patch.object(ops, "compiled", cache(partial(torch.compile, backend=backend))):
        return _course(config)


def _course(config: Config) -> list[dict[str, Tensor]]:
    torch.set_default_dtype(torch.float64)
    mesh = make_mesh(config.parallel) if torch.distributed.is_initialized() else Mesh.single()
    part = build_part(config.model, config, mesh)
    initialize_part(part, seed=0)
    learner = ModelLearner(part, Optimizer(part.parameters, config.optim), config)
    tokens = torch.randint(config.model.vocab_size, (8, 17), generator=torch.Generator().manual_seed(1))
    batch = make_batch(tokens.chunk(mesh.dp.size)[mesh.dp.rank], 8, mesh)
    found, seen = [whole(learner)], set[int]()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for frozen in STEPS:
            part.freeze(frozen)
            with torch.compiler.set_stance("fail_on_recompile" if frozen in seen else "default"):
                learner.step(batch, 1e-3, StepGuard())
                part.engine.evaluate(batch)
            seen.add(frozen)
            found.append(whole(learner))
    torch.set_default_dtype(torch.float32)
    return found


def whole(learner: ModelLearner) -> dict[str, Tensor]:
    return {name: full(parameter.detach()).clone() for name, parameter in learner.part.parameters.items()}


def both(ranks: int, config: Config, backend: str) -> list[list[list[dict[str, Tensor]]]]:
    """The courses of all ranks without and with compiled blocks."""
    trains = [dataclasses.replace(config.train, compile=compiles) for compiles in (False, True)]
    configs = [dataclasses.replace(config, train=train) for train in trains]
    return [run_ranks(course, ranks, c, backend) if ranks > 1 else [course(c, backend)] for c in configs]


@dataclasses.dataclass(frozen=True)
class Case:
    """Ranks, model and layout. Where the back end makes no code of its own, graphs and their gradients are the same."""

    ranks: int = 1
    model: ModelConfig = MODEL
    recompute: Literal["none", "selective", "full"] = "none"
    backend: str = "aot_eager"
    parallel: dict[str, Any] = dataclasses.field(default_factory=dict)


CASES = {
    "compiler's code": Case(backend="inductor"),
    "tied, full recompute": Case(model=TIED, recompute="full"),
    "selective recompute": Case(recompute="selective"),
    "data": Case(ranks=2),
    "pipeline": Case(ranks=2, parallel={"pipeline": 2}),
}


# torch's own, while it traces an autograd function whose input is no leaf
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("case", CASES)
def test_compiled_layers_stand_still_and_learn_again(case: str) -> None:
    how = CASES[case]
    config = settings(how.model, how.recompute, **how.parallel)
    for eager, compiled in zip(*both(how.ranks, config, how.backend), strict=True):
        for step, frozen in enumerate(STEPS):
            before, after, expected = compiled[step], compiled[step + 1], eager[step + 1]
            for name in expected:
                stays = frozen > 0 and stands_still(name)
                assert torch.equal(after[name], before[name]) == stays, (step, name)
                torch.testing.assert_close(after[name], expected[name], rtol=1e-9, atol=1e-12, msg=f"{step} {name}")
