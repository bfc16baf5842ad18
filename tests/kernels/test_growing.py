"""Growth with its kernels, interpreted, gives what it gives with the twins."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

import megagrow_kernels
from megagrow import growth_ops, ops
from megagrow.config import ModelConfig
from megagrow.growth.grow import grow_into
from megagrow.growth.ligo import Ligo
from megagrow.growth.methods import make_recipe
from megagrow.growth.recipe import Recipe
from megagrow.roles import parameter_shapes

pytestmark = pytest.mark.interpreted

SMALL = ModelConfig(vocab_size=21, hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, ffn_size=10)
LARGE = replace(SMALL, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, ffn_size=25)


def grown(recipe: Recipe, quantity: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sources = {name: torch.randn(shape, generator=generator) for name, shape in parameter_shapes(SMALL).items()}
    targets = {name: torch.full(shape, torch.nan) for name, shape in parameter_shapes(LARGE).items()}
    grow_into(recipe, sources.__getitem__, targets, quantity)
    return targets


@pytest.mark.parametrize(
    ("method", "quantity", "kernel"),
    [
        ("clone+insert_identity", "value", "sparse_map"),
        ("clone", "squared_gradient", "sparse_map"),
        ("ligo", "value", "layer_mix"),
    ],
)
def test_kernels_grow_as_the_twins_do(method: str, quantity: str, kernel: str) -> None:
    recipe = make_recipe(method, SMALL, LARGE)
    recipe = Ligo(make_recipe("clone", SMALL, LARGE), noise=0.3).recipe() if method == "ligo" else recipe
    expected, asked = grown(recipe, quantity), set[str]()

    def kernels_for(name: str, x: Tensor) -> object:
        asked.add(name)
        return megagrow_kernels

    with mock.patch.object(ops, "kernels_for", kernels_for), mock.patch.object(growth_ops, "kernels_for", kernels_for):
        found = grown(recipe, quantity)
    assert asked == {kernel}
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-6, atol=2e-6, msg=name)
