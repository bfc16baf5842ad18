"""In-place growth on every layout of the parity table against growing offline and loading, bit for bit.

    make growth                                    # all layouts and sparse methods, half an hour on two cores
    python -m tests.growth.layout_sweep pipeline   # layouts with all these words; nothing is written

Weights, moments and the optimizer's settings of every rank, after growing in the job, are compared with what growing
the checkpoint in one process gives and the layout then loads. Targets that a layout does not take are left out.
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
from megagrow.parallel.mesh import Mesh, make_mesh
from megagrow.parallel.shards import box, local
from megagrow.train import growing
from megagrow.train.learner import ModelLearner
from megagrow.train.part import build_part, load_part
from tests import ranks
from tests.growth.recipes import METHODS, recipe_of
from tests.growth.test_offline import save_own
from tests.parallel.layouts import LAYOUTS, Layout

POLICIES: tuple[Policy, ...] = ("exact", "zero_pad", "asymmetric")  # the first that has a rule carries most over


def sources(folder: Path, model: ModelConfig, seed: int) -> tuple[Path, dict[str, Path]]:
    """The small checkpoint and one grown offline by every method that has an answer for this model."""
    home = folder / str(abs(hash(str(to_dict(model)))))
    small, large = home / "small", {}
    if not small.exists():
        save_own(small, model)
    for number, name in enumerate(METHODS):
        try:
            recipe = recipe_of(name, model, seed)
        except ConfigError:
            continue
        large[name] = home / str(number)
        if not large[name].exists():
            grow_folder(open_source(small), large[name], recipe, Mesh.single(), policy_of(recipe))
    return small, large


def policy_of(recipe: Recipe) -> Policy:
    return next(policy for policy in POLICIES if rule_problem(recipe, policy) is None)


def growing_config(config: Config, recipe: Recipe, name: str) -> Config:
    """The run on this layout as one that grows."""
    method, _, breaker, _ = METHODS[name]
    growth = GrowthConfig(method, breaker=breaker, source=recipe.source, at_step=1, optimizer=policy_of(recipe))
    return replace(config, model=recipe.target, growth=growth)


def compare(config: Config, small: Path, large: dict[str, Path]) -> dict[str, Any]:
    """Grows on this rank by every method; says how many pieces were compared, and which differ."""
    mesh, source = make_mesh(config.parallel), open_source(small)
    count, differing = 0, []
    start = replace(config, growth=GrowthConfig("clone", source=source.model, at_step=1))  # its moments will grow
    part = build_part(source.model, start, mesh)
    load_part(part, source.fetch)
    learner = growing.new_learner(part, start, source)
    assert isinstance(learner, ModelLearner)
    for name, folder in large.items():
        recipe, expected = recipe_of(name, source.model, config.train.seed), open_source(folder)
        with mock.patch.object(growing, "release"):  # the next method needs the small weights again
            grown = growing.grow_copies(learner, growing_config(config, recipe, name), mesh)
        assert expected.optimizer is not None
        for item, tensor in grown.tensors().items():
            count += 1
            if not torch.equal(local(tensor), expected.read(item)[box(tensor)]):
                differing.append(f"{name}: {item}")
        multipliers = {n: asdict(m) for n, m in grown.optimizer.multipliers.items()}
        if (grown.optimizer.step_count, multipliers) != (
            expected.optimizer["step"],
            {n: dict(m) for n, m in expected.optimizer["multipliers"].items()},
        ):
            differing.append(f"{name}: the optimizer's settings")
    return {"count": count, "differing": differing}


def measure(layout: Layout, folder: Path) -> dict[str, Any]:
    """One row of the table."""
    began, config = time.perf_counter(), layout.config
    small, large = sources(folder, config.model, config.train.seed)
    fitting = {
        name: path
        for name, path in large.items()
        if not problems(growing_config(config, recipe_of(name, config.model), name), layout.ranks)
    }
    row = {"layout": layout.name, "ranks": layout.ranks, "methods": len(fitting), "left_out": len(large) - len(fitting)}
    try:
        found = ranks.run_ranks(compare, layout.ranks, config, small, fitting, timeout=900)
    except Exception as error:
        return {**row, "holds": False, "failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    differing = sorted({name for rank in found for name in rank["differing"]})
    counts = {"compared": sum(rank["count"] for rank in found)}
    seconds = round(time.perf_counter() - began, 1)
    return {**row, **counts, "differing": differing, "holds": bool(fitting) and not differing, "seconds": seconds}


def main(words: list[str]) -> int:
    rows = []
    chosen = [layout for layout in LAYOUTS if all(word in layout.name for word in words)]
    with tempfile.TemporaryDirectory() as folder:
        for number, layout in enumerate(chosen, 1):
            rows.append(measure(layout, Path(folder)))
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
