"""The AdamW kernel, interpreted, against float64 over several steps: weights, moments and copies of many tensors."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from megagrow import torch_ops
from megagrow_kernels.adamw import AdamWTable, adamw_, adamw_ref
from megagrow_kernels.launch import ANY
from tests.kernels.accuracy import assert_as_good_as_twin

pytestmark = pytest.mark.interpreted

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
BLOCK = ANY["adamw"][-1].block
BETAS = (0.9, 0.95)
SHAPES = ((3, 5), (0,), (), (BLOCK + 1,), (2, BLOCK), (7,), (64,))
STATE = ("params", "exp_avgs", "exp_avg_sqs")


def normal(seed: int, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = F32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def state(shapes: Sequence[tuple[int, ...]] = SHAPES, copies: torch.dtype | None = None) -> dict[str, list[Tensor]]:
    """Weights and moments of a run that has begun; moments are as large as in the first steps."""
    named = {
        "params": normal(0, shapes),
        "exp_avgs": [0.1 * x for x in normal(1, shapes)],
        "exp_avg_sqs": [0.1 * x.square() for x in normal(2, shapes)],
        "copies": None if copies is None else normal(3, shapes, copies),
    }
    return named


def rates(num_tensors: int) -> dict[str, list[float]]:
    """Different ones for every tensor; some have no decay, one an eps that drowns the root."""
    return {
        "lrs": [1e-3 * (1 + i) for i in range(num_tensors)],
        "eps": [1e-8 if i % 4 != 3 else 10.0 for i in range(num_tensors)],
        "weight_decays": [0.1 * (i % 3) for i in range(num_tensors)],
    }


def copied(named: dict[str, list[Tensor] | None]) -> dict[str, list[Tensor] | None]:
    return {name: None if tensors is None else [x.clone() for x in tensors] for name, tensors in named.items()}


def one_step(update, named: dict[str, list[Tensor] | None], grads: list[Tensor], step: int = 3, **more) -> None:
    """By `adamw_`, its twin, or the truth; `named` is overwritten."""
    params, exp_avgs, exp_avg_sqs, copies = named.values()
    given = rates(len(params)) | more
    update(params, grads, exp_avgs, exp_avg_sqs, copies, beta1=BETAS[0], beta2=BETAS[1], step=step, **given)


def reference(params, grads, exp_avgs, exp_avg_sqs, copies, lrs, eps, weight_decays, scale=None, **rest) -> None:
    for i, grad in enumerate(grads):
        factors = (lrs[i], eps[i], weight_decays[i])
        scaled = grad.double() if scale is None else grad.double() * scale.double()
        new = adamw_ref(params[i], scaled, exp_avgs[i], exp_avg_sqs[i], *factors, **rest)
        for tensor, value in zip((params[i], exp_avgs[i], exp_avg_sqs[i]), new, strict=True):
            tensor.copy_(value)


def assert_accurate(
    actual: dict[str, list[Tensor]], twin: dict[str, list[Tensor]], truth: dict[str, list[Tensor]]
) -> None:
    for name in STATE:
        for i, tensors in enumerate(zip(actual[name], twin[name], truth[name], strict=True)):
            if tensors[0].numel() > 0:
                assert_as_good_as_twin(*(x.flatten() for x in tensors), f"{name}[{i}]")


def assert_same(actual: dict[str, list[Tensor] | None], expected: dict[str, list[Tensor] | None]) -> None:
    for name, tensors in expected.items():
        for i, x in enumerate(tensors or ()):
            assert torch.equal(actual[name][i], x), f"{name}[{i}]"


@pytest.mark.parametrize(
    ("grad", "copy", "scaled"),
    [(F32, None, False), (F32, BF16, True), (BF16, BF16, False), (BF16, F16, True), (F16, F16, True)],
)
def test_as_good_as_the_twin_over_steps(grad: torch.dtype, copy: torch.dtype | None, scaled: bool) -> None:
    actual = state(copies=copy)
    twin = copied(actual)
    truth = {name: None if name == "copies" else [x.double() for x in actual[name]] for name in actual}
    scale = torch.tensor(0.37) if scaled else None
    for step in (1, 2, 3):
        grads = normal(10 + step, SHAPES, grad)
        for update, named in ((adamw_, actual), (torch_ops.adamw_, twin), (reference, truth)):
            one_step(update, named, grads, step, scale=scale)
    assert_accurate(actual, twin, truth)
    for x, param in zip(actual["copies"] or (), actual["params"] if copy else (), strict=True):
        assert torch.equal(x, param.to(copy))


def test_first_step_of_a_run() -> None:
    """The moments are zeros, and so are some gradients: their weights decay and do nothing else."""
    shapes = ((40,), (5,))
    actual = state(shapes)
    for name in STATE[1:]:
        actual[name] = [torch.zeros_like(x) for x in actual[name]]
    twin = copied(actual)
    truth = {name: None if name == "copies" else [x.double() for x in actual[name]] for name in actual}
    grads = normal(5, shapes)
    grads[0][::2] = 0
    for update, named in ((adamw_, actual), (torch_ops.adamw_, twin), (reference, truth)):
        one_step(update, named, grads, 1, lrs=[0.1, 0.1], weight_decays=[0.5, 0.5])
    assert_accurate(actual, twin, truth)
    torch.testing.assert_close(actual["params"][0][::2], state(shapes)["params"][0][::2] * 0.95)


@pytest.mark.parametrize("skip", [torch.tensor(True), torch.tensor([2], dtype=torch.int32)], ids=["bool", "int32"])
@pytest.mark.parametrize("update", [adamw_, torch_ops.adamw_], ids=["kernel", "twin"])
def test_a_skipped_step_leaves_everything(update, skip: Tensor) -> None:
    named = state(copies=BF16)  # whose copies are not the rounded weights
    before, grads = copied(named), normal(4, SHAPES)
    grads[0][0], grads[3][5] = torch.nan, torch.inf
    one_step(update, named, grads, skip=skip, scale=torch.tensor(torch.nan))
    assert_same(named, before)
    grads = normal(4, SHAPES)
    one_step(update, named, grads, skip=torch.zeros_like(skip))
    one_step(update, before, grads)
    assert_same(named, before)


def test_starts_anywhere() -> None:
    """Shards start where 4 bytes do (2 in 16-bit lists): what comes before and after them stays as it was."""
    size = BLOCK + 3
    for place in range(5):  # one list at a time is not aligned, the last time none is
        named, grads = state(((size,),), BF16), normal(4, ((size,),), BF16)
        expected = copied(named)
        lists = [*named.values(), grads]
        buffers = [torch.zeros(size + 16, dtype=x[0].dtype) for x in lists]
        for i, (tensors, buffer) in enumerate(zip(lists, buffers, strict=True)):
            start = 8 - buffer.data_ptr() % 16 // buffer.element_size() + (i == place or place == 4)
            buffer[start : start + size] = tensors[0]
            tensors[0] = buffer[start : start + size]
            assert (tensors[0].data_ptr() % 16 != 0) == (i == place or place == 4)
        one_step(adamw_, expected, [grads[0].clone()])
        one_step(adamw_, named, grads)
        assert_same(named, expected)
        assert all(torch.count_nonzero(b) <= size for b in buffers)


@pytest.mark.parametrize("copy", [None, BF16])
def test_results_do_not_depend_on_the_lists(copy: torch.dtype | None) -> None:
    whole, parts = state(copies=copy), state(copies=copy)
    grads, given = normal(4, SHAPES), rates(len(SHAPES))
    one_step(adamw_, whole, grads)
    for chosen in (slice(0, 3), slice(3, 4), slice(4, None)):
        some = {name: None if tensors is None else tensors[chosen] for name, tensors in parts.items()}
        one_step(adamw_, some, grads[chosen], **{name: values[chosen] for name, values in given.items()})
    assert_same(parts, whole)
    # Nor on how one tensor is cut.
    cut = state(copies=copy)
    for name, tensors in cut.items():
        cut[name] = None if tensors is None else [*tensors[3].split(1000)]
    num = len(cut["params"])
    one_step(adamw_, cut, [*grads[3].split(1000)], **{name: [values[3]] * num for name, values in given.items()})
    assert torch.equal(torch.cat(cut["params"]), whole["params"][3])


def test_many_small_tensors() -> None:
    shapes = [(1 + i % 5,) for i in range(40)]
    named = state(shapes, BF16)
    twin, grads = copied(named), normal(4, shapes)
    one_step(adamw_, named, grads)
    one_step(torch_ops.adamw_, twin, grads)
    for name in (*STATE, "copies"):
        torch.testing.assert_close(named[name], twin[name])


@pytest.mark.parametrize("shapes", [(), ((0,), (3, 0))])
def test_nothing_to_update(shapes: tuple[tuple[int, ...], ...]) -> None:
    for update in (adamw_, torch_ops.adamw_):
        for copies, how in ((None, {}), (BF16, {"scale": torch.tensor(2.0), "skip": torch.tensor(False)})):
            named = state(shapes, copies)
            one_step(update, named, normal(4, shapes), **how)
            assert [tuple(x.shape) for x in named["params"]] == list(shapes)


def test_not_a_number_is_not_hidden() -> None:
    named, grads = state(), normal(4, SHAPES)
    grads[4][1, 3] = torch.nan
    one_step(adamw_, named, grads)
    for name in STATE:
        assert named[name][4].isnan().nonzero().tolist() == [[1, 3]]
        assert all(x.isfinite().all() for i, x in enumerate(named[name]) if i != 4)


def test_the_twin_computes_in_float64_and_keeps_the_gradients() -> None:
    named = {name: tensors and [x.double() for x in tensors] for name, tensors in state().items()}
    exact, grads = copied(named), normal(4, SHAPES, F64)
    kept = [grad.clone() for grad in grads]
    for update, its in ((torch_ops.adamw_, named), (reference, exact)):
        one_step(update, its, grads, scale=torch.tensor(0.37, dtype=F64))
    for name in STATE:
        torch.testing.assert_close(named[name], exact[name], rtol=1e-12, atol=1e-14)
    assert all(torch.equal(grad, copy) for grad, copy in zip(grads, kept, strict=True))


def test_a_table_serves_many_steps() -> None:
    """Gradients are elsewhere in every step; weights that have moved are found again."""
    named = state(copies=BF16)
    expected = copied(named)
    table = AdamWTable(*named.values())
    for step in (1, 2, 3):
        grads, given = normal(step, SHAPES), rates(len(SHAPES))
        if step == 3:
            for x in named["params"]:
                x.data = x.data.clone()
        table.update(grads, *given.values(), *BETAS, step)
        one_step(adamw_, expected, grads, step)
        assert_same(named, expected)


def test_writes_are_counted() -> None:
    """Autograd, and who asks a tensor's version whether it was written to, has to know."""
    named, grads = state(copies=BF16), normal(4, SHAPES)
    before = {name: [x._version for x in tensors] for name, tensors in named.items()}
    AdamWTable(*named.values()).update(grads, *rates(len(SHAPES)).values(), *BETAS, 1)
    for name, tensors in named.items():
        assert all(x._version > version for x, version in zip(tensors, before[name], strict=True))


