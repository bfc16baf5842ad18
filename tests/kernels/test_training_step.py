"""A training step with every kernel, interpreted, against one with the twins: gradients, loss and updated weights."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import megagrow_kernels
from megagrow import ops, torch_ops
from megagrow.config import ModelConfig, OptimConfig, TrainConfig
from megagrow.model.dropout import token_keys
from megagrow.model.transformer import Teacher, Transformer, initialize
from megagrow.optim import Multipliers, Optimizer, StepGuard
from megagrow.parallel.loss import LossOptions, token_scores
from megagrow.parallel.mesh import Axis, Mesh
from megagrow.train.learner import ModelLearner
from tests.models import as_gpt2

pytestmark = pytest.mark.interpreted

LLAMA = ModelConfig(vocab_size=37, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=24)
MODELS = {
    "llama": LLAMA,
    "qwen3": replace(LLAMA, family="qwen3", qk_norm=True),
    "geglu": replace(LLAMA, activation="geglu", attention_bias="all", mlp_bias=True),
    "gpt2": as_gpt2(LLAMA, max_seq_length=16),
}
USED = {  # what a step of each calls, beside the loss and the optimizer
    "llama": {"rms_norm", "swiglu", "rope_"},
    "qwen3": {"rms_norm", "swiglu", "rope_"},
    "geglu": {"rms_norm", "geglu", "rope_", "dropout_add"},
    "gpt2": {"layer_norm", "bias_gelu", "dropout_add"},
}
GROWTH = {"layer_mix", "sparse_map_", "dense_map", "dense_map_", "dense_blocks_"}  # no step calls these
STEP = {"vocab_stats", "vocab_grad_", "AdamWTable"}
TAUGHT = {"distill_stats", "distill_grad_", "AdamWTable"}
B, S = 2, 8


@contextmanager
def serving(calls: set[str] | None) -> Iterator[None]:
    """The kernels serve CPU tensors too, and leave their names in `calls`; the twins do if that is None."""

    def recording(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.add(name)
            return getattr(megagrow_kernels, name)(*args, **kwargs)

        return call

    with mock.patch.object(torch_ops, "alternates", lambda x: True):  # the layout of a GPU
        if calls is None:
            yield
            return
        door = ModuleType("recorded")
        for name in megagrow_kernels.__all__:
            setattr(door, name, recording(name))
        with mock.patch.object(ops, "kernels_for", lambda name, x: door if x.dtype in ops.KERNEL_DTYPES else None):
            yield


def step(model: ModelConfig, train: TrainConfig, taught: bool) -> dict[str, Tensor]:
    """Loss, gradients and updated weights of one step."""
    transformer = Transformer(model, train=train)
    parameters = dict(transformer.named_parameters())
    initialize(parameters, model, seed=3)
    ids_BS, labels_BS = torch.randint(model.vocab_size, (2, B, S), generator=torch.Generator().manual_seed(1))
    keys_BS = token_keys(1, 2, torch.arange(B), torch.arange(S)) if train.dropout else None
    states = None
    if taught:
        generator = torch.Generator().manual_seed(2)
        states, head = (torch.randn(*shape, generator=generator) for shape in ((B, S, 6), (model.vocab_size, 6)))
        transformer.teacher = Teacher(head, LossOptions(weight=0.4, temperature=2.0, both=True))
    weights_BS = torch.linspace(0.5, 2, B * S).view(B, S)
    loss = transformer(ids_BS, labels_BS, weights_BS, states, dropout_keys=keys_BS)
    loss.sum().backward()
    found = {"loss": loss.detach()} | {f"gradient of {name}": p.grad.clone() for name, p in parameters.items()}
    optimizer = Optimizer(
        parameters, OptimConfig(lr=0.01, eps=0.1), {"final_norm.weight": Multipliers(lr=0.5, eps=4.0)}
    )
    optimizer.step(0.01)
    return found | {name: p.detach().clone() for name, p in parameters.items()}


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_with_every_kernel(name: str, recompute: Any, taught: bool) -> None:
    model, calls = MODELS[name], set()
    train = TrainConfig(recompute=recompute, dropout=0.2 if model.mlp_bias and not taught else 0.0)
    with serving(None):
        expected = step(model, train, taught)
    with serving(calls):
        found = step(model, train, taught)
    assert calls == USED[name] | (TAUGHT if taught else STEP)
    for key, tensor in expected.items():
        scale = tensor.abs().max().clamp(min=1e-3)
        assert ((found[key] - tensor).abs().max() / scale) < 1e-4, key
    changed = [key for key in expected if not key.startswith(("gradient", "loss"))]
    assert len(changed) == len(dict(Transformer(model).named_parameters()))


def test_a_compiled_step_with_every_kernel() -> None:
    with serving(None):
        expected = step(LLAMA, TrainConfig(), taught=False)
    calls: set[str] = set()
    with serving(calls), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the compiler meets in its own modules, and in what it traces
        found = step(LLAMA, TrainConfig(compile=True), taught=False)
    assert calls == USED["llama"] | STEP
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-6)


def test_scores_with_kernels_are_those_of_the_twins() -> None:
    generator = torch.Generator().manual_seed(4)
    hidden_TH, head_VH = (torch.randn(n, 16, generator=generator) for n in (9, 37))
    arguments = hidden_TH, head_VH, torch.randint(37, (9,), generator=generator), 37, Axis()
    expected_T, ranks_T = token_scores(*arguments, chunk_tokens=4)
    calls: set[str] = set()
    with serving(calls):
        found_T, found_ranks_T = token_scores(*arguments, chunk_tokens=4)
    assert calls == {"vocab_scores"}
    assert torch.equal(found_ranks_T, ranks_T)
    torch.testing.assert_close(found_T, expected_T, rtol=1e-6, atol=1e-6)


def test_all_that_the_door_leads_to_is_used() -> None:
    used = set().union(*USED.values(), STEP, TAUGHT, {"vocab_scores"})
    assert used == set(megagrow_kernels.__all__) - {"adamw_"} - GROWTH  # adamw_ makes a table for one step


def test_a_step_is_skipped_where_the_device_says_so() -> None:
    parameter = torch.nn.Parameter(torch.ones(5))
    with serving(set()):
        optimizer = Optimizer({"final_norm.weight": parameter}, OptimConfig(lr=0.1))
        assert optimizer.decides_on_device
        for skip, scale in ((True, 1.0), (False, 0.5)):
            before = parameter.detach().clone()
            parameter.grad = torch.full((5,), 2.0)
            optimizer.step(0.1, torch.tensor(scale), torch.tensor(skip))
            assert parameter.grad is None
            assert torch.equal(parameter, before) == skip
    moment = optimizer.moments()["exp_avg"]["final_norm.weight"]
    torch.testing.assert_close(moment, torch.full((5,), (1 - OptimConfig().beta1) * 1.0))


class Engine:
    """Gives prescribed losses and gradients."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], steps: Iterable[tuple[float, float]]) -> None:
        self.parameters, self.steps = parameters, iter(steps)

    def train_step(self, batch: object) -> Tensor:
        loss, size = next(self.steps)
        for i, parameter in enumerate(self.parameters.values()):
            parameter.grad = size * torch.linspace(-1, 1 + i, parameter.numel()).view(parameter.shape)
        return torch.tensor([loss, loss, 0.0, 0.0])


