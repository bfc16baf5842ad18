"""Checkpoints of a run, and resuming from the newest good one with the unchanged command."""

import logging
from pathlib import Path
from typing import Any

from megagrow import __version__
from megagrow.checkpoint import store
from megagrow.config import Config, from_dict, option_names, to_dict
from megagrow.errors import CheckpointError
from megagrow.parallel.mesh import Mesh
from megagrow.train.learner import Learner
from megagrow.train.state import RunState

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
# What may not change under a run: another model, other data, another way of growing is another run.
FIXED_SECTIONS = ("model", "data", "growth", "salt")
FIXED_FIELDS = ("train.global_batch_size", "train.seed", "train.steps", "train.precision")


def save(learner: Learner, state: RunState, config: Config, mesh: Mesh) -> Path:
    """Commits a checkpoint of the run as it stands; a collective."""
    root = Path(config.run.dir) / CHECKPOINTS
    state.optimizer = learner.state()
    return store.save(
        root,
        state.step,
        learner.tensors(),
        state.to_dict(),
        config=to_dict(config),
        provenance={"version": __version__, "init": config.init.from_, "grew_from": grew_from(state)},
        group=mesh.checkpoint_group,
        keep_last=config.checkpoint.keep_last,
    )


def saved(config: Config) -> list[Path]:
    """The run's checkpoints, newest first."""
    root = Path(config.run.dir) / CHECKPOINTS
    return store.candidates(root) if root.is_dir() else []


def read_state(path: Path, config: Config) -> RunState:
    """The state in a checkpoint, after making sure that it is of the same run.

    Raises:
        CheckpointError: damaged, or a fixed part of the configuration has changed.
    """
    manifest = store.read_manifest(path)
    refuse_changes(manifest.config, config, path)
    return RunState.from_dict(manifest.state, f"{path}/manifest.json")


def load(path: Path, learner: Learner, mesh: Mesh) -> None:
    """Fills the learner's tensors from a checkpoint; a collective."""
    store.load(path, learner.tensors(), group=mesh.checkpoint_group)


def refuse_changes(old: dict[str, Any], config: Config, path: Path) -> None:
    """Raises CheckpointError when the saved run is of another model or data; other differences are only told."""
    for name, before, now in differences(old, config):
        fixed = name.split(".")[0] in FIXED_SECTIONS or name in FIXED_FIELDS
        if fixed:
            raise CheckpointError(
                f"{path} belongs to another run: {name} was {before} there and is {now} now; "
                "use the saved value, or another --run.dir for a new run"
            )
        logger.warning("%s changed from %s to %s since the checkpoint", name, before, now)


def differences(old: dict[str, Any], config: Config) -> list[tuple[str, Any, Any]]:
    """(dotted name, old value, new value) of every field that differs from a saved configuration."""
    before, now = _flat(to_dict(from_dict(old, Config, "saved configuration"))), _flat(to_dict(config))
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
