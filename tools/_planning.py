"""Options of planning: what the model of time assumes, and what a small model may grow into."""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

from _command import Arguments, local_path
from rich.console import Console

from megagrow.checkpoint.convert import tokenizer_of
from megagrow.checkpoint.source import Source, open_source
from megagrow.config import Config, require
from megagrow.config_file import dump
from megagrow.plan import Machine, find_targets, show, targets
from megagrow.timeline import step_tokens

TARGETS = ("target_params", "budget_tokens", "write")  # options that go with --source


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
    growing.add_argument("--budget-tokens", type=amount, metavar="D", help="of the grown model; default: train.steps")
    growing.add_argument("--write", type=local_path, metavar="FILE", help="the run of the first, as a configuration")


def parameters(text: str) -> tuple[float, float]:
    """LOW..HIGH, or one number for both."""
    low, _, high = text.partition("..")
    bounds = amount(low), amount(high or low)
    if bounds[0] > bounds[1]:
        raise ValueError
    return bounds


def amount(text: str) -> float:
    """A positive number."""
    number = float(text)
    if not 0 < number < math.inf:
        raise ValueError
    return number


def show_targets(config: Config, options: argparse.Namespace, console: Console) -> None:
    """Prints what the source can grow into; keeps the first that fits as a run."""
    require(options.target_params is not None, "--source wants --target-params, as in 3e9..7e9")
    for file in filter(None, (options.write, options.json)):
        require(file.absolute().parent.is_dir(), f"{file}: its folder does not exist; make it")
    source = open_source(options.source)
    config, machine = growing_run(config, source, options), machine_of(options)
    found = find_targets(config, source.model, options.target_params, options.world_size, machine, options.count)
    notes = *show.target_notes(found, config.optim.lr), show.assumptions(machine)
    console.print(show.target_table(found, options.world_size), *notes, sep="\n")
    if options.json:
        options.json.write_text(json.dumps([targets.to_dict(each) for each in found], indent=1) + "\n")
    fitting = [each for each in found if each.suggestion]
    require(bool(fitting), "none of them fits; use more ranks, larger GPUs, shorter sequences, or smaller targets")
    if options.write:
        options.write.write_text(dump(fitting[0].config))
        print(f"the first that fits is in {options.write}: torchrun … -m megagrow {options.write}")


def growing_run(config: Config, source: Source, options: argparse.Namespace) -> Config:
    """The run from the source, on as many tokens as were asked for, with the source's tokenizer."""
    chosen = config.growth.method
    require(chosen == "none", f"growth.method={chosen} is what --source is to choose; leave growth out of CONFIG")
    is_own = options.write and Path(str(source.path.absolute())).is_relative_to(Path(config.run.dir).absolute())
    require(not is_own, f"run.dir={config.run.dir} holds the source; give the run another, --run.dir DIR")
    if options.budget_tokens:
        steps = math.ceil(options.budget_tokens / step_tokens(config))
        config = replace(config, train=replace(config.train, steps=steps))
    data = replace(config.data, tokenizer=config.data.tokenizer or str(tokenizer_of(source) or ""))
    return replace(config, data=data, init=replace(config.init, from_=options.source))
