"""Small checkpoints for the tests here: every value follows from the step, so that a mix shows."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagrow import checkpoint

SHAPES = {"embedding": (11, 3), "norm": (5,), "count": ()}
DTYPES = {"embedding": torch.float32, "norm": torch.bfloat16, "count": torch.int64}


def tensors_at(step: int) -> dict[str, Tensor]:
    """Every element tells the step."""
    return {name: torch.full(SHAPES[name], step, dtype=DTYPES[name]) for name in SHAPES}


def empty_tensors() -> dict[str, Tensor]:
    return {name: torch.zeros(SHAPES[name], dtype=DTYPES[name]) for name in SHAPES}


def save_step(root: Path, step: int, keep_last: int = 0, keep_every: int = 0) -> Path:
    return checkpoint.save(
        root,
        step,
        tensors_at(step),
        {"step": step, "cursor": {"epoch": 0, "sample": 8 * step}},
        config={"model": {"hidden_size": 3}},
        provenance={"grown_from": None},
        keep_last=keep_last,
        keep_every=keep_every,
    )


def assert_holds_step(path: Path, step: int) -> None:
    """Loads a checkpoint, which must be wholly of this step."""
    tensors = empty_tensors()
    state = checkpoint.load(path, tensors)
    assert path.name == f"step-{step}"
    assert state["step"] == step
    assert checkpoint.read_manifest(path).step == step
    for name, expected in tensors_at(step).items():
        assert torch.equal(tensors[name], expected)


def rewrite_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a manifest and its digests as somebody would who wants the change to go unnoticed."""
    record = json.loads((path / "manifest.json").read_bytes())
    change(record)
    raw = json.dumps(record).encode()
    (path / "manifest.json").write_bytes(raw)
    digest = hashlib.sha256(raw).hexdigest()
    (path / "manifest.sha256").write_text(f"{digest}  manifest.json\n")
    (path.parent / "latest").unlink(missing_ok=True)
