"""Options of planning: what the model of time assumes, and what a small model may grow into."""

import argparse
import math

from _command import Arguments, local_path

from megagrow.plan import Machine


def add_machine(parser: Arguments) -> None:
    assumed = parser.add_argument_group("what the model of time assumes")
    assumed.add_argument("--gpu-memory", type=float, default=80, metavar="GIB")
    assumed.add_argument("--usable", type=float, default=0.9, help="share of it that tensors can have")
    assumed.add_argument("--peak-tflops", type=float, default=989, help="dense, in the dtype of compute")
    assumed.add_argument("--efficiency", type=float, default=0.5, help="share of the peak that computing reaches")
    assumed.add_argument("--ranks-per-node", type=int, default=8)
    assumed.add_argument("--inside", type=float, default=300, metavar="GB/S", help="that a rank sends in a node")
    assumed.add_argument("--between", type=float, default=40, metavar="GB/S", help="between nodes, per rank")


def machine_of(options: argparse.Namespace) -> Machine:
    return Machine(
        peak_flops=options.peak_tflops * 1e12,
        efficiency=options.efficiency,
        ranks_per_node=options.ranks_per_node,
        inside=options.inside * 1e9,
        between=options.between * 1e9,
        memory=options.gpu_memory * 2**30,
        usable=options.usable,
    )


def add_targets(parser: Arguments) -> None:
    growing = parser.add_argument_group("what a small model can grow into")
    growing.add_argument("--source", metavar="CKPT", help="an own checkpoint or a Hugging Face folder")
    growing.add_argument("--target-params", type=parameters, metavar="LOW..HIGH", help="as in 3e9..7e9")
    growing.add_argument("--budget-tokens", type=float, metavar="D", help="of the grown model; default: train.steps")
    growing.add_argument("--write", type=local_path, metavar="FILE", help="the run of the first, as a configuration")


def parameters(text: str) -> tuple[float, float]:
    """LOW..HIGH, or one number for both."""
    low, _, high = text.partition("..")
    bounds = float(low), float(high or low)
    if not 0 < bounds[0] <= bounds[1] < math.inf:
        raise ValueError
    return bounds
