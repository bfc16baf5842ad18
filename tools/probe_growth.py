"""Rank ways of growing a checkpoint by the loss after a few steps of training.

    python tools/probe_growth.py large.yaml --source runs/small --candidates stack stack:reset clone+stack --steps 100
    torchrun --nproc-per-node 8 tools/probe_growth.py CONFIG … [--section.field VALUE …]

CONFIG is the run that is planned, a preset or a YAML file whose growth section says what the model grows into and when;
SOURCE an own checkpoint, a run directory or a Hugging Face folder. A candidate is METHOD or METHOD:POLICY, the policy
being what becomes of Adam's moments (default: growth.optimizer or, if that is empty, what a run does, else the first of
zero_pad, asymmetric and reset that has a rule). All train on the same samples. Nothing is kept but
what is printed and, with --json, written. Exit codes: 0 done, 2 usage or configuration, 3 data, 4 checkpoint.
"""

import json
from dataclasses import asdict

from _command import Arguments, local_path, run
from rich.console import Console
from rich.table import Table

from megagrow.checkpoint.source import open_source
from megagrow.checks import check_mesh
from megagrow.command_line import parse
from megagrow.config import require
from megagrow.parallel.mesh import init_distributed, leave_distributed, make_mesh
from megagrow.train.probe import Candidate, Outcome, caution, probe


def main() -> None:
    options, overrides = parser().parse_known_args()
    config, source = parse([options.config, *overrides]), open_source(options.source)
    require(options.steps > 0, f"--steps {options.steps} must be positive")
    candidates = [Candidate.parse(text, config.growth.optimizer) for text in options.candidates]
    check_mesh(config, init_distributed())
    mesh = make_mesh(config.parallel)
    outcomes = probe(source, config, candidates, options.steps, mesh)
    note = caution(options.steps, config)
    if mesh.is_main:
        Console(highlight=False).print(table(outcomes))
        print(note)
        if options.json:
            rows = [asdict(outcome) for outcome in outcomes]
            found = {"source": str(source.path), "lag_steps": options.steps, "note": note, "rows": rows}
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    leave_distributed()


def table(outcomes: list[Outcome]) -> Table:
    shown = Table("candidate", "loss as grown", "loss after the lag", "FLOPs", "seconds")
    for each in outcomes:
        losses = ["not finite" if loss is None else f"{loss:.4f}" for loss in (each.loss_initial, each.loss)]
        shown.add_row(each.candidate, *losses, f"{each.flops:.3g}", f"{each.seconds:.1f}")
    return shown


def parser() -> Arguments:
    parser = Arguments(description="Rank ways of growing a checkpoint.", allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG", help="of the planned run; --section.field VALUE changes it")
    parser.add_argument("--source", required=True, metavar="CKPT", help="the model that grows")
    parser.add_argument("--candidates", nargs="+", required=True, metavar="METHOD[:POLICY]")
    parser.add_argument("--steps", type=int, required=True, metavar="N", help="the lag: steps of each candidate")
    parser.add_argument("--json", type=local_path, metavar="FILE", help="the same for programs")
    return parser


if __name__ == "__main__":
    run(main)
