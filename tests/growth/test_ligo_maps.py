"""Where LiGO's maps start: at sparse methods exactly, or as its authors' do; how many they are, and files of them."""

import dataclasses
import runpy
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from megagrow.config import GrowthConfig, ModelConfig
from megagrow.errors import CheckpointError, ConfigError
from megagrow.growth.grow import grow_whole
from megagrow.growth.ligo import Ligo
from megagrow.growth.ligo_file import describe_maps, load_maps, save_maps
from megagrow.growth.ligo_maps import Variant, base_map, initial_depth, initial_width, map_shapes, start_recipe
from megagrow.growth.methods import make_recipe
from megagrow.growth.recipe import Recipe
from megagrow.roles import parameter_names
from tests.growth import models
from tests.growth.models import make, tensors_of, widened
from tests.models import as_bert

TOOL = Path(__file__).parents[2] / "tools" / "inspect_maps.py"
WIDE = {"hidden": 2, "query": 2, "kv": 2, "ffn": 3}
DEEP = dataclasses.replace(models.LLAMA, num_layers=5)
BERT_SMALL = as_bert(
    ModelConfig(
        vocab_size=30522, hidden_size=512, num_layers=6, num_heads=8, head_dim=64, ffn_size=2048, max_seq_length=128
    )
)
BERT_BASE = dataclasses.replace(
    BERT_SMALL, hidden_size=768, num_layers=12, num_heads=12, num_kv_heads=12, ffn_size=3072
)


def weights_of(recipe: Recipe) -> dict[str, Tensor]:
    """What a recipe grows out of a model whose parameters are all random."""
    small = tensors_of(make(recipe.source))
    return {name: grow_whole(recipe, small.__getitem__, name) for name in parameter_names(recipe.target)}


def padded(model: ModelConfig, target: ModelConfig) -> ModelConfig:
    """The target with the eps that zero-padding needs."""
    return dataclasses.replace(target, norm_eps=model.norm_eps * model.hidden_size / target.hidden_size)


SPARSE = {
    "Stack": ("stack", models.LLAMA, widened(models.LLAMA, layers=5)),
    "Stack of a BERT": ("stack", models.BERT, widened(models.BERT, layers=4)),
    "Interpolation": ("interleave", models.GPT2, widened(models.GPT2, layers=4)),
    "Net2Net": ("net2net", models.LLAMA, widened(models.LLAMA, **WIDE)),
    "Net2Net, MHA, biases": ("net2net", models.GPT2, widened(models.GPT2, **WIDE)),
    "bert2BERT's FPI": ("fpi", models.BERT, dataclasses.replace(widened(models.BERT, query=2, kv=2), hidden_size=20)),
    "clone and identities": ("clone+insert_identity", models.EVERYTHING, widened(models.EVERYTHING, **WIDE, layers=5)),
    "middle": ("middle", DEEP, widened(DEEP, layers=7)),
    "key/value heads alone": ("ligo", models.MQA, widened(models.MQA, kv=2)),
    "new tokens": ("clone", models.TIED, dataclasses.replace(widened(models.TIED, **WIDE, layers=3), vocab_size=40)),
    "new tokens of a BERT": ("stack", models.BERT, dataclasses.replace(models.BERT, vocab_size=40)),
}
FILLED = {
    "rms_random": ("rms_random", models.LLAMA, widened(models.LLAMA, **WIDE, layers=3)),
    "rms_random of a BERT": ("rms_random", models.BERT, widened(models.BERT, **WIDE, layers=3)),
    "zero_pad": ("zero_pad", models.LLAMA, padded(models.LLAMA, widened(models.LLAMA, **WIDE, layers=3))),
    "zero_pad and identities": (
        "zero_pad+insert_identity",
        models.LLAMA,
        padded(models.LLAMA, widened(models.LLAMA, **WIDE, layers=5)),
    ),
    "direct_copy": ("direct_copy", models.GPT2, widened(models.GPT2, **WIDE)),
    "rms_random, new tokens": (
        "rms_random",
        models.LLAMA,
        dataclasses.replace(widened(models.LLAMA, **WIDE, layers=3), vocab_size=40),
    ),
}
STARTS = [(case, variant) for case in SPARSE for variant in get_args(Variant)] + [(c, "full_rank") for c in FILLED]


@pytest.mark.parametrize(("case", "variant"), STARTS)
def test_maps_of_a_sparse_method_grow_as_it_does(case: str, variant: Variant) -> None:
    """Appendix A of the paper, bit for bit, and in full rank also where new entries are random."""
    method, source, target = {**SPARSE, **FILLED}[case]
    expected = weights_of(make_recipe(method, source, target))
    ligo = Ligo(start_recipe(method, source, target), dtype=torch.double, variant=variant)
    found = weights_of(ligo.recipe())
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("variant", get_args(Variant))
def test_only_full_rank_exceeds_the_rank_of_the_source(variant: Variant) -> None:
    """With default settings: random blocks need a start that has units without a source."""
    growth = GrowthConfig(method="ligo", ligo_variant=variant)
    start = start_recipe(growth.maps_start, models.LLAMA, widened(models.LLAMA, **WIDE))
    ligo = Ligo(start, growth.ligo_noise, dtype=torch.double, variant=variant)
    weights = weights_of(ligo.recipe())
    ranks = [torch.linalg.matrix_rank(weights[f"layers.1.{leaf}.weight"]) for leaf in ("attention.query", "mlp.down")]
    bounds = [models.LLAMA.hidden_size, models.LLAMA.ffn_size]
    exceeds = [bool(rank > bound) for rank, bound in zip(ranks, bounds, strict=True)]
    assert exceeds == [variant == "full_rank"] * 2
    assert bool(ligo.fill) == (variant == "full_rank")


