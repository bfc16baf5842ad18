"""The commit protocol: a checkpoint appears complete or not at all, and is never written again.

    step-N.tmp-*/  is filled  ->  fsync  ->  rename to step-N/  ->  fsync  ->  `latest` replaced
    step-N.trash-*/           a checkpoint that is being deleted
    step-N.damaged-*/         one that failed its own digests, set aside for a newer one of the same step
    step-N.left-*/            one that a roll-back has led past

A process may die between any two calls here: what is then left beside complete checkpoints bears
another name.

Remote folders (remote.py) have no atomic rename. There step-N/ is filled in place, `manifest.json` is written last and
deleted first, and a step-N/ without one is not a checkpoint: what dead saves left.
"""

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from megagrow.checkpoint.format import DIGEST, MANIFEST, Manifest
from megagrow.checkpoint.remote import RemotePath, remote, unreadable
from megagrow.data.files import fsync_path, os_errors_name
from megagrow.errors import CheckpointError, Damaged
from megagrow.json_file import parse_object
from megagrow.parallel import heartbeat

LATEST = "latest"
_STEP = re.compile(r"step-(0|[1-9][0-9]*)")
_LEFTOVER = re.compile(rf"(step-[0-9]+|{LATEST})\.(tmp|trash)-[0-9a-f]+")

logger = logging.getLogger(__name__)


def prepare(root: Path, step: int) -> Path:
    """Removes what dead saves left in `root`; returns a new directory to fill for this step."""
    root.mkdir(parents=True, exist_ok=True)
    for path in list(root.iterdir()):
        if is_left_over(path):
            _delete(path)
    path = root / f"step-{step}"
    temporary = path if remote(path) else _renamed(path, "tmp")
    temporary.mkdir()
    return temporary


def publish(temporary: Path, manifest: Manifest) -> Path:
    """Writes the manifest into a filled directory and commits it; returns its path.

    The data files must be on the disk already. On an OSError the checkpoint is either complete or
    not there.
    """
    root, raw = temporary.parent, manifest.to_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    _write(temporary / DIGEST, f"{digest}  {MANIFEST}\n".encode())
    _write(temporary / MANIFEST, raw)
    path = root / f"step-{manifest.step}"
    latest = json.dumps({"step": path.name, "manifest_sha256": digest}).encode() + b"\n"
    if remote(root):
        _write(root / LATEST, latest)
        return path
    fsync_path(temporary)
    os.rename(temporary, path)
    fsync_path(root)
    pointer = _renamed(root / LATEST, "tmp")
    _write(pointer, latest)
    os.replace(pointer, root / LATEST)
    fsync_path(root)
    return path


def discard(temporary: Path) -> None:
    """Removes a directory that will not be published; never fails."""
    if remote(temporary):
        with suppress(OSError):
            _delete(temporary)
        return
    shutil.rmtree(temporary, ignore_errors=True)


def prune(newest: Path, keep_last: int, keep_every: int = 0, passed_over: Collection[str] = ()) -> None:
    """Deletes checkpoints before `newest` so that `keep_last` good ones remain; a failure is only a warning.

    Steps after `newest` are left alone: a run that went back to it has not vouched for them. Multiples of `keep_every`
    (0: none) stay for ever. Those named in `passed_over`, and those with a bad manifest, are damaged and do not count.
    """
    try:
        older = [path for path in step_directories(newest.parent) if _step(path) < _step(newest)]
    except OSError as error:
        logger.warning("cannot look for old checkpoints to delete: %s", error)
        return
    num_kept = 1
    for path in older:
        if num_kept < keep_last:
            num_kept += path.name not in passed_over and _has_good_manifest(path)
        elif not keep_every or _step(path) % keep_every:
            _delete_old(path)


def clear(root: Path) -> None:
    """Deletes all checkpoints in `root`."""
    if _is_file(root / LATEST):
        (root / LATEST).unlink()  # first: else it would disown another one of the same step
    for path in step_directories(root):
        _delete(path if remote(path) else _to_trash(path))


