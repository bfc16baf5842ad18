"""The kernels that mix layers, interpreted, against float64: forward and every gradient."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from megagrow import torch_growth_ops
from megagrow.growth.grow import MOST_MIXED_LAYERS
from megagrow_kernels.launch import ANY
from megagrow_kernels.layer_mix import LAYERS_AT_ONCE, MOST_LAYERS, layer_mix, layer_mix_ref
from tests.kernels.accuracy import assert_as_good_as_twin

pytestmark = pytest.mark.interpreted

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
BLOCK = ANY["layer_mix"][-1].block


class Case(NamedTuple):
    """Source and target layers, elements of a leaf."""

    J: int
    K: int
    N: int
    dtype: torch.dtype
    weights: torch.dtype = F32


CASES = [
    Case(1, 1, 1, F32),
    Case(2, 4, 97, F32),  # rows that start at odd addresses
    Case(12, 24, 2 * BLOCK // 16 + 24, F32),  # layers and elements that blocks do not divide; several programs
    Case(7, LAYERS_AT_ONCE + 3, 320, F32),  # two blocks of target layers in the backward pass
    Case(6, 12, 640, BF16),
    Case(6, 12, 640, F16, F16),
    Case(4, 6, 0, F32),
]


def inputs(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(case.J * case.K)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "sources": normal(case.J, case.N).to(case.dtype),
        "weights": normal(case.K, case.J).to(case.weights),
        "dmixed": normal(case.K, case.N).to(case.weights),
    }


def output_and_gradients(mix, given: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = [given[name].clone().requires_grad_() for name in ("sources", "weights")]
    mixed_KN = mix(*leaves)
    gradients = torch.autograd.grad(mixed_KN, leaves, given["dmixed"])
    return {"mixed": mixed_KN.detach()} | dict(zip(("dsources", "dweights"), gradients, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_good_as_the_twin(case: Case) -> None:
    given = inputs(case)
    doubles = {name: x.double() for name, x in given.items()}
    actual, twin = (output_and_gradients(mix, given) for mix in (layer_mix, torch_growth_ops.layer_mix))
    for name, exact in output_and_gradients(layer_mix_ref, doubles).items():
        if exact.numel():
            assert_as_good_as_twin(actual[name], twin[name], exact, name)


def test_the_gradient_is_that_of_numbers() -> None:
    leaves = [torch.randn(*shape, dtype=torch.double, requires_grad=True) for shape in ((3, 5), (4, 3))]
    assert gradcheck(layer_mix_ref, leaves)
    assert gradcheck(torch_growth_ops.layer_mix, leaves)


def test_copies_are_exact() -> None:
    """A one-hot weight copies a layer to the bit, also where the others are not finite in what is masked out."""
    sources_JN = inputs(Case(5, 1, 77, F32))["sources"]
    layers = torch.tensor([4, 0, 0, 2])
    assert torch.equal(layer_mix(sources_JN, torch.nn.functional.one_hot(layers, 5).float()), sources_JN[layers])


@pytest.mark.parametrize(
    ("sources", "weights", "message"),
    [
        (torch.ones(2, 8, dtype=torch.float64), torch.ones(3, 2), "sources are torch.float64"),
        (torch.ones(2, 8), torch.ones(3, 4), r"weights are \(3, 4\) for sources of \(2, 8\)"),
        (torch.ones(129, 2), torch.ones(1, 129), "129 source layers, the kernel takes at most 128"),
    ],
    ids=["dtype", "shape", "layers"],
)
def test_refusals(sources: Tensor, weights: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"layer_mix: {message}") as refusal:
        layer_mix(sources, weights)
    assert "\n" not in str(refusal.value)


def test_it_is_a_sound_operation() -> None:
    given = inputs(Case(3, 4, 40, BF16))
    torch.library.opcheck(
        torch.ops.megagrow_kernels.layer_mix, (given["sources"].requires_grad_(), given["weights"].requires_grad_())
    )


def test_growing_knows_how_many_layers_it_holds() -> None:
    assert MOST_MIXED_LAYERS == MOST_LAYERS
