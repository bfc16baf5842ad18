"""The tokenizer and special tokens of what a run began from: its Hugging Face folder has them, too."""

import dataclasses
import json
from pathlib import Path

import pytest

from megagrow.checkpoint import hf
from megagrow.checkpoint.convert import convert
from megagrow.checkpoint.source import open_source
from megagrow.config import Config, InitConfig
from megagrow.data.tokenizer import load_tokenizer
from megagrow.train import run
from tests.train.runs import SMALL, make_config
from tests.train.test_run import cut_back, grown

IDS = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 4}
BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}


def save_tokenizer(folder: Path) -> None:
    content = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": BYTES, "merges": []}}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def assert_handed_on(directory: Path, folder: Path, source: Path) -> None:
    """A run's model as a Hugging Face folder states what its source does."""
    assert convert(directory, folder, "hf")
    for name in ("config.json", "generation_config.json"):
        entries = json.loads((folder / name).read_text())
        assert {token: entries[token] for token in IDS} == IDS
    assert load_tokenizer(folder).fingerprint == load_tokenizer(source).fingerprint


@pytest.mark.parametrize("method", ["none", "clone"])
def test_a_run_hands_them_on(
    corpus: Path, trained: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed after it has grown and before, and through a run that begins from this one, seen from another folder."""
    small = tmp_path / "small"
    hf.write_hf_folder(small, SMALL, open_source(trained).fetch, token_ids=IDS)
    save_tokenizer(small)
    monkeypatch.chdir(tmp_path)
    first: Config = make_config(corpus, tmp_path / "first", init=InitConfig(from_="small"))
    if method != "none":
        first = grown(first, method)
        first = dataclasses.replace(first, growth=dataclasses.replace(first.growth, source=None))
    assert run(first) == 0
    monkeypatch.chdir("/")
    first = dataclasses.replace(first, init=InitConfig(from_=str(small)))
    for step in (4, 2):
        cut_back(tmp_path / "first", step)
        assert run(first) == 0
        assert_handed_on(tmp_path / "first", tmp_path / f"from-{step}", small)
    assert run(make_config(corpus, tmp_path / "next", model=first.model, init=InitConfig(str(tmp_path / "first")))) == 0
    assert_handed_on(tmp_path / "next", tmp_path / "last", small)


def test_of_a_checkpoint_that_was_moved_too(corpus: Path, trained: Path, tmp_path: Path) -> None:
    """It has its tokenizer beside it."""
    small = tmp_path / "small"
    hf.write_hf_folder(small, SMALL, open_source(trained).fetch, token_ids=IDS)
    save_tokenizer(small)
    assert convert(small, tmp_path / "here", "megagrow")
    (tmp_path / "here").rename(tmp_path / "there")
    assert run(make_config(corpus, tmp_path / "run", 2, init=InitConfig(str(tmp_path / "there")))) == 0
    assert_handed_on(tmp_path / "run", tmp_path / "out", small)
