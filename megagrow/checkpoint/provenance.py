"""Which code wrote a checkpoint."""

import functools
import subprocess
from pathlib import Path
from typing import Any

import torch

import megagrow
from megagrow import __version__

ROOT = Path(megagrow.__file__).resolve().parents[1]
GIT_SECONDS = 10.0  # after which a repository counts as not there


@functools.cache
def code_version() -> dict[str, Any]:
    """What a manifest says of the code.

    Returns:
        `version` of the package and `torch`; `commit`, and `dirty`, whether tracked files differ from it. Both are null
        where the package does not lie in a git checkout of its own.
    """
    return {"version": __version__, "torch": torch.__version__, **_commit(ROOT)}


def _commit(root: Path) -> dict[str, Any]:
    commit = _git(root, "rev-parse", "HEAD") if _git(root, "rev-parse", "--show-toplevel") == str(root) else None
    changes = _git(root, "status", "--porcelain", "--untracked-files=no") if commit else None
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(root: Path, *command: str) -> str | None:
    try:
        found = subprocess.run(
            ["git", "-C", str(root), *command], capture_output=True, text=True, check=False, timeout=GIT_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None
