"""LiGO's maps: where they start, what they generate, and the gradients that come back to them."""

import dataclasses
import itertools
import weakref
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megagrow.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
from megagrow.errors import CheckpointError, DataError
from megagrow.growth import grow
from megagrow.growth.grow import Shards, grow_whole, mesh_fetch
from megagrow.growth.ligo import Ligo
from megagrow.growth.ligo_file import load_maps, save_maps
from megagrow.growth.ligo_maps import Variant, keeps_old_rows, start_recipe
from megagrow.growth.methods import make_recipe
from megagrow.growth.recipe import Fill
from megagrow.model import Transformer
from megagrow.parallel.fsdp import materialize
from megagrow.parallel.mesh import Mesh, make_mesh
from megagrow.parallel.pipeline import Batch
from megagrow.parallel.shards import fill, full
from megagrow.parallel.stages import own_stages
from megagrow.roles import leaves, parameter_shapes, role_of, split_name
from megagrow.train.part import build_part, gradients
from tests.growth import dense_ligo, models
from tests.growth.models import distance, make, make_ids, tensors_of, widened
from tests.ranks import run_ranks

VARIANTS: list[Variant] = ["tied", "source_layer", "target_layer", "full_rank"]
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
    "bert": (models.BERT, widened(models.BERT, **WIDTH, layers=3)),
    "roberta": (models.UNTIED_ROBERTA, widened(models.UNTIED_ROBERTA, **WIDTH, layers=3)),
    "tokens": (models.LLAMA, dataclasses.replace(widened(models.LLAMA, **WIDTH, layers=3), vocab_size=36)),
    "tokens of a bert": (models.BERT, dataclasses.replace(widened(models.BERT, hidden=2, layers=3), vocab_size=31)),
    "tokens only": (models.MHA, dataclasses.replace(models.MHA, vocab_size=31)),
    "ffn-only": (models.GPT2, dataclasses.replace(models.GPT2, ffn_size=13)),
    "kv-only": (models.LLAMA, widened(models.LLAMA, kv=2)),
}
# Of [I; C] the authors' maps append new heads, which takes query heads from key/value heads that grow alone.
FORMULAS = [
    (pair, variant) for pair in PAIRS for variant in VARIANTS if pair != "kv-only" or not keeps_old_rows(variant)
]


def make_ligo(
    source: ModelConfig, target: ModelConfig, variant: Variant = "tied", layers: Collection[int] | None = None
) -> Ligo:
    """Maps that have moved away from where they start everywhere, so that every entry counts."""
    start = start_recipe("authors" if variant in ("target_layer", "full_rank") else "clone", source, target)
    if variant == "full_rank":
        uses = itertools.product(start.axes.keys() - {"vocab"}, ("out", "in"))
        start = dataclasses.replace(start, fill=dataclasses.replace(start.fill, free=frozenset(uses), std="source"))
    ligo = Ligo(start, 0.5, dtype=torch.double, variant=variant, layers=layers)
    with torch.no_grad():
        for name, parameter in ligo.parameters().items():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.double))
    return ligo


