"""Growth from folder to folder, and the command that does it."""

import dataclasses
import json
import math
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from megagrow.checkpoint import hf, store
from megagrow.checkpoint.source import Source, load_model, open_source
from megagrow.config import Config, ModelConfig, ParallelConfig
from megagrow.config_file import dump, to_dict
from megagrow.errors import CheckpointError, ConfigError
from megagrow.growth.grow import grow_whole
from megagrow.growth.ligo import Ligo
from megagrow.growth.ligo_file import save_maps
from megagrow.growth.ligo_maps import Variant, start_recipe
from megagrow.growth.methods import make_recipe
from megagrow.growth.moments import QUANTITIES, grow_multipliers
from megagrow.growth.offline import grow_folder
from megagrow.growth.verify import function_change
from megagrow.ledger import Ledger, Phase
from megagrow.parallel.mesh import Mesh, make_mesh
from megagrow.plan.measure import peak_memory
from megagrow.roles import parameter_names, parameter_shapes
from tests.growth import models
from tests.growth.models import make, make_ids, tensors_of, widened
from tests.growth.test_sharded_growth import moments_of
from tests.ranks import run_ranks
from tests.tools import run_tool

SOURCE = dataclasses.replace(models.LLAMA, num_kv_heads=4)
WIDE = widened(SOURCE, hidden=2, query=2, kv=2, ffn=3)
GPT2 = dataclasses.replace(models.GPT2, ffn_size=48, head_dim=3)
STEP = 11
ALLOWANCE = 1 << 20  # for pieces of rows
LEDGER = Ledger(phases=[Phase("train", steps=1, tokens=1, flops=1e6, seconds=2.0)])

grow_command = partial(run_tool, "grow_checkpoint")


def save_own(folder: Path, model: ModelConfig, dtype: torch.dtype = torch.float32) -> Source:
    """A checkpoint in the middle of a training run."""
    tensors = {f"model.{name}": t.to(dtype) for name, t in tensors_of(make(model)).items()}
    for moment in QUANTITIES:
        named = moments_of(model, moment)
        tensors |= {f"optim.{moment}.{name}": t.float() for name, t in named.items()}
    optimizer = {"step": STEP, "multipliers": {"final_norm.weight": {"lr": 0.5}}}
    state = {"model": to_dict(model), "optimizer": optimizer, "ledger": LEDGER.to_dict()}
    config = to_dict(Config(model=model))
    store.save(folder, STEP, tensors, state, config=config, provenance={})
    return open_source(folder)


def save_hf(folder: Path, model: ModelConfig, dtype: torch.dtype) -> Source:
    tensors = {name: tensor.to(dtype) for name, tensor in tensors_of(make(model)).items()}
    hf.write_hf_folder(folder, model, tensors.__getitem__)
    return open_source(folder)


def test_own_checkpoint_grows_with_its_moments(tmp_path: Path) -> None:
    source = save_own(tmp_path / "small", SOURCE)
    recipe = make_recipe("clone", SOURCE, WIDE)
    grow_folder(source, tmp_path / "large", recipe, Mesh.single())
    large = open_source(tmp_path / "large")
    assert large.model == WIDE
    assert large.ledger == source.ledger
    assert large.optimizer is not None
    assert large.optimizer["step"] == STEP
    lr = grow_multipliers(recipe, "exact")["final_norm.weight"].lr / 2
    assert large.optimizer["multipliers"]["final_norm.weight"]["lr"] == lr
    for name in parameter_names(WIDE):
        assert torch.equal(large.fetch(name), grow_whole(recipe, source.fetch, name))
        for moment, quantity in QUANTITIES.items():

            def fetch(source_name: str, moment: str = moment) -> Tensor:
                return source.read(f"optim.{moment}.{source_name}")

            grown = large.read(f"optim.{moment}.{name}")
            assert torch.equal(grown, grow_whole(recipe, fetch, name, quantity))
            assert grown.all()
    loaded = [load_model(s, Mesh.single(), torch.double) for s in (source, large)]
    assert function_change(*loaded, make_ids(SOURCE)) <= 1e-6
    provenance = store.read_manifest(large.path).provenance["grew_from"][0]
    assert provenance["identity"] == source.identity


def test_a_grown_checkpoint_knows_its_new_part(tmp_path: Path) -> None:
    source = save_own(tmp_path / "small", SOURCE)
    grow_folder(source, tmp_path / "large", make_recipe("clone", SOURCE, WIDE), Mesh.single(), "asymmetric")
    large = open_source(tmp_path / "large")
    assert large.optimizer is not None
    part = large.optimizer["new_part"]
    assert (part["since"], part["starts_at_zero"], part["policy"]) == (STEP, True, "asymmetric")
    assert large.optimizer["multipliers"]["final_norm.weight"]["lr"] == 0.5
    for moment in QUANTITIES:
        for name, tensor in moments_of(SOURCE, moment).items():
            assert torch.count_nonzero(large.read(f"optim.{moment}.{name}")) == tensor.numel(), name
    deeper = make_recipe("stack", WIDE, dataclasses.replace(WIDE, num_layers=2 * WIDE.num_layers))
    with pytest.raises(ConfigError, match="grew lately.*--optimizer reset"):
        grow_folder(large, tmp_path / "again", deeper, Mesh.single())
    assert not (tmp_path / "again").exists()
    grow_folder(large, tmp_path / "again", deeper, Mesh.single(), "reset")


