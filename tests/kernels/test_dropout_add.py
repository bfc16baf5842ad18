"""The kernels of dropout before a residual addition, interpreted: the twin's mask bit by bit, values by float64."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from megagrow import torch_ops
from megagrow_kernels.dropout_add import dropout_add, dropout_add_ref
from megagrow_kernels.launch import ANY
from tests.kernels.accuracy import assert_as_good_as_twin

pytestmark = pytest.mark.interpreted

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
BLOCK = ANY["dropout_add"][-1].block
LEAVES = ("x", "y", "bias")


class Case(NamedTuple):
    """Rows, features; the backward pass has 20 warps here if there is a bias, shared among the columns' blocks."""

    T: int
    H: int
    dtype: torch.dtype
    bias_dtype: torch.dtype | None
    rate: float = 0.3


CASES = [
    Case(1, 1, F32, F32),
    Case(2, 3, F32, F32),  # less than a hash
    Case(23, 96, F32, F32, 0.1),  # a block wider than the row; two turns
    Case(5, 257, F32, None),  # rows that start at odd addresses
    Case(8, 257, F32, F32, 0.9),
    Case(7, BLOCK, F32, F32),
    Case(5, 2 * BLOCK + 8, F32, F32),  # three blocks, the last nearly empty; five turns
    Case(3, BLOCK + 8, F32, None),
    Case(8, 1000, BF16, BF16, 0.1),
    Case(8, 1000, F16, F16),
    Case(5, BLOCK, BF16, None),
    Case(8, 320, BF16, F32),  # a bias kept in float32
]


def inputs(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(case.T * case.H)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype)

    given = {"x": normal(case.T, case.H), "y": normal(case.T, case.H), "dsum": normal(case.T, case.H)}
    if case.bias_dtype is not None:
        given["bias"] = torch.randn(case.H, generator=generator).to(case.bias_dtype)
    return given


def some_keys(*shape: int) -> Tensor:
    """Of all 64 bits, the largest and the smallest among them."""
    keys = torch.randint(-(2**63), 2**63 - 1, shape, generator=torch.Generator().manual_seed(5))
    keys.view(-1)[:3] = torch.tensor([2**63 - 1, -(2**63), 0])[: keys.numel()]
    return keys


