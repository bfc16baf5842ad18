"""The phases that a run goes through, each with its steps, FLOPs and fullest moment.

small    training a model that the run grows later
growing  source and target exist side by side, each with the moments of AdamW
ligo     learning the maps: the target has gradients but no moments, the source is frozen
salt     stage 1: the teacher's weights are there too, or what it left behind of a step's samples
train    everything after that, or all of a plain run

Training that begins with layers that stand still (MSLT) is a phase of its own until they learn, of the same name: they
have a forward pass, and neither gradients nor activations that wait for them. Their moments are there all along.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import prod
from pathlib import Path

from megagrow import flops
from megagrow.checkpoint.remote import as_path
from megagrow.checkpoint.source import open_source
from megagrow.checks import check_chain, check_model, check_models_from
from megagrow.config import Config, ModelConfig, ParallelConfig
from megagrow.errors import CheckpointError
from megagrow.flops import Convention
from megagrow.growth.grow import ROWS
from megagrow.growth.ligo_maps import Variant, initial_fill, keeps_old_rows, map_shapes, start_recipe, width_maps
from megagrow.growth.recipe import Recipe
from megagrow.plan.activations import Cached, DeviceType, scoring
from megagrow.plan.layout import Layout
from megagrow.plan.memory import MOMENTS, PARAMETER, Extra, Parts, RankMemory, step_memory
from megagrow.plan.weights import (
    layer_names,
    other_names,
    other_unit,
    rank_unit,
    stored_elements,
    tensor_elements,
    trained_elements,
)
from megagrow.roles import layer_name, leaves, parameter_shapes, role_of, shape_of
from megagrow.salt import TeacherCache, check_teacher, with_stage_one_steps
from megagrow.salt.cached_teacher import cache_folders
from megagrow.salt.online import SAMPLES_AT_ONCE
from megagrow.timeline import growth_configs, last_source, latest_step, num_growths

CONVENTIONS: tuple[Convention, ...] = ("full", "causal")
MAP, MAP_MOMENTS = 4, 8  # bytes per element of a learned map, and of its moments; its gradient takes as much as itself


@dataclass(frozen=True)
class Phase:
    """One part of a run.

    Attributes:
        name: see above.
        steps: optimizer steps; 0 for what happens once.
        flops: of one step over all ranks (of `growing`: of the whole), by convention.
        memory: at the fullest moment, for each pipeline rank.
        frozen_layers: that stand still, from the first one on, with what is below them.
    """

    name: str
    steps: int
    flops: dict[Convention, float]
    memory: list[RankMemory]
    frozen_layers: int = 0

    @property
    def title(self) -> str:
        """The name, with what stands still."""
        return f"{self.name}, {self.frozen_layers} layers frozen" if self.frozen_layers else self.name

    @property
    def total_flops(self) -> dict[Convention, float]:
        """Of all its steps."""
        return {convention: max(self.steps, 1) * value for convention, value in self.flops.items()}


@dataclass(frozen=True)
class Frozen:
    """The layers of a model that stand still at first, from the first one on, and for how many steps."""

    layers: int = 0
    steps: int = 0

    def phases(self, steps: int, make: Callable[[int, int], Phase]) -> list[Phase]:
        """Training for so many steps; `make` is given the frozen layers and the steps of each phase."""
        still = min(self.steps, steps)
        return [make(layers, count) for layers, count in ((self.layers, still), (0, steps - still)) if count > 0]

    def after(self, steps: int) -> "Frozen":
        """What is left of it so many steps later."""
        return Frozen(self.layers, max(self.steps - steps, 0))


def phases(layout: Layout, device: DeviceType = "cuda") -> tuple[list[Phase], list[str]]:
    """All phases of the run, and what could not be planned because it is not there.

    Raises:
        CheckpointError: a source or teacher that is there cannot be read.
        ConfigError: it does not go with the model.
    """
    config, found, notes = layout.config, list[Phase](), list[str]()
    growth, salt, frozen = config.growth, with_stage_one_steps(config).salt, Frozen()
    if growth.method != "none":
        source = growth.source or _model_at(config.init.from_, "the source, init.from", notes)
        if source:
            check_chain(config, source)
            check_models_from(source, config, "the source")
            found += _growths(layout, source, device, _teacher(config, notes) if salt.map_weight else None)
            frozen = Frozen(last_source(config, source).num_layers, growth.freeze_steps)
        elif growth.freeze_steps:
            notes.append(
                "growth.freeze_steps: how many layers stand still is not known, so all count as if they learned"
            )
    steps = config.train.steps - (latest_step(config, num_growths(growth) - 1) if num_growths(growth) else 0)
    taught = min(salt.steps, steps)
    if salt.steps:
        found += frozen.phases(taught, partial(_stage_one, layout, device, notes))
    found += frozen.after(taught).phases(steps - taught, partial(_training, "train", layout, device))
    return found, list(dict.fromkeys(notes))  # stage 1 may be two phases, with and without frozen layers


def _teacher(config: Config, notes: list[str]) -> ModelConfig | None:
    if not config.salt.grown_teaches:
        return _model_at(config.salt.teacher, "salt.teacher", notes)
    source = config.growth.source or _model_at(config.init.from_, "the teacher, which is grown from init.from", notes)
    return last_source(config, source) if source else None


def _model_at(path: str, what: str, notes: list[str]) -> ModelConfig | None:
    if path and _is_there(path):
        return _read_model(path)
    notes.append(f"{what}={path or '(empty)'}: no such folder yet; its memory and FLOPs are left out")
    return None


def _is_there(path: str) -> bool:
    """Whether there is such a folder, which may be remote; CheckpointError where its store does not answer."""
    try:
        return as_path(path).is_dir()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


@lru_cache(maxsize=8)
def _read_model(path: str) -> ModelConfig:
    return open_source(path).model


def _training(name: str, layout: Layout, device: DeviceType, frozen_layers: int, steps: int) -> Phase:
    memory = step_memory(layout, device, Extra(frozen_layers=frozen_layers))
    return Phase(name, steps, _training_flops(layout, frozen_layers), memory, frozen_layers)


def _training_flops(layout: Layout, frozen_layers: int) -> dict[Convention, float]:
    how = layout.model, layout.step_tokens, layout.config.data.seq_length
    return {c: flops.training_flops(*how, c, frozen_layers) for c in CONVENTIONS}


def _growths(layout: Layout, source: ModelConfig, device: DeviceType, teacher: ModelConfig | None) -> list[Phase]:
    """Training up to each growth, which is taken to come as late as it may, and the growth; the last one is taught."""
    found: list[Phase] = []
    begun, small, frozen = 0, source, Frozen()
    for number, config in enumerate(growth_configs(layout.config, source)):
        latest, trained = latest_step(layout.config, number), layout.of_model(small)
        found += frozen.phases(latest - begun, partial(_training, "small", trained, device))
        is_last = number == num_growths(layout.config.growth) - 1
        found.append(_growing(Layout(config, layout.world_size), small, device, teacher if is_last else None))
        begun, small, frozen = latest, config.model, Frozen(small.num_layers, config.growth.freeze_steps)
    return found


def _growing(layout: Layout, source: ModelConfig, device: DeviceType, teacher: ModelConfig | None) -> Phase:
    if layout.config.growth.method == "ligo":
        return _learning_maps(layout, source, device, teacher)
    memory = [_growing_rank(layout, source, rank) for rank in range(layout.pipeline)]
    return Phase("growing", 0, {c: 0.0 for c in CONVENTIONS}, memory)


def _growing_rank(layout: Layout, source: ModelConfig, rank: int) -> RankMemory:
    """While the weights grow, or while the moments do, when the source's weights are gone, whichever is fuller.

    A save that was under way is done by then, and its copy in host memory given back.
    """
    of_source, stages = layout.of_model(source), layout.rank_stages(rank)
    small, large = PARAMETER * rank_unit(of_source, rank).stored, PARAMETER * rank_unit(layout, rank).stored
    old, new = (MOMENTS * trained_elements(each, rank) for each in (of_source, layout))
    names = [*layer_names(source), *(name for stage in stages for name in other_names(source, stage))]
    needed, whole = (
        PARAMETER * max(sizes)
        for sizes in zip(
            *((stored_elements(of_source, n), prod(shape_of(role_of(n), source))) for n in names), strict=True
        )
    )
    host = Parts()
    if layout.config.optim.offload:  # both optimizers, with the weights that they update, are in the host's memory
        host = Parts({"moments": old + new, "weights": PARAMETER * (old + new) // MOMENTS})
        old = new = 0
    weights = Parts({"parameters": small + large, "moments": old, "a tensor of the source": whole})
    moments = Parts({"parameters": large, "moments": old + new, "a tensor of the source": needed})
    kinds = {"weights grow": weights, "moments grow": moments}
    moment = max(kinds, key=lambda kind: kinds[kind].total())
    return RankMemory(rank, stages, large // PARAMETER, kinds[moment], moment, (), host)


def _learning_maps(layout: Layout, source: ModelConfig, device: DeviceType, teacher: ModelConfig | None) -> Phase:
    """A step, or a moment after it in which gradients are taken to the maps, whichever is fullest.

    A teacher that has a word in it costs a forward pass.
    """
    config, variant = layout.config, layout.config.growth.ligo_variant
    start = start_recipe(config.growth.maps_start, source, layout.model)
    static, saved = {}, {}
    of_layers, of_others = _layers_spread(layout, source), _others_spread(layout, start)
    for rank in range(layout.pipeline):
        small = PARAMETER * rank_unit(layout.of_model(source), rank).stored
        layers = [layer for stage in layout.rank_stages(rank) for layer in stage.layers]
        maps, shared = (map_elements(start, variant, held) for held in (layers, []))
        # One rank of a stage has the moments of a map that is the stage's own.
        moments = MAP_MOMENTS * (shared + -(-(maps - shared) * layout.pipeline // layout.world_size))
        static[rank] = Parts({"source": small, "maps": 2 * MAP * maps + moments})
        saved[rank] = small + MAP * maps + moments
    for rank, of_teacher in (_of_teacher(layout, teacher) if teacher else {}).items():
        static[rank] += of_teacher
    memory = []
    for held in step_memory(layout, device, Extra(static, teacher=teacher, has_moments=False)):
        stages = layout.rank_stages(held.rank)
        others = PARAMETER * sum(other_unit(layout, stage).stored for stage in stages)
        parts = static[held.rank] + Parts(parameters=held.parts["parameters"])
        for after in (
            parts + Parts({"gradients": held.parts["parameters"], "a leaf of all the source's layers": of_layers}),
            parts + Parts({"gradients": others, "rows of an embedding": of_others}),
        ):
            if after.total() > held.total:
                held = replace(held, parts=after, moment="gradients of the maps", in_flight=())
        host = Parts({"copy for the checkpoint": saved[held.rank]} if config.checkpoint.asynchronous else {})
        memory.append(replace(held, host=host))
    length = config.data.seq_length
    pair, tokens = (source, layout.model), layout.step_tokens
    per_step = {c: flops.ligo_step_flops(*pair, tokens, length, c, variant) for c in CONVENTIONS}
    if teacher:
        per_step = {c: per_step[c] + flops.forward_flops(teacher, tokens, length, c) for c in CONVENTIONS}
    return Phase("ligo", config.growth.ligo_steps, per_step, memory)


def _of_teacher(layout: Layout, teacher: ModelConfig) -> dict[int, Parts]:
    """What a teacher holds on each pipeline rank: its weights, and on the last stage what it says of a whole step."""
    weights = layout.width * tensor_elements(layout.of_model(teacher))
    found = {rank: Parts({"teacher": weights}) for rank in range(layout.pipeline)}
    hidden = layout.tokens * layout.num_microbatches * teacher.hidden_size * layout.width
    found[layout.stages[-1].rank]["teacher's hidden states"] = hidden
    return found


def map_elements(start: Recipe, variant: Variant, layers: Collection[int]) -> int:
    """Elements of LiGO's maps on a rank: what all layers share, and the maps of its own target layers."""
    shapes, places = map_shapes(start, variant), width_maps(start, variant)
    elsewhere = {
        name for name, (_, layer) in places.items() if keeps_old_rows(variant) and layer not in (None, *layers)
    }
    return sum(prod(shape) for name, shape in shapes.items() if name not in elsewhere)


