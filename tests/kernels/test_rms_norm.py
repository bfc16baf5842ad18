"""The RMSNorm kernels, interpreted, against float64: forward and every gradient."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from megagrow import torch_ops
from megagrow_kernels.rms_norm import MAX_HIDDEN_SIZE, rms_norm, rms_norm_ref
from tests.kernels.accuracy import assert_as_good_as_twin

pytestmark = pytest.mark.interpreted

EPS = 1e-5
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


class Case(NamedTuple):
    """Rows, hidden size; the backward pass has 2 programs here, so 5 rows make it turn thrice."""

    T: int
    H: int
    dtype: torch.dtype
    residual: bool
    weight_dtype: torch.dtype | None = None


CASES = [
    Case(4, 64, F32, False),
    Case(5, 96, F32, True),  # a block wider than the row
    Case(1, 1, F32, True),
    Case(5, 257, F32, False),  # rows that start at odd addresses
    Case(3, 8192, F32, True),  # the widest row of one backward block
    Case(3, 8200, F32, True),  # two backward blocks, the second nearly empty
    Case(2, 32768, F32, False),  # four of them
    Case(5, 1000, BF16, True),
    Case(5, 1000, F16, True),
    Case(4, 4096, BF16, False),
    Case(2, 16384, BF16, True),
    Case(5, 320, BF16, True, F32),  # weights kept in float32
]


def inputs(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(case.T * case.H)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype)

    weight_H = (1 + 0.3 * torch.randn(case.H, generator=generator)).to(case.weight_dtype or case.dtype)
    given = {"x": normal(case.T, case.H) * 2, "weight": weight_H, "dy": normal(case.T, case.H)}
    if case.residual:
        given |= {"residual": normal(case.T, case.H), "dsum": normal(case.T, case.H)}
    return given


def outputs_and_gradients(norm, given: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: given[name].clone().requires_grad_() for name in ("x", "weight", "residual") if name in given}
    result = norm(leaves["x"], leaves["weight"], EPS, leaves.get("residual"))
    y, total = result if isinstance(result, tuple) else (result, None)
    outputs, seeds = [y], [given["dy"]]
    if "dsum" in given:
        outputs.append(total)
        seeds.append(given["dsum"])
    torch.autograd.backward(outputs, seeds)
    found = {"y": y.detach()} | {f"d{name}": leaf.grad for name, leaf in leaves.items()}
    return found | ({"sum": total.detach()} if "dsum" in given else {})


def truth(given: dict[str, Tensor]) -> dict[str, Tensor]:
    def reference(x, weight, eps, residual):
        y, total = rms_norm_ref(x, weight, eps, residual)
        return y if residual is None else (y, total)

    doubles = {name: tensor.double() for name, tensor in given.items()}
    return outputs_and_gradients(reference, doubles)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_good_as_the_twin(case: Case) -> None:
    given = inputs(case)
    actual, twin = (outputs_and_gradients(f, given) for f in (rms_norm, torch_ops.rms_norm))
    for name, exact in truth(given).items():
        assert_as_good_as_twin(actual[name], twin[name], exact, name)


def test_rows_of_any_scale() -> None:
    case = Case(5, 96, F32, True)
    given = inputs(case)
    scale_T1 = torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6])[:, None]
    given["x"], given["residual"] = given["x"] * scale_T1, given["residual"] * scale_T1
    del given["dsum"]  # it would drown the gradients of the large rows
    actual, twin = (outputs_and_gradients(f, given) for f in (rms_norm, torch_ops.rms_norm))
    for name, exact in truth(given).items():
        assert_as_good_as_twin(actual[name], twin[name], exact, name)


def test_leading_dimensions_and_strides() -> None:
    base = torch.randn(6, 4, 40, generator=torch.Generator().manual_seed(0))
    x, weight = base.transpose(0, 1)[:, ::2, 8:], torch.linspace(0.5, 2, 32)
    assert not x.is_contiguous()
    torch.testing.assert_close(rms_norm(x, weight, EPS), torch_ops.rms_norm(x, weight, EPS))
    y, total = rms_norm(x, weight, EPS, 2 * x)
    torch.testing.assert_close(total, 3 * x)
    torch.testing.assert_close(y, torch_ops.rms_norm(3 * x, weight, EPS))


def test_statistics_are_those_of_the_rounded_sum() -> None:
    given = inputs(Case(5, 320, BF16, True))
    x, weight, residual = given["x"], given["weight"], given["residual"]
    y, total = rms_norm(x, weight, EPS, residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, rms_norm(total, weight, EPS))


@pytest.mark.parametrize("used", ["y", "sum", "both"])
def test_gradient_through_either_output(used: str) -> None:
    given = inputs(Case(3, 48, F32, True))
    gradients = []
    for norm in (rms_norm, torch_ops.rms_norm):
        leaves = [given[name].clone().requires_grad_() for name in ("x", "weight", "residual")]
        y, total = norm(leaves[0], leaves[1], EPS, leaves[2])
        loss = {"y": y.pow(3), "sum": total.pow(2), "both": y.pow(3) + total.pow(2)}[used].sum()
        gradients.append(torch.autograd.grad(loss, leaves, allow_unused=True))
    for actual, expected in zip(*gradients, strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_no_rows() -> None:
    x, weight = torch.zeros(0, 16, requires_grad=True), torch.ones(16, requires_grad=True)
    rms_norm(x, weight, EPS).sum().backward()
    assert torch.equal(weight.grad, torch.zeros(16))
    assert x.grad.shape == (0, 16)


def test_not_a_number_is_not_hidden() -> None:
    x = torch.ones(2, 32)
    x[1, 7] = torch.nan
    y = rms_norm(x, torch.ones(32), EPS)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(9)}, r"weight has shape \(9,\), x needs \(8,\)"),
        ({"x": torch.ones(2, 8, dtype=torch.float64)}, "x is torch.float64"),
        ({"residual": torch.ones(3, 8)}, r"residual is torch.float32 \(3, 8\)"),
        ({"residual": torch.ones(2, 8, dtype=BF16)}, "both must agree"),
        (
            {
                "x": torch.ones(1, MAX_HIDDEN_SIZE + 1),
                "weight": torch.ones(MAX_HIDDEN_SIZE + 1),
            },
            "exceeds the kernel's 32768",
        ),
    ],
    ids=["weight", "dtype", "residual-shape", "residual-dtype", "hidden"],
)
def test_refusals(changes: dict[str, Tensor], message: str) -> None:
    arguments = {"x": torch.ones(2, 8), "weight": torch.ones(8), "eps": EPS} | changes
    with pytest.raises(ValueError, match=message) as refusal:
        rms_norm(**arguments)
    assert "\n" not in str(refusal.value)
