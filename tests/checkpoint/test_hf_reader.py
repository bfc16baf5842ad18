"""Reading Hugging Face folders: the right numbers from good ones, one clear line from bad ones."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from megagrow.checkpoint.hf import HFReader, is_hf_folder
from megagrow.checkpoint.source import open_source
from megagrow.errors import CheckpointError
from megagrow.roles import parameter_names, parameter_shapes
from tests.checkpoint.hf_folders import LLAMA, random_model, save_folder, tensors_of


def refusal(folder: Path) -> str:
    """The one line with which a folder is refused."""
    with pytest.raises(CheckpointError) as caught:
        reader = HFReader(folder)
        for name in parameter_names(reader.model):
            reader.fetch(name)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes the tensors of a folder with one file."""
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder: Path) -> Path:
    """Cuts the weights of a Llama folder into several files with an index."""
    (folder / "model.safetensors").unlink()
    random_model("llama").save_pretrained(folder, max_shard_size="20KB")
    return folder / "model.safetensors.index.json"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_folder(tmp_path / "llama", "llama")


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    return save_folder(tmp_path / "gpt2", "gpt2")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_have_our_shapes_and_the_stored_dtype(tmp_path, family, dtype) -> None:
    reader = HFReader(save_folder(tmp_path, family, dtype))
    for name, shape in parameter_shapes(reader.model).items():
        parameter = reader.fetch(name)
        assert (tuple(parameter.shape), parameter.dtype) == (shape, dtype), name
        assert parameter.is_contiguous()


def test_llama_rows_are_regrouped(llama) -> None:
    reader, stored = HFReader(llama), tensors_of(llama)
    key, value = (stored[f"model.layers.2.self_attn.{part}_proj.weight"] for part in "kv")
    fused = reader.fetch("layers.2.attention.key_value.weight")
    head_dim = 6
    assert torch.equal(fused[head_dim : 2 * head_dim], value[:head_dim])
    assert torch.equal(fused[2 * head_dim : 3 * head_dim], key[head_dim:])
    up = stored["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(reader.fetch("layers.1.mlp.gate_up.weight")[1::2], up)


def test_gpt2_matrices_are_turned_and_cut(gpt2) -> None:
    reader, stored = HFReader(gpt2), tensors_of(gpt2)
    fused = stored["transformer.h.1.attn.c_attn.weight"]
    assert torch.equal(reader.fetch("layers.1.attention.query.weight"), fused[:, :24].T)
    assert torch.equal(reader.fetch("layers.1.attention.key_value.weight")[:6], fused[:, 24:30].T)
    bias = stored["transformer.h.1.attn.c_attn.bias"]
    assert torch.equal(reader.fetch("layers.1.attention.key_value.bias")[6:12], bias[48:54])
    down = stored["transformer.h.0.mlp.c_proj.weight"]
    assert torch.equal(reader.fetch("layers.0.mlp.down.weight"), down.T)


def test_several_files_read_like_one(tmp_path, llama) -> None:
    cut = save_folder(tmp_path / "cut", "llama")
    assert len(set(json.loads(shard(cut).read_text())["weight_map"].values())) > 2
    one, several = HFReader(llama), HFReader(cut)
    for name in parameter_names(one.model):
        assert torch.equal(one.fetch(name), several.fetch(name)), name


def test_a_folder_saved_without_its_head_reads_the_same(tmp_path, gpt2) -> None:
    whole = transformers.GPT2LMHeadModel.from_pretrained(gpt2)
    whole.transformer.save_pretrained(tmp_path / "body")
    assert not any(name.startswith("transformer.") for name in tensors_of(tmp_path / "body"))
    body, full = HFReader(tmp_path / "body"), HFReader(gpt2)
    for name in parameter_names(full.model):
        assert torch.equal(body.fetch(name), full.fetch(name)), name


def test_token_ids_are_kept(llama) -> None:
    assert HFReader(llama).token_ids == {"bos_token_id": 3, "eos_token_id": [4, 5]}


def test_token_ids_of_generation_go_first(llama) -> None:
    """Chat models end their turn with a token that config.json does not name."""
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 4], "pad_token_id": 6, "top_p": 0.8}))
    assert HFReader(llama).token_ids == {"bos_token_id": 3, "eos_token_id": [7, 4], "pad_token_id": 6}
    (llama / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id='</s>' must be a token id"):
        HFReader(llama)


@pytest.mark.parametrize("ids", ["</s>", [4, "5"], 4.0, True, 2**31])
def test_token_ids_that_are_none_are_refused(llama, ids) -> None:
    edit(llama / "config.json", eos_token_id=ids)
    with pytest.raises(CheckpointError, match=r"config\.json: eos_token_id=.* must be a token id"):
        HFReader(llama)


def test_buffers_are_passed_over(gpt2) -> None:
    def parameters() -> dict[str, torch.Tensor]:
        reader = HFReader(gpt2)
        return {name: reader.fetch(name) for name in parameter_names(reader.model)}

    before = parameters()
    rewrite(gpt2, lambda tensors: tensors.update({"transformer.h.0.attn.bias": torch.ones(4)}))
    assert all(torch.equal(tensor, before[name]) for name, tensor in parameters().items())


def test_a_stored_copy_of_a_tied_head_is_compared(gpt2) -> None:
    def copy_head(tensors: dict) -> None:
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()

    def change_head(tensors: dict) -> None:
        tensors["lm_head.weight"][60, 23] += 1

    before = HFReader(gpt2).fetch("embedding.tokens")
    rewrite(gpt2, copy_head)
    assert torch.equal(HFReader(gpt2).fetch("embedding.tokens"), before)
    rewrite(gpt2, change_head)
    assert "lm_head.weight differs from transformer.wte.weight" in refusal(gpt2)


def test_a_tied_embedding_may_be_stored_as_the_head(gpt2) -> None:
    before = HFReader(gpt2).fetch("embedding.tokens")
    rewrite(gpt2, lambda t: t.update({"lm_head.weight": t.pop("transformer.wte.weight")}))
    assert torch.equal(HFReader(gpt2).fetch("embedding.tokens"), before)


NORM, GATE = "model.norm.weight", "model.layers.1.mlp.gate_proj.weight"
CHANGES: list[tuple[Callable[[dict], object], list[str]]] = [
    (lambda t: t.pop(GATE), [f"tensor {GATE} is missing"]),
    (lambda t: t.pop("lm_head.weight"), ["tensor lm_head.weight is missing"]),
    (lambda t: t.update({NORM: torch.ones(23)}), [NORM, "[23]", "asks for [24]"]),
    (lambda t: t.update({GATE: t[GATE].T.contiguous()}), [GATE, "[24, 40]", "asks for [40, 24]"]),
    (lambda t: t.update({GATE: t[GATE].to(torch.int8)}), [GATE, "stored as I8"]),
    (lambda t: t.update({GATE: t[GATE].half()}), [GATE, "float16 and float32", "one dtype"]),
    (lambda t: t.update({"extra": torch.ones(1)}), ["tensor extra has no place", "would be lost"]),
    (
        lambda t: t.update({"model.layers.3.input_layernorm.weight": torch.ones(24)}),
        ["model.layers.3.input_layernorm.weight has no place"],
    ),
    (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(24)}),
        ["q_proj.bias has no place"],
    ),
]


