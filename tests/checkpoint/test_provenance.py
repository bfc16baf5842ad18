"""What a checkpoint says of the code that wrote it."""

import subprocess
from pathlib import Path

import pytest
import torch

from megagrow import __version__, checkpoint
from megagrow.checkpoint import provenance
from megagrow.train import run, saving
from tests.train.runs import make_config, make_corpus


def git(folder: Path, *command: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(["git", *identity, *command], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_a_checkout_has_a_commit_and_may_be_dirty(tmp_path: Path) -> None:
    assert provenance._commit(tmp_path) == {"commit": None, "dirty": None}
    git(tmp_path, "init", "--quiet")
    (tmp_path / "code.py").write_text("x = 1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    (tmp_path / "notes.txt").touch()
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert provenance._commit(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "code.py").write_text("x = 2")
    assert provenance._commit(tmp_path) == {"commit": commit, "dirty": True}


def test_a_package_inside_of_another_repository_has_none(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", "first")
    (tmp_path / "site-packages").mkdir()
    assert provenance._commit(tmp_path / "site-packages") == {"commit": None, "dirty": None}


def test_a_run_tells_code_source_and_costs(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    config = make_config(corpus, tmp_path / "run", steps=2)
    assert run(config) == 0
    manifest = checkpoint.read_manifest(tmp_path / "run/checkpoints/step-2")
    code = {"version": __version__, "torch": torch.__version__, **provenance._commit(provenance.ROOT)}
    begun = {"init": "", "inherited": [], "grew_from": [], "tokenizer": "", "token_ids": None}
    assert manifest.provenance == {**code, **begun}
    assert manifest.config["train"]["steps"] == 2 and manifest.state["ledger"]["phases"]


def test_the_code_is_noted_once_when_the_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = iter(["as it began", "a later one", "the last one"])
    monkeypatch.setattr(saving, "code_version", lambda: {"commit": next(commits)})
    assert run(make_config(make_corpus(tmp_path), tmp_path / "run")) == 0
    manifests = [checkpoint.read_manifest(path) for path in checkpoint.candidates(tmp_path / "run/checkpoints")]
    assert [manifest.provenance["commit"] for manifest in manifests] == ["as it began"] * 3
    assert next(commits) == "a later one"
