"""Conversion both ways, and the tool around it."""

import importlib.util
import json
import os
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import save_file

from megagrow.checkpoint import convert, hf, source, store
from megagrow.checkpoint.convert import Comparison
from megagrow.checkpoint.hf import HFReader, model_config_from_hf
from megagrow.checkpoint.hf_tokenizer import tokenizer_note
from megagrow.checkpoint.remote import as_path
from megagrow.config import Config, DataConfig, ModelConfig, ParallelConfig
from megagrow.config_file import to_dict
from megagrow.data.tokenizer import load_tokenizer
from megagrow.errors import CheckpointError
from megagrow.evaluate.transformers_tokenizer import load_transformers_tokenizer
from megagrow.model.transformer import Transformer, initialize
from megagrow.parallel.mesh import make_mesh
from megagrow.plan.measure import peak_memory
from megagrow.roles import num_parameters, parameter_shapes
from megagrow.train.part import build_part, initialize_part
from tests.checkpoint.hf_folders import OWN_QWEN2, save_folder, save_tokenizer, tensors_of
from tests.ranks import run_ranks

SHARDED = replace(OWN_QWEN2, vocab_size=61, num_kv_heads=1)

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


def save_own(folder: Path, model: ModelConfig, step: int = 3, moments: bool = False) -> Path:
    shapes = parameter_shapes(model)
    kinds = ["model", "optim.exp_avg", "optim.exp_avg_sq"] if moments else ["model"]
    tensors = {f"{kind}.{n}": torch.randn(shape) for kind in kinds for n, shape in shapes.items()}
    state = {"model": to_dict(model), **({"optimizer": {"step": 3, "multipliers": {}}} if moments else {})}
    store.save(folder / "checkpoints", step, tensors, state, config=to_dict(Config(model=model)), provenance={})
    return folder


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", torch.float32),
        ("llama", torch.bfloat16),
        ("gpt2", torch.float32),
        ("qwen2", torch.bfloat16),
        ("gpt_neox", torch.float16),
        ("bert", torch.bfloat16),
        ("roberta", torch.float32),
    ],
)
def test_there_and_back_is_equal(tmp_path, tool, family, dtype) -> None:
    changes = {"pad_token_id": 0} if family == "roberta" else {}  # a special token of the tokenizer
    before = save_tokenizer(save_folder(tmp_path / "before", family, dtype, **changes))
    own, after = tmp_path / "own", tmp_path / "after"
    code, printed, _ = tool(before, own, "--to", "megagrow")
    assert code == 0
    assert "largest logit difference" in printed
    assert f"{before} in transformers against {own} in megagrow" in printed
    code, printed, _ = tool(own, after, "--to", "hf")
    assert code == 0
    assert f"{own}/step-0 in megagrow against {after} in transformers" in printed
    old, new = tensors_of(before), tensors_of(after)
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        assert tensor.dtype == new[name].dtype
        assert torch.equal(tensor, new[name]), name
    stated, written = (json.loads((d / "config.json").read_text()) for d in (before, after))
    assert all(stated[key] == written[key] for key in ("bos_token_id", "eos_token_id", "dtype"))
    assert load_tokenizer(before).fingerprint == load_tokenizer(after).fingerprint
    assert sorted(os.listdir(tmp_path)) == ["after", "before", "own"]


