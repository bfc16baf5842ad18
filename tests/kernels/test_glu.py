"""The gated activations' kernels, interpreted, against float64: forward and gradient."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from megagrow import torch_ops
from megagrow_kernels.glu import geglu, glu_ref, swiglu
from megagrow_kernels.launch import ANY
from tests.kernels.accuracy import assert_as_good_as_twin

pytestmark = pytest.mark.interpreted

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
KERNELS = {"silu": swiglu, "gelu": geglu}
BLOCK = ANY["glu"][-1].block


class Case(NamedTuple):
    """Rows, columns of the output; all of them are one row to the kernels."""

    T: int
    F: int
    dtype: torch.dtype


CASES = [
    Case(1, 1, F32),
    Case(3, 96, F32),  # one block, not full
    Case(4, BLOCK // 4, F32),  # one full block
    Case(7, 257, F32),  # rows that start at odd places, the last block not full
    Case(2, BLOCK + 1, F32),
    Case(3, BLOCK, BF16),
    Case(7, 300, BF16),
    Case(7, 300, F16),
]


def twin(activation: str):
    return partial(torch_ops.glu, activation=activation, alternating=True)


def inputs(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(case.T * case.F)
    gate_up = 2 * torch.randn(case.T, 2 * case.F, generator=generator)
    return gate_up.to(case.dtype), torch.randn(case.T, case.F, generator=generator).to(case.dtype)


def output_and_gradient(gated, gate_up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    leaf = gate_up.clone().requires_grad_()
    y = gated(leaf)
    y.backward(dy)
    return y.detach(), leaf.grad


def assert_accurate(activation: str, gate_up: Tensor, dy: Tensor) -> None:
    truth = output_and_gradient(partial(glu_ref, activation=activation), gate_up.double(), dy.double())
    actual = output_and_gradient(KERNELS[activation], gate_up, dy)
    expected = output_and_gradient(twin(activation), gate_up, dy)
    for name, *three in zip(("y", "dgate_up"), actual, expected, truth, strict=True):
        assert_as_good_as_twin(*three, name)


@pytest.mark.parametrize("activation", KERNELS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_good_as_the_twin(case: Case, activation: str) -> None:
    assert_accurate(activation, *inputs(case))


@pytest.mark.parametrize("activation", KERNELS)
def test_gates_of_any_size(activation: str) -> None:
    """Each in a row of its own, since errors are measured by a row's largest element."""
    gates = torch.tensor([0.0, 1e-30, 1e-4, 0.5, 3.0, 9.0, 11.9, 12.1, 50.0, 89.0, 1e4, 1e9])
    gate_up = torch.stack((torch.cat((gates, -gates)), torch.full((24,), 1.5)), dim=-1)
    assert_accurate(activation, gate_up, torch.full((24, 1), 0.75))


@pytest.mark.parametrize("activation", KERNELS)
def test_the_largest_gates_pass_or_stop(activation: str) -> None:
    largest = torch.finfo(F32).max
    gate_up = torch.tensor([[largest, 0.5], [-largest, 0.5]], requires_grad=True)
    y = KERNELS[activation](gate_up)
    assert torch.equal(y, torch.tensor([[largest / 2], [0.0]]))
    y.sum().backward()
    assert torch.equal(gate_up.grad, torch.tensor([[0.5, largest], [0.0, 0.0]]))


@pytest.mark.parametrize("activation", KERNELS)
def test_leading_dimensions_and_strides(activation: str) -> None:
    base = torch.randn(6, 4, 40, generator=torch.Generator().manual_seed(0))
    gate_up = base.transpose(0, 1)[:, ::2, 8:]
    assert not gate_up.is_contiguous()
    dy = torch.ones(()).expand(4, 3, 16)
    torch.testing.assert_close(
        output_and_gradient(KERNELS[activation], gate_up, dy), output_and_gradient(twin(activation), gate_up, dy)
    )


@pytest.mark.parametrize("alternating", [True, False])
@pytest.mark.parametrize("activation", KERNELS)
def test_the_twin_is_the_definition(activation: str, alternating: bool) -> None:
    pairs = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gate_up = pairs if alternating else torch.cat((pairs[..., 0::2], pairs[..., 1::2]), dim=-1)
    found = torch_ops.glu(gate_up, activation, alternating)
    torch.testing.assert_close(found, glu_ref(pairs, activation))
    assert gradcheck(lambda x: torch_ops.glu(x, activation, alternating), (gate_up.requires_grad_(),))
    if not alternating:  # as a CPU has them
        named = {"silu": torch_ops.swiglu, "gelu": torch_ops.geglu}[activation]
        assert torch.equal(named(gate_up), found)


def test_no_rows_and_no_columns() -> None:
    for shape in ((0, 16), (3, 0)):
        gate_up = torch.zeros(*shape, requires_grad=True)
        y = swiglu(gate_up)
        y.sum().backward()
        assert y.shape == (shape[0], shape[1] // 2)
        assert gate_up.grad.shape == shape


@pytest.mark.parametrize("activation", KERNELS)
@pytest.mark.parametrize("column", [6, 7])
def test_not_a_number_is_not_hidden(column: int, activation: str) -> None:
    gate_up, dy = torch.ones(2, 32), torch.ones(2, 16)
    gate_up[1, column] = torch.nan
    y, gradient = output_and_gradient(KERNELS[activation], gate_up, dy)
    assert y.isnan().nonzero().tolist() == [[1, 3]]
    assert gradient[1, 6].isnan()
    assert gradient[0].isfinite().all()


def test_the_same_every_time() -> None:
    gate_up, dy = inputs(Case(7, 257, F32))
    for first, again in zip(*(output_and_gradient(geglu, gate_up, dy) for _ in range(2)), strict=True):
        assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("gate_up", "message"),
    [
        (torch.ones(2, 8, dtype=torch.float64), "gate_up is torch.float64"),
        (torch.ones(2, 7), r"gate_up has shape \(2, 7\), needs an even number of columns"),
        (torch.ones(()), r"gate_up has shape \(\)"),
    ],
    ids=["dtype", "odd", "scalar"],
)
def test_refusals(gate_up: Tensor, message: str) -> None:
    for name, gated in (("swiglu", swiglu), ("geglu", geglu)):
        with pytest.raises(ValueError, match=f"{name}: {message}") as refusal:
            gated(gate_up)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("activation", KERNELS)
def test_it_is_a_sound_operation(activation: str) -> None:
    gate_up = torch.randn(3, 10, requires_grad=True)
    torch.library.opcheck(torch.ops.megagrow_kernels.glu, (gate_up, activation))
    torch.library.opcheck(torch.ops.megagrow_kernels.glu_backward, (gate_up.detach(), torch.randn(3, 5), activation))


@pytest.mark.parametrize("activation", KERNELS)
def test_a_compiler_takes_it_as_it_is(activation: str) -> None:
    def step(gate_up: Tensor) -> Tensor:
        return 2 * KERNELS[activation](gate_up + 1)

    gate_up, dy = inputs(Case(3, 20, F32))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for eager, found in zip(*(output_and_gradient(f, gate_up, dy) for f in (step, compiled)), strict=True):
        assert torch.equal(eager, found)
