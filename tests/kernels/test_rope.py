"""The rotary kernels, interpreted, against float64: forward, every gradient, and what autograd makes of the write."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from megagrow import torch_ops
from megagrow.model.recompute import recompute
from megagrow_kernels.launch import ANY
from megagrow_kernels.rope import MAX_BATCH, MAX_HEAD_DIM, rope_, rope_ref
from tests.kernels.accuracy import assert_as_good_as_twin

pytestmark = pytest.mark.interpreted

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


class Case(NamedTuple):
    """Batch, sequence, query heads, key heads, parts of those, head dimension, rotated columns."""

    B: int
    S: int
    N: int
    K: int
    P: int
    D: int
    R: int
    dtype: torch.dtype = F32
    interleaved: bool = False
    angle_dtype: torch.dtype = F32


WIDE = ANY["rope"][-1].block // 128  # heads of 128 columns in the widest block

CASES = [
    Case(1, 1, 1, 1, 1, 2, 2),
    Case(2, 3, 4, 2, 2, 8, 8),
    Case(2, 3, 3, 1, 2, 20, 12),  # blocks wider than the columns and the heads
    Case(1, 3, 5, 5, 1, 7, 6),  # heads that start at odd places
    Case(1, 2, 2 * WIDE + 1, WIDE, 2, 128, 128),  # three blocks of heads
    Case(2, 2, 8, 2, 2, 128, 32),  # a quarter of the columns
    Case(2, 2, 8, 2, 2, 64, 64, BF16),
    Case(2, 2, 3, 1, 2, 96, 80, BF16, angle_dtype=BF16),
    Case(2, 2, 8, 2, 2, 64, 64, F16, angle_dtype=F16),
]
CASES += [case._replace(interleaved=True) for case in CASES]


def normal(seed: int, *shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def angles(case: Case) -> tuple[Tensor, Tensor]:
    angles_SR = 3 * normal(0, case.S, case.R // 2).repeat(1, 2)
    return angles_SR.cos().to(case.angle_dtype), angles_SR.sin().to(case.angle_dtype)


def inputs(case: Case) -> dict[str, Tensor]:
    B, S, N, K, P, D, *_ = case
    shapes = {"q": (B, S, N, D), "kv": (B, S, K, P, D), "dq": (B, S, N, D), "dk": (B, S, K, D), "dv": (B, S, K, D)}
    named = {name: normal(i, *shape, dtype=case.dtype) for i, (name, shape) in enumerate(shapes.items())}
    if P == 1:
        del named["dv"]
    return named | dict(zip(("cos", "sin"), angles(case), strict=True))


def outputs_and_gradients(rope, given: dict[str, Tensor], interleaved: bool) -> dict[str, Tensor]:
    q, kv = (given[name].clone().requires_grad_() for name in ("q", "kv"))
    outputs = rope(q, kv, *angles_of(given), interleaved)
    gradients = torch.autograd.grad(outputs, (q, kv), [given[name] for name in ("dq", "dk", "dv") if name in given])
    found = dict(zip("qkv", (x.detach() for x in outputs), strict=False))
    return found | dict(zip(("dq", "dkv"), gradients, strict=True))


def of_projections(rope):
    """Of views of what a projection returns, as in the model."""

    def rope_of_views(q: Tensor, kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, ...]:
        return rope((q.flatten(2) * 1).view(q.shape), (kv.flatten(2) * 1).view(kv.shape), cos, sin, interleaved)

    return rope_of_views


def angles_of(given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return given["cos"], given["sin"]


def reference(q: Tensor, kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, ...]:
    k, *v = kv.unbind(-2)
    return rope_ref(q, cos, sin, interleaved), rope_ref(k, cos, sin, interleaved), *v


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_good_as_the_twin(case: Case) -> None:
    given = inputs(case)
    actual, twin = (outputs_and_gradients(of_projections(f), given, case.interleaved) for f in (rope_, torch_ops.rope_))
    doubles = {name: tensor.double() for name, tensor in given.items()}
    for name, exact in outputs_and_gradients(reference, doubles, case.interleaved).items():
        assert_as_good_as_twin(actual[name], twin[name], exact, name)


@pytest.mark.parametrize("interleaved", [False, True])
def test_in_place_and_nothing_else_is_written(interleaved: bool) -> None:
    case = Case(2, 3, 3, 2, 2, 12, 8, BF16)
    given = inputs(case)
    q, kv = given["q"].clone(), given["kv"].clone()
    turned_q, k, v = rope_(q, kv, *angles_of(given), interleaved)
    assert turned_q.data_ptr() == q.data_ptr()
    assert k.data_ptr() == kv.data_ptr() and v.data_ptr() == kv[..., 1, :].data_ptr()
    assert torch.equal(q[..., 8:], given["q"][..., 8:])
    assert torch.equal(k[..., 8:], given["kv"][..., 0, 8:])
    assert torch.equal(v, given["kv"][..., 1, :])
    expected = torch_ops.rope_(given["q"], given["kv"], *angles_of(given), interleaved)
    torch.testing.assert_close((turned_q, k, v), expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_strides(interleaved: bool) -> None:
    """Sequence within heads, every second head, and heads that begin within a wider row."""
    cos, sin = angles(Case(2, 3, 4, 2, 2, 8, 6))
    base_q, base_kv = normal(1, 2, 4, 3, 11), normal(2, 3, 2, 5, 2, 8)
    q, kv = base_q.clone().transpose(1, 2)[..., 3:], base_kv.clone().transpose(0, 1)[:, :, 1::2]
    expected = torch_ops.rope_(q.clone(), kv.clone(), cos, sin, interleaved)
    torch.testing.assert_close(rope_(q, kv, cos, sin, interleaved), expected)
    assert torch.equal(q._base[..., :3], base_q[..., :3])
    assert torch.equal(kv._base[:, :, ::2], base_kv[:, :, ::2])


@pytest.mark.parametrize("used", ["q", "k", "v", "qk", "qv", "kv"])
def test_gradient_through_some_outputs(used: str) -> None:
    given = inputs(Case(1, 2, 3, 2, 2, 6, 4))
    found = []
    for rope in (rope_, torch_ops.rope_):
        leaves = [given[name].clone().requires_grad_() for name in ("q", "kv")]
        outputs = dict(zip("qkv", rope(*(x * 1 for x in leaves), *angles_of(given)), strict=True))
        # Their gradients are expanded, and some not there.
        loss = sum(outputs[name].sum() for name in used)
        found.append(torch.autograd.grad(loss, leaves, allow_unused=True))
    for actual, expected in zip(*found, strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(actual, expected)


def test_gradients_are_not_overwritten_and_may_be_strided() -> None:
    given = inputs(Case(2, 3, 4, 2, 2, 8, 8))
    q, kv = (given[name].clone().requires_grad_() for name in ("q", "kv"))
    # As attention gives them: the sequence within the heads; and columns apart.
    seeds = [given[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("dq", "dk")]
    seeds.append(torch.stack((given["dv"], given["dv"]), dim=-1)[..., 0])
    kept = [seed.clone() for seed in seeds]
    gradients = torch.autograd.grad(rope_(q * 1, kv * 1, *angles_of(given)), (q, kv), seeds)
    assert all(torch.equal(seed, copy) for seed, copy in zip(seeds, kept, strict=True))
    expected = torch.autograd.grad(torch_ops.rope_(q, kv, *angles_of(given)), (q, kv), seeds)
    torch.testing.assert_close(gradients, expected)
    assert all(gradient.is_contiguous() for gradient in gradients)


@pytest.mark.parametrize("wanted", ["q", "kv"])
def test_gradient_of_one_argument(wanted: str) -> None:
    given = inputs(Case(1, 2, 3, 2, 2, 6, 4))
    leaf = given[wanted].clone().requires_grad_()
    found = []
    for rope in (rope_, torch_ops.rope_):
        arguments = {name: given[name].clone() for name in ("q", "kv")} | {wanted: leaf * 1}
        outputs = rope(arguments["q"], arguments["kv"], *angles_of(given))
        found.append(
            torch.autograd.grad(
                [x for x in outputs if x.requires_grad],
                leaf,
                [given[f"d{name}"] for name, x in zip("qkv", outputs, strict=True) if x.requires_grad],
            )
        )
    torch.testing.assert_close(*found)


def test_heads_may_be_pieces_of_one_projection() -> None:
    """Autograd refuses to write into what `split` returns; here it learns of new tensors instead."""
    given = inputs(Case(1, 2, 4, 2, 2, 8, 8))
    x = normal(7, 1, 2, 4 * 8 + 2 * 2 * 8).requires_grad_()
    found = []
    for rope in (rope_, torch_ops.rope_):
        q, kv = (x * 1).split((32, 32), dim=-1)
        outputs = rope(q.unflatten(-1, (4, 8)), kv.unflatten(-1, (2, 2, 8)), *angles_of(given))
        found.append(torch.autograd.grad(outputs, x, [given[f"d{name}"] for name in "qkv"]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("saved", ["q", "kv"])
def test_who_kept_the_old_values_is_told(saved: str) -> None:
    given = inputs(Case(1, 2, 3, 2, 2, 6, 4))
    arguments = {name: given[name].clone().requires_grad_() * 1 for name in ("q", "kv")}
    squared = arguments[saved].square().sum()
    rope_(arguments["q"], arguments["kv"], *angles_of(given))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()


@pytest.mark.parametrize("P", [1, 2])
def test_into_new_tensors(P: int) -> None:
    case = Case(2, 3, 4, 2, P, 8, 6)
    given = inputs(case)
    kept = {name: tensor.clone() for name, tensor in given.items()}
    aside = outputs_and_gradients(partial(rope_, in_place=False), given, False)
    within = outputs_and_gradients(of_projections(rope_), given, False)
    assert all(torch.equal(aside[name], within[name]) for name in within)
    rope_(given["q"], given["kv"], *angles_of(given), in_place=False)
    assert all(torch.equal(given[name], kept[name]) for name in given)


def test_selective_recomputation_needs_new_tensors() -> None:
    """It keeps the projections' results; written to, they would be turned twice, which torch notices."""
    given = inputs(Case(2, 3, 4, 2, 2, 8, 8))
    x, weight = normal(6, 6, 16), normal(7, 16, 32).requires_grad_()

    def block(x: Tensor, weight: Tensor, in_place: bool) -> Tensor:
        q, kv = (x @ weight).view(2, 3, 4, 8), (x @ weight).view(2, 3, 2, 2, 8)
        return sum(y.pow(3).sum() for y in rope_(q, kv, *angles_of(given), in_place=in_place))

    (expected,) = torch.autograd.grad(block(x, weight, True), weight)
    (found,) = torch.autograd.grad(recompute(block, "selective", x, weight, False), weight)
    assert torch.equal(found, expected)
    loss = recompute(block, "selective", x, weight, True)
    with pytest.raises(RuntimeError, match="has been mutated"):
        loss.backward()


