"""From the small model to the large one, inside the running job: which learner a run has at each point, and the changes
between them.

    small   ModelLearner of the source
    ligo    MapLearner: the source, frozen, and the target that is generated from it
    main    ModelLearner of the target
"""

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megagrow.checkpoint.source import Source
from megagrow.config import Config
from megagrow.growth.exchange import Exchange
from megagrow.growth.grow import Fetch, grow_into, mesh_fetch
from megagrow.growth.ligo import Ligo
from megagrow.growth.ligo_file import save_maps
from megagrow.growth.ligo_maps import start_recipe
from megagrow.growth.methods import make_recipe
from megagrow.growth.moments import QUANTITIES, grow_multipliers, grow_new_part, grow_optimizer, restored_new_part
from megagrow.growth.recipe import Recipe
from megagrow.optim import Multipliers, Optimizer
from megagrow.parallel.mesh import Mesh
from megagrow.parallel.shards import fill, release
from megagrow.parallel.stages import own_stages
from megagrow.train.learner import Learner, MapLearner, ModelLearner
from megagrow.train.part import Part, build_part
from megagrow.train.state import RunState

MAPS_FILE = "maps.safetensors"  # in the run directory; grow_checkpoint.py --maps applies it elsewhere


def new_learner(part: Part, config: Config, source: Source | None = None) -> ModelLearner:
    """Trains a model from its first step, or from the optimizer state that its source brings along.

    A source's moments are kept only where they are about to grow with it; a run that starts from the weights of a
    finished one has its own optimizer.
    """
    keeps_moments = config.growth.method != "none" and config.growth.optimizer != "reset"
    if source is None or source.optimizer is None or not keeps_moments:
        return ModelLearner(part, Optimizer(part.parameters, config.optim), config)
    optimizer = _restored_optimizer(part, config, source.optimizer)
    for moment, tensors in optimizer.moments().items():
        for name, tensor in tensors.items():
            fill(tensor, source.read(f"optim.{moment}.{name}").to(tensor.device))
    return ModelLearner(part, optimizer, config)


def learner_for(state: RunState, config: Config, mesh: Mesh) -> Learner:
    """The learner of a saved state, with tensors that wait to be loaded."""
    part = build_part(state.model, config, mesh)
    if state.phase == "ligo":
        return map_learner(part, config)
    return ModelLearner(part, _restored_optimizer(part, config, state.optimizer), config)


def after_load(learner: Learner, state: RunState) -> None:
    """What a learner still needs when its tensors have been loaded."""
    if isinstance(learner, MapLearner):
        learner.set_step_count(int(state.optimizer["step"]))
        learner.generate()


def begin(learner: Learner, state: RunState, config: Config, mesh: Mesh) -> Learner:
    """Grows at once, or begins to learn the maps; moves the state on."""
    assert isinstance(learner, ModelLearner)
    if config.growth.method == "ligo":
        state.phase = "ligo"
        grown = map_learner(learner.part, config)
        grown.generate()
        return grown
    grown_learner = grow_copies(learner, config, mesh)
    _complete(state, config)
    return grown_learner


def finish(learner: Learner, state: RunState, config: Config) -> ModelLearner:
    """Keeps what the maps generate as the target's weights and drops maps and source; moves the state on."""
    assert isinstance(learner, MapLearner)
    learner.generate()
    maps = learner.ligo.gathered(learner.part.mesh)
    if learner.part.mesh.is_main:
        save_maps(learner.ligo, Path(config.run.dir) / MAPS_FILE, maps)
    _complete(state, config)
    part = learner.part
    del learner
    gc.collect()
    return ModelLearner(part, Optimizer(part.parameters, config.optim), config)


def grow_copies(small: ModelLearner, config: Config, mesh: Mesh) -> ModelLearner:
    """The grown model with its optimizer; a collective. The small one's weights are gone afterwards.

    They are given back before the large moments take memory, so that a rank never holds more than both models' moments
    and the large weights.
    """
    recipe, policy = _recipe(small.part, config), config.growth.optimizer
    part, old = build_part(config.model, config, mesh), small.optimizer
    multipliers = grow_multipliers(recipe, policy, old.multipliers)
    exchange = Exchange(recipe, small.part.parameters, part.parameters, mesh)
    grow_into(recipe, exchange.fetch(small.part.parameters), part.parameters)
    release(small.part.parameters.values())
    optimizer = Optimizer(part.parameters, config.optim, multipliers)
    sources = {moment: exchange.fetch(tensors, QUANTITIES[moment]) for moment, tensors in old.moments().items()}
    step = grow_optimizer(recipe, policy, sources, optimizer.moments(), old.step_count)
    optimizer.step_count = step
    optimizer.new_part = grow_new_part(recipe, policy, config.growth, step, part.parameters)
    return ModelLearner(part, optimizer, config)


def map_learner(small: Part, config: Config) -> MapLearner:
    """Prepares learning the maps from a frozen small model; `generate` must be called before the first step."""
    growth, mesh = config.growth, small.mesh
    start = start_recipe(growth.ligo_init, small.config, config.model, config.train.seed)
    for stage in small.stages:
        stage.requires_grad_(False)
    own_layers = [layer for stage in own_stages(config.model.num_layers, mesh) for layer in stage.layers]
    ligo = Ligo(
        start,
        noise=growth.ligo_noise,
        device=mesh.device,
        variant=growth.ligo_variant,
        layers=own_layers,
    )
    part = build_part(config.model, config, mesh)
    return MapLearner(small, part, ligo, _fetch(small.parameters, start, mesh), config)


def _recipe(small: Part, config: Config) -> Recipe:
    growth = config.growth
    breaker = growth.breaker, growth.breaker_scale
    return make_recipe(growth.method, small.config, config.model, *breaker, seed=config.train.seed)


def _fetch(tensors: Mapping[str, Tensor], recipe: Recipe, mesh: Mesh) -> Fetch:
    return mesh_fetch(tensors, recipe.source, mesh)


def _restored_optimizer(part: Part, config: Config, saved: dict[str, Any]) -> Optimizer:
    multipliers = {name: Multipliers(**factors) for name, factors in saved["multipliers"].items()}
    optimizer = Optimizer(part.parameters, config.optim, multipliers, int(saved["step"]))
    if "new_part" in saved:
        optimizer.new_part = restored_new_part(saved["new_part"], part.config, part.parameters)
    return optimizer


def _complete(state: RunState, config: Config) -> None:
    state.phase, state.model, state.grown_at = "main", config.model, state.train_step