def test_one_tensor_at_a_time_is_in_memory(tmp_path) -> None:
    """Both ways. What is measured counts mapped files as if they were read; two may be open."""
    model = ModelConfig(vocab_size=1001, hidden_size=128, num_heads=4, num_layers=6, ffn_size=352)
    shapes, file = parameter_shapes(model), 550_000
    hf.write_hf_folder(tmp_path / "before", model, lambda name: torch.randn(shapes[name]), shard_bytes=file)
    assert len(list((tmp_path / "before").glob("*.safetensors"))) > 3
    largest = 4 * max(torch.Size(shape).numel() for shape in shapes.values())
    there = peak_memory(lambda: convert.convert(tmp_path / "before", tmp_path / "own", "megagrow"))
    back = peak_memory(lambda: convert.convert(tmp_path / "own", tmp_path / "after", "hf"))
    assert there < 2 * file + 2.1 * largest < 4 * num_parameters(model) / 2
    assert back < 2.1 * largest
    old, new = tensors_of(tmp_path / "before"), tensors_of(tmp_path / "after")
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize(("to", "family"), [("megagrow", "qwen2"), ("hf", "llama")])
def test_weights_are_rounded_as_asked(tmp_path, tool, to, family) -> None:
    folder = save_folder(tmp_path / "source", family)
    code, printed, _ = tool(folder, tmp_path / "out", "--to", to, "--dtype", "bfloat16")
    assert code == 0
    assert "weights rounded to bfloat16" in printed
    back = tmp_path / "out" if to == "hf" else tmp_path / "back"
    if to == "megagrow":
        convert.convert(tmp_path / "out", back, "hf")
    for name, tensor in tensors_of(folder).items():
        assert torch.equal(tensors_of(back)[name], tensor.bfloat16()), name


def test_numbers_too_large_for_the_dtype_are_refused(tmp_path, tool) -> None:
    folder = save_folder(tmp_path / "source", "gpt2")
    tensors = tensors_of(folder)
    tensors["transformer.h.1.mlp.c_proj.bias"][7] = 7e4
    tensors["transformer.h.1.mlp.c_proj.bias"][8] = torch.nan  # which is no reason to see nothing else
    tensors["transformer.h.1.mlp.c_proj.bias"][9] = torch.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for to in ("megagrow", "hf"):
        code, _, errors = tool(folder, tmp_path / "out", "--to", to, "--dtype", "float16")
        assert code == 4
        assert "layers.1.mlp.down.bias holds 7e+04, more than float16 can: use --dtype bfloat16" in errors
        assert errors.count("\n") == 1
    assert os.listdir(tmp_path) == ["source"]


def test_the_comparison_can_be_left_out(tmp_path, tool, monkeypatch) -> None:
    monkeypatch.setattr(convert, "compare", None)
    before, own = save_folder(tmp_path / "before", "llama"), tmp_path / "own"
    code, printed, _ = tool(before, own, "--to", "megagrow", "--no-verify")
    without = "without a tokenizer: none found with SRC, and none given (--tokenizer)"
    assert (code, printed) == (0, f"wrote {own} from {before}, {without}\n")


def test_a_tokenizer_can_be_given(tmp_path, tool) -> None:
    before, other = save_folder(tmp_path / "before", "llama"), tmp_path / "other"
    other.mkdir()
    save_tokenizer(other)
    for to in ("hf", "megagrow"):
        assert tool(before, tmp_path / to, "--to", to, "--tokenizer", other, "--no-verify")[0] == 0
    assert tool(tmp_path / "megagrow", tmp_path / "again", "--to", "hf", "--no-verify")[0] == 0
    for folder in ("hf", "again"):
        assert load_tokenizer(tmp_path / folder).fingerprint == load_tokenizer(other).fingerprint


@pytest.mark.parametrize("own", [True, False])
def test_another_tokenizer_brings_its_own_special_ids(tmp_path, tool, own) -> None:
    """The source's end of text would never come: to the new tokenizer its id is other text."""
    before = save_folder(tmp_path / "before", "llama", eos_token_id=[40, 41], bos_token_id=39)
    if own:
        save_tokenizer(before, "<own>")
    save_tokenizer(tmp_path / "other")
    tool(before, tmp_path / "kept", "--to", "hf", "--no-verify")
    assert HFReader(tmp_path / "kept").token_ids == {"bos_token_id": 39, "eos_token_id": [40, 41]}
    assert tool(before, tmp_path / "own", "--to", "megagrow", "--tokenizer", tmp_path / "other", "--no-verify")[0] == 0
    for start, more in ((before, ["--tokenizer", tmp_path / "other"]), (tmp_path / "own", [])):
        target = tmp_path / f"from-{start.name}"
        assert tool(start, target, "--to", "hf", "--no-verify", *more)[0] == 0
        assert HFReader(target).token_ids == {"eos_token_id": load_tokenizer(tmp_path / "other").eod_id}