def reference(ligo: Ligo, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The target's parameters by the formulas written out."""
    source, target = ligo.start.source, ligo.start.target
    is_scaled, small = ligo.start.method == "clone", tensors_of(make(source))
    grown = dense_ligo.generate(source, target, small, maps, ligo.variant, is_scaled)
    if ligo.variant != "full_rank":
        return grown
    without = dataclasses.replace(ligo.start, fill=Fill(average=ligo.start.fill.average))
    for name, tensor in grown.items():
        filled, empty = (grow_whole(recipe, small.__getitem__, name) for recipe in (ligo.start, without))
        layer, leaf = split_name(name)
        scales = maps.get(f"fill.{leaf}")
        assert (scales is not None) == bool((filled != empty).any()), name
        if scales is not None:
            grown[name] = tensor + scales[layer or 0] * (filled - empty)
    return grown


def reference_gradients(ligo: Ligo, ids: Tensor) -> dict[str, Tensor]:
    """Gradients of the maps by autograd through the written-out formulas and a dense model."""
    maps = {name: p.detach().clone().requires_grad_() for name, p in ligo.parameters().items()}
    loss = dense_ligo.loss_of(ligo.start.target, reference(ligo, maps), ids[:, :-1], ids[:, 1:])
    return dict(zip(maps, torch.autograd.grad(loss, list(maps.values())), strict=True))


@pytest.mark.parametrize(("pair", "variant"), FORMULAS)
def test_generates_what_the_formulas_say(pair: str, variant: Variant) -> None:
    """Algorithm 1 of the paper, its section 3.3, and [I; C] of the authors' code, biases, norms and heads included."""
    source, target = PAIRS[pair]
    ligo, small = make_ligo(source, target, variant), tensors_of(make(source))
    model = Transformer(target).double()
    ligo.generate(small.__getitem__, tensors_of(model))
    expected = reference(ligo, ligo.state_dict())
    assert distance(tensors_of(model), expected) <= 1e-13
    whole = {name: grow_whole(ligo.recipe(), small.__getitem__, name) for name in expected}
    assert distance(whole, expected) <= 1e-13


@pytest.mark.parametrize(("pair", "variant"), FORMULAS)
def test_pulls_gradients_back_to_the_maps(pair: str, variant: Variant) -> None:
    source, target = PAIRS[pair]
    ligo, small = make_ligo(source, target, variant), tensors_of(make(source))
    model, ids = Transformer(target).double(), make_ids(target)
    ligo.generate(small.__getitem__, tensors_of(model))
    of_weights = models.gradients_of(model, ids)
    ligo.pull_back(small.__getitem__, tensors_of(model), of_weights, Mesh.single())
    found = {name: p.grad for name, p in ligo.parameters().items() if p.grad is not None}
    assert distance(found, reference_gradients(ligo, ids)) <= 1e-10
    assert not of_weights


@pytest.mark.parametrize("variant", ["tied", "full_rank"])
@pytest.mark.parametrize("pair", ["gqa", "everything", "roberta", "depth-only"])
def test_what_grows_row_by_row_is_grown_in_pieces(pair: str, variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random entries are those of their place in the whole, and as large as all of the source."""
    monkeypatch.setattr(grow, "ROWS", 5)
    test_generates_what_the_formulas_say(pair, variant)
    test_pulls_gradients_back_to_the_maps(pair, variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_weights_go_as_they_are_used(variant: Variant) -> None:
    """Before each source tensor that is read, no more gradients are alive than are still needed."""
    source, target = PAIRS["gqa"]
    ligo, small = make_ligo(source, target, variant), tensors_of(make(source))
    model, ids = Transformer(target).double(), make_ids(source)
    ligo.generate(small.__getitem__, tensors_of(model))
    of_weights = models.gradients_of(model, ids)
    model.zero_grad()
    alive, names = {name: weakref.ref(gradient) for name, gradient in of_weights.items()}, list(leaves(target))

    def fetch(name: str) -> Tensor:
        layer, leaf = split_name(name)
        used = names if layer is None else names[: names.index(leaf)]
        assert not [name for name, gradient in alive.items() if split_name(name)[1] in used and gradient() is not None]
        return small[name]

    ligo.pull_back(fetch, tensors_of(model), of_weights, Mesh.single())
    assert not any(gradient() is not None for gradient in alive.values())


@pytest.mark.parametrize("variant", ["tied", "source_layer", "target_layer"])
def test_maps_can_be_on_another_device_than_what_grows(variant: Variant) -> None:
    source, target = PAIRS["everything"]
    ligo, small = make_ligo(source, target, variant), tensors_of(make(source))
    boxes = {name: tuple(map(slice, [0, 0], shape)) for name, shape in parameter_shapes(target).items()}
    grown = grow.grown_boxes(ligo.recipe(), small.__getitem__, boxes, torch.device("meta"))
    assert {name: (x.device.type, x.requires_grad) for name, _, x in grown} == dict.fromkeys(boxes, ("meta", True))


def test_a_factor_of_random_entries_comes_to_their_device() -> None:
    source, target = PAIRS["gqa"]
    recipe, asked = make_ligo(source, target, "full_rank").recipe(), list[torch.device]()

    class Elsewhere:
        def to(self, like: Tensor) -> Tensor:
            asked.append(like.device)
            return torch.tensor(2.0).to(like)

    name = "layers.1.mlp.down.weight"
    elsewhere = dataclasses.replace(recipe, fill_scales={"mlp.down.weight": [Elsewhere()] * 3})  # type: ignore[dict-item]
    grow_whole(elsewhere, tensors_of(make(source)).__getitem__, name)
    assert asked == [torch.device("cpu")]


def config_of(model: ModelConfig, parallel: ParallelConfig) -> Config:
    train = TrainConfig(global_batch_size=4, microbatch_size=1)
    return Config(model=model, data=DataConfig(seq_length=7), parallel=parallel, train=train)


def on_shards(cases: Sequence[tuple[str, Variant]], parallel: ParallelConfig) -> list[tuple[Any, Any, float]]:
    """Of each case, one learning step in the mesh, with the source's shards in the same mesh.

    Returns:
        What the maps generate; the gradients of those that this rank holds, and their norm over all ranks.
    """
    mesh, wholes = make_mesh(parallel), {pair: tensors_of(make(PAIRS[pair][0])) for pair, _ in cases}
    torch.set_default_dtype(torch.double)  # of activations between stages too
    with mock.patch.object(grow, "ROWS", 5):  # pieces of an embedding, on every rank several
        return [learning_step(pair, variant, wholes[pair], mesh) for pair, variant in cases]


def learning_step(pair: str, variant: Variant, whole: Mapping[str, Tensor], mesh: Mesh) -> tuple[Any, Any, float]:
    source, target = PAIRS[pair]
    with torch.device("meta"):
        small = Transformer(source, mesh, stage=own_stages(source.num_layers, mesh)[0])
    materialize(small, list(small.layers.values()), source, mesh, None)
    for name, parameter in small.named_parameters():
        fill(parameter, whole[name])
    part = build_part(target, config_of(target, mesh.parallel), mesh)
    ligo = make_ligo(source, target, variant, own_stages(target.num_layers, mesh)[0].layers)
    of_mesh, gathered = mesh_fetch(tensors_of(small), source, mesh), set[str]()

    def gather(name: str) -> Tensor:
        gathered.add(name)
        return of_mesh(name)

    fetch = Shards(gather, of_mesh.piece, of_mesh.rms)
    ligo.generate(fetch, part.parameters)
    ids = make_ids(target, batch=4).chunk(mesh.dp.size)[mesh.dp.rank]
    weights = torch.full((len(ids), 7), 1 / 28)
    part.engine.train_step(Batch(ids[:, :-1], ids[:, 1:], weights))
    ligo.pull_back(fetch, part.parameters, gradients(part.parameters), mesh)
    is_longer = source.vocab_size != target.vocab_size
    assert is_longer or not any(role_of(name).out in ("vocab", "positions") for name in gathered)
    found = {name: p.grad for name, p in ligo.parameters().items() if p.grad is not None}
    generated = {name: full(p) for name, p in part.parameters.items()}
    return generated, found, ligo.gradient_norm(mesh).item()


CASES: list[tuple[str, Variant]] = [
    *(("gqa", "tied"), ("everything", "tied"), ("everything", "source_layer")),
    *(("gqa", "target_layer"), ("bert", "target_layer"), ("everything", "full_rank")),
    *(("ffn-only", "full_rank"), ("depth-only", "full_rank")),  # maps that only their own stage has
    *(("tokens of a bert", "source_layer"), ("kv-only", "tied")),
]
LAYOUTS = [(2, 2, 1), (2, 1, 2), (4, 1, 2), (8, 2, 2)]  # ranks, tensor, pipeline
SLOW_LAYOUTS = [(2, 1, 1), (4, 2, 2), (4, 2, 1)]  # of slow_ligo.py


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: "-".join(map(str, x)))
def test_shards_and_their_gradients_equal_one_process(layout: tuple[int, int, int]) -> None:
    assert_shards_equal_one_process(*layout)


def assert_shards_equal_one_process(ranks: int, tensor: int, pipeline: int) -> None:
    """Maps of one target layer are on its own stage; what several ranks hold is the same on all of them."""
    results = run_ranks(on_shards, ranks, CASES, ParallelConfig(tensor, pipeline))
    for case, (pair, variant) in enumerate(CASES):
        ligo = make_ligo(*PAIRS[pair], variant)
        expected = reference_gradients(ligo, make_ids(ligo.start.target, batch=4))
        weights = reference(ligo, ligo.state_dict())
        norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm().item()
        of_layer = [name for name in expected if keeps_old_rows(variant) and ".layers." in name]
        found: dict[str, Tensor] = {}
        for generated, of_maps, its_norm in (result[case] for result in results):
            assert distance(generated, {name: weights[name] for name in generated}) <= 1e-12
            assert its_norm == pytest.approx(norm, rel=1e-10)
            assert all(torch.equal(of_maps[name], found[name]) for name in of_maps.keys() & found.keys())
            assert (len(of_maps) < len(expected)) == (pipeline > 1 and bool(of_layer))
            found |= of_maps
        assert distance(found, expected) <= 1e-10


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
    moved = (noisy.widths["width.hidden"] - silent.widths["width.hidden"]).detach()
    assert not moved[::3].any()
    of_new_rows = moved.view(12, 3, 12)[:, 1:].std().item()
    assert of_new_rows == pytest.approx(0.5 / 12**0.5, rel=0.15)
    for leaf, weights in noisy.depth.items():
        assert torch.allclose(weights.sum(-1), torch.ones(weights.shape[0], 5))
        assert ((weights > 0.9) == (silent.depth[leaf] == 1)).all()
        assert ((weights > 0) & (weights < 0.03) == (silent.depth[leaf] == 0)).all()


def test_initial_maps_depend_on_seed_and_name() -> None:
    pair = models.LLAMA, widened(models.LLAMA, **WIDTH, layers=4)
    starts = [start_recipe("clone", *pair, seed) for seed in (1, 1, 2)]
    one, same, other = (Ligo(start, noise=0.3).state_dict() for start in starts)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["width.key"], one["width.value"])
    assert not torch.equal(one["depth.mlp_norm.weight"], one["depth.attention_norm.weight"])


def test_only_axes_that_grow_have_maps_and_attention_output_shares_the_values() -> None:
    mha = Ligo(make_recipe("ligo", models.MHA, widened(models.MHA, query=2, kv=2)))
    assert set(mha.widths) == {"width.query", "width.key", "width.value"}
    recipe = mha.recipe()
    assert recipe.axes["heads"] is recipe.axes["value"]
    gqa = Ligo(make_recipe("ligo", models.LLAMA, widened(models.LLAMA, query=2)))
    assert set(gqa.widths) == {"width.query", "width.heads"}
    assert set(gqa.depth) == set(leaves(models.LLAMA))
    deep = Ligo(make_recipe("ligo", models.LLAMA, widened(models.LLAMA, layers=4)))
    assert not deep.widths


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