def test_methods_that_mix_layers_are_no_start() -> None:
    with pytest.raises(ConfigError, match="ligo_init=aki takes more than copies of one layer"):
        start_recipe("aki", models.BERT, widened(models.BERT, **WIDE))
    with pytest.raises(ConfigError, match="does not exist"):
        start_recipe("nothing", models.BERT, widened(models.BERT, **WIDE))


def test_the_authors_maps_of_bert_are_as_many_as_theirs() -> None:
    """6 x 512 -> 12 x 768: 30,178,234 in their code, of which 30,522 belong to a bias that nothing uses."""
    start = start_recipe("authors", BERT_SMALL, BERT_BASE)
    shapes = map_shapes(start, "target_layer")
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 30_147_712
    assert sum(torch.Size(shape).numel() for name, shape in shapes.items() if name.endswith(".ffn")) == 25_165_824
    assert sum(torch.Size(shape).numel() for name, shape in shapes.items() if name.startswith("depth.")) == 1_152


def test_the_authors_initial_maps() -> None:
    """Depth rows sum to 1 with 0.93 on the stacked layer; new rows average old ones, and so are 20 times smaller."""
    start = start_recipe("authors", BERT_SMALL, BERT_BASE)
    for leaf in ("attention.key_value.weight", "mlp.down.bias"):
        depth = initial_depth(start, leaf, "target_layer", noise=0.0)
        assert torch.allclose(depth.sum(-1), torch.ones(1).double())
        main = torch.eye(6).repeat(2, 1).bool().expand_as(depth)
        assert depth[main].mean().item() == pytest.approx(0.93, abs=0.01)
        assert depth[~main].mean().item() == pytest.approx(0.014, abs=0.002)
    base = base_map(start, "hidden")
    rows = initial_width(base, start, "target_layer", 0.0, "width.hidden")
    assert rows.shape == (256, 512) and rows.min() >= 0
    assert torch.allclose(rows.sum(1), torch.ones(1).double())
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).double()
    assert (weight.std() / (rows @ weight).std()).item() == pytest.approx(20, rel=0.1)
    assert torch.equal(initial_width(base, start, "tied", 0.0, "width.hidden")[512:], rows)


@pytest.mark.parametrize("variant", get_args(Variant))
def test_files_keep_the_variant_and_where_maps_began(variant: Variant, tmp_path: Path) -> None:
    start = start_recipe("rms_random", models.LLAMA, widened(models.LLAMA, **WIDE, layers=3), seed=7)
    ligo = Ligo(start, noise=0.2, variant=variant)
    save_maps(ligo, tmp_path / "maps.safetensors")
    again = load_maps(tmp_path / "maps.safetensors")
    assert (again.variant, again.noise, again.start.seed, again.start.method) == (variant, 0.2, 7, "rms_random")
    expected, found = (weights_of(maps.recipe()) for maps in (ligo, again))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_older_and_foreign_files_are_one_line(tmp_path: Path) -> None:
    file = tmp_path / "maps.safetensors"
    pair = models.LLAMA, widened(models.LLAMA, **WIDE)
    save_maps(Ligo(start_recipe("clone", *pair)), file)
    state, metadata = load_file(file), metadata_of(file)
    for change, words in [
        ({"maps": None}, "older version"),
        ({"maps": '{"variant": "other", "init": "clone", "noise": 0, "seed": 0}'}, "maps.variant is 'other'"),
        ({"maps": '{"variant": "tied", "init": "aki", "noise": 0, "seed": 0}'}, "ligo_init=aki"),
        ({"maps": '{"variant": "target_layer", "init": "clone", "noise": 0, "seed": 0}'}, "in the same variant"),
        ({"maps": '{"variant": "tied", "init": "clone", "noise": 0}'}, "maps.seed"),
        ({"maps": "[]"}, "maps"),
        (
            {"target": metadata["target"].replace('"vocab_size": 29', '"vocab_size": 2000000000')},
            "no tokenizer has that",
        ),
    ]:
        changed = {name: text for name, text in {**metadata, **change}.items() if text is not None}
        save_file(state, file, changed)
        with pytest.raises(CheckpointError, match=words) as refusal:
            load_maps(file)
        assert "\n" not in str(refusal.value) and str(file) in str(refusal.value)


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata())


def test_the_inspector_shows_what_maps_have_become(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ligo = Ligo(start_recipe("clone", models.LLAMA, widened(models.LLAMA, hidden=2, layers=3)))
    with torch.no_grad():
        ligo.widths["width.hidden"][0, 0] += 0.5
    save_maps(ligo, tmp_path / "maps.safetensors")
    _, facts = describe_maps(tmp_path / "maps.safetensors")
    by_name = {each.name: each for each in facts}
    hidden = by_name["width.hidden"]
    assert hidden.departure == pytest.approx(0.5) and hidden.row_sums == pytest.approx((1, 1.5))
    assert hidden.effective_rank == pytest.approx(12, abs=0.2)
    assert by_name["depth.mlp.down.weight"].departure == 0
    monkeypatch.syspath_prepend(str(TOOL.parent))
    monkeypatch.setattr(sys, "argv", [str(TOOL), str(tmp_path / "maps.safetensors")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(TOOL), run_name="__main__")
    printed = capsys.readouterr().out
    assert end.value.code in (None, 0)
    assert "LiGO, tied" in printed and "width.hidden" in printed and "0.5" in printed
