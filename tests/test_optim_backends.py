"""Whose kernels update the weights, and in which memory: one training whatever the answer."""

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from megagrow.adamw import TorchAdamW, check_optimizer_backend
from megagrow.checkpoint import store
from megagrow.config import OptimConfig
from megagrow.errors import ConfigError
from megagrow.optim import MOMENTS, Multipliers, Optimizer
from megagrow.parallel.shards import fill, full, local
from tests.ranks import run_ranks

SHAPES = {
    "embedding.tokens": (7, 4),
    "layers.0.attention_norm.weight": (4,),
    "layers.0.mlp.down.weight": (4, 6),
    "layers.1.mlp.down.weight": (4, 6),
    "final_norm.weight": (1,),  # on two ranks the second one's piece is empty
}
SLOW = {"layers.1.mlp.down.weight": Multipliers(lr=0.5, eps=4.0, weight_decay=2.0)}
TORCH = OptimConfig(lr=0.01, eps=1e-3)
OFFLOAD, APEX = dataclasses.replace(TORCH, offload=True), dataclasses.replace(TORCH, backend="apex")
CUDA = torch.device("cuda")


def values(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def make_parameters(mesh: DeviceMesh | None = None) -> dict[str, nn.Parameter]:
    parameters = {}
    for name, value in values(0).items():
        whole = value if mesh is None else DTensor.from_local(value, mesh).redistribute(placements=[Shard(0)])
        parameters[name] = nn.Parameter(whole.clone())
    return parameters


def train(optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        for i, (name, grad) in enumerate(values(100 + step).items()):
            parameter = optimizer.parameters[name]
            if step % 3 == 1 and i == 2:
                continue  # no gradient
            parameter.grad = torch.empty_like(parameter)
            fill(parameter.grad, grad)
        optimizer.step(lr=0.01 * (step + 1))
        assert all(p.grad is None for p in optimizer.parameters.values())


def result(optimizer: Optimizer) -> dict[str, Tensor]:
    """Whole weights and moments; a collective."""
    tensors = {**optimizer.parameters, **optimizer.tensors()}
    return {"step": torch.tensor(optimizer.step_count), **{name: full(t).clone() for name, t in tensors.items()}}


def trained(config: OptimConfig, steps: int = 7, mesh: DeviceMesh | None = None) -> dict[str, Tensor]:
    optimizer = Optimizer(make_parameters(mesh), config, SLOW)
    train(optimizer, range(steps))
    return result(optimizer)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def train_with_gradients(optimizer: Optimizer, steps: range) -> None:
    """Every tensor has a gradient in every step: checkpoints and Apex count steps for all together."""
    train(optimizer, range(3 * steps.start, 3 * steps.stop, 3))


def test_offload_is_bit_equal() -> None:
    assert_equal(trained(OFFLOAD), trained(TORCH))


def test_offload_sees_weights_that_others_write() -> None:
    for config in (TORCH, OFFLOAD):
        optimizer = Optimizer(make_parameters(), config)
        train(optimizer, range(2))
        for name, value in values(5).items():
            fill(optimizer.parameters[name], value)
        optimizer.parameters["final_norm.weight"].data = torch.full((1,), 3.0)  # other memory, not a write
        train(optimizer, range(2, 4))
        if config is TORCH:
            expected = result(optimizer)
    assert_equal(result(optimizer), expected)


class Copies(TorchDispatchMode):
    num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += func is torch.ops.aten.copy_.default
        return func(*args, **(kwargs or {}))


def copies_per_step(sharded: bool) -> list[int]:
    mesh = init_device_mesh("cpu", (1,)) if sharded else None
    optimizer, num_copies = Optimizer(make_parameters(mesh), OFFLOAD), []
    for step in range(5):
        if step == 3:
            fill(optimizer.parameters["final_norm.weight"], torch.zeros(1))
        for parameter in optimizer.parameters.values():
            parameter.grad = torch.ones_like(parameter)
        with Copies() as copies:
            optimizer.step(0.01)
        num_copies.append(copies.num)
    return num_copies


@pytest.mark.parametrize("sharded", [False, True])
def test_offload_sends_to_the_host_what_was_written_elsewhere(sharded: bool) -> None:
    n = len(SHAPES)
    assert run_ranks(copies_per_step, 1, sharded) == [[3 * n, 2 * n, 2 * n, 2 * n + 1, 2 * n]]


def test_a_step_without_a_new_part_does_not_wait_for_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is on the device: reading it would stop the host in every step."""
    optimizer, reads = Optimizer(make_parameters(), TORCH), list[int]()
    count = TorchAdamW.step_count.fget
    assert count is not None
    watched = property(lambda self: reads.append(1) or count(self), TorchAdamW.step_count.fset)
    monkeypatch.setattr(TorchAdamW, "step_count", watched)
    train(optimizer, range(2))
    assert not reads and optimizer.step_count == 2


def test_moments_are_the_ones_in_use() -> None:
    results = []
    for config in (TORCH, OFFLOAD):
        optimizer = Optimizer(make_parameters(), config)
        train(optimizer, range(1))
        for tensors in optimizer.moments().values():
            for tensor in tensors.values():
                tensor.fill_(0.5)
        optimizer.step_count = 40
        train(optimizer, range(1, 2))
        results.append(result(optimizer))
    assert results[0]["step"] == 41
    assert_equal(results[1], results[0])


def change_over(folder: Path, mesh: DeviceMesh, before: OptimConfig, after: OptimConfig) -> dict[str, Tensor]:
    """Trains with one configuration, saves in the folder, and goes on with another."""
    first = Optimizer(make_parameters(mesh), before, SLOW)
    train_with_gradients(first, range(3))
    kept = {**first.parameters, **first.tensors()}
    path = store.save(folder, 3, kept, first.state(), config={}, provenance={})
    second = Optimizer(make_parameters(mesh), after, SLOW, first.state()["step"])
    store.load(path, {**second.parameters, **second.tensors()})
    train_with_gradients(second, range(3, 6))
    return result(second)


def uninterrupted(mesh: DeviceMesh) -> dict[str, Tensor]:
    whole = Optimizer(make_parameters(mesh), TORCH, SLOW)
    train_with_gradients(whole, range(6))
    return result(whole)


def offload_in_ranks(folder: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    expected = trained(TORCH, mesh=mesh)
    assert_equal(trained(OFFLOAD, mesh=mesh), expected)
    assert_close(expected, trained(TORCH))  # one process, whose vector loops end elsewhere
    assert_equal(change_over(Path(folder, "1"), mesh, TORCH, OFFLOAD), uninterrupted(mesh))
    assert_equal(change_over(Path(folder, "2"), mesh, OFFLOAD, TORCH), uninterrupted(mesh))


def test_offload_of_shards(tmp_path: Path) -> None:
    run_ranks(offload_in_ranks, 2, str(tmp_path))


def moments_beside_a_device() -> None:
    mesh = DeviceMesh("meta", torch.arange(2))  # stands for GPUs: anything that is not the host
    piece = torch.empty(3, 4, device="meta")
    parameter = nn.Parameter(DTensor.from_local(piece, mesh, [Shard(0)], run_check=False))
    optimizer = Optimizer({"embedding.tokens": parameter}, OFFLOAD)
    for moment in MOMENTS:
        tensor = optimizer.moments()[moment]["embedding.tokens"]
        assert isinstance(tensor, DTensor)
        assert (tensor.placements, tensor.shape) == (parameter.placements, (6, 4))
        local(tensor).fill_(2.0)  # as loading a checkpoint does
        state = optimizer.adamw.moment(optimizer.weights.tensors["embedding.tokens"], moment)
        assert state.device.type == "cpu"
        assert state.eq(2.0).all()
        assert full(tensor).device.type == "meta"  # gathered there, as growth does


def test_offloaded_moments_stay_on_the_host() -> None:
    run_ranks(moments_beside_a_device, 2)


class FusedAdam(torch.optim.Optimizer):
    """Apex' optimizer as far as its contract goes: state, steps per group, and what its kernel launch leaves out."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], adam_w_mode: bool) -> None:
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            assert {p.dtype for p in group["params"]} == {torch.float32}
            assert all(type(p) is nn.Parameter and type(p.data) is Tensor for p in group["params"])  # no DTensor
            group["step"] = group.get("step", 0) + 1
            listed = [p for p in group["params"] if p.grad is not None]
            if listed and listed[-1].numel() == 0:
                continue
            for p in listed:
                self._update(p, group)

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        assert type(p.grad) is Tensor
        (beta1, beta2), state, t = group["betas"], self.state[p], group["step"]
        state["exp_avg"].lerp_(p.grad, 1 - beta1)
        state["exp_avg_sq"].lerp_(p.grad**2, 1 - beta2)
        denominator = (state["exp_avg_sq"] / (1 - beta2**t)).sqrt() + group["eps"]
        p -= group["lr"] * (state["exp_avg"] / (1 - beta1**t) / denominator + group["weight_decay"] * p)


@contextmanager
def apex() -> Iterator[None]:
    """NVIDIA Apex with its extensions, as far as imports see it."""
    package, optimizers = ModuleType("apex"), ModuleType("apex.optimizers")
    package.optimizers, optimizers.FusedAdam = optimizers, FusedAdam
    modules = {"apex": package, "apex.optimizers": optimizers, "amp_C": ModuleType("amp_C")}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            sys.modules.pop(name, None)


def test_what_apex_is_called_with() -> None:
    with apex():
        optimizer = Optimizer(make_parameters(), APEX, SLOW, step=3)
    names = {id(tensor): name for name, tensor in optimizer.weights.tensors.items()}
    groups = optimizer.adamw.groups
    found = {tuple(names[id(p)] for p in g["params"]): (g["eps"], g["weight_decay"], g["step"]) for g in groups}
    assert found == {
        ("embedding.tokens", "layers.0.mlp.down.weight"): (1e-3, 0.1, 3),
        ("layers.0.attention_norm.weight", "final_norm.weight"): (1e-3, 0.0, 3),
        ("layers.1.mlp.down.weight",): (4e-3, 0.2, 3),
    }
    assert {g["betas"] for g in groups} == {(0.9, 0.95)}
    train_with_gradients(optimizer, range(2))
    assert [g["lr"] for g in groups] == pytest.approx([0.04, 0.04, 0.02])  # of the second step
    assert [g["step"] for g in groups] == [5, 5, 5]
    assert optimizer.step_count == optimizer.state()["step"] == 5


def apex_in_ranks(folder: str, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    expected = uninterrupted(mesh)
    with apex():
        assert_close(change_over(Path(folder, "1"), mesh, TORCH, APEX), expected)
        assert_close(change_over(Path(folder, "2"), mesh, APEX, TORCH), expected)


@pytest.mark.parametrize("world_size", [1, 2])
def test_checkpoints_change_between_torch_and_apex(world_size: int, tmp_path: Path) -> None:
    run_ranks(apex_in_ranks, world_size, str(tmp_path), world_size)


def refusal(device: torch.device = CUDA) -> str:
    with pytest.raises(ConfigError) as caught:
        check_optimizer_backend("apex", device)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith("or use optim.backend=torch")
    return message


def test_checks_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    check_optimizer_backend("torch", torch.device("cpu"))
    assert "which is not installed (the registry's apex is another package)" in refusal()
    with apex():
        check_optimizer_backend("apex", CUDA)
        assert "GPUs, not on the cpu" in refusal(torch.device("cpu"))
        monkeypatch.delitem(sys.modules, "amp_C")
        message = refusal()
        assert "the CUDA extensions of NVIDIA Apex, which do not load (No module named 'amp_C')" in message
        assert "APEX_CUDA_EXT=1 pip install --no-build-isolation ." in message


@pytest.mark.parametrize("source", ["", "import pyramid_of_another_age\n"])
def test_the_registrys_apex_is_another_package(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        message = refusal()
    finally:
        sys.modules.pop("apex", None)
    assert "finds no FusedAdam in the installed package apex" in message
    assert "pip uninstall apex" in message
    assert "https://github.com/NVIDIA/apex" in message
