"""Writing Hugging Face folders: complete and equal, or not there."""

import gc
import json
import os
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from megagrow.checkpoint.hf import HFReader, write_hf_folder
from megagrow.checkpoint.safetensors_file import SafetensorsFile
from megagrow.config import ModelConfig
from megagrow.errors import CheckpointError, ConfigError, DataError
from megagrow.parallel.shards import full
from megagrow.roles import parameter_names, parameter_shapes
from tests.checkpoint.hf_folders import (
    OWN_GPT2,
    OWN_LLAMA,
    logits_of,
    random_ids,
    save_folder,
    save_tokenizer,
    tensors_of,
)
from tests.ranks import run_ranks

NO_SPACE = OSError(28, "No space left on device")
FAMILIES = ["llama", "gpt2"]


def random_fetch(model: ModelConfig, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in parameter_shapes(model).items()
    }
    return weights.__getitem__


def copy(source: Path, target: Path, **options) -> HFReader:
    reader = HFReader(source)
    write_hf_folder(target, reader.model, reader.fetch, token_ids=reader.token_ids, **options)
    return reader


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_and_out_again_is_equal(tmp_path, family, tied, dtype) -> None:
    """Same files, same tensors bit for bit, same configuration as transformers wrote."""
    before = save_folder(tmp_path / "before", family, dtype, tie_word_embeddings=tied)
    copy(before, tmp_path / "after")
    old, new = tensors_of(before), tensors_of(tmp_path / "after")
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        assert tensor.dtype == new[name].dtype
        assert torch.equal(tensor, new[name]), name
    assert sorted(os.listdir(before)) == sorted(os.listdir(tmp_path / "after"))
    stated, written = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("before", "after"))
    changed = {key for key in stated.keys() | written.keys() if stated.get(key) != written.get(key)}
    dropout = {"attn_pdrop", "embd_pdrop", "resid_pdrop"}
    in_words = {"n_inner", "rope_theta", "transformers_version"}
    assert {key for key in changed if not key.startswith("summary_")} <= dropout | in_words