def test_leaves_may_be_updated() -> None:
    param = torch.ones(3, requires_grad=True)
    adamw_([param], [torch.ones(3)], [torch.zeros(3)], [torch.zeros(3)], None, [0.1], [1e-8], [0.0], *BETAS, 1)
    torch.testing.assert_close(param.detach(), torch.full((3,), 0.9))
    assert param.is_leaf and param.requires_grad


@pytest.mark.parametrize("copy", [None, BF16])
def test_it_is_a_sound_operation(copy: torch.dtype | None) -> None:
    shapes = ((3, 5), (7,))
    params, exp_avgs, exp_avg_sqs, copies = state(shapes, copy).values()
    arguments = (params, normal(4, shapes), exp_avgs, exp_avg_sqs, copies or [], *rates(2).values(), *BETAS, 2)
    for scale, skip in ((None, None), (torch.tensor(0.5), torch.tensor(False))):
        torch.library.opcheck(torch.ops.megagrow_kernels.adamw_, (*arguments, scale, skip))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"params": [torch.ones(3, dtype=F16)]}, r"params\[0\] is torch.float16, must be float32"),
        ({"exp_avgs": [torch.ones(3, dtype=F64)]}, r"exp_avgs\[0\] is torch.float64, must be float32"),
        ({"exp_avg_sqs": [torch.ones(4)]}, r"exp_avg_sqs\[0\] is \(4,\) .* must be \(3,\)"),
        ({"exp_avg_sqs": []}, "0 exp_avg_sqs for 1 params"),
        ({"grads": [torch.ones(3, 2)[:, 0]]}, r"grads\[0\] is \(3,\) with strides \(2,\)"),
        ({"grads": [torch.ones(3, dtype=F64)]}, "grads must all be float32, all float16 or all bfloat16"),
        ({"grads": []}, "0 grads for 1 params"),
        ({"copies": [torch.ones(3)]}, "copies must all be float16, or all bfloat16"),
        ({"lrs": [0.1, 0.1]}, "2 lrs for 1 params"),
        ({"step": 0}, "step is 0, the first update has 1"),
        ({"scale": torch.ones(2)}, r"scale is torch.float32 \(2,\)"),
        ({"skip": torch.ones(1)}, "skip is torch.float32 .* must be one torch.bool or torch.int32"),
    ],
    ids=[
        "dtype",
        "moment-dtype",
        "shape",
        "number",
        "strides",
        "grad-dtype",
        "no-grads",
        "copies",
        "rates",
        "step",
        "scale",
        "skip",
    ],
)
def test_refusals(changes: dict, message: str) -> None:
    arguments = {
        **{name: [torch.ones(3)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")},
        "copies": None,
        "lrs": [0.1],
        "eps": [1e-8],
        "weight_decays": [0.1],
        "beta1": 0.9,
        "beta2": 0.95,
        "step": 1,
    }
    with pytest.raises(ValueError, match=message) as refusal:
        adamw_(**(arguments | changes))
    assert "\n" not in str(refusal.value)
