"""From the small model to the large one, inside the running job: which learner a run has at each point, and the changes
between them.

    small   ModelLearner of the source
    ligo    MapLearner: the source, frozen, and the target that is generated from it
    main    ModelLearner of the target

In a run whose model grows several times, each target but the last is the source of the next growth. Until a checkpoint
of the grown model is complete, the newest one on disk is of the model before: whoever resumes from it grows again.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megagrow.checkpoint.source import Source
from megagrow.checks import check_models_from
from megagrow.config import Config, GrowthConfig, ModelConfig, require
from megagrow.errors import ConfigError, MegagrowError
from megagrow.growth.exchange import Exchange
from megagrow.growth.grow import Fetch, grow_into, mesh_fetch
from megagrow.growth.ligo import Ligo
from megagrow.growth.ligo_file import save_maps
from megagrow.growth.ligo_maps import start_recipe
from megagrow.growth.maps import LayerMap
from megagrow.growth.methods import make_recipe
from megagrow.growth.moments import (
    QUANTITIES,
    copies_warning,
    grow_multipliers,
    grow_new_part,
    grow_optimizer,
    lasting_copies,
    restored_new_part,
)
from megagrow.growth.recipe import Recipe
from megagrow.optim import Multipliers, Optimizer
from megagrow.parallel.mesh import Mesh
from megagrow.parallel.shards import fill, release
from megagrow.parallel.stages import own_stages
from megagrow.timeline import growth_configs, growth_name, growth_settings, latest_step, num_growths, policy_of
from megagrow.train.learner import Learner, MapLearner, ModelLearner
from megagrow.train.part import Part, build_part
from megagrow.train.state import RunState


def new_learner(part: Part, config: Config, source: Source | None = None) -> ModelLearner:
    """Trains a model from its first step, or from the optimizer state that its source brings along.

    Raises:
        ConfigError: entries that the source got when it was grown itself still have updates of their own when the model
            grows.
    """
    if source is None or source.optimizer is None or not keeps_moments(source, config):
        return ModelLearner(part, Optimizer(part.parameters, config.optim), config)
    optimizer = _restored_optimizer(part, config, source.optimizer)
    if _grows_moments(config):
        latest = latest_step(config, 0)
        require(
            not optimizer.treats_new_part(latest),
            f"growth comes before step {latest}, but {source.path} grew lately, and the moments or the rate of its new "
            "entries are not yet those of the others, which the next growth would lose; grow later, or use "
            "growth.optimizer=reset",
        )
    for moment, tensors in optimizer.moments().items():
        for name, tensor in tensors.items():
            fill(tensor, source.read(f"optim.{moment}.{name}").to(tensor.device))
    return ModelLearner(part, optimizer, config)


def keeps_moments(source: Source, config: Config) -> bool:
    """Whether a run goes on with its source's moments: those of a model that grew and was not trained since, and those
    that are about to grow with it. A run that starts from the weights of a finished one has its own optimizer.
    """
    if source.optimizer is None:
        return False
    grows_at_once = num_growths(config.growth) > 0 and latest_step(config, 0) == 0
    return _grows_moments(config) or (source.has_just_grown and not grows_at_once)


def moments_note(source: Source, config: Config) -> str:
    """What becomes of a source's moments, in one line; "" where it has none."""
    if source.optimizer is None:
        return ""
    if keeps_moments(source, config):
        return f"{source.path}: its moments of Adam, {source.optimizer['step']} updates old, go on in this run"
    return f"{source.path}: its moments of Adam are left behind, this run has an optimizer of its own"


def _grows_moments(config: Config) -> bool:
    return num_growths(config.growth) > 0 and growth_settings(config.growth, 0).optimizer != "reset"


def learner_for(state: RunState, config: Config, mesh: Mesh) -> Learner:
    """The learner of a saved state, with tensors that wait to be loaded.

    Raises:
        ConfigError: its model, or one that it still grows into, does not fit the mesh, which may be another now.
    """
    check_models_from(state.model, config, "the saved model", state.growths)
    part = build_part(state.model, config, mesh)
    if state.phase == "ligo":
        return map_learner(part, state.growing(config))
    return ModelLearner(part, _restored_optimizer(part, config, state.optimizer), config)


def after_load(learner: Learner, state: RunState) -> None:
    """What a learner still needs when its tensors have been loaded."""
    if isinstance(learner, MapLearner):
        learner.set_step_count(int(state.optimizer["step"]))
        learner.generate()


def is_ready(learner: Learner, state: RunState, config: Config) -> bool:
    """Whether the next growth loses nothing of the one before it, whose new entries may still have their own updates.

    Moments that are to be forgotten have nothing to lose.
    """
    if not isinstance(learner, ModelLearner) or state.phase != "small":
        return True
    return state.growing(config).growth.optimizer == "reset" or not learner.optimizer.treats_new_part()


def begin(learner: Learner, state: RunState, config: Config, mesh: Mesh) -> Learner:
    """Grows at once, or begins to learn the maps; moves the state on."""
    assert isinstance(learner, ModelLearner)
    growing = state.growing(config)
    if growing.growth.learns_maps:
        state.phase, state.ligo_step = "ligo", 0
        for moments in learner.optimizer.moments().values():
            release(moments.values())
        grown = map_learner(learner.part, growing)
        grown.generate()
        return grown
    grown_learner = grow_copies(learner, growing, mesh)
    _complete(state, config)
    return grown_learner


def finish(learner: Learner, state: RunState, config: Config, tell: Callable[[str], None]) -> ModelLearner:
    """Keeps what the maps have generated as the target's weights and drops maps and source; moves the state on.

    Maps and source give their memory back before the moments take it.
    """
    assert isinstance(learner, MapLearner)
    _write_maps(learner, Path(config.run.dir) / maps_file(state.growths, config), tell)
    _complete(state, config)
    for moments in learner.adamw.state.values():
        release(moments.values())
    release([*learner.ligo.parameters().values(), *learner.small.parameters.values()])
    return ModelLearner(learner.part, Optimizer(learner.part.parameters, config.optim), config)


