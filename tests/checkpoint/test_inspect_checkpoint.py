"""`tools/inspect_checkpoint.py` shows what is there and says what is damaged."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from megagrow.checkpoint.remote import as_path
from megagrow.config_file import load_file
from megagrow.ledger import Ledger, Phase
from megagrow.roles import num_parameters
from tests.checkpoint.samples import rewrite_manifest, save_step
from tests.growth.test_offline import SOURCE, save_hf

TOOL = Path(__file__).parents[2] / "tools" / "inspect_checkpoint.py"


@pytest.fixture(autouse=True)
def tools_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOL.parent))


def inspect(*arguments: object) -> int:
    """Runs the tool as the command line does; returns the exit code."""
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(SystemExit) as ended:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        runpy.run_path(str(TOOL), run_name="__main__")
    return int(ended.value.code or 0)


def test_it_shows_the_newest_checkpoint_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_step(tmp_path / "checkpoints", 1)
    newest = save_step(tmp_path / "checkpoints", 1200)
    (tmp_path / "link").symlink_to(newest)
    for path in (tmp_path, tmp_path / "checkpoints", newest, tmp_path / "link"):
        assert inspect(path, "--verify") == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "│ step │ 1,200 │" in shown
        assert "hidden_size=3" in shown
        assert "grown_from=None" in shown
        assert "│ norm │ bfloat16 │ [5] │ 10 │" in shown
        assert "│ 3 tensors │ │ │ 150 │" in shown
        assert "every byte agrees" in shown


def test_a_hugging_face_folder_gives_the_section_of_a_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_hf(tmp_path / "hf", SOURCE, torch.float32)
    assert inspect(tmp_path / "hf") == 0
    (tmp_path / "run.yaml").write_text(shown := capsys.readouterr().out)
    assert shown.startswith(f"# {tmp_path / 'hf'}: {num_parameters(SOURCE):,} parameters\n")
    assert load_file(tmp_path / "run.yaml").model == source.model
    assert inspect(tmp_path / "hf", "--verify") == 2
    assert "holds no digests" in capsys.readouterr().err


def test_a_run_on_a_store_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    MemoryFileSystem.store.clear()
    save_step(as_path("memory://bucket/run/checkpoints"), 7)
    assert inspect("memory://bucket/run", "--verify") == 0
    assert "memory://bucket/run/checkpoints/step-7" in capsys.readouterr().out
    assert inspect("nosuch://bucket/run") == 4
    assert "nosuch://bucket/run: " in capsys.readouterr().err
    MemoryFileSystem.store.clear()


def test_it_shows_what_a_run_has_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger(phases=[Phase("train", steps=2, tokens=1000, flops=3e9, seconds=1.5)])
    ledger.inherit("source", "a folder", Ledger.outside(flops=1e9))
    path = save_step(tmp_path, 2)
    rewrite_manifest(path, lambda record: record["state"].update(ledger=ledger.to_dict()))
    assert inspect(path) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "│ cost.papers_convention │ flops=3000000000.0, tokens=1000, seconds=1.5 │" in shown
    assert "│ cost.all_in │ flops=4000000000.0, tokens=None, seconds=None │" in shown
    rewrite_manifest(path, lambda record: record["state"]["ledger"]["phases"][0].update(flops=-1))
    assert inspect(path) == 4
    assert "flops=-1 must be finite and not negative" in capsys.readouterr().err


def test_damage_is_one_line_and_exit_code_4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_step(tmp_path, 3)
    file = path / "__0_0.distcp"
    raw = bytearray(file.read_bytes())
    raw[100] ^= 1
    file.write_bytes(raw)
    assert inspect(path) == 0
    capsys.readouterr()
    assert inspect(path, "--verify") == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {file}: ")
    assert captured.err.count("\n") == 1
    (path / "manifest.json").unlink()
    assert inspect(path) == 4
    assert inspect(tmp_path) == 4
    assert inspect(tmp_path / "nowhere") == 4
    assert "nowhere: no checkpoint" in capsys.readouterr().err
