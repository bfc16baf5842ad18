"""The kernels of GELU with a bias, interpreted, against float64: forward and every gradient."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from megagrow import torch_ops
from megagrow_kernels.gelu import bias_gelu, bias_gelu_ref
from megagrow_kernels.launch import ANY
from tests.kernels.accuracy import assert_as_good_as_twin

pytestmark = pytest.mark.interpreted

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
BLOCK = ANY["bias_gelu"][-1].block


class Case(NamedTuple):
    """Rows, features; the backward pass has 20 warps here if there is a bias, shared among the columns' blocks."""

    T: int
    F: int
    dtype: torch.dtype
    bias_dtype: torch.dtype | None


CASES = [
    Case(1, 1, F32, F32),
    Case(13, 96, F32, F32),  # a block wider than the row; two turns
    Case(5, 257, F32, None),  # rows that start at odd addresses
    Case(8, 257, F32, F32),
    Case(7, BLOCK, F32, F32),
    Case(5, 2 * BLOCK + 8, F32, F32),  # three blocks, the last nearly empty; five turns
    Case(3, BLOCK + 8, F32, None),
    Case(8, 1000, BF16, BF16),
    Case(8, 1000, F16, F16),
    Case(5, BLOCK, BF16, None),
    Case(8, 320, BF16, F32),  # a bias kept in float32
]


def inputs(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(case.T * case.F)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    given = {"x": (2 * normal(case.T, case.F)).to(case.dtype), "dy": normal(case.T, case.F).to(case.dtype)}
    return given if case.bias_dtype is None else given | {"bias": normal(case.F).to(case.bias_dtype)}


def output_and_gradients(activate, given: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: given[name].clone().requires_grad_() for name in ("x", "bias") if name in given}
    y = activate(leaves["x"], leaves.get("bias"))
    y.backward(given["dy"])
    return {"y": y.detach()} | {f"d{name}": leaf.grad for name, leaf in leaves.items()}


def assert_accurate(given: dict[str, Tensor]) -> None:
    doubles = {name: tensor.double() for name, tensor in given.items()}
    actual, twin = (output_and_gradients(f, given) for f in (bias_gelu, torch_ops.bias_gelu))
    for name, exact in output_and_gradients(bias_gelu_ref, doubles).items():
        assert_as_good_as_twin(actual[name], twin[name], exact, name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_good_as_the_twin(case: Case) -> None:
    assert_accurate(inputs(case))


def test_inputs_of_any_size() -> None:
    """Each in a row of its own, since errors are measured by a row's largest element."""
    x = torch.tensor([0.0, 1e-30, 1e-4, 0.5, 3.0, 9.0, 11.9, 12.1, 50.0, 1e4, 1e9])
    x_T1 = torch.cat((x, -x))[:, None]
    assert_accurate({"x": x_T1, "dy": torch.full_like(x_T1, 0.75)})


def test_the_largest_inputs_pass_or_stop() -> None:
    largest = torch.finfo(F32).max
    x = torch.tensor([[largest, -largest]], requires_grad=True)
    y = bias_gelu(x)
    assert torch.equal(y, torch.tensor([[largest, 0.0]]))
    y.sum().backward()
    assert torch.equal(x.grad, torch.tensor([[1.0, 0.0]]))


def test_leading_dimensions_and_strides() -> None:
    base = torch.randn(6, 4, 40, generator=torch.Generator().manual_seed(0))
    x, bias = base.transpose(0, 1)[:, ::2, 8:], torch.linspace(-1, 1, 64)[::2]
    assert not x.is_contiguous() and not bias.is_contiguous()
    given = {"x": x, "bias": bias, "dy": torch.ones(()).expand(x.shape)}
    torch.testing.assert_close(output_and_gradients(bias_gelu, given), output_and_gradients(torch_ops.bias_gelu, given))


def test_the_twin_is_the_definition() -> None:
    x, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), (5,)))
    torch.testing.assert_close(torch_ops.bias_gelu(x, bias), bias_gelu_ref(x, bias))
    torch.testing.assert_close(torch_ops.bias_gelu(x, None), bias_gelu_ref(x, None))
    assert gradcheck(torch_ops.bias_gelu, (x, bias))


def test_no_rows_and_no_columns() -> None:
    for shape in ((0, 16), (3, 0)):
        x, bias = torch.zeros(*shape, requires_grad=True), torch.ones(shape[1], requires_grad=True)
        bias_gelu(x, bias).sum().backward()
        assert torch.equal(bias.grad, torch.zeros(shape[1]))
        assert x.grad.shape == shape


def test_not_a_number_is_not_hidden() -> None:
    given = inputs(Case(8, 32, F32, F32))
    given["x"][5, 7] = torch.nan
    for name, found in output_and_gradients(bias_gelu, given).items():
        assert found.isnan().nonzero().tolist() == ([[7]] if name == "dbias" else [[5, 7]])


def test_the_same_every_time() -> None:
    given = inputs(Case(13, 96, F32, F32))
    first, again = (output_and_gradients(bias_gelu, given) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.ones(2, 8, dtype=torch.float64), None, "x is torch.float64"),
        (torch.ones(()), None, "x has no dimension"),
        (torch.ones(2, 8), torch.ones(9), r"bias has shape \(9,\), x needs \(8,\)"),
    ],
    ids=["dtype", "scalar", "bias"],
)
def test_refusals(x: Tensor, bias: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"bias_gelu: {message}") as refusal:
        bias_gelu(x, bias)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("bias_dtype", [None, F32])
def test_it_is_a_sound_operation(bias_dtype: torch.dtype | None) -> None:
    given = inputs(Case(3, 10, BF16, bias_dtype))
    x, bias = given["x"].requires_grad_(), given.get("bias")
    torch.library.opcheck(torch.ops.megagrow_kernels.bias_gelu, (x, None if bias is None else bias.requires_grad_()))
    bias = None if bias is None else bias.detach()
    torch.library.opcheck(torch.ops.megagrow_kernels.bias_gelu_backward, (x.detach(), bias, given["dy"]))


@pytest.mark.parametrize("bias_dtype", [None, F32])
def test_a_compiler_takes_it_as_it_is(bias_dtype: torch.dtype | None) -> None:
    def step(x: Tensor, bias: Tensor | None) -> Tensor:
        return 2 * bias_gelu(x + 1, bias)

    given = inputs(Case(3, 20, F32, bias_dtype))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager, found = (output_and_gradients(f, given) for f in (step, compiled))
    assert all(torch.equal(eager[name], found[name]) for name in eager)
