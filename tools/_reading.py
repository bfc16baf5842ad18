"""What the tools share that let a model read a corpus, sample by sample."""

import argparse
from typing import Any

import torch

from megagrow.parallel.mesh import Mesh, make_inference_mesh

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WAIT_SECONDS = 86_400.0  # for ranks that are slower: each has its share; torchrun ends all when one of them dies


def add_reading(parser: argparse.ArgumentParser, output: str) -> None:
    """The options that say which model reads which samples, and how; `output` is what comes of it."""
    parser.add_argument("--model", required=True, metavar="CKPT", help="checkpoint or HF folder")
    parser.add_argument("--data", required=True, metavar="PREFIX", help="of PREFIX.bin/.idx")
    parser.add_argument("--output", required=True, metavar="DIR", help=f"folder of the {output}")
    parser.add_argument("--seq-length", type=int, required=True, help="tokens of a training sample")
    parser.add_argument("--mask-documents", action="store_true", help="as data.mask_documents")
    parser.add_argument("--reset-positions", action="store_true", help="as data.reset_positions")
    parser.add_argument("--tensor", type=int, default=1, help="ranks that share the model")
    parser.add_argument("--batch-size", type=int, default=16, help="samples per forward pass")
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model: a minute, then faster")
    parser.add_argument("--skip-source-check", action="store_true", help="even if it does not fit")


def reading_of(options: argparse.Namespace) -> dict[str, Any]:
    """What the options of `add_reading` say of how samples are read, for `ScoreSettings` and `CacheSettings`."""
    names = ("mask_documents", "reset_positions", "batch_size", "skip_source_check", "compile")
    return {"dtype": DTYPES[options.precision], **{name: getattr(options, name) for name in names}}


def mesh_of(options: argparse.Namespace) -> Mesh:
    """The mesh of the launched ranks."""
    return make_inference_mesh(options.tensor, WAIT_SECONDS)