@pytest.mark.parametrize(("change", "phrases"), CHANGES)
def test_tensors_that_do_not_fit_are_named(llama, change, phrases) -> None:
    rewrite(llama, change)
    message = refusal(llama)
    assert all(phrase in message for phrase in phrases), message


def test_a_damaged_file_is_named(llama) -> None:
    path = llama / "model.safetensors"
    raw = path.read_bytes()
    for damaged in (raw[:-1], raw[:100], b"", b"\xff" * 100, struct.pack("<Q", 2) + b"[]"):
        path.write_bytes(damaged)
        assert f"{path}: damaged or not a safetensors file" in refusal(llama)


def test_an_adapter_beside_the_weights_is_refused(llama) -> None:
    """transformers would add it to them, where peft is installed."""
    (llama / "adapter_config.json").write_text("{}")
    assert "adapter_config.json" in refusal(llama) and "merge" in refusal(llama)


def test_more_layers_than_tensors_are_refused_at_once(llama) -> None:
    edit(llama / "config.json", num_hidden_layers=2**30)
    assert "num_hidden_layers=1073741824, but the folder holds only" in refusal(llama)


def test_missing_weights_are_named(llama) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    assert "neither model.safetensors nor model.safetensors.index.json" in refusal(llama)


def test_a_missing_file_of_several_is_named(llama) -> None:
    index = json.loads(shard(llama).read_text())
    missing = llama / index["weight_map"][NORM]
    missing.unlink()
    assert f"{missing}: cannot be read (No such file" in refusal(llama)


@pytest.mark.parametrize(
    "name",
    [
        "../llama2/model.safetensors",
        "/etc/model.safetensors",
        "sub/m.safetensors",
        "..\\m.safetensors",
        "pytorch_model.bin",
        "..",
        "",
        7,
    ],
)
def test_the_index_cannot_name_files_elsewhere(llama, name) -> None:
    save_folder(llama.with_name("llama2"), "llama")
    index = shard(llama)
    weight_map = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=weight_map | {NORM: name})
    message = refusal(llama)
    assert f"{index}: weight_map places {NORM} in {name!r}" in message


@pytest.mark.parametrize("weight_map", [None, [], {}, "model.safetensors"])
def test_an_index_without_a_map_is_named(llama, weight_map) -> None:
    index = shard(llama)
    edit(index, weight_map=weight_map)
    assert f"{index}: weight_map must name" in refusal(llama)


def test_an_index_that_is_wrong_about_a_tensor_is_refused(llama) -> None:
    index = shard(llama)
    weight_map = json.loads(index.read_text())["weight_map"]
    other = next(file for file in weight_map.values() if file != weight_map[NORM])
    edit(index, weight_map=weight_map | {NORM: other})
    assert f"{llama / other}: tensor {NORM} is missing" in refusal(llama)


def test_a_tensor_in_two_files_is_refused(llama) -> None:
    index = shard(llama)
    weight_map = json.loads(index.read_text())["weight_map"]
    save_file({NORM: torch.ones(24)}, llama / "again.safetensors")
    edit(index, weight_map=weight_map | {"again": "again.safetensors"})
    assert f"tensor {NORM} stands in" in refusal(llama)


def test_folders_of_hugging_face_are_recognised(tmp_path, llama) -> None:
    assert is_hf_folder(llama)
    assert not is_hf_folder(tmp_path / "nothing")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"model": LLAMA, "data": {}}))
    assert not is_hf_folder(run)
    (llama / "config.json").write_text("{")
    assert is_hf_folder(llama)
    assert "config.json: not valid JSON" in refusal(llama)


@pytest.mark.parametrize(("window", "note"), [(None, ""), (40, "the sliding window of 40 tokens")])
def test_a_window_that_is_not_kept_is_said(tmp_path: Path, window: int | None, note: str) -> None:
    """Nothing keeps a run from sequences that are longer than the context which the folder states."""
    source = open_source(save_folder(tmp_path, "mistral", sliding_window=window))
    assert source.window == window
    assert note in source.note and bool(source.note) == bool(note) and "\n" not in source.note
