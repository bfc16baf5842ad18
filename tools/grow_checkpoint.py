"""Grow a small pretrained model into a large one, from folder to folder.

    python tools/grow_checkpoint.py runs/small grown --target large.yaml --method clone
    torchrun --nproc-per-node 8 tools/grow_checkpoint.py SRC DST … --tensor 2

SRC is an own checkpoint, a run directory or a Hugging Face folder; DST gets the same format. CONFIG
is a preset, a YAML file or a Hugging Face config.json. `ligo` applies maps that were learned before
(--maps). Weights keep their dtype.
Exit codes: 0 done, 2 usage, or a target that the method cannot reach, 4 checkpoint.
"""

from pathlib import Path

import torch
from _command import Arguments, run

from megagrow import command_line
from megagrow.checkpoint.hf_config import CONFIG_FILE, model_config_from_hf, read_json
from megagrow.checkpoint.source import Source, open_source
from megagrow.config import ModelConfig, ParallelConfig, check_model, require
from megagrow.growth.ligo import load_maps
from megagrow.growth.methods import METHODS, Recipe, make_recipe
from megagrow.growth.offline import grow_folder
from megagrow.parallel.mesh import Mesh, init_distributed, make_mesh
from megagrow.roles import num_parameters


def main() -> None:
    options = parser().parse_args()
    source, target = open_source(options.src), target_model(options.target)
    recipe = choose_recipe(source, target, options.method, options.maps)
    mesh = make_growth_mesh(target, options.tensor)
    grow_folder(source, options.dst, recipe, mesh, options.optimizer)
    if mesh.is_main:
        show(options.dst, recipe)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def show(path: Path, recipe: Recipe) -> None:
    small, large = (num_parameters(model) / 1e6 for model in (recipe.source, recipe.target))
    kept = "keeps the function" if recipe.keeps_function else "does not keep the function"
    print(f"wrote {path}: {small:.2f}M -> {large:.2f}M parameters; {recipe.method} {kept}")


def parser() -> Arguments:
    parser = Arguments(description="Grow a small pretrained model into a large one.")
    parser.add_argument("src", type=Path, help="checkpoint, run directory or Hugging Face folder")
    parser.add_argument("dst", type=Path, help="folder to write; must not exist or be empty")
    parser.add_argument("--target", required=True, metavar="CONFIG", help="what to grow into")
    parser.add_argument("--method", required=True, choices=METHODS)
    parser.add_argument("--maps", type=Path, metavar="FILE", help="learned maps, for ligo")
    parser.add_argument("--optimizer", choices=["exact", "reset"], default="exact")
    parser.add_argument("--tensor", type=int, default=1, help="ranks that share each matrix")
    return parser


def target_model(name: str) -> ModelConfig:
    """The model of a preset, an own file, or a Hugging Face config.json (or its folder)."""
    path = Path(name) / CONFIG_FILE if Path(name).is_dir() else Path(name)
    if path.suffix == ".json" and path.is_file() and "model_type" in read_json(path):
        return model_config_from_hf(path)
    return command_line.load(str(path)).model


def choose_recipe(source: Source, target: ModelConfig, method: str, maps: Path | None) -> Recipe:
    recipe = make_recipe(method, source.model, target)
    if method != "ligo":
        require(maps is None, f"--maps belongs to --method ligo, not {method}; leave one out")
        return recipe
    require(maps is not None, "--method ligo applies learned maps; name their file with --maps")
    ligo = load_maps(maps)
    models = (ligo.start.source, ligo.start.target)
    require(
        models == (source.model, target),
        f"{maps} was learned for another pair of models; give maps of this growth, or learn some",
    )
    return ligo.recipe()


def make_growth_mesh(target: ModelConfig, tensor: int) -> Mesh:
    """The tensor axis as asked for; all other ranks share the rows."""
    parallel = ParallelConfig(tensor=tensor)
    world = init_distributed()
    require(
        world % tensor == 0,
        f"--tensor {tensor} does not divide the {world} launched ranks; start a multiple of it",
    )
    check_model(target, parallel, "the target")
    return make_mesh(parallel)


if __name__ == "__main__":
    run(main)
