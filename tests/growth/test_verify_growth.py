"""The command that shows what a growth keeps."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megagrow.config import Config
from megagrow.config_file import dump
from megagrow.data.indexed import IndexedWriter
from megagrow.growth import verify as verify_growth
from megagrow.growth.recipe import Recipe
from megagrow.model import Transformer
from tests.growth import models
from tests.growth.models import widened
from tests.growth.test_offline import save_hf

TOOL = Path(__file__).parents[2] / "tools" / "verify_growth.py"
TARGET = widened(models.LLAMA, hidden=2, ffn=2)


def verify(folder: Path, *arguments: object) -> int:
    options = [folder, "--target", folder.parent / "large.yaml", *arguments]
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(SystemExit) as ended:
        monkeypatch.syspath_prepend(str(TOOL.parent))
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, options)])
        runpy.run_path(str(TOOL), run_name="__main__")
    return int(ended.value.code or 0)


def test_the_figures_of_a_growth_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_hf(tmp_path / "small", models.LLAMA, torch.float32)
    (tmp_path / "large.yaml").write_text(dump(Config(model=TARGET)))
    assert verify(tmp_path / "small", "--method", "clone", "--breaker", "noise") == 0
    shown = capsys.readouterr().out
    assert "clone, which says that it keeps the function" in shown
    assert all(name in shown for name in ("function_change", "gradient_error", "replica_distance_later"))
    changes = [line for line in shown.splitlines() if "function_change" in line]
    assert float(changes[0].split("│")[2]) <= 1e-12


def test_what_cannot_be_verified_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_hf(tmp_path / "small", models.LLAMA, torch.float32)
    for target, method, words in (
        (TARGET, "ligo", "maps are learned"),
        (TARGET, "zero_pad", "set norm_eps=5e-06"),
        (replace(TARGET, hidden_size=20), "clone", "set norm_eps=6e-06"),
    ):
        (tmp_path / "large.yaml").write_text(dump(Config(model=target)))
        assert verify(tmp_path / "small", "--method", method) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_data_is_read_in_sequences_as_long_as_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = replace(models.LLAMA, max_seq_length=200)
    save_hf(tmp_path / "small", model, torch.float32)
    (tmp_path / "large.yaml").write_text(dump(Config(model=replace(TARGET, max_seq_length=200))))
    with IndexedWriter(tmp_path / "tokens", np.uint16) as writer:
        writer.add_document(np.arange(2000) % 29)
        writer.close()
    seen: list[torch.Size] = []

    def watched(recipe: Recipe, small: Transformer, ids: Tensor, steps: int) -> dict[str, float | None]:
        seen.append(ids.shape)
        return {}

    monkeypatch.setattr(verify_growth, "report", watched)
    for length in (150, 300):
        options = ["--method", "clone", "--data", tmp_path / "tokens", "--seq-length", length, "--batch-size", 2]
        assert verify(tmp_path / "small", *options) == 0
    assert seen == [(2, 151), (2, 201)]


@pytest.mark.parametrize("option", ["--seq-length", "--batch-size", "--steps"])
def test_sizes_must_be_positive(tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    assert verify(tmp_path / "small", "--method", "clone", option, 0) == 2
    assert f"{option}=0 must be positive" in capsys.readouterr().err
