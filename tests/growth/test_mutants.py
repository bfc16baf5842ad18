"""The checks of growth hold for the code as it is, and each known mistake fails the one that is there for it."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megagrow.config import Config, DataConfig, GrowthConfig, ModelConfig, TrainConfig
from megagrow.errors import ConfigError
from megagrow.growth.grow import grow_whole
from megagrow.growth.methods import make_recipe
from megagrow.growth.moments import grow_multipliers, grow_optimizer
from megagrow.growth.recipe import Recipe
from megagrow.growth.verify import VERIFY_STEP, function_change, grow_model, replica_distances, step_error, train
from megagrow.optim import MOMENTS, Optimizer
from megagrow.parallel.mesh import Mesh
from megagrow.train import growing
from megagrow.train.learner import ModelLearner
from megagrow.train.part import build_part, initialize_part
from tests.growth import models
from tests.growth.models import grown, make, make_ids, tensors_of, widened
from tests.growth.mutants import MUTANTS


def keeps_function(recipe: Recipe) -> bool:
    small = make(recipe.source)
    return function_change(small, grown(recipe, small), make_ids(recipe.source)) <= 1e-12


def query_heads() -> bool:
    return keeps_function(make_recipe("clone", models.LLAMA, widened(models.LLAMA, query=2)))


def padding() -> bool:
    """With whichever eps the method takes."""
    source, accepted = models.LLAMA, []
    for eps in (source.norm_eps, source.norm_eps / 2):
        try:
            accepted.append(make_recipe("zero_pad", source, replace(source, hidden_size=24, norm_eps=eps)))
        except ConfigError:
            continue
    return len(accepted) == 1 and keeps_function(accepted[0])


def tied_head() -> bool:
    return keeps_function(make_recipe("clone", models.TIED, widened(models.TIED, hidden=2)))


def optimizer_step() -> bool:
    recipe = make_recipe("clone", models.LLAMA, widened(models.LLAMA, hidden=2, query=2, kv=2, ffn=2))
    error = step_error(recipe, make(models.LLAMA), make_ids(models.LLAMA))
    return error is not None and error <= 1e-10


def masters() -> bool:
    """A run that computes in bf16 grows the float32 weights that it keeps."""
    small: ModelConfig = models.LLAMA
    config = Config(
        model=widened(small, hidden=2),
        data=DataConfig(seq_length=8),
        train=TrainConfig(global_batch_size=2, precision="bf16"),
        growth=GrowthConfig(method="clone", source=small, at_step=1, optimizer="reset"),
    )
    part = build_part(small, config, Mesh.single())
    initialize_part(part, seed=0)
    learner = growing.new_learner(part, config)
    assert isinstance(learner, ModelLearner)
    recipe, weights = make_recipe("clone", small, config.model), {n: p.clone() for n, p in part.parameters.items()}
    large = growing.grow_copies(learner, config, Mesh.single()).part.parameters
    return all(torch.equal(large[name], grow_whole(recipe, weights.__getitem__, name)) for name in large)


def replicas_part() -> bool:
    """Under policy `asymmetric`, which is there for that."""
    source = models.LLAMA
    recipe, small = make_recipe("clone", source, widened(source, hidden=2, ffn=2)), make(source)
    old = Optimizer(dict(small.named_parameters()), VERIFY_STEP)
    train(small, old, make_ids(source), 3)
    large = grow_model(recipe, small)
    new = Optimizer(dict(large.named_parameters()), VERIFY_STEP, grow_multipliers(recipe, "asymmetric"))
    sources = {moment: old.moments()[moment].__getitem__ for moment in MOMENTS}
    new.step_count = grow_optimizer(recipe, "asymmetric", sources, new.moments(), old.step_count)
    train(large, new, make_ids(source), 3)
    return replica_distances(recipe, tensors_of(large))["layers.0.mlp.gate_up.weight"] > 1e-5


CHECKS: dict[str, Callable[[], bool]] = {
    "query heads": query_heads,
    "padding": padding,
    "tied head": tied_head,
    "optimizer step": optimizer_step,
    "masters": masters,
    "replicas part": replicas_part,
}


@pytest.mark.parametrize("check", CHECKS)
def test_growth_as_it_is_passes(check: str) -> None:
    assert CHECKS[check]()


@pytest.mark.parametrize("mutant", MUTANTS)
def test_every_mutant_fails_its_check(mutant: str) -> None:
    mutate, check = MUTANTS[mutant]
    with mutate():
        assert not CHECKS[check]()
