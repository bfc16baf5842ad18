"""The kernels of RMSNorm and LayerNorm, interpreted, against float64: forward and every gradient."""

from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megagrow import torch_ops
from megagrow_kernels import norm
from megagrow_kernels.norm import MAX_HIDDEN_SIZE, layer_norm, norm_ref, rms_norm
from tests.kernels.accuracy import assert_as_good_as_twin

pytestmark = pytest.mark.interpreted

EPS = 1e-5
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
RMS, LAYER = "rms_norm", "layer_norm"
OPS = torch.ops.megagrow_kernels


class Case(NamedTuple):
    """Rows, hidden size, and what is optional; "x" stands for a residual, "b" for a bias."""

    name: str
    T: int
    H: int
    dtype: torch.dtype
    options: str = ""
    param_dtype: torch.dtype | None = None


# Programs hold a row, or several of up to 1024 elements; 16 warps share the rows here: 8 programs of 2, or 1 of 16.
CASES = [
    Case(RMS, 4, 64, F32),  # fewer rows than a program holds
    Case(LAYER, 300, 64, F32, "xb"),  # programs turn thrice, the last rows do not fill one
    Case(RMS, 45, 257, F32),  # rows that start at odd addresses
    Case(LAYER, 45, 257, F32, "b"),
    Case(RMS, 1, 1, F32, "x"),
    Case(LAYER, 3, 2, F32, "xb"),
    Case(RMS, 5, 3000, F32, "x"),  # a block wider than the row; 2 programs turn thrice
    Case(LAYER, 5, 3000, F32, "x"),
    Case(LAYER, 3, 8192, F32, "xb"),  # the widest row of one backward block
    Case(RMS, 3, 8200, F32, "x"),  # two backward blocks, the second nearly empty
    Case(LAYER, 3, 8200, F32, "xb"),
    Case(RMS, 2, 32768, F32),  # four of them
    Case(RMS, 17, 1000, BF16, "x"),
    Case(LAYER, 17, 1000, BF16, "xb"),
    Case(RMS, 17, 1000, F16, "x"),
    Case(LAYER, 17, 1000, F16, "b"),
    Case(RMS, 4, 4096, BF16),
    Case(LAYER, 4, 4096, BF16),
    Case(RMS, 2, 16384, BF16, "x"),
    Case(LAYER, 2, 16384, BF16, "xb"),
    Case(RMS, 5, 320, BF16, "x", F32),  # parameters kept in float32
    Case(LAYER, 5, 320, BF16, "xb", F32),
]


