"""LiGO's maps: where they start, what they generate, and the gradients that come back to them."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megagrow.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
from megagrow.errors import CheckpointError, DataError
from megagrow.growth.grow import grow_whole, mesh_fetch
from megagrow.growth.ligo import Ligo, load_maps, save_maps
from megagrow.growth.methods import make_recipe
from megagrow.model import Transformer
from megagrow.parallel.fsdp import materialize
from megagrow.parallel.mesh import Mesh, make_mesh
from megagrow.parallel.pipeline import Batch
from megagrow.parallel.shards import fill
from megagrow.parallel.stages import own_stages
from megagrow.roles import leaves
from megagrow.train.part import build_part, gradients
from tests.growth import dense_ligo, models
from tests.growth.models import distance, make, make_ids, tensors_of, widened
from tests.ranks import run_ranks

WIDTH = {"hidden": 2, "query": 2, "kv": 2, "ffn": 2}
PAIRS = {
    "gqa": (models.LLAMA, widened(models.LLAMA, **WIDTH, layers=3)),
    "mha": (models.MHA, widened(models.MHA, **WIDTH, layers=3)),
    "gpt2": (models.GPT2, widened(models.GPT2, **WIDTH, layers=4)),
    "everything": (models.EVERYTHING, widened(models.EVERYTHING, **WIDTH, layers=3)),
    "uneven": (
        models.EVERYTHING,
        dataclasses.replace(models.EVERYTHING, hidden_size=20, num_heads=6, num_kv_heads=3, ffn_size=17, num_layers=3),
    ),
    "depth-only": (models.UNTIED_BIAS, widened(models.UNTIED_BIAS, layers=3)),
    "ffn-only": (models.GPT2, dataclasses.replace(models.GPT2, ffn_size=13)),
}


def make_ligo(source: ModelConfig, target: ModelConfig, noise: float = 0.5) -> Ligo:
    """Maps that have moved away from copies everywhere, so that every entry counts."""
    ligo = Ligo(make_recipe("ligo", source, target), noise, dtype=torch.double)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in ligo.parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).double())
    return ligo


def reference_gradients(ligo: Ligo, ids: Tensor) -> dict[str, Tensor]:
    """Gradients of the maps by autograd through the written-out algorithm and a dense model."""
    source, target = ligo.start.source, ligo.start.target
    maps = {name: p.detach().clone().requires_grad_() for name, p in ligo.parameters().items()}
    grown = dense_ligo.generate(source, target, tensors_of(make(source)), maps)
    loss = dense_ligo.loss_of(target, grown, ids[:, :-1], ids[:, 1:])
    return dict(zip(maps, torch.autograd.grad(loss, list(maps.values())), strict=True))


@pytest.mark.parametrize("pair", PAIRS)
def test_generates_what_the_algorithm_says(pair: str) -> None:
    source, target = PAIRS[pair]
    ligo, small = make_ligo(source, target), tensors_of(make(source))
    model = Transformer(target).double()
    ligo.generate(small.__getitem__, tensors_of(model))
    expected = dense_ligo.generate(source, target, small, ligo.state_dict())
    assert distance(tensors_of(model), expected) <= 1e-13


@pytest.mark.parametrize("pair", PAIRS)
def test_pulls_gradients_back_to_the_maps(pair: str) -> None:
    source, target = PAIRS[pair]
    ligo, small = make_ligo(source, target), tensors_of(make(source))
    model, ids = Transformer(target).double(), make_ids(source)
    ligo.generate(small.__getitem__, tensors_of(model))
    of_weights = models.gradients_of(model, ids)
    ligo.pull_back(small.__getitem__, tensors_of(model), of_weights, Mesh.single())
    found = {name: p.grad for name, p in ligo.parameters().items() if p.grad is not None}
    assert distance(found, reference_gradients(ligo, ids)) <= 1e-10


def config_of(model: ModelConfig, parallel: ParallelConfig) -> Config:
    train = TrainConfig(global_batch_size=4, microbatch_size=1)
    return Config(model=model, data=DataConfig(seq_length=7), parallel=parallel, train=train)


def sharded_gradients(source: ModelConfig, target: ModelConfig, parallel: ParallelConfig) -> dict[str, Tensor]:
    """One learning step in the mesh, with the source's shards in the same mesh."""
    mesh = make_mesh(parallel)
    whole, ligo = tensors_of(make(source)), make_ligo(source, target)
    torch.set_default_dtype(torch.double)  # of activations between stages too
    with torch.device("meta"):
        small = Transformer(source, mesh, stage=own_stages(source.num_layers, mesh)[0])
    materialize(small, list(small.layers.values()), source, mesh, None)
    for name, parameter in small.named_parameters():
        fill(parameter, whole[name])
    part = build_part(target, config_of(target, parallel), mesh)
    fetch = mesh_fetch(tensors_of(small), source, mesh)
    ligo.generate(fetch, part.parameters)
    ids = make_ids(source, batch=4).chunk(mesh.dp.size)[mesh.dp.rank]
    weights = torch.full((len(ids), 7), 1 / 28)
    part.engine.train_step(Batch(ids[:, :-1], ids[:, 1:], weights))
    ligo.pull_back(fetch, part.parameters, gradients(part.parameters), mesh)
    return {name: p.grad for name, p in ligo.parameters().items() if p.grad is not None}


