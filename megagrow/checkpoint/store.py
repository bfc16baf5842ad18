"""Saving and loading: any layout loads what any other saved, and nothing is used unverified."""

import functools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, is_initialized

from megagrow.checkpoint import directory
from megagrow.checkpoint.agreement import Ranks, cause_of, some
from megagrow.checkpoint.dcp_io import ItemReader, digest_of, open_sized, read_items, write_items
from megagrow.checkpoint.format import MANIFEST, Manifest, check_json
from megagrow.checkpoint.remote import as_path
from megagrow.checkpoint.shards import DTYPES, Deferred, LocalShard, layout_of, local_shards
from megagrow.errors import CheckpointError, Damaged

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """What a save writes, as one rank has it.

    Attributes:
        shards: this rank's part of each tensor.
        layout: of all ranks, for people to read.
        state, config, provenance: JSON values, those of the first rank are written.
    """

    shards: dict[str, LocalShard]
    layout: dict[str, Any]
    state: dict[str, Any]
    config: dict[str, Any]
    provenance: dict[str, Any]


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Tensor | Deferred],
    state: dict[str, Any],
    *,
    config: dict[str, Any],
    provenance: dict[str, Any],
    group: ProcessGroup | None = None,
    keep_last: int = 0,
    keep_every: int = 0,
    late_state: Callable[[], dict[str, Any]] = dict,
) -> Path:
    """Saves a checkpoint as `root/step-N`; a collective over all ranks of `group`.

    Args:
        root: a directory that all ranks share, or its URL.
        tensors: by name; plain tensors are the same on all ranks that name them, DTensors have any
            layout, and those of `Deferred` are fetched one by one. Ranks may hold different names, as
            pipeline stages do; a box that several ranks hold is written once.
        state: JSON values only, as are `config` and `provenance`; those of the first rank are
            written.
        group: for all communication, ideally gloo and used by nothing else.
        keep_last: number of checkpoints to keep, this one included; 0 keeps all.
        keep_every: steps whose multiples are kept besides; 0: none.
        late_state: gives more of the state on the first rank, once all tensors are written: what fetching them took.

    Raises:
        CheckpointError: on every rank: the step exists, a value cannot be stored, or any rank
            cannot write (which rank, which file, why). Older checkpoints are untouched then.
    """

    def take() -> Snapshot:
        return snapshot(tensors, state, config, provenance, group)

    return write(root, step, take, group, keep_last, keep_every, late_state=late_state)


def snapshot(
    tensors: Mapping[str, Tensor | Deferred],
    state: dict[str, Any],
    config: dict[str, Any],
    provenance: dict[str, Any],
    group: ProcessGroup | None = None,
) -> Snapshot:
    """What `write` needs, in this rank alone; the shards share the tensors' memory.

    Raises:
        CheckpointError: a value cannot be stored.
    """
    for name, record in (("state", state), ("config", config), ("provenance", provenance)):
        check_json(record, name)
    layout = layout_of(tensors, Ranks(group).world_size)
    return Snapshot(local_shards(tensors), layout, state, config, provenance)


def write(
    root: Path,
    step: int,
    take: Callable[[], Snapshot],
    group: ProcessGroup | None = None,
    keep_last: int = 0,
    keep_every: int = 0,
    passed_over: Collection[str] = (),
    late_state: Callable[[], dict[str, Any]] = dict,
) -> Path:
    """What `save` does with a snapshot; `take` gives this rank's, and fails the save on all ranks where it raises.

    `passed_over` names damaged checkpoints, which do not count among the `keep_last`.
    """
    root, ranks = as_path(root), Ranks(group)
    action = f"cannot save step {step} in {root}"
    taken = ranks.together(action, take)
    temporary = ranks.first(action, lambda: _make_room(root, step))
    try:
        written = write_items(temporary, taken.shards, ranks, action)

        def commit() -> Path:
            manifest = Manifest(
                step=step,
                layout=taken.layout,
                config=taken.config,
                provenance=taken.provenance,
                state=taken.state | late_state(),
                tensors=written.tensors,
                files=written.files,
                items=written.items,
            )
            _check_files(temporary, manifest)
            return directory.publish(temporary, manifest)

        path = ranks.first(action, commit)
    except CheckpointError:
        if ranks.is_first:
            directory.discard(temporary)
        raise
    if keep_last:
        prune = functools.partial(directory.prune, path, keep_last, keep_every, passed_over)
        ranks.first(f"cannot delete old checkpoints in {root}", prune)
    return path


def load(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    group: ProcessGroup | None = None,
    strict: bool = True,
    manifest: Manifest | None = None,
) -> dict[str, Any]:
    """Fills `tensors` in place from a checkpoint and returns its state; a collective over `group`.

    Every stored item that a rank reads is compared with its digest before it is used. After an
    error some tensors may have been filled.

    Args:
        tensors: plain tensors (filled whole) or DTensors, on any device and in any layout.
        strict: whether the checkpoint and the tensors of all ranks must have the same names;
            otherwise what both have is loaded. Shapes and dtypes must agree in any case.
        manifest: what `read_manifest` returned; with many ranks and tensors reading it takes its time.

    Raises:
        Damaged: on every rank: any of them has found that the checkpoint is not whole.
        CheckpointError: on every rank: it cannot be read just now, or does not fit (names the tensors).
    """
    path, ranks = as_path(path), Ranks(group)
    action = f"cannot load {path}"
    manifest, shards = ranks.together(action, lambda: (manifest or read_manifest(path), local_shards(tensors)))
    seen = ranks.gather((manifest.sha256, bytes(name in tensors for name in manifest.tensors)))

    def check() -> None:
        if len({digest for digest, _ in seen}) > 1:
            raise CheckpointError("the ranks see different manifests; all must see one directory")
        if ranks.is_first:
            _check_files(path, manifest)
        is_read = [any(ranks_read) for ranks_read in zip(*(reads for _, reads in seen), strict=True)]
        unread = [name for name, used in zip(manifest.tensors, is_read, strict=True) if not used]
        _check_fit(manifest, tensors, unread, strict)

    ranks.together(action, check)
    known = {name: shard for name, shard in shards.items() if name in manifest.tensors}
    read_items(path, manifest, known, ranks, action)
    return manifest.state


