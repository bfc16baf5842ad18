"""Growth from one folder to another, in the source's format, in one process or on a mesh.

One process writes copies parameter by parameter: no more than one grown parameter and what it is made of are in memory.
So it does what learned maps give, into a Hugging Face folder. Otherwise an own checkpoint is grown into shards over all
ranks. The optimizer's moments come along where there is a rule.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from megagrow import command_line
from megagrow.checkpoint import hf, store
from megagrow.checkpoint.agreement import Ranks
from megagrow.checkpoint.convert import TOKENIZER_FOLDER, tokenizer_of
from megagrow.checkpoint.hf_config import CONFIG_FILE, model_config_from_hf, read_json
from megagrow.checkpoint.provenance import code_version
from megagrow.checkpoint.shards import Deferred
from megagrow.checkpoint.source import Source
from megagrow.checkpoint.staged import StagedFolder, check_free
from megagrow.config import Config, DataConfig, GrowthConfig, ModelConfig, Policy, require
from megagrow.config_file import to_dict
from megagrow.data.tokenizer import load_tokenizer
from megagrow.growth.grow import Fetch, grow_into, grow_whole
from megagrow.growth.maps import LayerMix
from megagrow.growth.moments import (
    QUANTITIES,
    check_policy,
    grow_multipliers,
    grow_new_part,
    grow_optimizer,
    grow_whole_moment,
    rule_problem,
)
from megagrow.growth.recipe import Recipe
from megagrow.model import Transformer
from megagrow.optim import Multipliers
from megagrow.parallel.fsdp import materialize
from megagrow.parallel.mesh import Mesh
from megagrow.parallel.shards import local, wrap_like
from megagrow.roles import parameter_names, parameter_shapes

T = TypeVar("T")


def check_destination(source: Source, destination: Path, target: ModelConfig, mesh: Mesh) -> None:
    """Makes sure, before anything is learned, that `target` can be written in the source's format; a collective.

    Raises:
        CheckpointError: the destination is taken.
        ConfigError: the source's format cannot express the target.
    """
    if hf.is_hf_folder(source.path):
        hf.check_exportable(target)
    Ranks(mesh.checkpoint_group).first(f"cannot grow into {destination}", lambda: check_free(destination))


def moments_policy(recipe: Recipe, asked: Policy | None, is_learned: bool = False) -> Policy:
    """What becomes of the moments: what was asked for; else `exact` where that has a rule, and `reset` elsewhere.

    Args:
        recipe: how to grow.
        asked: what was asked for; None: nothing.
        is_learned: whether the recipe is where maps start that are about to be learned; no policy has a rule for these.

    Raises:
        ConfigError: the policy that was asked for has no rule for the recipe.
    """
    recipe = replace(recipe, method="ligo", layers=LayerMix({})) if is_learned else recipe
    if asked is None:
        return "reset" if rule_problem(recipe, "exact") else "exact"
    check_policy(recipe, asked)
    return asked


def moments_note(source: Source, recipe: Recipe, policy: Policy) -> str:
    """What has become of the moments, in one line."""
    if source.optimizer is None:
        return "the source has no moments of Adam; training starts with fresh ones"
    if policy != "reset":
        return f"the moments of Adam have grown by policy {policy}"
    reason = rule_problem(recipe, "exact")
    return "the moments of Adam are left behind" + (f": policy exact {reason}" if reason else "")


def grow_folder(
    source: Source,
    destination: Path,
    recipe: Recipe,
    mesh: Mesh,
    policy: Policy | None = None,
    ledger: Callable[[float], dict[str, Any] | None] | None = None,
) -> None:
    """Writes the grown model to a new folder, in the format of its source; a collective over the mesh.

    Weights keep their dtype, and the tokenizer comes along.

    Args:
        source: the small model on disk.
        destination: must not exist or be empty.
        recipe: how to grow: from `make_recipe`, or `Ligo.recipe` of learned maps.
        mesh: its tensor and data axes share an own checkpoint's work and memory; a Hugging Face folder is written by
            the first rank alone.
        policy: what becomes of the moments of an own checkpoint that has some, see moments.py; None: see
            `moments_policy`. Under `reset` the grown checkpoint has none, and training starts with a fresh optimizer.
        ledger: takes the seconds that growing took and gives what the grown model has cost, kept in an own checkpoint;
            None: what the source has.

    Raises:
        CheckpointError: the source is damaged, or the destination is taken or cannot be written.
        ConfigError: the source's format cannot express the target; the policy has no rule for the recipe.
    """
    assert source.model == recipe.source, "the recipe belongs to another source"
    policy = moments_policy(recipe, policy)
    if hf.is_hf_folder(source.path):
        _write_hf(source, destination, recipe, mesh)
    else:
        _write_own(source, destination, recipe, mesh, policy, ledger or (lambda _: source.ledger))


def _write_hf(source: Source, destination: Path, recipe: Recipe, mesh: Mesh) -> None:
    def fetch(name: str) -> Tensor:
        return grow_whole(recipe, source.fetch, name) if mesh.is_main else torch.empty(0)

    tokenizer, token_ids = tokenizer_of(source), source.token_ids
    hf.write_hf_folder(destination, recipe.target, fetch, tokenizer, token_ids=token_ids, is_writer=mesh.is_main)


def _write_own(
    source: Source,
    destination: Path,
    recipe: Recipe,
    mesh: Mesh,
    policy: Policy,
    ledger: Callable[[float], dict[str, Any] | None],
) -> None:
    check_destination(source, destination, recipe.target, mesh)
    ranks, action = Ranks(mesh.checkpoint_group), f"cannot grow into {destination}"
    clock = _Clock()
    tensors, state = _grown_own(source, recipe, mesh, policy, clock)
    tokenizer, staged = tokenizer_of(source), StagedFolder(destination)
    named = "" if tokenizer is None else str((destination / TOKENIZER_FOLDER).absolute())
    try:
        store.save(
            ranks.first(action, lambda: _stage(staged, tokenizer)),
            0,
            tensors,
            state,
            config=to_dict(Config(model=recipe.target, data=DataConfig(tokenizer=named))),
            provenance=_provenance(source, recipe),
            group=mesh.checkpoint_group,
            late_state=lambda: {"ledger": ledger(clock.seconds)},
        )
        ranks.first(action, staged.publish)
    finally:
        if mesh.is_main:
            staged.discard()


def _stage(staged: StagedFolder, tokenizer: Path | None) -> Path:
    """The temporary folder, with the tokenizer in it."""
    staged.start()
    if tokenizer is not None:
        load_tokenizer(tokenizer).save(staged.temporary / TOKENIZER_FOLDER)
    return staged.temporary


class _Clock:
    """Adds up the seconds that growing takes, however it is cut into pieces."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, grow: Callable[..., T], *args: Any) -> T:
        """What `grow` returns; its seconds count."""
        began = time.perf_counter()
        grown = grow(*args)
        self.seconds += time.perf_counter() - began
        return grown


