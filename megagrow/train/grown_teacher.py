"""The small model that a run grows, kept as it is then, for `salt.teacher=grown`.

It is written to the run's checkpoints and read from there when it teaches, so that a resumed run finds it, and no rank
holds both what was trained and what teaches.
"""

from pathlib import Path

from megagrow.checkpoint import store
from megagrow.checkpoint.agreement import Ranks
from megagrow.config import Config
from megagrow.config_file import to_dict
from megagrow.ledger import Ledger
from megagrow.parallel.mesh import Mesh
from megagrow.timeline import num_growths
from megagrow.train.part import Part
from megagrow.train.saving import provenance, root_of
from megagrow.train.state import RunState

FOLDER = "teacher"


def teacher_folder(config: Config) -> Path:
    """Where the small model is kept."""
    return root_of(config) / FOLDER


def is_due(state: RunState, config: Config) -> bool:
    """Whether the growth that comes now is the last one, and the model before it is to teach the one after it."""
    return config.salt.grown_teaches and state.growths == num_growths(config.growth) - 1


def is_kept(state: RunState, config: Config) -> bool:
    """Whether that growth has begun."""
    return state.phase == "main" or (state.phase == "ligo" and is_due(state, config))


def keep(part: Part, state: RunState, config: Config, mesh: Mesh) -> None:
    """Stores the weights of the small model; a collective.

    What an earlier attempt has left is replaced: a run that went back to before it grew, and skipped data since or goes
    on with other settings, grows another model. No save may be under way: it has the ranks' group for itself.
    """
    root, group = teacher_folder(config), mesh.checkpoint_group
    Ranks(group).first(f"cannot keep the teacher in {root}", lambda: store.clear(root))
    # What it cost is the run's own, which its ledger has already: no more is inherited with it.
    record = {"model": to_dict(part.config), "ledger": Ledger().to_dict()}
    facts = provenance(state, config)
    store.save(root, state.step, part.tensors(), record, config=to_dict(config), provenance=facts, group=group)