def newest(root: Path, passed_over: Collection[str] = ()) -> Path | None:
    """The checkpoint of the highest step in `root` (or `root` itself) whose manifest is intact; None: nothing is there.

    Manifests below it are not read. Those above are named in a warning of the first rank.

    Args:
        root: a folder of checkpoints, or one of them.
        passed_over: names of those that are known to be damaged.

    Raises:
        Damaged: there are checkpoints, and the manifests of all of them are damaged.
        CheckpointError: one cannot be read just now, and might be the newest.
    """
    return next(_intact(as_path(root), passed_over), None)


def candidates(root: Path) -> list[Path]:
    """What `newest` would find, and all after it, the highest step first."""
    return list(_intact(as_path(root), ()))


def _intact(root: Path, passed_over: Collection[str]) -> Iterator[Path]:
    try:
        paths = [root] if (root / MANIFEST).is_file() else directory.step_directories(root)
    except OSError as error:
        raise CheckpointError(f"cannot look for checkpoints in {root}: {cause_of(error)}") from error
    problems, are_all_bad = [], True
    for path in (path for path in paths if path.name not in passed_over):
        try:
            directory.read_checked_manifest(path)
        except Damaged as error:
            problems.append(str(error))
            if not are_all_bad:
                _warn_of(problems[-1:])
            continue
        if are_all_bad:
            _warn_of(problems)
        are_all_bad = False
        yield path
    if problems and are_all_bad:
        raise Damaged(f"no usable checkpoint in {root}: {some(problems, '; ')}; restore one or move it away")


def _warn_of(problems: list[str]) -> None:
    if not is_initialized() or torch.distributed.get_rank() == 0:
        for problem in problems:
            logger.warning("%s; it is passed over", problem)


def clear(root: Path) -> None:
    """Deletes all checkpoints in `root`, in this process alone."""
    directory.clear(as_path(root))


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at `path`, its digest and every field checked.

    Raises:
        CheckpointError: names the file and the field.
    """
    path = as_path(path)
    return Manifest.parse(directory.read_checked_manifest(path), path / MANIFEST)


def read_full(path: Path, names: Iterable[str], manifest: Manifest | None = None) -> dict[str, Tensor]:
    """Whole tensors by name, on the CPU and verified, in this process alone.

    Args:
        manifest: what `read_manifest` returned, which saves reading it again with every call.

    Raises:
        CheckpointError: the checkpoint is damaged or lacks one of the names.
    """
    path, action = as_path(path), f"cannot read {path}"
    manifest = manifest or read_manifest(path)
    tensors = {}
    for name in names:
        if name not in manifest.tensors:
            raise CheckpointError(f"{action}: it has no tensor {name!r}")
        entry = manifest.tensors[name]
        tensors[name] = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    read_items(path, manifest, local_shards(tensors), Ranks(None, alone=True), action)
    return tensors


def verify(path: Path) -> Manifest:
    """Compares every byte of a checkpoint with its digests, in this process; returns the manifest.

    Raises:
        Damaged: names the file.
        CheckpointError: a file cannot be read just now.
    """
    path = as_path(path)
    manifest = read_manifest(path)
    _check_files(path, manifest)
    reader = ItemReader(path, manifest, manifest.tensors)
    for item in manifest.items:
        reader.verify(item)
    return manifest


def _make_room(root: Path, step: int) -> Path:
    """A directory to fill. A damaged checkpoint of this step (the run fell back) is set aside."""
    path = root / f"step-{step}"
    if path.exists() and not directory.is_left_over(path):
        try:
            verify(path)
        except Damaged as error:
            logger.warning("%s; it is kept as %s", error, directory.set_aside(path))
        else:
            raise CheckpointError(f"{path} exists and is intact; move it away to save this step again")
    return directory.prepare(root, step)


def _check_files(path: Path, manifest: Manifest) -> None:
    """Every file has the size in the manifest, and the digest if it does not consist of items.

    That takes in `.metadata`, which megagrow does not read: torch's own tools do, and unpickle it. A changed byte
    anywhere means that something has written here, or that the disk is failing: an older checkpoint is the safer one.
    """
    for name, entry in manifest.files.items():
        with open_sized(path / name, entry) as stream:
            if entry.sha256 is not None and digest_of(stream) != entry.sha256:
                raise Damaged(f"{path / name}: differs from its digest: the file is damaged")


def _check_fit(manifest: Manifest, tensors: Mapping[str, Tensor], unread: list[str], strict: bool) -> None:
    missing, misfits = [], []
    for name, tensor in tensors.items():
        stored = manifest.tensors.get(name)
        wanted = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
        if stored is None:
            missing.append(name)
        elif (found := f"{stored.dtype}{list(stored.shape)}") != wanted:
            misfits.append(f"{name}: {found}, not {wanted}")
    problems = [f"{len(misfits)} of another shape or dtype ({some(misfits)})"] if misfits else []
    if strict and missing:
        problems.append(f"{len(missing)} missing ({some(missing)})")
    if strict and unread:
        problems.append(f"{len(unread)} unexpected ({some(unread)})")
    if problems:
        raise CheckpointError(
            f"its tensors do not fit the model: {', '.join(problems)}; use the configuration that "
            "it was saved with (tools/inspect_checkpoint.py shows it)"
        )
