"""Grow a small pretrained model into a large one, from folder to folder.

    python tools/grow_checkpoint.py runs/small grown --target large.yaml --method clone
    torchrun --nproc-per-node 8 tools/grow_checkpoint.py SRC DST … --tensor 2
    python tools/grow_checkpoint.py SRC DST … --method net2net+insert_identity --breaker noise
    python tools/grow_checkpoint.py SRC DST … --method ligo --data PREFIX --steps 100 --lr 3e-3

SRC is an own checkpoint, a run directory or a Hugging Face folder; DST gets the same format. CONFIG is a preset, a YAML
file or a Hugging Face config.json. `ligo` learns its maps on --data and leaves them beside DST, or applies maps learned
before (--maps). Weights keep their dtype. Exit codes: 0 done, 2 usage, or a target that the method cannot reach, 3
data, 4 checkpoint.
"""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

from _command import Arguments, add_method, recipe_of, run
from _learning import add_learning, learning_of

from megagrow.checkpoint.agreement import Ranks
from megagrow.checkpoint.source import Source, open_source
from megagrow.checks import check_model
from megagrow.config import ModelConfig, ParallelConfig, Policy, require
from megagrow.growth.ligo import Ligo
from megagrow.growth.ligo_file import save_maps
from megagrow.growth.ligo_maps import start_recipe
from megagrow.growth.maps import LayerMix
from megagrow.growth.moments import rule_problem
from megagrow.growth.offline import check_destination, grow_folder, moments_policy, target_model
from megagrow.growth.recipe import Recipe
from megagrow.ledger import Ledger
from megagrow.metrics import Progress
from megagrow.parallel.mesh import Mesh, init_distributed, leave_distributed, make_mesh
from megagrow.roles import num_parameters
from megagrow.train.map_learning import apply_maps, charged, grown_ledger, learn_maps


def main() -> None:
    options = parser().parse_args()
    source, target = open_source(options.src), target_model(options.target)
    check_options(options)
    is_learned, pair = options.method == "ligo", (source.model, target)
    recipe = start_recipe(options.init, *pair, options.seed) if is_learned else recipe_of(options, *pair)
    # Learned maps mix layers: no policy has a rule for that, and it is told before they are learned.
    planned = replace(recipe, method="ligo", layers=LayerMix({})) if is_learned else recipe
    policy, ledger = moments_policy(planned, options.optimizer), grown_ledger(source)
    mesh = make_growth_mesh(target, options.tensor)
    check_destination(source, options.dst, target, mesh)
    ligo = learned_maps(source, target, options, mesh, ledger or Ledger()) if is_learned else None
    recipe = ligo.recipe() if ligo else recipe
    grow_folder(source, options.dst, recipe, mesh, policy, partial(charged, ledger, ligo, target))
    if mesh.is_main:
        show(source, options.dst, recipe, policy)
    leave_distributed()


def show(source: Source, path: Path, recipe: Recipe, policy: Policy) -> None:
    small, large = (num_parameters(model) / 1e6 for model in (recipe.source, recipe.target))
    kept = "keeps the function" if recipe.keeps_function else "does not keep the function"
    wrote = f"wrote {path}: {small:.2f}M -> {large:.2f}M parameters; {recipe.method} {kept}"
    print(*filter(None, (source.note, wrote, what_became_of_moments(source, recipe, policy))), sep="\n")


def what_became_of_moments(source: Source, recipe: Recipe, policy: Policy) -> str:
    if source.optimizer is None:
        return "the source has no moments of Adam; training starts with fresh ones"
    if policy != "reset":
        return f"the moments of Adam have grown by policy {policy}"
    reason = rule_problem(recipe, "exact")
    return "the moments of Adam are left behind" + (f": policy exact {reason}" if reason else "")


def parser() -> Arguments:
    parser = Arguments(description="Grow a small pretrained model into a large one.")
    parser.add_argument("src", type=Path, help="checkpoint, run directory or Hugging Face folder")
    parser.add_argument("dst", type=Path, help="folder to write; must not exist or be empty")
    add_method(parser)
    parser.add_argument("--optimizer", choices=get_args(Policy), help="default: exact where it has a rule, else reset")
    parser.add_argument("--tensor", type=int, default=1, help="ranks that share each matrix")
    add_learning(parser)
    return parser


def check_options(options: argparse.Namespace) -> None:
    given = [option for option in (options.maps, options.data) if option is not None]
    require(
        len(given) == (options.method == "ligo"),
        "--method ligo learns its maps on --data PREFIX or applies learned ones from --maps FILE; give one of them, "
        "and neither with another method",
    )
    require(
        options.save_maps is None or options.data is not None,
        "--save-maps keeps maps that are learned on --data PREFIX; without, there are none; leave it out",
    )


def learned_maps(source: Source, target: ModelConfig, o: argparse.Namespace, mesh: Mesh, ledger: Ledger) -> Ligo:
    """Maps that are read, or that are learned and saved before anything grows by them."""
    if o.maps is not None:
        return apply_maps(o.maps, source, target, ledger)
    with Progress(o.steps, enabled=mesh.is_main) as progress:
        tell = partial(progress.update, phase="ligo")
        ligo = learn_maps(source, target, learning_of(o), mesh, tell, ledger)
    file = o.save_maps or o.dst.with_name(f"{o.dst.name}.maps.safetensors")
    Ranks(mesh.checkpoint_group).first(f"cannot save the maps to {file}", lambda: save_maps(ligo, file))
    return ligo


def make_growth_mesh(target: ModelConfig, tensor: int) -> Mesh:
    world = init_distributed()
    require(
        tensor > 0 and world % tensor == 0,
        f"--tensor {tensor} does not divide the {world} launched ranks; start a multiple of it",
    )
    check_model(target, ParallelConfig(tensor=tensor), "the target")
    return make_mesh(ParallelConfig(tensor=tensor))


if __name__ == "__main__":
    run(main)