@pytest.mark.parametrize("family", FAMILIES)
def test_large_models_are_cut_into_files(tmp_path, family) -> None:
    before = save_folder(tmp_path / "before", family)
    copy(before, tmp_path / "after", shard_bytes=10_000)
    files = sorted(path.name for path in (tmp_path / "after").glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert files == [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    index = json.loads((tmp_path / "after" / "model.safetensors.index.json").read_text())
    tensors = tensors_of(before)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["metadata"]["total_parameters"] == sum(t.numel() for t in tensors.values())
    for file in files:
        held = [tensors[name].nbytes for name, place in index["weight_map"].items() if place == file]
        assert sum(held) <= 10_000 or len(held) == 1
    assert torch.equal(logits_of(tmp_path / "after", random_ids()), logits_of(before, random_ids()))


def test_another_dtype_on_request(tmp_path) -> None:
    copy(save_folder(tmp_path / "before", "gpt2"), tmp_path / "after", dtype=torch.bfloat16)
    before, after = tensors_of(tmp_path / "before"), tensors_of(tmp_path / "after")
    for name, tensor in before.items():
        assert torch.equal(tensor.bfloat16(), after[name]), name
    assert json.loads((tmp_path / "after" / "config.json").read_text())["dtype"] == "bfloat16"


def test_mixed_dtypes_are_stated_as_the_one_that_holds_them_all(tmp_path) -> None:
    fetch = random_fetch(OWN_LLAMA)

    def fetch_mixed(name: str) -> Tensor:
        return fetch(name).to(torch.float16 if "norm" in name else torch.bfloat16)

    write_hf_folder(tmp_path / "out", OWN_LLAMA, fetch_mixed)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_few_parameters_are_in_memory_at_a_time(tmp_path) -> None:
    """Only what waits for the rest of a fused tensor is kept: query beside key and value."""
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def fetch(name: str) -> Tensor:
        nonlocal most
        parameter = torch.zeros(parameter_shapes(OWN_GPT2)[name])
        alive.add(parameter)
        most = max(most, len(alive))
        return parameter

    gc.collect()
    write_hf_folder(tmp_path / "out", OWN_GPT2, fetch)
    assert most <= 3


def test_the_tokenizer_comes_along(tmp_path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    write_hf_folder(tmp_path / "out", OWN_LLAMA, random_fetch(OWN_LLAMA), tokenizer)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = loaded("grow the large model")["input_ids"]
    assert loaded.decode(ids).replace(" ", "") == "growthelargemodel"
    assert len(set(ids)) > 3
    end = loaded.convert_tokens_to_ids("<|endoftext|>")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == end
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == end


def test_stated_token_ids_go_before_the_tokenizers(tmp_path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    ids = {"eos_token_id": [4, 5], "bos_token_id": 3}
    fetch = random_fetch(OWN_LLAMA)
    write_hf_folder(tmp_path / "out", OWN_LLAMA, fetch, tokenizer, token_ids=ids)
    assert HFReader(tmp_path / "out").token_ids == ids


def test_a_tokenizer_of_another_model_is_refused(tmp_path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    model = replace(OWN_LLAMA, vocab_size=5)
    with pytest.raises(CheckpointError, match=r"tokenizer has \d+ tokens, more than model.vocab"):
        write_hf_folder(tmp_path / "out", model, random_fetch(model), tokenizer)
    with pytest.raises(DataError, match="nowhere"):
        write_hf_folder(tmp_path / "out", model, random_fetch(model), tmp_path / "nowhere")
    assert os.listdir(tmp_path) == ["tokenizer"]


def test_nothing_is_replaced_unless_asked_for(tmp_path) -> None:
    target, fetch = tmp_path / "out", random_fetch(OWN_GPT2)
    target.mkdir()
    write_hf_folder(target, OWN_GPT2, fetch)
    with pytest.raises(CheckpointError, match="out: is not empty"):
        write_hf_folder(target, OWN_LLAMA, random_fetch(OWN_LLAMA))
    assert HFReader(target).model == OWN_GPT2
    write_hf_folder(target, OWN_LLAMA, random_fetch(OWN_LLAMA), overwrite=True)
    assert HFReader(target).model == OWN_LLAMA
    assert os.listdir(tmp_path) == ["out"]


def test_what_is_no_hugging_face_folder_is_never_replaced(tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    for name, refusal in (("out", "out: is not empty"), ("file", "file: is not a folder")):
        with pytest.raises(CheckpointError, match=refusal):
            write_hf_folder(tmp_path / name, OWN_GPT2, random_fetch(OWN_GPT2), overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").exists() and (tmp_path / "file").is_file()


def test_what_cannot_be_expressed_is_refused_before_the_first_fetch(tmp_path) -> None:
    model = replace(OWN_GPT2, mlp_bias=False)
    with pytest.raises(ConfigError, match="model.mlp_bias=False"):
        write_hf_folder(tmp_path / "out", model, lambda name: pytest.fail(name))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("good_tensors", [0, 7])
def test_a_full_disk_leaves_nothing_and_no_rank_waiting(tmp_path, monkeypatch, good_tensors) -> None:
    written, fetched = [], []
    add = SafetensorsFile.add

    def fill_disk(file: SafetensorsFile, name: str, tensor: Tensor) -> None:
        written.append(name)
        if len(written) > good_tensors:
            raise NO_SPACE
        add(file, name, tensor)

    def fetch(name: str) -> Tensor:
        fetched.append(name)
        return random_fetch(OWN_LLAMA)(name)

    monkeypatch.setattr(SafetensorsFile, "add", fill_disk)
    with pytest.raises(CheckpointError, match="out: cannot be written .No space left on device."):
        write_hf_folder(tmp_path / "out", OWN_LLAMA, fetch)
    assert len(written) == good_tensors + 1
    assert fetched == parameter_names(OWN_LLAMA)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [CheckpointError("damaged"), KeyboardInterrupt()])
def test_a_fetch_that_fails_leaves_nothing(tmp_path, error) -> None:
    def fetch(name: str) -> Tensor:
        if name == "layers.1.mlp.down.weight":
            raise error
        return random_fetch(OWN_LLAMA)(name)

    with pytest.raises(type(error)):
        write_hf_folder(tmp_path / "out", OWN_LLAMA, fetch)
    assert os.listdir(tmp_path) == []


def export_collectively(folder: str, fails: bool) -> str:
    """Gathers every parameter from both ranks; rank 1 writes. Returns what went wrong."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = random_fetch(OWN_LLAMA)
    shards = {n: distribute_tensor(whole(n), mesh, [Shard(0)]) for n in parameter_names(OWN_LLAMA)}
    target = Path(folder) / ("taken" if fails else "out")
    try:
        write_hf_folder(target, OWN_LLAMA, lambda name: full(shards[name]), is_writer=dist.get_rank() == 1)
    except CheckpointError as error:
        return str(error)
    return ""


def test_ranks_export_together(tmp_path) -> None:
    assert run_ranks(export_collectively, 2, str(tmp_path), False) == ["", ""]
    reader = HFReader(tmp_path / "out")
    for name in parameter_names(reader.model):
        assert torch.equal(reader.fetch(name), random_fetch(OWN_LLAMA)(name)), name


def test_a_writer_that_fails_keeps_no_rank_waiting(tmp_path) -> None:
    (tmp_path / "taken").touch()
    first, second = run_ranks(export_collectively, 2, str(tmp_path), True, timeout=30)
    assert first == ""
    assert "taken: is not a folder" in second