def test_results_are_not_to_be_overwritten() -> None:
    given = inputs(Case(1, 2, 3, 2, 2, 6, 4))
    outputs = rope_(*(given[name].clone().requires_grad_() * 1 for name in ("q", "kv")), *angles_of(given))
    for output in outputs:
        with pytest.raises(RuntimeError, match="view"):
            output.mul_(2)


def test_without_autograd() -> None:
    given = inputs(Case(1, 2, 3, 2, 2, 6, 4))
    expected = torch_ops.rope_(given["q"], given["kv"], *angles_of(given))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            q, kv = (given[name].clone() for name in ("q", "kv"))
            torch.testing.assert_close(rope_(q, kv, *angles_of(given)), expected)
    with torch.no_grad():  # where a leaf may be overwritten
        rope_(given["q"].clone().requires_grad_(), given["kv"].clone(), *angles_of(given))


@pytest.mark.parametrize("interleaved", [False, True])
def test_turning_back(interleaved: bool) -> None:
    given = inputs(Case(1, 2, 3, 2, 2, 6, 6))
    cos, sin = angles_of(given)
    outputs = rope_(given["q"].clone(), given["kv"].clone(), cos, sin, interleaved)
    back = rope_(outputs[0].clone(), torch.stack(outputs[1:], dim=-2), cos, -sin, interleaved)
    torch.testing.assert_close((back[0], torch.stack(back[1:], dim=-2)), (given["q"], given["kv"]))