def _write_maps(learner: MapLearner, path: Path, tell: Callable[[str], None]) -> None:
    """A collective. The run does not need the file: it goes on without."""
    maps = learner.ligo.gathered(learner.part.mesh)
    if learner.part.mesh.is_main:
        try:
            save_maps(learner.ligo, path, maps)
        except (OSError, MegagrowError) as error:
            tell(f"warning: the learned maps are not kept, {path} cannot be written: {error}")


def maps_file(number: int, config: Config) -> str:
    """Where in the run directory a growth leaves its learned maps; grow_checkpoint.py --maps applies them elsewhere."""
    is_last = number == num_growths(config.growth) - 1
    return "maps.safetensors" if is_last else f"maps-{number}.safetensors"


def check_recipes(state: RunState, config: Config) -> None:
    """Makes sure, before anything is trained, that the growths which are still to come can be done.

    Raises:
        ConfigError: a method or a policy does not serve the models.
    """
    source = state.model
    coming = growth_configs(config, source, state.growths) if state.phase != "main" else []
    for number, growing in enumerate(coming, state.growths):
        try:
            _check_recipe(_recipe(source, growing), growing.growth)
        except ConfigError as error:
            where = f"{growth_name(config.growth, number)}: " if config.growth.earlier else ""
            raise ConfigError(f"{where}{error}") from None
        source = growing.model


def warning(learner: ModelLearner, state: RunState, config: Config) -> str:
    """About the first growth to come that makes copies which nothing ever tells apart; "" where none does."""
    source, has_moments, dropout = state.model, learner.optimizer.step_count > 0, config.train.dropout
    coming = growth_configs(config, source, state.growths) if state.phase == "small" else []
    for number, growing in enumerate(coming, state.growths):
        recipe, growth = _recipe(source, growing), growing.growth
        has_moments = has_moments or latest_step(config, number) > 0
        axes = lasting_copies(recipe, policy_of(growth), has_moments, growth.rewarmup_part == "new", dropout)
        if axes and not growth.learns_maps:
            return copies_warning(recipe, axes)
        source = growing.model
    return ""


def check_freezing(learner: ModelLearner, state: RunState, config: Config) -> None:
    """Raises ConfigError where layers would stand still that have no moments when the model grows.

    The count of updates goes on without them, so that Adam's correction of moments that began at zero would be missing
    when they learn again. Under the policy `reset` the optimizer begins anew then (`timing.restarts`).
    """
    has_moments = learner.optimizer.step_count > 0
    for number, growing in enumerate(growth_configs(config, state.model) if state.phase == "small" else []):
        growth, has_moments = growing.growth, has_moments or latest_step(config, number) > 0
        require(
            has_moments or growth.freeze_steps == 0 or policy_of(growth) == "reset",
            f"growth.freeze_steps={growth.freeze_steps}: the model has no moments when it grows, which "
            f"growth.optimizer={policy_of(growth)} would keep; set --growth.optimizer reset",
        )


def _check_recipe(recipe: Recipe, growth: GrowthConfig) -> None:
    if not growth.learns_maps:
        grow_multipliers(recipe, policy_of(growth))
    if growth.freeze_steps:
        require(not growth.learns_maps, "growth.freeze_steps: learned maps mix all layers, so that none is an old one")
        _check_freezable(recipe)


def _check_freezable(recipe: Recipe) -> None:
    count = recipe.source.num_layers
    keeps = isinstance(recipe.layers, LayerMap) and tuple(recipe.layers.index[:count]) == tuple(range(count))
    require(
        keeps and not recipe.axes and recipe.target.num_layers > count,
        f"growth.freeze_steps: {recipe.method} does not leave the source's {count} layers as the first ones of the "
        f"{recipe.target.num_layers}, with new ones above; use a method of depth that does (stack) at the same width",
    )


def grow_copies(small: ModelLearner, config: Config, mesh: Mesh) -> ModelLearner:
    """The grown model with its optimizer; a collective. The small one's weights are gone afterwards.

    They are given back before the large moments take memory, so that a rank never holds more than both models' moments
    and the large weights.
    """
    recipe, policy = _recipe(small.part.config, config), policy_of(config.growth)
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
    start = _recipe(small.config, config)
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


def _recipe(source: ModelConfig, config: Config) -> Recipe:
    growth = config.growth
    if growth.learns_maps:
        return start_recipe(growth.maps_start, source, config.model, config.train.seed)
    breaker = growth.breaker, growth.breaker_scale
    return make_recipe(growth.method, source, config.model, *breaker, seed=config.train.seed)


def _fetch(tensors: Mapping[str, Tensor], recipe: Recipe, mesh: Mesh) -> Fetch:
    return mesh_fetch(tensors, recipe.source, mesh)


def _restored_optimizer(part: Part, config: Config, saved: dict[str, Any]) -> Optimizer:
    multipliers = {name: Multipliers(**factors) for name, factors in saved["multipliers"].items()}
    optimizer = Optimizer(part.parameters, config.optim, multipliers, int(saved["step"]))
    if "new_part" in saved:
        optimizer.new_part = restored_new_part(saved["new_part"], part.config, part.parameters)
    return optimizer


def _complete(state: RunState, config: Config) -> None:
    target = state.growing(config).model
    state.layers_before, state.model, state.grown_at = state.model.num_layers, target, state.train_step
    state.growths += 1
    state.phase = "main" if state.growths == num_growths(config.growth) else "small"
    state.losses = []