def test_the_device_decides_as_the_host_would() -> None:
    """Losses and gradients that are refused: not finite, or a spike; and norms above and below the bound."""
    nan = float("nan")
    steps = [(2.0, 0.1), (2.1, 9.0), (nan, 0.1), (2.0, nan), (2.05, 0.2), (90.0, 0.1), (2.0, 0.3), (float("inf"), 0.1)]
    optim = OptimConfig(lr=0.01, clip_norm=1.0, spike_sigma=6.0, spike_window=8)
    found = []
    for calls in (None, set()):
        with serving(calls):
            parameters = {
                name: torch.nn.Parameter(torch.ones(3, 4)) for name in ("head.weight", "layers.0.mlp.up.weight")
            }
            part = SimpleNamespace(engine=Engine(parameters, steps), parameters=parameters, mesh=Mesh.single())
            learner = ModelLearner(part, Optimizer(parameters, optim), SimpleNamespace(optim=optim))
            assert learner.optimizer.decides_on_device == (calls is not None)
            guard = StepGuard()
            results = [learner.step(None, 0.01, guard) for _ in steps]
            assert all(parameter.grad is None for parameter in parameters.values())
        found.append((results, learner.optimizer.step_count, guard, {**parameters, **learner.optimizer.tensors()}))
    (host, device) = found
    assert [result.accepted for result in host[0]] == [True, True, False, False, True, False, True, False]
    assert str(device[0]) == str(host[0])
    assert device[1] == host[1] == 4
    assert device[2].losses == host[2].losses and device[2].bad_steps == host[2].bad_steps == 1
    torch.testing.assert_close(device[3], host[3], rtol=1e-6, atol=1e-6)
