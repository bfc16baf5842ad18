"""Compare ways of getting a large model, at matched cost, each with its own learning rate.

    python tools/compare.py llama_depth                      # six arms, three seeds: 80 minutes on two CPU cores
    python tools/compare.py llama_depth --full               # all arms, one seed; of the best, three
    python tools/compare.py llama_depth --gpu --minutes 10   # shapes for a GPU; again, until it says that it is done
    python tools/compare.py llama_depth --data TEXT          # a folder of text instead of the built-in corpus

Runs that are on record in benchmarks/results/compare are not run again: the unchanged command goes on. Writes
report.md, report.json, savings.csv and curves.png; see docs/compare.md.
Exit codes: 0 done, 1 --check finds a difference, 2 usage, 3 data, 4 checkpoint, 7 out of time.
"""

import signal
import sys
from dataclasses import replace
from pathlib import Path

from _command import Arguments, local_path, run

from megagrow.compare import SIZES, SUITES, Comparison, check, compare

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "compare"


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what runs is stopped, and saved, as on ctrl-C
    options = vars(parser().parse_args())
    checks = options.pop("checks")
    options["results"] = options["results"] or RESULTS
    asked = Comparison(**{name: value for name, value in options.items() if value is not None})
    if asked.size == "gpu" and options["parallel"] is None:
        asked = replace(asked, parallel=1)
    if not checks:
        print(f"the report is in {compare(asked)}")
    elif found := check(asked):
        sys.exit("\n".join(found))
    else:
        print("all means lie within what is on record")


def parser() -> Arguments:
    parser = Arguments(description="Compare ways of getting a large model, at matched cost.")
    parser.add_argument("suite", metavar="SUITE", choices=SUITES, help=", ".join(SUITES))
    sizes = parser.add_mutually_exclusive_group()
    for size in SIZES[1:]:
        sizes.add_argument(f"--{size}", dest="size", action="store_const", const=size)
    parser.add_argument(
        "--data",
        type=local_path,
        metavar="FOLDER",
        help="of text, or of tokens from OUTPUT/corpora; default: the built-in corpus",
    )
    parser.add_argument(
        "--output", type=local_path, metavar="FOLDER", help="of corpora, runs, reports; default runs/compare"
    )
    parser.add_argument("--jobs", dest="parallel", type=int, help="runs at a time; default 2, with --gpu 1")
    parser.add_argument("--minutes", type=float, help="from the first run on, in which all has to end")
    parser.add_argument(
        "--results", type=local_path, metavar="FOLDER", help="of the records of ended runs; default: the project's"
    )
    parser.add_argument("--lr", dest="fixed", type=float, help="of all arms, without any tuning")
    parser.add_argument("--report", dest="only_reports", action="store_true", help="of what is there; run nothing")
    parser.add_argument(
        "--check",
        dest="checks",
        action="store_true",
        help="run what is reported again, elsewhere; compare with the record",
    )
    return parser


if __name__ == "__main__":
    run(main)