def inputs(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(case.T * case.H)
    param_dtype = case.param_dtype or case.dtype

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    given = {"x": (normal(case.T, case.H) * 2 + 0.5).to(case.dtype), "dy": normal(case.T, case.H).to(case.dtype)}
    given |= {"weight": (1 + 0.3 * normal(case.H)).to(param_dtype)}
    if "b" in case.options:
        given |= {"bias": normal(case.H).to(param_dtype)}
    if "x" in case.options:
        given |= {name: normal(case.T, case.H).to(case.dtype) for name in ("residual", "dsum")}
    return given


def call(module: ModuleType, name: str, given: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """(y, sum) by a module's function, the sum only where there is a residual."""
    bias = () if name == RMS else (given.get("bias"),)
    result = getattr(module, name)(given["x"], given["weight"], *bias, EPS, given.get("residual"))
    return result if isinstance(result, tuple) else (result, None)


def defined(name: str, given: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    residual = given.get("residual")
    y, total = norm_ref(given["x"], given["weight"], given.get("bias"), EPS, residual, centred=name == LAYER)
    return y, None if residual is None else total


def leaves_of(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.clone().requires_grad_() for name, x in given.items() if name not in ("dy", "dsum")}


def outputs_and_gradients(function, given: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = leaves_of(given)
    y, total = function(leaves)
    outputs, seeds = ([y], [given["dy"]]) if "dsum" not in given else ([y, total], [given["dy"], given["dsum"]])
    torch.autograd.backward(outputs, seeds)
    found = {"y": y.detach()} | {f"d{name}": leaf.grad for name, leaf in leaves.items()}
    return found | ({} if total is None else {"sum": total.detach()})


def assert_accurate(name: str, given: dict[str, Tensor]) -> None:
    actual = outputs_and_gradients(lambda leaves: call(norm, name, leaves), given)
    twin = outputs_and_gradients(lambda leaves: call(torch_ops, name, leaves), given)
    doubles = {key: x.double() for key, x in given.items()}
    for key, exact in outputs_and_gradients(lambda leaves: defined(name, leaves), doubles).items():
        assert_as_good_as_twin(actual[key], twin[key], exact, key)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_good_as_the_twin(case: Case) -> None:
    assert_accurate(case.name, inputs(case))


@pytest.mark.parametrize("name", [RMS, LAYER])
def test_rows_of_any_scale(name: str) -> None:
    given = inputs(Case(name, 5, 96, F32, "x"))
    scale_T1 = torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6])[:, None]
    given["x"], given["residual"] = given["x"] * scale_T1, given["residual"] * scale_T1
    del given["dsum"]  # it would drown the gradients of the large rows
    assert_accurate(name, given)


@pytest.mark.parametrize("H", [96, 8200])
def test_a_mean_much_larger_than_the_deviation(H: int) -> None:
    given = inputs(Case(LAYER, 4, H, F32, "b"))
    given["x"] += 3000  # whose rounding is 1e-4 of the deviation
    found = outputs_and_gradients(lambda leaves: call(norm, LAYER, leaves), given)
    doubles = {key: x.double() for key, x in given.items()}
    exact = outputs_and_gradients(lambda leaves: defined(LAYER, leaves), doubles)
    for key in exact:
        torch.testing.assert_close(found[key].double(), exact[key], rtol=1e-3, atol=1e-3)
    # The squares, of 9e6, are rounded by 0.5: against a variance of 4 it shows.
    x = given["x"]
    variance_T = x.var(-1, correction=0)
    naive_T = x.square().mean(-1) - x.mean(-1).square()
    assert ((naive_T - variance_T).abs() > 0.02 * variance_T).any()


@pytest.mark.parametrize("name", [RMS, LAYER])
def test_leading_dimensions_and_strides(name: str) -> None:
    base = torch.randn(6, 4, 40, generator=torch.Generator().manual_seed(0))
    x, weight = base.transpose(0, 1)[:, ::2, 8:], torch.linspace(0.5, 2, 64)[::2]
    assert not x.is_contiguous()
    given = {"x": x, "weight": weight, "bias": weight - 1, "residual": 2 * x}
    results = []
    for module in (norm, torch_ops):
        leaves = {key: value.detach().requires_grad_() for key, value in given.items()}
        y, total = call(module, name, leaves)
        (y.sum() + 3 * total[..., 0].sum()).backward()  # gradients that are expanded, or strided
        results.append([y, total, *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert results[0][0].shape == x.shape
    del given["residual"]
    torch.testing.assert_close(call(norm, name, given), call(torch_ops, name, given))


@pytest.mark.parametrize("name", [RMS, LAYER])
def test_statistics_are_those_of_the_rounded_sum(name: str) -> None:
    given = inputs(Case(name, 5, 320, BF16, "x"))
    y, total = call(norm, name, given)
    assert torch.equal(total, given["x"] + given["residual"])
    assert torch.equal(y, call(norm, name, {"x": total, "weight": given["weight"]})[0])


class BackwardCalls(TorchDispatchMode):
    """Notes the arguments of every backward pass of a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.args: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is OPS.norm_backward.default:
            self.args.append(args)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [RMS, LAYER])
@pytest.mark.parametrize("used", ["y", "sum", "both"])
def test_gradient_through_either_output(used: str, name: str) -> None:
    given = inputs(Case(name, 3, 48, F32, "x" if name == RMS else "xb"))
    gradients = []
    for module in (norm, torch_ops):
        leaves = leaves_of(given)
        y, total = call(module, name, leaves)
        loss = {"y": y.pow(3), "sum": total.pow(2), "both": y.pow(3) + total.pow(2)}[used].sum()
        with BackwardCalls() as calls:
            gradients.append(torch.autograd.grad(loss, list(leaves.values()), allow_unused=True))
        if module is norm:  # nothing is computed with zeros
            assert len(calls.args) == (used != "sum")
            assert all((args[4] is None) == (used == "y") for args in calls.args)
    for actual, expected in zip(*gradients, strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trained", ["x", "residual", "weight", "bias"])
def test_all_but_one_input_frozen(trained: str) -> None:
    given = inputs(Case(LAYER, 3, 48, F32, "xb"))
    expected = outputs_and_gradients(lambda leaves: call(norm, LAYER, leaves), given)
    leaves = {name: x.clone().requires_grad_(name == trained) for name, x in given.items()}
    y, total = call(norm, LAYER, leaves)
    ((y * given["dy"]).sum() + (total * given["dsum"]).sum()).backward()
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [trained]
    torch.testing.assert_close(leaves[trained].grad, expected[f"d{trained}"])


@pytest.mark.parametrize("case", [CASES[0], CASES[9], CASES[13], CASES[19]], ids=str)
def test_the_same_from_run_to_run(case: Case) -> None:
    given = inputs(case)
    first, second = (outputs_and_gradients(lambda leaves: call(norm, case.name, leaves), given) for _ in range(2))
    for key in first:
        assert torch.equal(first[key], second[key])


@pytest.mark.parametrize("options", ["", "b", "x", "xb"])
def test_no_rows(options: str) -> None:
    for name in (RMS, LAYER):
        leaves = leaves_of(inputs(Case(name, 0, 16, F32, options)))
        y, total = call(norm, name, leaves)
        assert y.shape == (0, 16)
        (y.sum() + (0 if total is None else total.sum())).backward()
        assert torch.equal(leaves["weight"].grad, torch.zeros(16))
        assert leaves["x"].grad.shape == (0, 16)
        if name == LAYER and "b" in options:
            assert torch.equal(leaves["bias"].grad, torch.zeros(16))


@pytest.mark.parametrize("name", [RMS, LAYER])
def test_not_a_number_is_not_hidden(name: str) -> None:
    given = {"x": torch.randn(3, 24), "weight": torch.ones(24), "dy": torch.ones(3, 24)}
    given["x"][1, 7] = torch.nan
    found = outputs_and_gradients(lambda leaves: call(norm, name, leaves), given)
    for key in ("y", "dx"):
        assert found[key][[0, 2]].isfinite().all()
        assert found[key][1].isnan().all()
    assert found["dweight"].isnan().all()


@pytest.mark.parametrize("centred", [False, True])
def test_registration(centred: bool) -> None:
    x, residual = (torch.randn(3, 4, 24, requires_grad=True) for _ in range(2))
    weight, bias = torch.randn(24, requires_grad=True), torch.randn(24, requires_grad=True) if centred else None
    torch.library.opcheck(OPS.norm.default, (x, weight, bias, EPS, centred))
    torch.library.opcheck(OPS.add_norm.default, (x, residual, weight, bias, EPS, centred))
    given = (x.detach(), weight.detach(), torch.ones(12, 1 + centred), x.detach())
    for dsum in (None, x.detach()):
        torch.library.opcheck(OPS.norm_backward.default, (*given, dsum, centred))


@pytest.mark.parametrize("name", [RMS, LAYER])
@pytest.mark.parametrize("options", ["", "xb"])
def test_compiled_whole(options: str, name: str) -> None:
    def function(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        y, total = call(norm, name, leaves)
        return y * 2, total

    given = inputs(Case(name, 5, 24, F32, options))
    given.pop("bias" if name == RMS else "", None)
    expected = outputs_and_gradients(function, given)
    actual = outputs_and_gradients(torch.compile(function, fullgraph=True, backend="aot_eager"), given)
    assert actual.keys() == expected.keys()
    for key in actual:
        assert torch.equal(actual[key], expected[key])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(9)}, r"weight has shape \(9,\), x needs \(8,\)"),
        ({"bias": torch.ones(2, 8)}, r"bias has shape \(2, 8\), x needs \(8,\)"),
        ({"x": torch.ones(())}, "x has no dimension"),
        ({"x": torch.ones(2, 8, dtype=torch.float64)}, "x is torch.float64"),
        ({"residual": torch.ones(3, 8)}, r"residual is torch.float32 \(3, 8\)"),
        ({"residual": torch.ones(2, 8, dtype=BF16)}, "both must agree"),
        (
            {"x": torch.ones(2, 0), "weight": torch.ones(0), "bias": None},
            "hidden size 0 lies outside the kernel's 1..32768",
        ),
        (
            {"x": torch.ones(1, MAX_HIDDEN_SIZE + 1), "weight": torch.ones(MAX_HIDDEN_SIZE + 1), "bias": None},
            "hidden size 32769 lies outside",
        ),
    ],
    ids=["weight", "bias", "scalar", "dtype", "residual-shape", "residual-dtype", "none", "hidden"],
)
def test_refusals(changes: dict[str, Tensor | None], message: str) -> None:
    arguments = {"x": torch.ones(2, 8), "weight": torch.ones(8), "bias": torch.ones(8), "eps": EPS} | changes
    with pytest.raises(ValueError, match=f"layer_norm: .*{message}") as refusal:
        layer_norm(**arguments)
    assert "\n" not in str(refusal.value)
    del arguments["bias"]
    if "bias" not in changes:
        with pytest.raises(ValueError, match=f"rms_norm: .*{message}"):
            rms_norm(**arguments)