def _grown_own(
    source: Source, recipe: Recipe, mesh: Mesh, policy: Policy, clock: _Clock
) -> tuple[Mapping[str, Tensor | Deferred], dict[str, Any]]:
    """All that the grown checkpoint stores, as this rank's shards or to be grown when it is written; and the state."""
    require(
        policy == "reset" or "new_part" not in (source.optimizer or {}),
        f"{source.path} grew lately, and the moments or the rate of its new entries are not yet those of the others, "
        "which growing again would lose; train it further first, or leave the moments behind: --optimizer reset",
    )
    state: dict[str, Any] = {"model": to_dict(recipe.target)}
    has_moments = source.optimizer is not None and policy != "reset"
    if source.optimizer is not None and has_moments:
        step = int(source.optimizer["step"])
        old = {name: Multipliers(**m) for name, m in source.optimizer["multipliers"].items()}
        multipliers = grow_multipliers(recipe, policy, old)
        state["optimizer"] = {"step": step, "multipliers": {n: asdict(m) for n, m in multipliers.items()}}
        new_part = grow_new_part(recipe, policy, GrowthConfig(), step, {})
        if new_part is not None:
            state["optimizer"]["new_part"] = new_part.state()
    if mesh.world.size == 1 and recipe.copies:  # learned maps would read all source layers for each target layer
        return _streamed(source, recipe, policy, has_moments, clock), state
    return clock.timed(_grown_shards, source, recipe, mesh, policy, has_moments), state


