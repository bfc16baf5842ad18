"""Grow a small pretrained model into a large one, from folder to folder.

    python tools/grow_checkpoint.py runs/small grown --target large.yaml --method clone
    torchrun --nproc-per-node 8 tools/grow_checkpoint.py SRC DST … --tensor 2
    python tools/grow_checkpoint.py SRC DST … --method net2net+insert_identity --breaker noise
    python tools/grow_checkpoint.py SRC DST … --method ligo --data PREFIX --steps 100

SRC is an own checkpoint, a run directory or a Hugging Face folder; DST gets the same format. CONFIG is a preset, a YAML
file or a Hugging Face config.json. `ligo` learns its maps on --data and leaves them beside DST, or applies maps learned
before (--maps). Weights keep their dtype. Exit codes: 0 done, 2 usage, or a target that the method cannot reach, 3
data, 4 checkpoint, 5 a loss that is not finite.
"""

import argparse
import gc
from functools import partial
from pathlib import Path
from typing import get_args

from _command import Arguments, add_method, local_path, recipe_of, run
from _learning import add_learning, check_learning, learning_of

from megagrow.checkpoint.source import Source, open_source
from megagrow.checks import check_model
from megagrow.config import ModelConfig, ParallelConfig, Policy, require
from megagrow.growth.ligo import Ligo
from megagrow.growth.ligo_maps import start_recipe
from megagrow.growth.moments import copies_warning, lasting_copies
from megagrow.growth.offline import check_destination, grow_folder, moments_note, moments_policy, target_model
from megagrow.growth.recipe import Recipe
from megagrow.ledger import Ledger
from megagrow.metrics import Progress
from megagrow.parallel.mesh import Mesh, init_distributed, leave_distributed, make_mesh
from megagrow.roles import num_parameters
from megagrow.train.map_learning import apply_maps, charged, grown_ledger, keep_maps, learn_maps


def main() -> None:
    options = parser().parse_args()
    source, target = open_source(options.src), target_model(options.target)
    check_learning(options)
    is_learned, pair = options.method == "ligo", (source.model, target)
    init = learning_of(options).growth.maps_start
    recipe = start_recipe(init, *pair, options.seed) if is_learned else recipe_of(options, *pair)
    policy, ledger = moments_policy(recipe, options.optimizer, is_learned), grown_ledger(source)
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
    equal = lasting_copies(recipe, policy, has_moments=source.optimizer is not None)
    warning = copies_warning(recipe, equal, "--breaker noise, or --optimizer asymmetric")
    print(*filter(None, (source.note, wrote, moments_note(source, recipe, policy), warning)), sep="\n")


def parser() -> Arguments:
    parser = Arguments(description="Grow a small pretrained model into a large one.")
    parser.add_argument("src", help="checkpoint, run directory or Hugging Face folder")
    parser.add_argument("dst", type=local_path, help="folder to write; must not exist or be empty")
    add_method(parser)
    parser.add_argument("--optimizer", choices=get_args(Policy), help="default: exact where it has a rule, else reset")
    parser.add_argument("--tensor", type=int, default=1, help="ranks that share each matrix")
    add_learning(parser)
    return parser


def learned_maps(source: Source, target: ModelConfig, o: argparse.Namespace, mesh: Mesh, ledger: Ledger) -> Ligo:
    """Maps that are read, or that are learned and saved before anything grows by them."""
    if o.maps is not None:
        return apply_maps(o.maps, source, target, ledger)
    with Progress(o.steps, enabled=mesh.is_main) as progress:
        tell = partial(progress.update, phase="ligo")
        ligo = learn_maps(source, target, learning_of(o), mesh, tell, ledger, progress.message)
    gc.collect()  # the models that learned need their memory no more: grown shards take it
    keep_maps(ligo, o.save_maps or o.dst.with_name(f"{o.dst.name}.maps.safetensors"), mesh)
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