def output_and_gradients(add, given: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: given[name].clone().requires_grad_() for name in LEAVES if name in given}
    total = add(leaves["x"], leaves["y"], leaves.get("bias"))
    total.backward(given["dsum"])
    return {"sum": total.detach()} | {f"d{name}": leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_good_as_the_twin(case: Case) -> None:
    given, keys, place = inputs(case), some_keys(case.T), 2
    kept = torch_ops.kept(keys, place, case.rate, case.H)
    doubles = {name: tensor.double() for name, tensor in given.items()}
    exact = output_and_gradients(lambda *each: dropout_add_ref(*each, case.rate, kept), doubles)
    actual, twin = (
        output_and_gradients(lambda *each, add=add: add(*each, case.rate, keys, place), given)
        for add in (dropout_add, torch_ops.dropout_add)
    )
    for name in exact:
        assert_as_good_as_twin(actual[name], twin[name], exact[name], name)
    assert torch.equal(actual["dx"], given["dsum"])
    torch.testing.assert_close(actual["dy"] != 0, kept & (given["dsum"] != 0))


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("rate", [0.0, 2**-16, 0.1, 0.5, 1 - 2**-16, 1.0])
def test_the_mask_is_the_twins_bit_by_bit(rate: float, place: int) -> None:
    keys, zeros, ones = some_keys(4), torch.zeros(4, 2 * BLOCK + 5), torch.ones(4, 2 * BLOCK + 5)
    kept = torch_ops.kept(keys, place, rate, ones.shape[1])
    total = dropout_add(zeros, ones.requires_grad_(), None, rate, keys, place)
    assert torch.equal(total != 0, kept)
    total.sum().backward()
    assert torch.equal(ones.grad, total)
    assert torch.equal(total, torch_ops.dropout_add(zeros, ones, None, rate, keys, place))


def test_the_gradient_of_x_is_not_copied() -> None:
    x, y = torch.ones(3, 8, requires_grad=True), torch.ones(3, 8, requires_grad=True)
    gradient = torch.randn(3, 8)
    dx, _ = torch.autograd.grad(dropout_add(x, y, None, 0.5, some_keys(3), 0), (x, y), gradient)
    assert dx.data_ptr() == gradient.data_ptr()


def test_only_keys_are_kept() -> None:
    kept = []
    leaves = [torch.ones(3, 8, requires_grad=True) for _ in range(2)] + [torch.ones(8, requires_grad=True)]
    keys = some_keys(3)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        for add in (dropout_add, torch_ops.dropout_add):
            add(*leaves, 0.5, keys, 0)
    assert [tensor.data_ptr() for tensor in kept] == [keys.data_ptr()] * 2


def test_leading_dimensions_and_strides() -> None:
    base = torch.randn(6, 4, 40, generator=torch.Generator().manual_seed(0))
    x, bias, keys = base.transpose(0, 1)[:, ::2, 8:], torch.linspace(-1, 1, 64)[::2], some_keys(3, 4).T
    assert not (x.is_contiguous() or bias.is_contiguous() or keys.is_contiguous())
    given = {"x": x, "y": 2 * x, "bias": bias, "dsum": torch.ones(()).expand(x.shape)}
    found, expected = (
        output_and_gradients(lambda *each, add=add: add(*each, 0.4, keys, 1), given)
        for add in (dropout_add, torch_ops.dropout_add)
    )
    torch.testing.assert_close(found, expected)


def test_no_rows_and_no_columns() -> None:
    for shape in ((0, 16), (3, 0)):
        x, bias = torch.zeros(*shape, requires_grad=True), torch.ones(shape[1], requires_grad=True)
        dropout_add(x, 2 * x, bias, 0.5, some_keys(shape[0]), 0).sum().backward()
        assert torch.equal(bias.grad, torch.zeros(shape[1]))
        assert x.grad.shape == shape


@pytest.mark.parametrize("name", ["x", "y", "dsum"])
def test_not_a_number_is_not_hidden(name: str) -> None:
    """Not even where it is dropped."""
    given, keys = inputs(Case(8, 32, F32, F32)), some_keys(8)
    given[name][5] = torch.nan
    found = output_and_gradients(lambda *each: dropout_add(*each, 0.5, keys, 0), given)
    shown = ("dx", "dy") if name == "dsum" else ("sum",)
    for each in shown:
        assert found[each].isnan().nonzero()[:, 0].tolist() == [5] * 32
    assert found["dbias"].isnan().all() == (name == "dsum")


def test_the_same_every_time() -> None:
    given, keys = inputs(Case(13, 96, F32, F32)), some_keys(13)
    first, again = (output_and_gradients(lambda *each: dropout_add(*each, 0.5, keys, 0), given) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(2, 8, dtype=torch.float64)}, "x is torch.float64"),
        ({"y": torch.ones(2, 9)}, r"y is torch.float32 \(2, 9\), x is torch.float32 \(2, 8\); both must agree"),
        ({"y": torch.ones(2, 8, dtype=BF16)}, "both must agree"),
        ({"x": torch.ones(()), "y": torch.ones(())}, "x has no dimension"),
        ({"bias": torch.ones(9)}, r"bias has shape \(9,\), x needs \(8,\)"),
        ({"keys": torch.zeros(3, dtype=torch.int64)}, r"keys are torch.int64 \(3,\), x needs int64 \(2,\)"),
        ({"keys": torch.zeros(2, dtype=torch.int32)}, "keys are torch.int32"),
        ({"rate": 1.5}, "rate=1.5 must lie between 0 and 1"),
        ({"rate": float("nan")}, "rate=nan must lie"),
    ],
    ids=["dtype", "y-shape", "y-dtype", "scalar", "bias", "keys-shape", "keys-dtype", "rate", "nan"],
)
def test_refusals(changes: dict[str, object], message: str) -> None:
    arguments = {"x": torch.ones(2, 8), "y": torch.ones(2, 8), "bias": None, "rate": 0.5, "keys": some_keys(2)}
    with pytest.raises(ValueError, match=f"dropout_add: .*{message}") as refusal:
        dropout_add(**arguments | changes, place=0)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("bias_dtype", [None, F32])
def test_it_is_a_sound_operation(bias_dtype: torch.dtype | None) -> None:
    given, keys = inputs(Case(3, 10, BF16, bias_dtype)), some_keys(3)
    leaves = [given[name].requires_grad_() if name in given else None for name in LEAVES]
    torch.library.opcheck(torch.ops.megagrow_kernels.dropout_add, (*leaves, 0.5, keys, 1))
    backward = torch.ops.megagrow_kernels.dropout_add_backward
    torch.library.opcheck(backward, (given["dsum"], keys, 0.5, 1, bias_dtype is not None))


@pytest.mark.parametrize("bias_dtype", [None, F32])
def test_a_compiler_takes_it_as_it_is(bias_dtype: torch.dtype | None) -> None:
    keys = some_keys(3)

    def step(x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        return 2 * dropout_add(dropout_add(x, y + 1, bias, 0.5, keys, 1), y, bias, 0.5, keys, 2)

    given = inputs(Case(3, 20, F32, bias_dtype))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager, found = (output_and_gradients(f, given) for f in (step, compiled))
    assert all(torch.equal(eager[name], found[name]) for name in eager)