def _streamed(source: Source, recipe: Recipe, policy: Policy, has_moments: bool, clock: _Clock) -> dict[str, Deferred]:
    """Whole tensors, each grown when its turn comes to be written."""
    shapes = parameter_shapes(recipe.target)
    tensors = {
        f"model.{name}": Deferred(
            shape,
            source.dtype_of(recipe.source_name(name)),
            partial(clock.timed, grow_whole, recipe, source.fetch, name),
        )
        for name, shape in shapes.items()
    }
    for moment in QUANTITIES if has_moments else ():
        fetch = _moment_fetch(source, moment)
        dtype = fetch(parameter_names(recipe.source)[0]).dtype
        tensors |= {
            f"optim.{moment}.{name}": Deferred(
                shape, dtype, partial(clock.timed, grow_whole_moment, recipe, policy, fetch, moment, name)
            )
            for name, shape in shapes.items()
        }
    return tensors


def _grown_shards(source: Source, recipe: Recipe, mesh: Mesh, policy: Policy, has_moments: bool) -> dict[str, Tensor]:
    """This rank's shards of weights and moments."""
    parameters = _empty_target(source, recipe, mesh)
    grow_into(recipe, source.fetch, parameters)
    tensors = {f"model.{name}": tensor for name, tensor in parameters.items()}
    if has_moments:
        moments = _empty_moments(source, recipe, parameters)
        grow_optimizer(recipe, policy, {m: _moment_fetch(source, m) for m in moments}, moments, step=0)
        tensors |= {f"optim.{m}.{name}": t for m, named in moments.items() for name, t in named.items()}
    return tensors


def _empty_target(source: Source, recipe: Recipe, mesh: Mesh) -> dict[str, Tensor]:
    dtype = source.dtype_of(parameter_names(recipe.source)[0])
    with torch.device("meta"):
        model = Transformer(recipe.target, mesh).to(dtype)
    materialize(model, list(model.layers.values()), recipe.target, mesh, None)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _empty_moments(source: Source, recipe: Recipe, parameters: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Adam's moments, laid out like the parameters."""
    first = parameter_names(recipe.source)[0]
    return {
        moment: {name: wrap_like(torch.empty_like(local(p), dtype=dtype), p) for name, p in parameters.items()}
        for moment in QUANTITIES
        for dtype in [_moment_fetch(source, moment)(first).dtype]
    }


def _moment_fetch(source: Source, moment: str) -> Fetch:
    return lambda name: source.read(f"optim.{moment}.{name}")


def _provenance(source: Source, recipe: Recipe) -> dict[str, Any]:
    grew_from = {
        "path": str(source.path),
        "identity": source.identity,
        "method": recipe.method,
        "model": to_dict(recipe.source),
    }
    return {**code_version(), "grew_from": [grew_from], "token_ids": source.token_ids}


def target_model(name: str) -> ModelConfig:
    """The model of a preset, an own file, or a Hugging Face config.json (or its folder)."""
    path = Path(name) / CONFIG_FILE if Path(name).is_dir() else Path(name)
    if path.suffix == ".json" and path.is_file() and "model_type" in read_json(path):
        return model_config_from_hf(path)
    return command_line.load(str(path)).model
