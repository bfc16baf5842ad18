"""Every policy on shards: the same moments bit for bit, and the same new entries, as in one process."""

import pytest
import torch
from torch import Tensor

from megagrow.config import GrowthConfig, OptimConfig, ParallelConfig, Policy
from megagrow.growth.grow import mesh_fetch
from megagrow.growth.methods import make_recipe
from megagrow.growth.moments import grow_new_part, grow_optimizer
from megagrow.growth.recipe import Recipe
from megagrow.optim import MOMENTS, Optimizer
from megagrow.parallel.mesh import Mesh, make_mesh
from megagrow.parallel.shards import fill, full
from tests.growth.models import widened
from tests.growth.test_policies import sized
from tests.growth.test_sharded_growth import LLAMA, TIED, moments_of, sharded
from tests.ranks import run_ranks

WIDTH = {"hidden": 3, "query": 2, "kv": 2, "ffn": 2, "layers": 5}
OLD = 1_000  # updates before growing
GROWTH = GrowthConfig(rewarmup_part="new", rewarmup_steps=3)
CASES: dict[str, tuple[Policy, Recipe]] = {
    "asymmetric": ("asymmetric", make_recipe("clone", LLAMA, widened(LLAMA, **WIDTH))),
    "asymmetric, tied": ("asymmetric", make_recipe("clone+interleave", TIED, widened(TIED, **WIDTH))),
    "zero_pad": ("zero_pad", sized("zero_pad", LLAMA, hidden_size=20, num_heads=6, ffn_size=14, num_layers=5)),
    "reset": ("reset", make_recipe("net2net", LLAMA, widened(LLAMA, hidden=2, ffn=2), seed=3)),
}


def grow_and_train(recipe: Recipe, policy: Policy, mesh: Mesh) -> dict[str, Tensor]:
    """Whole moments right after growing, then weights and moments after two steps with given gradients."""
    small, large = (dict(sharded(model, mesh).named_parameters()) for model in (recipe.source, recipe.target))
    old, new = Optimizer(small, OptimConfig()), Optimizer(large, OptimConfig(beta2=0.99))
    for moment in MOMENTS:
        for name, tensor in old.moments()[moment].items():
            fill(tensor, moments_of(recipe.source, moment)[name])
    sources = {moment: mesh_fetch(tensors, recipe.source, mesh) for moment, tensors in old.moments().items()}
    new.step_count = grow_optimizer(recipe, policy, sources, new.moments(), OLD)
    new.new_part = grow_new_part(recipe, policy, GROWTH, new.step_count, large)
    grown = {f"grown {name}": full(tensor).clone() for name, tensor in new.tensors().items()}
    for step in range(3):
        given = moments_of(recipe.target, "gradient" * step)
        for name, parameter in large.items():
            if step == 0:
                fill(parameter, given[name])
            else:
                parameter.grad = torch.empty_like(parameter)
                fill(parameter.grad, given[name])
        if step:
            new.step(0.01)
    return grown | {name: full(tensor).clone() for name, tensor in {**large, **new.tensors()}.items()}


def all_cases(parallel: ParallelConfig) -> dict[str, dict[str, Tensor]]:
    mesh = make_mesh(parallel) if torch.distributed.is_initialized() else Mesh.single()
    return {case: grow_and_train(recipe, policy, mesh) for case, (policy, recipe) in CASES.items()}


@pytest.mark.parametrize("layout", [(3, 1, 1), (4, 2, 1), (4, 1, 2)], ids=lambda x: "-".join(map(str, x)))
def test_shards_of_moments_and_new_entries_are_those_of_the_whole(layout: tuple[int, int, int]) -> None:
    ranks, tensor, pipeline = layout
    expected, results = all_cases(ParallelConfig()), run_ranks(all_cases, ranks, ParallelConfig(tensor, pipeline))
    for case, wholes in expected.items():
        assert set().union(*(found[case] for found in results)) == wholes.keys()
        for found in results:
            for name, shards in found[case].items():
                if name.startswith("grown"):
                    assert torch.equal(shards, wholes[name]), (case, name)
                else:  # vector loops end elsewhere
                    torch.testing.assert_close(shards, wholes[name], rtol=1e-13, atol=1e-15)


def test_the_two_steps_tell_old_and_new_entries_apart() -> None:
    """Gradients of one sign: those of a fresh Adam at a third and two thirds of its way to 1.3 lr."""
    found = all_cases(ParallelConfig())["asymmetric"]
    name = "layers.0.mlp.down.weight"
    moved = (found[name] - moments_of(CASES["asymmetric"][1].target, "")[name]).abs()
    is_new = found[f"grown optim.exp_avg.{name}"] == 0
    assert moved[is_new].mean() == pytest.approx(0.013, rel=0.1)
    assert moved[~is_new].std() > 5 * moved[is_new].std()