def test_reset_and_learned_maps_leave_the_moments_behind(tmp_path: Path) -> None:
    source = save_own(tmp_path / "small", SOURCE)
    recipe = make_recipe("clone", SOURCE, WIDE)
    grow_folder(source, tmp_path / "reset", recipe, Mesh.single(), "reset")
    assert open_source(tmp_path / "reset").optimizer is None
    ligo = Ligo(make_recipe("ligo", SOURCE, WIDE), noise=0.3)
    grow_folder(source, tmp_path / "learned", ligo.recipe(), Mesh.single())
    learned = open_source(tmp_path / "learned")
    assert learned.optimizer is None
    for name in parameter_names(WIDE):
        expected = grow_whole(ligo.recipe(), source.fetch, name)
        torch.testing.assert_close(learned.fetch(name), expected)


def test_one_process_holds_one_grown_tensor_at_a_time(tmp_path: Path) -> None:
    """Of weights and moments, 100 MB in all, of which no tensor has more than 2."""
    small = ModelConfig(vocab_size=64, hidden_size=128, num_layers=3, num_heads=4, ffn_size=256, max_seq_length=8)
    source = save_own(tmp_path / "small", small)
    recipe = make_recipe("clone", small, widened(small, hidden=2, query=2, kv=2, ffn=4, layers=8))
    largest, total = (4 * f(map(math.prod, parameter_shapes(recipe.target).values())) for f in (max, sum))
    assert 3 * total > 15 * (2 * largest + ALLOWANCE)
    peak = peak_memory(lambda: grow_folder(source, tmp_path / "large", recipe, Mesh.single(), "asymmetric"))
    assert peak < 2 * largest + ALLOWANCE
    assert open_source(tmp_path / "large").optimizer is not None


def grow_on_mesh(folder: Path, tensor: int) -> None:
    mesh = make_mesh(ParallelConfig(tensor=tensor))
    recipe = make_recipe("clone", SOURCE, WIDE)
    grow_folder(open_source(folder / "small"), folder / "large", recipe, mesh)


@pytest.mark.parametrize(("ranks", "tensor"), [(2, 2), (4, 2), (3, 1)])
def test_ranks_write_the_same_checkpoint(tmp_path: Path, ranks: int, tensor: int) -> None:
    source = save_own(tmp_path / "small", SOURCE)
    run_ranks(grow_on_mesh, ranks, tmp_path, tensor)
    grow_folder(source, tmp_path / "alone", make_recipe("clone", SOURCE, WIDE), Mesh.single())
    together, alone = (store.read_manifest(tmp_path / n / "step-0") for n in ("large", "alone"))
    assert together.state == alone.state
    names = list(alone.tensors)
    assert together.tensors.keys() == alone.tensors.keys()
    found, expected = (store.read_full(tmp_path / n / "step-0", names) for n in ("large", "alone"))
    assert all(torch.equal(found[name], expected[name]) for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", [SOURCE, GPT2], ids=["llama", "gpt2"])
def test_hugging_face_folder_grows_in_its_dtype(tmp_path: Path, model: ModelConfig, dtype: torch.dtype) -> None:
    source = save_hf(tmp_path / "small", model, dtype)
    recipe = make_recipe("clone", model, widened(model, hidden=2, query=2, kv=2, ffn=2))
    grow_folder(source, tmp_path / "large", recipe, Mesh.single())
    large = open_source(tmp_path / "large")
    assert large.model == recipe.target
    assert {large.fetch(name).dtype for name in parameter_names(large.model)} == {dtype}
    # Twice as wide: all scales are powers of two, so that nothing is rounded.
    loaded = [load_model(s, Mesh.single(), torch.double) for s in (source, large)]
    assert function_change(*loaded, make_ids(model)) <= 1e-12


def test_a_taken_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "note").write_text("mine")
    recipe = make_recipe("clone", SOURCE, WIDE)
    for source in (
        save_own(tmp_path / "own", SOURCE),
        save_hf(tmp_path / "hf", SOURCE, torch.float32),
    ):
        with pytest.raises(CheckpointError, match="is not empty"):
            grow_folder(source, tmp_path / "large", recipe, Mesh.single())
    assert [p.name for p in tmp_path.iterdir()].count("large") == 1
    assert (tmp_path / "large" / "note").read_text() == "mine"
    assert not list(tmp_path.glob("*.tmp-*"))