def set_aside(path: Path, why: str = "damaged") -> Path:
    """Renames a checkpoint that no run is to go on from, so that its step can be saved again; returns its new path."""
    aside = _renamed(path, why)
    pointer = path.parent / LATEST
    if pointer.is_file() and path.name in _latest_digest(pointer):
        pointer.unlink()  # else a death before `latest` is replaced leaves it to disown the new checkpoint
    if place := remote(path):
        place.move(RemotePath(str(aside)))
        return aside
    os.rename(path, aside)
    fsync_path(path.parent)
    return aside


def step_directories(root: Path) -> list[Path]:
    """The directories step-N under `root`, the highest step first, good or damaged."""
    if not root.is_dir():
        return []
    steps = [p for p in root.iterdir() if _STEP.fullmatch(p.name) and p.is_dir() and not is_left_over(p)]
    return sorted(steps, key=_step, reverse=True)


def is_left_over(path: Path) -> bool:
    """Whether a dead save or deletion has left it."""
    is_uncommitted = remote(path) and _STEP.fullmatch(path.name) and not (path / MANIFEST).is_file()
    return bool(is_uncommitted or _LEFTOVER.fullmatch(path.name))


def read_checked_manifest(path: Path) -> bytes:
    """The bytes of a manifest, compared with the digest beside it and the one in `latest`.

    Raises:
        Damaged: a file is missing, or a digest differs.
        CheckpointError: a file cannot be read just now.
    """
    if not _is_file(path / MANIFEST):
        raise Damaged(f"{path} is no complete checkpoint: it has no {MANIFEST}")
    raw, noted = _read(path / MANIFEST), _read(path / DIGEST)
    digest = hashlib.sha256(raw).hexdigest()
    if noted != f"{digest}  {MANIFEST}\n".encode():
        raise Damaged(f"{path / MANIFEST}: damaged, its digest is not the one in {DIGEST}")
    pointer = path.absolute().parent / LATEST
    if _is_file(pointer) and digest != _latest_digest(pointer).get(path.name, digest):
        raise Damaged(f"{path / MANIFEST}: replaced, its digest is not the one in {pointer}")
    return raw


def _has_good_manifest(path: Path) -> bool:
    try:
        read_checked_manifest(path)
    except CheckpointError:
        return False
    return True


def _delete_old(path: Path) -> None:
    try:
        _delete(path if remote(path) else _to_trash(path))
    except OSError as error:
        logger.warning("cannot delete the old checkpoint %s: %s", path, error)


def _to_trash(path: Path) -> Path:
    trash = _renamed(path, "trash")
    os.rename(path, trash)
    fsync_path(path.parent)
    return trash


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _latest_digest(pointer: Path) -> dict[str, str]:
    """The step that `latest` names, and its manifest's digest; empty if `latest` itself is damaged.

    `latest` only adds a check: a checkpoint holds its own digests, so a bad pointer must not make
    it unreadable.
    """
    try:
        record = parse_object(_read(pointer), pointer, Damaged, "checkpoints are found without it")
        return {str(record["step"]): str(record["manifest_sha256"])}
    except (Damaged, KeyError) as error:
        logger.warning("%s is damaged (%s); checkpoints are found without it", pointer, error)
        return {}


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        raise unreadable(path, error) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def _write(path: Path, raw: bytes) -> None:
    with os_errors_name(path), path.open("wb" if remote(path) else "xb") as stream:
        stream.write(raw)
        stream.flush()
        if not remote(path):
            os.fsync(stream.fileno())


def _delete(path: Path) -> None:
    if not path.is_dir():
        path.unlink()
    else:
        for file in sorted(path.iterdir(), key=lambda file: file.name != MANIFEST):  # large files take a while
            _delete(file)
        path.rmdir()
    heartbeat.progress()


def _renamed(path: Path, kind: str) -> Path:
    return path.with_name(f"{path.name}.{kind}-{secrets.token_hex(4)}")