def _layers_spread(layout: Layout, source: ModelConfig) -> int:
    """The largest leaf of all layers of the source, read whole to mix them, and what one mixture takes beside it.

    With maps of each source layer it is the rank's box of the target, to which all of them are widened, and gradients.
    """
    small, large = parameter_shapes(source), parameter_shapes(layout.model)
    names = [layer_name(0, leaf) for leaf in leaves(source)]
    if layout.config.growth.ligo_variant != "source_layer":
        return PARAMETER * (source.num_layers + 2) * max(prod(small[name]) for name in names)
    ranks = layout.tensor * layout.shard
    return PARAMETER * (2 * source.num_layers + 2) * max(prod(large[name]) for name in names) // ranks


def _others_spread(layout: Layout, start: Recipe) -> int:
    """What growing one parameter outside the layers takes: rows, their gradient, and where they come from.

    An embedding whose rows do not grow is grown in pieces of them, from the rank's own shard; all else is gathered.
    Random entries take as much again twice: they are made beside what the maps give, and their factor's gradient too.
    """
    filled, found = initial_fill(start, layout.config.growth.ligo_variant), [0]
    for name in {name for stage in layout.stages for name in other_names(layout.model, stage)}:
        old, (rows, *columns) = parameter_shapes(start.source)[name], parameter_shapes(layout.model)[name]
        stored, copies = stored_elements(layout, name), 5 if name in filled else 3
        found.append(copies * min(stored, ROWS * prod(columns)) if rows == old[0] else prod(old) + copies * stored)
    return PARAMETER * max(found)


