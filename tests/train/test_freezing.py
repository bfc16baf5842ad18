"""Multi-stage layerwise training: older layers stand still after a growth, and cost no backward pass."""

import dataclasses
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from megagrow import flops
from megagrow.checkpoint import hf, store
from megagrow.checkpoint.source import open_source
from megagrow.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    GrowthConfig,
    InitConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)
from megagrow.earlier_growth import EarlierGrowth
from megagrow.evaluate import make_batch
from megagrow.model.transformer import Block
from megagrow.optim import Optimizer
from megagrow.parallel.mesh import Mesh, make_mesh
from megagrow.parallel.shards import full, local
from megagrow.plan.layout import Layout
from megagrow.plan.phases import phases
from megagrow.roles import split_name
from megagrow.train import run, timing
from megagrow.train.learner import StepResult
from megagrow.train.part import build_part, initialize_part
from megagrow.train.state import RunState
from tests.models import as_gpt2
from tests.ranks import run_ranks
from tests.train.runs import LARGE, SMALL, make_config, metrics, run_on_ranks
from tests.train.test_run import assert_same_run, cut_back, ledger

FROZEN = 2
MODEL = dataclasses.replace(LARGE, num_layers=5, num_kv_heads=1)
FOUR_LAYERS = dataclasses.replace(MODEL, num_layers=4)
TIED = as_gpt2(dataclasses.replace(LARGE, num_layers=5))


def gradients(config: Config, frozen: int) -> dict[str, Tensor | None]:
    """The whole gradients of this rank's parameters, in float64."""
    torch.set_default_dtype(torch.float64)
    mesh = make_mesh(config.parallel) if torch.distributed.is_initialized() else Mesh.single()
    part = build_part(config.model, config, mesh)
    initialize_part(part, seed=0)
    part.freeze(frozen)
    tokens = torch.randint(config.model.vocab_size, (8, 17), generator=torch.Generator().manual_seed(1))
    share = 8 // mesh.dp.size
    mine = tokens[mesh.dp.rank * share : (mesh.dp.rank + 1) * share]
    part.engine.train_step(make_batch(mine, 8, mesh))
    found = {name: None if p.grad is None else full(p.grad).clone() for name, p in part.parameters.items()}
    part.engine.evaluate(make_batch(mine, 8, mesh))
    torch.set_default_dtype(torch.float32)
    return found


def settings(model: Any, recompute: Literal["none", "selective", "full"] = "none", **parallel: Any) -> Config:
    train = TrainConfig(global_batch_size=8, microbatch_size=2, recompute=recompute)
    return Config(model=model, data=DataConfig(seq_length=16), train=train, parallel=ParallelConfig(**parallel))


def stands_still(name: str) -> bool:
    layer, _ = split_name(name)
    return name.startswith("embedding.") if layer is None else layer < FROZEN


LAYOUTS: list[tuple[int, Any, dict[str, Any]]] = [
    (1, MODEL, {}),
    (1, TIED, {"recompute": "full"}),
    (4, MODEL, {"recompute": "full"}),
    (4, MODEL, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}),
    (4, TIED, {"pipeline": 2}),
    (4, MODEL, {"pipeline": 4, "layers_per_stage": (1, 2, 1, 1)}),  # one stage of frozen layers alone, one mixed
    (4, FOUR_LAYERS, {"pipeline": 4, "layers_per_stage": (0, 2, 2, 0)}),  # the first stage is the embedding alone
    (2, MODEL, {"pipeline": 2, "schedule": "Interleaved1F1B"}),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout[0]}-{layout[1].family}-{layout[2]}")
def test_layers_above_learn_as_ever_and_those_below_not_at_all(layout: tuple[int, Any, dict[str, Any]]) -> None:
    ranks, model, how = layout
    expected = gradients(settings(model), frozen=0)
    assert all(grad is not None for grad in expected.values())
    config = settings(model, **how)
    for found in run_ranks(gradients, ranks, config, FROZEN) if ranks > 1 else [gradients(config, FROZEN)]:
        for name, grad in found.items():
            if stands_still(name):
                assert grad is None, name
                continue
            assert grad is not None, name
            assert (grad - expected[name]).abs().max() <= 1e-10 * expected[name].abs().max(), name


def test_frozen_layers_keep_nothing_for_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, bool] = {}
    compute = Block.compute

    def watched(self: Block, x: Tensor, *args: Any) -> Tensor:
        y = compute(self, x, *args)
        seen.setdefault(self.index, y.requires_grad)  # in training; evaluation comes later
        return y

    monkeypatch.setattr(Block, "compute", watched)
    gradients(settings(MODEL), FROZEN)
    assert seen == {index: index >= FROZEN for index in range(MODEL.num_layers)}


