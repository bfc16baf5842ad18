"""Checkpoints of a run, and resuming from the newest good one with the unchanged command."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from megagrow.checkpoint import directory, store
from megagrow.checkpoint.agreement import Ranks
from megagrow.checkpoint.format import Manifest
from megagrow.checkpoint.provenance import code_version
from megagrow.checkpoint.remote import as_path
from megagrow.checkpoint.saver import Saver
from megagrow.config import Config, GrowthConfig
from megagrow.config_file import from_dict, option_names, to_dict
from megagrow.errors import CheckpointError, ConfigError
from megagrow.parallel.mesh import Mesh
from megagrow.timeline import growth_settings, num_growths, order_size
from megagrow.train.learner import Learner
from megagrow.train.state import RunState

CHECKPOINTS = "checkpoints"
# What may not change under a run: another model, other data, another way of growing is another run.
FIXED_SECTIONS = ("model", "data", "growth")
# What held-out losses are measured on, and may change.
HELD_OUT_FIELDS = ("data.validation", "train.eval_batches", "train.global_batch_size")
# With the section `salt`: what the training loss is made of, and may change.
OBJECTIVE_FIELDS = ("train.label_smoothing", "train.z_loss", "train.dropout")


def make_saver(config: Config, mesh: Mesh) -> Saver:
    """What saves this run's checkpoints; notes the code as it is now, when the run begins."""
    options = config.checkpoint
    saver = Saver(mesh.checkpoint_group, options.asynchronous, options.keep_last, options.keep_every)
    if Ranks(mesh.checkpoint_group).is_first:
        saver.facts = code_version()
    return saver


def save(saver: Saver, learner: Learner, state: RunState, config: Config) -> None:
    """Saves the run as it stands, perhaps in the background; a collective.

    Where bad steps have just been refused, a roll-back may have to lead to what was saved before: all of it stays.
    """

    def take() -> store.Snapshot:
        state.optimizer = learner.state()
        facts = {**saver.facts, **provenance(state, config)}
        return store.snapshot(learner.tensors(), state.to_dict(), to_dict(config), facts, saver.group)

    saver.save(root_of(config), state.step, take, prunes=state.guard.bad_steps == 0)


def root_of(config: Config) -> Path:
    """The folder of the run's checkpoints, which may be remote."""
    return as_path(config.checkpoint.dir) if config.checkpoint.dir else Path(config.run.dir) / CHECKPOINTS


def provenance(state: RunState, config: Config) -> dict[str, Any]:
    """Where a checkpoint comes from: what the run began with and grew from, the tokenizer that it has from there."""
    return {
        "init": config.init.from_,
        "inherited": [{"label": each.label, "identity": each.identity} for each in state.ledger.inherited],
        "grew_from": grew_from(state),
        "tokenizer": state.tokenizer,
        "token_ids": state.token_ids,
    }


def newest(config: Config, mesh: Mesh, passed_over: Collection[str] = ()) -> Path | None:
    """The run's newest checkpoint, as the first rank sees it; None when there is none; a collective.

    Args:
        passed_over: names of those that are known to be damaged.

    Raises:
        CheckpointError: on every rank: there are none but damaged ones, or their folder cannot be read.
    """
    root = root_of(config)
    return Ranks(mesh.checkpoint_group).first(f"cannot resume from {root}", lambda: store.newest(root, passed_over))


def leave_behind(names: Collection[str], config: Config, mesh: Mesh) -> None:
    """Sets checkpoints aside that a roll-back has led past, or the next start would go on from them; a collective."""
    root = root_of(config)

    def rename() -> None:
        for name in names:
            directory.set_aside(root / name, "left")

    Ranks(mesh.checkpoint_group).first(f"cannot set checkpoints aside in {root}", rename)


def saved_steps(config: Config, mesh: Mesh) -> tuple[int | None, int | None]:
    """`growth.at_step` and `salt.steps` of the run as its newest checkpoint has them, None where there is none; a
    collective."""
    path = newest(config, mesh)
    saved = {} if path is None else store.read_manifest(path).config

    def step(section: str, name: str) -> int | None:
        fields = saved.get(section)
        value = fields.get(name) if isinstance(fields, dict) else None
        return value if type(value) is int and value > 0 else None

    return step("growth", "at_step"), step("salt", "steps")


