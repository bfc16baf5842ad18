"""Plan a run before it starts, on one CPU, from its configuration alone.

    python tools/plan.py CONFIG --world-size 1024 [--section.field VALUE ...] [--json FILE]
    python tools/plan.py CONFIG --world-size 1024 --suggest --gpu-memory 80
    python tools/plan.py CONFIG --world-size 1024 --dry-run
    python tools/plan.py CONFIG --world-size 1024 --source CKPT --target-params 3e9..7e9 [--budget-tokens D]

CONFIG is a preset or a YAML or JSON file. Says whether the layout is valid, what each rank needs and sends, and what
the run costs, growth and SALT included; --suggest ranks the layouts that fit; --dry-run builds the real model of one
rank per place of the pipeline without memory, and counts. --source says what a model can grow into, how, at which rate
and in which layout, and what others saved so; --write FILE keeps the first. Exit codes: 0 done, 2 a layout that is not
valid (each broken rule is told with its remedy) or none that fits, 4 a source or teacher that cannot be read.
"""

import argparse
import json
import sys

from _command import Arguments, local_path, refuse_options, run
from _planning import TARGETS, add_machine, add_targets, machine_of, show_targets
from rich.console import Console

from megagrow.checks import problems
from megagrow.command_line import parse
from megagrow.config import Config, require
from megagrow.growth.bootstrap import bootstrapped
from megagrow.plan import Plan, dry_run, make_plan, show, suggest, to_dict


def main() -> None:
    options, rest = parser().parse_known_args()
    config = parse([options.config, *rest])
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    require(options.world_size > 0, f"--world-size {options.world_size} must be positive")
    require(options.count > 0, f"--count {options.count} must be positive")
    if options.source:
        refuse_options(parser(), options, ["suggest", "dry_run"], "with --source")
        show_targets(config, options, console)
        return
    refuse_options(parser(), options, TARGETS, "without --source")
    if options.suggest:
        suggestions(config, options, console)
        return
    plan = make_plan(config, options.world_size, machine_of(options))
    if not isinstance(plan, Plan):
        for problem in plan:
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    for part in dry_run.tables(plan.layout) if options.dry_run else show.plan_tables(plan):
        console.print(part)
    if options.json:
        options.json.write_text(json.dumps(to_dict(plan), indent=1) + "\n")


def suggestions(config: Config, options: argparse.Namespace, console: Console) -> None:
    config = bootstrapped(config)
    found = suggest.suggest(config, options.world_size, machine_of(options))
    broken = [] if found else problems(config, options.world_size)
    require(not broken, "; ".join(broken))
    require(
        bool(found),
        f"no layout of this model on {options.world_size} ranks fits into --gpu-memory {options.gpu_memory:g} GiB; use "
        "more ranks, larger GPUs, shorter sequences, or optim.offload",
    )
    console.print(show.suggestion_table(found, options.world_size, options.count))
    console.print(show.assumptions(machine_of(options)))
    print(f"the first: {show.options(found[0], config)}")
    if options.json:
        options.json.write_text(json.dumps([suggest.to_dict(each) for each in found], indent=1) + "\n")


def parser() -> Arguments:
    parser = Arguments(description="Plan a run before it starts.", allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG", help="of the run; --section.field VALUE changes it")
    parser.add_argument("--world-size", type=int, required=True, metavar="N", help="ranks")
    parser.add_argument("--json", type=local_path, metavar="FILE", help="the same for programs")
    parser.add_argument("--dry-run", action="store_true", help="build the model of one rank per pipeline place")
    parser.add_argument("--suggest", action="store_true", help="rank the layouts that fit")
    parser.add_argument("--count", type=int, default=6, help="suggestions that are shown, seconds each with --source")
    add_targets(parser)
    add_machine(parser)
    return parser


if __name__ == "__main__":
    run(main)