def test_command_takes_own_and_hugging_face_configurations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_own(tmp_path / "own", SOURCE)
    save_hf(tmp_path / "hf", SOURCE, torch.float32)
    (tmp_path / "large.yaml").write_text(dump(Config(model=WIDE)))
    (tmp_path / "config.json").write_text(json.dumps(hf.hf_config_from_model(WIDE)))
    for kind, target in (("own", "config.json"), ("hf", "large.yaml"), ("hf", "")):
        destination = tmp_path / f"{kind}-from-{target or 'folder'}"
        options = ["--target", tmp_path / target, "--method", "clone"]
        assert grow_command(tmp_path / kind, destination, *options) == 0
        shown = capsys.readouterr().out
        assert "clone keeps the function" in shown
        assert ("moments of Adam have grown by policy exact" if kind == "own" else "has no moments of Adam") in shown
        assert open_source(destination).model == WIDE
        assert hf.is_hf_folder(destination) == (kind == "hf")


def test_a_taken_folder_is_refused_before_maps_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("own", "hf"):
        save_own(tmp_path / "own", SOURCE) if kind == "own" else save_hf(tmp_path / "hf", SOURCE, torch.float32)
        (tmp_path / "large.yaml").write_text(dump(Config(model=WIDE)))
        options = ["--target", tmp_path / "large.yaml", "--method", "ligo", "--maps", "nowhere"]
        assert grow_command(tmp_path / kind, tmp_path, *options) == 4
        assert "is not empty" in capsys.readouterr().err


def test_command_tells_that_moments_are_left_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_own(tmp_path / "small", SOURCE)
    (tmp_path / "large.yaml").write_text(dump(Config(model=WIDE)))
    arguments = ["--target", tmp_path / "large.yaml", "--method", "net2net"]
    assert grow_command(tmp_path / "small", tmp_path / "large", *arguments) == 0
    shown = capsys.readouterr().out
    assert "moments of Adam are left behind: policy exact has no rule for net2net" in shown
    large = open_source(tmp_path / "large")
    assert large.optimizer is None
    phases = Ledger.from_dict(large.ledger).phases
    assert [(phase.phase, phase.flops, phase.tokens, phase.steps) for phase in phases] == [("growth", 0, 0, 1)]
    assert phases[0].seconds


@pytest.mark.parametrize("variant", get_args(Variant))
def test_command_applies_learned_maps(tmp_path: Path, variant: Variant) -> None:
    source = save_own(tmp_path / "small", SOURCE)
    (tmp_path / "large.yaml").write_text(dump(Config(model=WIDE)))
    ligo = Ligo(start_recipe("rms_random", SOURCE, WIDE, seed=3), noise=0.3, variant=variant)
    save_maps(ligo, tmp_path / "maps.safetensors")
    options = ["--target", tmp_path / "large.yaml", "--method", "ligo"]
    maps = ["--maps", tmp_path / "maps.safetensors"]
    assert grow_command(tmp_path / "small", tmp_path / "large", *options, *maps) == 0
    name = "layers.1.attention.key_value.weight"
    expected = grow_whole(ligo.recipe(), source.fetch, name)
    torch.testing.assert_close(open_source(tmp_path / "large").fetch(name), expected)
    ledger = Ledger.from_dict(open_source(tmp_path / "large").ledger)
    assert [item.identity for item in ledger.inherited] == [source.identity]
    assert ledger.totals()["all_in"]["flops"] is None, "nobody knows what learning these maps cost"


MISTAKES = [
    ({}, 2, "--method ligo learns its maps on --data PREFIX or applies learned ones"),
    ({"--method": "clone", "--data": "tokens"}, 2, "and neither with another method"),
    ({"--method": "stack"}, 2, "grows depth only"),
    ({"--method": "clone", "--tensor": 3}, 2, "--tensor 3 does not divide"),
    ({"--target": "nowhere.yaml"}, 2, "neither a preset nor a file"),
    ({"--maps": "nowhere"}, 4, "no file of learned maps"),
    ({"--maps": "nowhere", "--save-maps": "maps"}, 2, "--save-maps keeps maps that are learned on --data PREFIX"),
    ({"--method": "clone", "--optimizer": "zero_pad"}, 2, "growth.optimizer=zero_pad has nothing to pad"),
    ({"--data": "nowhere", "--optimizer": "exact"}, 2, "growth.optimizer=exact has no rule for the learned maps"),
]


@pytest.mark.parametrize(("changes", "code", "words"), MISTAKES)
def test_mistakes_are_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    code: int,
    words: str,
) -> None:
    save_own(tmp_path / "small", SOURCE)
    (tmp_path / "large.yaml").write_text(dump(Config(model=WIDE)))
    options = {"--target": tmp_path / "large.yaml", "--method": "ligo", **changes}
    pairs = [part for option in options.items() for part in option]
    assert grow_command(tmp_path / "small", tmp_path / "large", *pairs) == code
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "large").exists()