def read_state(manifest: Manifest, path: Path, config: Config, tell: Callable[[str], None]) -> RunState:
    """The state in a checkpoint, after making sure that it is of the same run; `tell` gets what else has changed.

    Where that is what training minimises, the state has no losses to compare with.

    Raises:
        CheckpointError: malformed, or a fixed part of the configuration has changed.
    """
    changes = allowed_changes(manifest.config, config, path)
    for name, before, now in changes:
        tell(f"{name} was {before} when {path.name} was saved and is {now} now")
    state = RunState.from_dict(manifest.state, f"{path}/manifest.json")
    _check_seed(changes, state, path)
    if any(name in OBJECTIVE_FIELDS or name.startswith("salt.") for name, _, _ in changes):
        state.forget_losses()
    if any(name in HELD_OUT_FIELDS for name, _, _ in changes):
        state.teacher_loss = None  # of other text
    return state


def load(manifest: Manifest, path: Path, learner: Learner, mesh: Mesh) -> None:
    """Fills the learner's tensors from a checkpoint; a collective."""
    store.load(path, learner.tensors(), group=mesh.checkpoint_group, manifest=manifest)


def allowed_changes(old: dict[str, Any], config: Config, path: Path) -> list[tuple[str, Any, Any]]:
    """The differences to a saved configuration; CheckpointError when the saved run is of another model or data."""
    try:
        changes = differences(old, config, f"{path}/manifest.json: config")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    # Other datasets are checked where the blend goes on (`streams.continue_blend`), which knows every one's cursor.
    free = {"data.change_blend", "data.validation", "data.num_samples"}
    if config.data.order == "megagrow":
        free.add("data.train")
    if config.model.is_causal:
        free.add("data.tokenizer")  # of an encoder it decides what masks are drawn
    _check_order_size(old, config, path)
    for name, before, now in changes:
        if name.split(".")[0] in FIXED_SECTIONS and name not in free:
            raise CheckpointError(
                f"{path} belongs to another run: {name} was {before} there and is {now} now; "
                "use the saved value, or another --run.dir for a new run"
            )
    return changes


def _check_seed(changes: Sequence[tuple[str, Any, Any]], state: RunState, path: Path) -> None:
    """While maps learn, what they do not say of the model is drawn from the seed."""
    for name, before, now in changes:
        if name == "train.seed" and state.phase == "ligo":
            raise CheckpointError(
                f"{path}: train.seed was {before} there and is {now} now, and maps learn: the model that they make "
                f"depends on it; set --train.seed {before} until it has grown"
            )


def _check_order_size(old: dict[str, Any], config: Config, path: Path) -> None:
    """Megatron's order is made for a number of samples: with another number all samples come in another order."""
    before, now = order_size(from_dict(old, Config, f"{path}/manifest.json: config")), order_size(config)
    if config.data.order == "megatron" and before != now:
        raise CheckpointError(
            f"{path}: data.order=megatron was made for {before} samples there, for {now} now, which would lose some "
            f"samples and repeat others; set --data.num-samples {before}, which a longer run needs to begin with"
        )


def _spelled_out(config: Config) -> Config:
    """With what an empty setting stands for, which once was written there; what a run never reads is as by default."""
    growth = config.growth
    if any(growth_settings(growth, number).learns_maps for number in range(num_growths(growth))):
        return replace(config, growth=replace(growth, ligo_init=growth.maps_start))
    names = [field.name for field in fields(growth) if field.name.startswith("ligo_")]
    unread: dict[str, Any] = {name: getattr(GrowthConfig(), name) for name in names}
    return replace(config, growth=replace(growth, **unread))


def differences(old: dict[str, Any], config: Config, where: str) -> list[tuple[str, Any, Any]]:
    """(dotted name, old value, new value) of every field that differs from a configuration saved in `where`."""
    before, now = (_flat(to_dict(_spelled_out(each))) for each in (from_dict(old, Config, where), config))
    return [(n, before.get(n), now.get(n)) for n in option_names() if before.get(n) != now.get(n)]


def grew_from(state: RunState) -> list[dict[str, Any]]:
    """The growth events of the run."""
    return [event for event in state.ledger.events if event["event"] == "growth"]


def _flat(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{path}.{key}" if path else key
        flat |= _flat(value, name) if isinstance(value, dict) else {name: value}
    return flat