def test_a_tokenizer_can_replace_one_that_is_damaged(tmp_path, tool) -> None:
    before = save_folder(tmp_path / "before", "llama", eos_token_id=40, bos_token_id=39)
    (before / "tokenizer.json").write_text("{}")
    other = save_tokenizer(tmp_path / "other")
    assert tool(before, tmp_path / "out", "--to", "hf", "--no-verify", "--tokenizer", other)[0] == 0
    assert HFReader(tmp_path / "out").token_ids == {"eos_token_id": load_tokenizer(other).eod_id}


def test_a_run_that_named_another_tokenizer_since_brings_that_ones_ids(tmp_path, tool) -> None:
    model, own = model_config_from_hf(save_folder(tmp_path / "before", "llama")), tmp_path / "own"
    tensors = {f"model.{name}": torch.zeros(shape) for name, shape in parameter_shapes(model).items()}
    first, second = save_tokenizer(tmp_path / "first"), save_tokenizer(tmp_path / "second", "<more>")
    for data, ends in (("", 40), (str(first), 40), (str(second), load_tokenizer(second).eod_id)):
        config = to_dict(Config(model=model, data=DataConfig(tokenizer=data)))
        provenance = {"tokenizer": str(first), "token_ids": {"eos_token_id": 40}}
        store.save(own, 0, tensors, {"model": to_dict(model), "ledger": None}, config=config, provenance=provenance)
        assert tool(own, tmp_path / f"out-{Path(data).name}", "--to", "hf", "--no-verify")[0] == 0
        assert HFReader(tmp_path / f"out-{Path(data).name}").token_ids == {"eos_token_id": ends}
        shutil.rmtree(own)


def test_the_same_tokenizer_leaves_the_special_ids_as_they_are(tmp_path, tool) -> None:
    end = load_tokenizer(save_tokenizer(tmp_path / "same")).eod_id
    before = save_folder(tmp_path / "before", "llama", eos_token_id=[40, end], bos_token_id=39)
    for beside in (False, True):
        if beside:
            save_tokenizer(before)
        target = tmp_path / f"{beside}"
        assert tool(before, target, "--to", "hf", "--no-verify", "--tokenizer", tmp_path / "same")[0] == 0
        assert HFReader(target).token_ids == {"bos_token_id": 39, "eos_token_id": [40, end]}


def test_a_tokenizer_that_transformers_would_rebuild_is_told(tmp_path, tool) -> None:
    before = save_folder(tmp_path / "before", "qwen2")
    save_tokenizer(before)
    _, _, _ = tool(before, tmp_path / "own", "--to", "megagrow", "--no-verify")
    code, printed, _ = tool(tmp_path / "own", tmp_path / "hf", "--to", "hf", "--no-verify")
    assert code == 0 and "AutoTokenizer of transformers 5 cuts text as Qwen does" in printed
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "grow the small model"
    ids = load_tokenizer(tmp_path / "hf").encode(text)
    assert theirs.decode(ids) != text, "transformers has changed: the note may go"
    assert transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "hf").decode(ids) == text
    loaded = load_transformers_tokenizer(tmp_path / "hf")
    assert loaded.decode(ids) == text and loaded.name_or_path == str(tmp_path / "hf")
    transformers.Qwen2Tokenizer(vocab={"<|endoftext|>": 0, "a": 1}, merges=[]).save_pretrained(tmp_path / "qwen")
    assert not tokenizer_note("qwen2", tmp_path / "qwen") and not tokenizer_note("llama", tmp_path / "hf")


def save_sharded(root: str, model: ModelConfig) -> None:
    mesh = make_mesh(ParallelConfig(tensor=2))
    part = build_part(model, Config(model=model, parallel=ParallelConfig(tensor=2)), mesh)
    initialize_part(part, seed=5)
    state, config = {"model": to_dict(model)}, to_dict(Config(model=model))
    store.save(Path(root), 3, part.tensors(), state, config=config, provenance={})


def test_a_checkpoint_of_any_layout_becomes_the_same_folder(tmp_path) -> None:
    """Tensor and data ranks, fewer key/value heads than tensor ranks, biases of some layers alone."""
    run_ranks(save_sharded, 4, str(tmp_path / "run"), SHARDED)
    convert.convert(tmp_path / "run", tmp_path / "out", "hf")
    whole = Transformer(SHARDED)
    initialize(dict(whole.named_parameters()), SHARDED, 5)
    hf.write_hf_folder(tmp_path / "expected", SHARDED, dict(whole.named_parameters()).__getitem__)
    found, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


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