def test_nothing_to_turn() -> None:
    for B, S in ((0, 3), (2, 0)):
        cos, sin = angles(Case(B, S, 2, 2, 2, 4, 4))
        q, kv = torch.zeros(B, S, 2, 4, requires_grad=True), torch.zeros(B, S, 2, 2, 4, requires_grad=True)
        outputs = rope_(q * 1, kv * 1, cos, sin)
        gradients = torch.autograd.grad([x.sum() for x in outputs], (q, kv))
        assert [x.shape for x in gradients] == [q.shape, kv.shape]


def test_not_a_number_is_not_hidden() -> None:
    given = inputs(Case(1, 3, 2, 1, 2, 8, 8))
    given["q"][0, 1, 0, 2] = torch.nan
    q, k, v = rope_(given["q"], given["kv"], *angles_of(given))
    assert q.isnan().nonzero().tolist() == [[0, 1, 0, 2], [0, 1, 0, 6]]
    assert k.isfinite().all() and v.isfinite().all()


def test_the_same_from_run_to_run() -> None:
    given = inputs(CASES[4])
    runs = [outputs_and_gradients(of_projections(rope_), given, False) for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("interleaved", [False, True])
def test_it_is_a_sound_operation(interleaved: bool) -> None:
    given = inputs(Case(2, 3, 4, 2, 2, 8, 6))
    q, k = given["q"].requires_grad_(), given["kv"][..., 0, :].requires_grad_()
    torch.library.opcheck(torch.ops.megagrow_kernels.rope, (q, k, *angles_of(given), interleaved, False))


@pytest.mark.parametrize("P", [1, 2])
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_compiler_takes_it_as_it_is(interleaved: bool, P: int) -> None:
    def step(*arguments: Tensor) -> tuple[Tensor, ...]:
        return tuple(x * 2 for x in of_projections(rope_)(*arguments))

    given = inputs(Case(2, 3, 4, 2, P, 8, 6))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager, found = (outputs_and_gradients(f, given, interleaved) for f in (step, compiled))
    assert eager.keys() == found.keys()
    assert all(torch.equal(eager[name], found[name]) for name in eager)


def test_a_view_of_a_leaf_is_refused() -> None:
    cos, sin = torch.ones(2, 3, 4)
    kv = torch.ones(2, 3, 32).requires_grad_().view(2, 3, 2, 2, 8)
    with pytest.raises(ValueError, match="kv is a leaf that requires a gradient, or a view of one"):
        rope_(torch.ones(2, 3, 4, 8), kv, cos, sin)
    rope_(torch.ones(2, 3, 4, 8), kv.detach(), cos, sin)


ANGLES_4 = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.ones(2, 3, 8)}, r"q has shape \(2, 3, 8\)"),
        ({"kv": torch.ones(2, 3, 2, 2, 6)}, r"must be \[B, S, N, D\] and \[B, S, K, P, D\]"),
        ({"kv": torch.ones(2, 3, 2, 3, 8)}, "kv has 3 parts to a head"),
        ({"q": torch.ones(2, 3, 4, 8, dtype=torch.float64)}, "q is torch.float64"),
        ({"kv": torch.ones(2, 3, 2, 2, 8, dtype=BF16)}, "kv torch.bfloat16; both must be"),
        ({"cos": torch.ones(2, 4)}, r"must be \[3, R\] with R even, 2..8"),
        ({"cos": torch.ones(3, 3), "sin": torch.ones(3, 3)}, "R even"),
        ({"cos": torch.ones(3, 10), "sin": torch.ones(3, 10)}, "R even, 2..8"),
        ({"cos": torch.ones(3, 4, dtype=F16)}, "cos is torch.float16 and sin torch.float32"),
        ({"cos": torch.ones(3, 4).requires_grad_()}, "cos or sin requires a gradient"),
        ({"q": torch.ones(2, 3, 8, 4).transpose(2, 3)}, "columns of q are 4 elements apart"),
        ({"q": torch.ones(1, 3, 4, 8).expand(2, -1, -1, -1)}, "q is expanded"),
        ({"q": torch.ones(2, 3, 4, 8).requires_grad_()}, "q is a leaf that requires a gradient"),
        (
            {"q": torch.ones(2, 3, 1, MAX_HEAD_DIM + 1), "kv": torch.ones(2, 3, 1, 1, MAX_HEAD_DIM + 1)},
            f"D={MAX_HEAD_DIM + 1} or B=2 exceeds",
        ),
        (
            {
                "q": torch.ones(MAX_BATCH + 1, 1, 1, 4),
                "kv": torch.ones(MAX_BATCH + 1, 1, 1, 1, 4),
                "cos": torch.ones(1, 4),
                "sin": torch.ones(1, 4),
            },
            f"B={MAX_BATCH + 1} exceeds",
        ),
    ],
    ids=[
        "q",
        "head-dim",
        "parts",
        "dtype",
        "kv-dtype",
        "positions",
        "odd",
        "too-many",
        "angle-dtype",
        "angle-gradient",
        "columns",
        "expanded",
        "leaf",
        "wide",
        "batch",
    ],
)
def test_refusals(changes: dict[str, Tensor], message: str) -> None:
    arguments = {"q": torch.ones(2, 3, 4, 8), "kv": torch.ones(2, 3, 2, 2, 8), "cos": ANGLES_4, "sin": ANGLES_4}
    with pytest.raises(ValueError, match=message) as refusal:
        rope_(*(arguments | changes).values())
    assert "\n" not in str(refusal.value)