def everything(optimizer: Optimizer, name: str) -> Tensor:
    """A parameter and its moments."""
    held = [optimizer.parameters[name].detach(), *(tensors[name] for tensors in optimizer.moments().values())]
    return torch.stack([tensor.clone() for tensor in held])


@pytest.mark.parametrize("offload", [False, True])
def test_the_optimizer_leaves_parameters_without_gradients_alone(offload: bool) -> None:
    """No update, no decay, moments as they were; when they learn again, by the common count of updates."""
    parameters = {name: nn.Parameter(torch.ones(3)) for name in ("embedding.tokens", "head.weight")}
    optimizer = Optimizer(parameters, OptimConfig(weight_decay=0.5, offload=offload))

    def step(*names: str) -> None:
        for name in names:
            parameters[name].grad = torch.full((3,), 0.5)
        optimizer.step(0.1)

    step(*parameters)
    kept = everything(optimizer, "embedding.tokens")
    step("head.weight")
    step("head.weight")
    assert torch.equal(everything(optimizer, "embedding.tokens"), kept)
    assert optimizer.step_count == 3
    saved = optimizer.state()["step"]
    again = Optimizer(parameters, OptimConfig(weight_decay=0.5, offload=offload), step=saved)
    for moment, tensors in again.moments().items():
        for name, tensor in tensors.items():
            local(tensor).copy_(optimizer.moments()[moment][name])
    before = {name: p.detach().clone() for name, p in parameters.items()}
    step(*parameters)
    expected = {name: p.detach().clone() for name, p in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data.copy_(before[name])
        parameter.grad = torch.full((3,), 0.5)
    again.step(0.1)
    assert all(torch.equal(parameters[name], expected[name]) for name in parameters)


def staged(corpus: Path, directory: Path, optimizer: Literal["exact", "reset"] = "exact") -> Config:
    """2 layers, from step 2 on 4 of which the new ones learn alone for 2 steps, then all."""
    growth = GrowthConfig("stack", source=SMALL, at_step=2, freeze_steps=2, optimizer=optimizer)
    kept = CheckpointConfig(interval=1, keep_last=0)
    model = dataclasses.replace(SMALL, num_layers=4)
    return make_config(corpus, directory, 6, model=model, growth=growth, checkpoint=kept)


def stored(directory: Path, step: int) -> dict[str, Tensor]:
    path = directory / "checkpoints" / f"step-{step}"
    return store.read_full(path, store.read_manifest(path).tensors)


@pytest.mark.parametrize("optimizer", ["exact", "reset"])
def test_a_stage_of_new_layers_in_a_run(corpus: Path, tmp_path: Path, optimizer: Literal["exact", "reset"]) -> None:
    config = staged(corpus, tmp_path / "whole", optimizer)
    assert run(config) == 0
    small, first, second, later = (stored(tmp_path / "whole", step) for step in (2, 3, 4, 5))
    for name in first:
        frozen = stands_still(re.sub(r"^(model|optim[.]exp_avg|optim[.]exp_avg_sq)[.]", "", name))
        assert torch.equal(first[name], second[name]) == frozen, name
        assert not torch.equal(second[name], later[name]), name
        if frozen and (name.startswith("model.") or optimizer == "exact"):
            assert torch.equal(first[name], small[name]), name
    states = [store.read_manifest(tmp_path / f"whole/checkpoints/step-{n}").state["optimizer"]["step"] for n in (4, 5)]
    assert states == ([4, 5] if optimizer == "exact" else [2, 1])
    spent = [line["flops_total"] for line in metrics(tmp_path / "whole")]
    assert spent[3] - spent[2] == flops.training_flops(config.model, 64, 16, frozen_layers=2)
    assert spent[5] - spent[4] == flops.training_flops(config.model, 64, 16)
    planned = defaultdict[str, float](float)
    for phase in phases(Layout(config, 1), "cpu")[0]:
        planned[phase.name] += phase.total_flops["full"]
    counted = {phase["phase"]: phase["flops"] for phase in ledger(tmp_path / "whole")["phases"]}
    assert counted["train"] == planned["train"] == spent[5] - spent[1]
    assert counted["small"] == planned["small"] == spent[1]
    for step in (3, 4):
        shutil.copytree(tmp_path / "whole", tmp_path / f"at-{step}")
        cut_back(tmp_path / f"at-{step}", step)
        assert run(staged(corpus, tmp_path / f"at-{step}", optimizer)) == 0
        assert_same_run(tmp_path / f"at-{step}", tmp_path / "whole")


def test_the_next_growth_waits_until_all_layers_learn_again(tmp_path: Path) -> None:
    """Under reset the optimizer begins anew after the frozen steps, 3 to 5, and the rate rises twice."""
    earlier = EarlierGrowth(num_layers=4, at_step=3, optimizer="reset", freeze_steps=3)
    growth = GrowthConfig(
        "stack", source=SMALL, at_step=20, at_plateau=0.5, plateau_window=1, earlier=(earlier,), rewarmup_steps=2
    )
    model = dataclasses.replace(SMALL, num_layers=8)
    config = make_config(tmp_path, tmp_path, 30, model=model, growth=growth)
    state = RunState(SMALL, "small", growths=1, grown_at=3, layers_before=2)
    result = StepResult(loss=1.0, ce=1.0, kd=0.0, teacher_entropy=0.0, grad_norm=1.0, lr=0.1, accepted=True)
    due, rates, noted = {}, [], []
    for state.train_step in range(3, 12):
        state.losses = []
        timing.note_loss(state, result, config)
        noted += [state.train_step] * len(state.losses)
        state.losses = [1.0, 1.0]
        due[state.train_step] = timing.due(state, config, Mesh.single())
        rates.append(timing.rewarmup(state, config))
    assert due == {step: "plateau" if step > 6 else None for step in range(3, 12)}
    assert rates == [0.5, 1.0, 1.0, 0.5, *[1.0] * 5]
    assert noted == [9, 10, 11]  # after the second rise, as a step is counted before its loss is noted


def test_stages_on_shards_equal_one_process(corpus: Path, tmp_path: Path) -> None:
    assert run(staged(corpus, tmp_path / "one")) == 0
    assert run_ranks(run_on_ranks, 4, staged(corpus, tmp_path / "many"), 1, 2) == [0] * 4
    for ours, theirs in zip(metrics(tmp_path / "many"), metrics(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-4), ours["step"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3), ours["step"]


def test_methods_that_move_older_layers_are_refused_before_training(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    growth = GrowthConfig("clone", source=SMALL, at_step=2, freeze_steps=2)
    assert run(make_config(corpus, tmp_path, 6, model=LARGE, growth=growth)) == 2
    assert "growth.freeze_steps: clone does not leave the source's 2 layers" in capfd.readouterr().err
    assert not (tmp_path / "metrics.jsonl").exists()


def test_learned_maps_leave_no_older_layer_to_freeze(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    growth = GrowthConfig("ligo", source=SMALL, at_step=2, freeze_steps=2, ligo_steps=2)
    deep = dataclasses.replace(SMALL, num_layers=4)
    assert run(make_config(corpus, tmp_path, 6, model=deep, growth=growth)) == 2
    assert "growth.freeze_steps: learned maps mix all layers" in capfd.readouterr().err


@pytest.mark.parametrize(("policy", "at_step", "code"), [("", 0, 2), ("", 1, 0), ("reset", 0, 0)])
def test_layers_without_moments_stand_still_only_where_the_optimizer_begins_anew(
    policy: Any, at_step: int, code: int, corpus: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A Hugging Face folder brings no moments: when its layers learn again, Adam would not correct the new ones."""
    hf.write_hf_folder(tmp_path / "hf", SMALL, open_source(trained).fetch)
    growth = GrowthConfig("stack", at_step=at_step, freeze_steps=2, optimizer=policy)
    deep, init = dataclasses.replace(SMALL, num_layers=4), InitConfig(str(tmp_path / "hf"))
    assert run(make_config(corpus, tmp_path / "run", 4, model=deep, growth=growth, init=init)) == code
    assert ("set --growth.optimizer reset" in capfd.readouterr().err) == (code == 2)


@pytest.mark.parametrize("frozen", [0, FROZEN])
@pytest.mark.parametrize("model", [MODEL, TIED], ids=["own head", "tied"])
def test_the_count_of_a_step_with_frozen_layers_is_that_of_torchs_counter(model: ModelConfig, frozen: int) -> None:
    with FlopCounterMode(display=False) as counter:
        gradients(settings(model), frozen)
    tokens, length = 8 * 16, 16
    evaluation = flops.forward_flops(model, tokens, length)
    counted = flops.training_flops(model, tokens, length, frozen_layers=frozen)
    scores = 2 * tokens * length * model.num_heads * model.head_dim  # made anew in a layer's backward pass
    found = counter.get_total_flops() - evaluation - scores * (model.num_layers - frozen)
    assert found == pytest.approx(counted, rel=1e-3)