def _stage_one(layout: Layout, device: DeviceType, notes: list[str], frozen_layers: int, steps: int) -> Phase:
    """Stage 1, in which a teacher costs a forward pass for each sample that it teaches or scores."""
    config, salt = layout.config, layout.config.salt
    teacher, per_step = _teacher(config, notes) if salt.teacher else None, _training_flops(layout, frozen_layers)
    if teacher is None:
        memory = step_memory(layout, device, replace(_left_behind(layout, notes), frozen_layers=frozen_layers))
        return Phase("salt", steps, per_step, memory, frozen_layers)
    length = config.data.seq_length
    check_teacher(teacher, layout.model, length)
    check_model(teacher, ParallelConfig(tensor=layout.tensor), "the teacher")
    passes = float(salt.weight > 0)  # over what it teaches, and over batches for one that it keeps
    passes += salt.online_buffer / salt.kept_batches if salt.online_buffer else 0.0
    for convention in CONVENTIONS:
        per_step[convention] += passes * flops.forward_flops(teacher, layout.step_tokens, length, convention)
    static = _of_teacher(layout, teacher)
    memory = step_memory(layout, device, Extra(static, teacher=teacher, frozen_layers=frozen_layers))
    if salt.online_buffer:
        memory = [_or_scoring(held, layout, teacher, device) for held in memory]
    return Phase("salt", steps, per_step, memory, frozen_layers)