LAYOUTS = [(2, 2, 1), (2, 1, 2), (2, 1, 1), (4, 2, 2), (4, 2, 1), (4, 1, 2)]


@pytest.mark.parametrize("pair", ["gqa", "everything"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: "-".join(map(str, x)))
def test_sharded_gradients_equal_one_process(pair: str, layout: tuple[int, int, int]) -> None:
    source, target = PAIRS[pair]
    ranks, tensor, pipeline = layout
    expected = reference_gradients(make_ligo(source, target), make_ids(source, batch=4))
    results = run_ranks(sharded_gradients, ranks, source, target, ParallelConfig(tensor, pipeline))
    for found in results:
        assert distance(found, expected) <= 1e-10
        assert all(torch.equal(found[name], results[0][name]) for name in found)


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("source", [models.LLAMA, models.GPT2], ids=["llama", "gpt2"])
def test_without_noise_ligo_starts_as_clone(source: ModelConfig, layers: int) -> None:
    target = widened(source, **WIDTH, layers=layers)
    small = tensors_of(make(source))
    ligo = Ligo(make_recipe("ligo", source, target), dtype=torch.double)
    model = Transformer(target).double()
    ligo.generate(small.__getitem__, tensors_of(model))
    clone = make_recipe("clone", source, target)
    expected = {name: grow_whole(clone, small.__getitem__, name) for name in tensors_of(model)}
    assert distance(tensors_of(model), expected) <= 1e-15


def test_noise_falls_on_new_rows_and_new_layers_only() -> None:
    source, target = models.LLAMA, widened(models.LLAMA, hidden=3, layers=5)
    start = make_recipe("ligo", source, target)
    silent, noisy = Ligo(start), Ligo(start, noise=0.5)
    moved = (noisy.maps["hidden"] - silent.maps["hidden"]).detach()
    assert not moved[::3].any()
    of_new_rows = moved.view(12, 3, 12)[:, 1:].std().item()
    assert of_new_rows == pytest.approx(0.5 / 12**0.5, rel=0.15)
    for leaf, weights in noisy.depth.items():
        assert torch.allclose(weights.sum(1), torch.ones(5))
        assert ((weights > 0.9) == (silent.depth[leaf] == 1)).all()
        assert ((weights > 0) & (weights < 0.03) == (silent.depth[leaf] == 0)).all()


def test_initial_maps_depend_on_seed_and_name() -> None:
    start = make_recipe("ligo", models.LLAMA, widened(models.LLAMA, **WIDTH, layers=4))
    one, same, other = (Ligo(start, noise=0.3, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["width.key"], one["width.value"])
    assert not torch.equal(one["depth.mlp_norm.weight"], one["depth.attention_norm.weight"])


def test_only_axes_that_grow_have_maps_and_attention_output_shares_the_values() -> None:
    mha = Ligo(make_recipe("ligo", models.MHA, widened(models.MHA, query=2, kv=2)))
    assert set(mha.maps) == {"query", "key", "value"}
    recipe = mha.recipe()
    assert recipe.axes["heads"] is recipe.axes["value"]
    gqa = Ligo(make_recipe("ligo", models.LLAMA, widened(models.LLAMA, query=2)))
    assert set(gqa.maps) == {"query", "heads"}
    assert set(gqa.depth) == set(leaves(models.LLAMA))
    deep = Ligo(make_recipe("ligo", models.LLAMA, widened(models.LLAMA, layers=4)))
    assert not deep.maps


def test_saved_maps_come_back(tmp_path: Path) -> None:
    ligo = Ligo(make_recipe("ligo", *PAIRS["uneven"]), noise=0.3)
    save_maps(ligo, tmp_path / "maps.safetensors")
    again = load_maps(tmp_path / "maps.safetensors")
    assert again.start.target == ligo.start.target
    for name, tensor in ligo.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_foreign_maps_are_refused(tmp_path: Path) -> None:
    ligo = Ligo(make_recipe("ligo", *PAIRS["gqa"]))
    other = Ligo(make_recipe("ligo", *PAIRS["mha"]))
    with pytest.raises(CheckpointError, match="same source and target sizes"):
        ligo.load_state_dict(other.state_dict())
    file = tmp_path / "maps.safetensors"
    with pytest.raises(CheckpointError, match="no file of learned maps"):
        load_maps(file)
    file.write_bytes(b"not a file of maps")
    with pytest.raises(CheckpointError, match="no file of learned maps"):
        load_maps(file)


def test_maps_that_cannot_be_written_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ligo = Ligo(make_recipe("ligo", *PAIRS["uneven"]))
    with pytest.raises(DataError, match="file"):
        save_maps(ligo, tmp_path / "file" / "maps.safetensors")
