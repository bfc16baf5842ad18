"""Conversion both ways, and the tool around it."""

import importlib.util
import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megagrow.checkpoint import convert, store
from megagrow.checkpoint.convert import Comparison
from megagrow.config import Config, ModelConfig
from megagrow.config_file import to_dict
from megagrow.data.tokenizer import load_tokenizer
from megagrow.errors import CheckpointError
from megagrow.roles import parameter_shapes
from tests.checkpoint.hf_folders import save_folder, save_tokenizer, tensors_of

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


@pytest.fixture
def tool(monkeypatch, capsys):
    """Runs the tool; returns exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.syspath_prepend(TOOL.parent)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOL), run_name="__main__")
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return run


def save_own(folder: Path, model: ModelConfig) -> Path:
    weights = {f"model.{n}": torch.randn(shape) for n, shape in parameter_shapes(model).items()}
    state = {"model": to_dict(model)}
    config = to_dict(Config(model=model))
    store.save(folder / "checkpoints", 3, weights, state, config=config, provenance={})
    return folder


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_equal(tmp_path, tool, family, dtype) -> None:
    before = save_tokenizer(save_folder(tmp_path / "before", family, dtype))
    own, after = tmp_path / "own", tmp_path / "after"
    code, printed, _ = tool(before, own, "--to", "megagrow")
    assert code == 0
    assert "largest logit difference" in printed
    assert f"{before} in transformers against {own} in megagrow" in printed
    code, printed, _ = tool(own, after, "--to", "hf")
    assert code == 0
    assert f"{own} in megagrow against {after} in transformers" in printed
    old, new = tensors_of(before), tensors_of(after)
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        assert tensor.dtype == new[name].dtype
        assert torch.equal(tensor, new[name]), name
    stated, written = (json.loads((d / "config.json").read_text()) for d in (before, after))
    assert all(stated[key] == written[key] for key in ("bos_token_id", "eos_token_id", "dtype"))
    assert load_tokenizer(before).fingerprint == load_tokenizer(after).fingerprint
    assert sorted(os.listdir(tmp_path)) == ["after", "before", "own"]


def test_a_moved_checkpoint_still_finds_its_tokenizer(tmp_path) -> None:
    before = save_tokenizer(save_folder(tmp_path / "before", "llama"))
    assert convert.convert(before, tmp_path / "own", "megagrow")
    (tmp_path / "own").rename(tmp_path / "moved")
    assert convert.convert(tmp_path / "moved", tmp_path / "after", "hf")
    assert (tmp_path / "after" / "tokenizer.json").is_file()


def test_a_run_directory_becomes_a_folder(tmp_path, tool) -> None:
    run = save_own(tmp_path / "run", ModelConfig(vocab_size=61, hidden_size=16, num_heads=4))
    code, printed, _ = tool(run, tmp_path / "out", "--to", "hf")
    assert code == 0
    assert "without a tokenizer" in printed
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_difference_is_measured_and_refused(tmp_path) -> None:
    one = save_folder(tmp_path / "one", "gpt2")
    other = save_folder(tmp_path / "other", "gpt2")
    same = convert.compare(one, other)
    assert same.largest_difference < 1e-5 < same.largest_logit
    assert same.libraries == ("megagrow", "transformers")
    convert.check_equal(same)
    tensors = tensors_of(other)
    tensors["transformer.h.1.mlp.c_proj.bias"][7] += 0.5
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    different = convert.compare(one, other)
    assert different.largest_difference > 0.05
    with pytest.raises(CheckpointError, match="the logits differ by"):
        convert.check_equal(different)
    with pytest.raises(CheckpointError, match="the logits differ by nan"):
        convert.check_equal(Comparison(float("nan"), 1.0, 1, ("megagrow", "megagrow")))


def test_without_transformers_megagrow_computes_both(tmp_path, monkeypatch) -> None:
    before = save_folder(tmp_path / "before", "llama")
    convert.convert(before, tmp_path / "own", "megagrow")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else found(name))
    compared = convert.compare(before, tmp_path / "own")
    assert compared.libraries == ("megagrow", "megagrow")
    assert compared.largest_difference == 0


def test_wrong_inputs_are_one_line_and_leave_nothing(tmp_path, tool) -> None:
    llama = save_folder(tmp_path / "llama", "llama")
    bad = save_folder(tmp_path / "bad", "llama")
    entries = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps(entries | {"hidden_act": "relu"}))
    odd = ModelConfig(vocab_size=61, hidden_size=16, num_heads=4, activation="gelu")
    run, out = save_own(tmp_path / "run", odd), tmp_path / "out"
    before = sorted(os.listdir(tmp_path))
    for arguments, code, message in [
        ((tmp_path / "nowhere", out, "--to", "hf"), 4, "nowhere: no such folder"),
        ((llama, bad, "--to", "megagrow"), 4, "bad: is not empty"),
        ((bad, out, "--to", "megagrow"), 4, "hidden_act='relu' is not supported"),
        ((run, out, "--to", "hf"), 2, "model.activation=gelu cannot be exported"),
    ]:
        ended, printed, errors = tool(*arguments)
        assert ended == code, errors
        assert message in errors
        assert errors.startswith("error: ")
        assert errors.count("\n") == 1
        assert printed == ""
    assert sorted(os.listdir(tmp_path)) == before


def test_wrong_usage_ends_with_2(tmp_path, tool) -> None:
    code, _, errors = tool(tmp_path, tmp_path / "out", "--to", "onnx")
    assert code == 2
    assert "--to" in errors


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch) -> None:
    before = save_folder(tmp_path / "before", "llama")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "save", full)
    with pytest.raises(CheckpointError, match="own: cannot be written .No space left"):
        convert.convert(before, tmp_path / "own", "megagrow")
    assert os.listdir(tmp_path) == ["before"]