def _left_behind(layout: Layout, notes: list[str]) -> Extra:
    """What `salt.cache` changes about plain training: a step's targets, on the rank that computes the loss."""
    salt, folders = layout.config.salt, cache_folders(layout.config.salt)
    if not folders:
        return Extra()
    if not all(Path(folder).is_dir() for folder in folders):
        notes.append(f"salt.cache={salt.cache}: no such folder yet; the memory of its targets is left out")
        return Extra()
    identity = TeacherCache(folders[0]).identity
    divides = salt.temperature_on == "both" and salt.temperature != 1
    cached = Cached(identity.num_entries, divides or salt.weight == 0 or identity.vocab_size < layout.model.vocab_size)
    targets = Parts({"targets": cached.per_token * layout.tokens * layout.num_microbatches})
    return Extra({layout.stages[-1].rank: targets}, cached=cached)


def _or_scoring(held: RankMemory, layout: Layout, teacher: ModelConfig, device: DeviceType) -> RankMemory:
    """The fullest moment of a step, or that before it in which the teacher scores a piece of an online buffer."""
    train = replace(layout.config.train, microbatch_size=SAMPLES_AT_ONCE)
    piece = Layout(replace(layout.config, model=teacher, train=train), layout.world_size)
    resting = {name: held.parts[name] for name in ("parameters", "moments", "pipeline buffers", "teacher")}
    parts = Parts({**resting, "working": scoring(piece, device)})
    return held if held.total >= parts.total() else replace(held, parts=parts, moment="scoring a buffer", in_flight=())