def test_a_run_that_goes_on_is_compared_with_the_step_that_was_converted(tmp_path, tool, monkeypatch) -> None:
    model = ModelConfig(vocab_size=61, hidden_size=16, num_heads=4)
    run, write = save_own(tmp_path / "run", model), hf.write_hf_folder

    def write_and_train_on(*arguments: object, **options: object) -> None:
        write(*arguments, **options)
        save_own(run, model, step=4)

    monkeypatch.setattr(hf, "write_hf_folder", write_and_train_on)
    code, printed, errors = tool(run, tmp_path / "out", "--to", "hf")
    assert (code, errors) == (0, "")
    assert f"wrote {tmp_path / 'out'} from {run}/checkpoints/step-3" in printed


def test_a_run_on_a_store_becomes_a_local_folder(tmp_path, tool) -> None:
    MemoryFileSystem.store.clear()
    run = as_path("memory://bucket/run")
    save_own(run, ModelConfig(vocab_size=61, hidden_size=16, num_heads=4))
    code, printed, errors = tool(run, tmp_path / "out", "--to", "hf")
    assert (code, errors) == (0, "")
    assert f"wrote {tmp_path / 'out'} from memory://bucket/run/checkpoints/step-3" in printed
    code, _, errors = tool(run, "memory://bucket/out", "--to", "hf")
    assert code == 2
    assert errors == "error: argument dst: memory://bucket/out must be local; copy it to or from there; see --help\n"
    MemoryFileSystem.store.clear()


def test_moments_that_are_left_behind_are_named(tmp_path, tool) -> None:
    model = ModelConfig(vocab_size=61, hidden_size=16, num_heads=4)
    for moments in (True, False):
        run = save_own(tmp_path / f"run {moments}", model, moments=moments)
        code, printed, _ = tool(run, tmp_path / f"own {moments}", "--to", "megagrow", "--no-verify")
        assert code == 0
        assert ("step-3: the moments of Adam are left behind" in printed) == moments


@pytest.mark.parametrize("to", ["megagrow", "hf"])
def test_a_folder_is_hashed_once_at_most(tmp_path, tool, monkeypatch, to) -> None:
    before, read, hashed = save_folder(tmp_path / "before", "llama"), source._file_digest, []
    (before / "optimizer.safetensors").write_bytes(b"of something else")
    monkeypatch.setattr(source, "_file_digest", lambda stream: hashed.append(Path(stream.name).name) or read(stream))
    assert tool(before, tmp_path / "out", "--to", to)[0] == 0
    assert hashed == (["model.safetensors", "config.json"] if to == "megagrow" else [])


def hashed_on_this_rank(folder: str) -> tuple[int, str]:
    opened, mesh, hashed, read = source.open_source(folder), make_mesh(ParallelConfig()), [], source._file_digest
    with mock.patch.object(source, "_file_digest", lambda stream: hashed.append(stream) or read(stream)):
        source.share_identity(opened, mesh)
        return len(hashed), opened.identity


def test_the_first_rank_hashes_a_folder_for_all(tmp_path) -> None:
    folder = save_folder(tmp_path / "folder", "llama")
    identity = source.open_source(folder).identity
    assert run_ranks(hashed_on_this_rank, 2, str(folder)) == [(2, identity), (0, identity)]


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


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize(("table", "row"), [("position_embeddings", 130), ("token_type_embeddings", 1)])
def test_every_position_and_token_type_is_compared(tmp_path, family, table, row) -> None:
    sizes = {"max_position_embeddings": 131, "type_vocab_size": 2}
    one, other = (save_folder(tmp_path / name, family, **sizes) for name in ("one", "other"))
    convert.check_equal(convert.compare(one, other))
    tensors = tensors_of(other)
    tensors[f"{family}.embeddings.{table}.weight"][row] *= -3  # a norm takes off what all elements share
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="the logits differ by"):
        convert.check_equal(convert.compare(one, other))


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
