"""The options that say how LiGO's maps are learned."""

import argparse
from typing import get_args

from _command import local_path

from megagrow.config import GrowthConfig, require
from megagrow.growth.ligo_maps import Variant
from megagrow.train.map_learning import MapLearning

LIGO = {  # fields of GrowthConfig
    "variant": "which maps there are; see docs/ligo.md",
    "init": "where they start: a sparse method, or authors; default: rms_random for full_rank, else clone",
    "noise": "on copies, which would stay equal without",
    "steps": "learning steps",
    "lr": "of the maps",
    "warmup_steps": "of that rate",
    "weight_decay": "of the maps",
}


def add_learning(parser: argparse.ArgumentParser) -> None:
    """The options, for `learning_of`."""
    ligo = parser.add_argument_group("ligo")
    ligo.add_argument("--maps", type=local_path, metavar="FILE", help="maps that were learned before")
    ligo.add_argument("--data", metavar="PREFIX", help="tokens to learn the maps on")
    ligo.add_argument(
        "--save-maps", type=local_path, metavar="FILE", help="where they go; default DST.maps.safetensors"
    )
    for name, text in LIGO.items():
        default, choices = getattr(GrowthConfig(), f"ligo_{name}"), get_args(Variant) if name == "variant" else None
        option = f"--{name.replace('_', '-')}"
        ligo.add_argument(option, type=type(default), default=default, choices=choices, help=text)
    ligo.add_argument("--seq-length", type=int, default=128)
    ligo.add_argument("--batch-size", type=int, default=16, help="samples per step, over all ranks")
    ligo.add_argument("--mask-token", type=int, default=-1, help="of an encoder whose tokenizer is not there")
    ligo.add_argument("--skip-source-check", action="store_true", help="even if SRC does not fit the data")


def check_learning(options: argparse.Namespace) -> None:
    """Maps are learned, or read, by `ligo` alone."""
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


def learning_of(options: argparse.Namespace) -> MapLearning:
    """The learning that the options describe."""
    growth = GrowthConfig(**{f"ligo_{name}": getattr(options, name) for name in LIGO})
    names = ("data", "seq_length", "batch_size", "seed", "mask_token", "skip_source_check")
    return MapLearning(growth=growth, **{name: getattr(options, name) for name in names})
