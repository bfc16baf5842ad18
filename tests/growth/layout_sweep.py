"""In-place growth on every layout of the parity table against growing offline and loading, bit for bit.

    make growth                                    # all layouts and sparse methods, an hour on two cores
    python -m tests.growth.layout_sweep pipeline   # layouts with all these words; nothing is written

Weights, moments and the optimizer's settings of every rank, after growing in the job, are compared with what growing
the checkpoint in one process gives and the layout then loads. Every layout grows by every method; what becomes of the
moments takes turns from layout to layout. Targets that a layout does not take are left out.
"""

import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import tests.conftest  # noqa: F401  # one thread, no GPU, strict torch: what holds for tests holds here
from benchmarks.results_file import save
from megagrow.checkpoint.source import open_source
from megagrow.checks import problems
from megagrow.config import Config, GrowthConfig, ModelConfig, Policy
from megagrow.config_file import to_dict
from megagrow.errors import ConfigError
from megagrow.growth.moments import rule_problem
from megagrow.growth.offline import grow_folder
from megagrow.growth.recipe import Recipe
from megagrow.optim import Optimizer
from megagrow.parallel.mesh import Mesh, make_mesh
from megagrow.parallel.shards import box, local
from megagrow.train import growing
from megagrow.train.learner import ModelLearner
from megagrow.train.part import build_part, load_part
from tests import ranks
from tests.growth.recipes import METHODS, recipe_of
from tests.growth.test_offline import save_own
from tests.parallel.layouts import LAYOUTS, Layout

POLICIES: tuple[Policy, ...] = ("exact", "zero_pad", "asymmetric")  # those that carry moments over

Way = tuple[str, Policy]  # a method of METHODS, and what becomes of the moments


def sources(folder: Path, model: ModelConfig, seed: int) -> tuple[Path, dict[Way, Path]]:
    """The small checkpoint and one grown offline in every way that has an answer for this model."""
    home = folder / str(abs(hash(str(to_dict(model)))))
    small, large = home / "small", {}
    if not small.exists():
        save_own(small, model)
    for number, name in enumerate(METHODS):
        try:
            recipe = recipe_of(name, model, seed)
        except ConfigError:
            continue
        for policy in (policy for policy in POLICIES if rule_problem(recipe, policy) is None):
            grown = large[name, policy] = home / f"{number}-{policy}"
            if not grown.exists():
                grow_folder(open_source(small), grown, recipe, Mesh.single(), policy)
    return small, large


def growing_config(config: Config, recipe: Recipe, way: Way) -> Config:
    """The run on this layout as one that grows."""
    name, policy = way
    method, _, breaker, _ = METHODS[name]
    growth = GrowthConfig(method, breaker=breaker, source=recipe.source, at_step=1, optimizer=policy)
    return replace(config, model=recipe.target, growth=growth)


def compare(config: Config, small: Path, large: dict[Way, Path]) -> dict[str, Any]:
    """Grows on this rank in every way; says how many pieces were compared, and which differ."""
    mesh, source = make_mesh(config.parallel), open_source(small)
    count, differing = 0, []
    start = replace(config, growth=GrowthConfig("clone", source=source.model, at_step=1))  # its moments will grow
    part = build_part(source.model, start, mesh)
    load_part(part, source.fetch)
    learner = growing.new_learner(part, start, source)
    assert isinstance(learner, ModelLearner)
    for way, folder in large.items():
        recipe, expected = recipe_of(way[0], source.model, config.train.seed), open_source(folder)
        with mock.patch.object(growing, "release"):  # the next way needs the small weights again
            grown = growing.grow_copies(learner, growing_config(config, recipe, way), mesh)
        assert expected.optimizer is not None
        for item, tensor in grown.tensors().items():
            count += 1
            if not torch.equal(local(tensor), expected.read(item)[box(tensor)]):
                differing.append(f"{way}: {item}")
        if _settings(grown.optimizer) != _saved_settings(expected.optimizer):
            differing.append(f"{way}: the optimizer's settings")
    return {"count": count, "differing": differing}


def _settings(optimizer: Optimizer) -> tuple[object, ...]:
    """Count of updates, multipliers, and how new entries are updated."""
    multipliers = {name: asdict(factors) for name, factors in optimizer.multipliers.items()}
    return optimizer.step_count, multipliers, optimizer.new_part and optimizer.new_part.state()


def _saved_settings(state: dict[str, Any]) -> tuple[object, ...]:
    multipliers = {name: dict(factors) for name, factors in state["multipliers"].items()}
    return state["step"], multipliers, state.get("new_part")


def taking_turns(large: dict[Way, Path], turn: int) -> dict[Way, Path]:
    """Every method once, with another one of its policies in each turn."""
    by_method: dict[str, list[Way]] = {}
    for name, policy in large:
        by_method.setdefault(name, []).append((name, policy))
    return {way: large[way] for ways in by_method.values() for way in [ways[turn % len(ways)]]}


def measure(layout: Layout, turn: int, folder: Path) -> dict[str, Any]:
    """One row of the table."""
    began, config = time.perf_counter(), layout.config
    small, large = sources(folder, config.model, config.train.seed)
    fitting = {
        way: path
        for way, path in taking_turns(large, turn).items()
        if not problems(growing_config(config, recipe_of(way[0], config.model), way), layout.ranks)
    }
    policies = sorted({policy for _, policy in fitting})
    row: dict[str, Any] = {"layout": layout.name, "ranks": layout.ranks, "methods": len(fitting), "policies": policies}
    try:
        found = ranks.run_ranks(compare, layout.ranks, config, small, fitting, timeout=900)
    except Exception as error:
        return {**row, "holds": False, "failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    differing = sorted({name for rank in found for name in rank["differing"]})
    row |= {"compared": sum(rank["count"] for rank in found), "differing": differing}
    return {**row, "holds": bool(fitting) and not differing, "seconds": round(time.perf_counter() - began, 1)}


def main(words: list[str]) -> int:
    rows = []
    chosen = [layout for layout in LAYOUTS if all(word in layout.name for word in words)]
    with tempfile.TemporaryDirectory() as folder:
        for number, layout in enumerate(chosen, 1):
            rows.append(measure(layout, number, Path(folder)))
            said = "holds" if rows[-1]["holds"] else f"FAILS {rows[-1].get('failed', rows[-1].get('differing'))}"
            figures = ", ".join(f"{rows[-1].get(key)} {key}" for key in ("methods", "compared", "seconds"))
            print(f"{number}/{len(chosen)} {layout.name}: {said} ({figures})", flush=True)
    ranks.shutdown()
    if not words:
        print(f"written to {save('growth_layouts', rows)}")
    failed = [row["layout"] for row in rows if not row["holds"]]
    print(f"{len(rows) - len(failed)} of {len(rows)} layouts hold")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
