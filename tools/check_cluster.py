"""Check a cluster before a run: in the run's own layout, at reduced width, in under three minutes.

    torchrun --nproc-per-node 8 tools/check_cluster.py PRESET_OR_FILE [--section.field VALUE ...] [--json FILE]

environment   versions, code, configuration and network variables are the same on all hosts
links         time and bandwidth of every mesh axis at the run's message sizes; the slowest group by name
compute       the same matrix product on all ranks; the slowest host by name
gradients     one training step of a narrow model in the run's layout, every gradient against one process

Rank 0 prints a table, then a line for each bound that does not hold. Exit codes: 0 fit, with or without warnings
(something is slow), 2 the configuration or the hosts do not fit together, 5 gradients are wrong, 6 a link is dead or a
rank hangs: the line names axis, ranks and hosts. torchrun makes 1 of all of them; FILE has the code unless it is 6.
"""

import datetime
import json
import os
import sys
from pathlib import Path

from _command import Arguments, local_path, run

from megagrow.cluster import Row, check_cluster, exit_code, first_error, problems, table, to_json
from megagrow.cluster.watch import LIMIT_SECONDS
from megagrow.command_line import parse
from megagrow.parallel.mesh import leave_distributed


def main() -> None:
    options, rest = parser().parse_known_args()
    config = parse([options.config, *rest])
    is_first = os.environ.get("RANK", "0") == "0"
    rows = check_cluster(config, options.limit)
    if is_first:
        show(rows)
        if options.json:
            save(options.json, rows)
    leave_distributed()
    error = first_error(rows)
    if error and is_first:
        raise error
    sys.exit(exit_code(rows))


def parser() -> Arguments:
    parser = Arguments(description="Check a cluster in a run's own layout.", allow_abbrev=False)
    parser.add_argument("config", metavar="PRESET_OR_FILE", help="of the run; --section.field VALUE changes it")
    parser.add_argument("--json", type=local_path, metavar="FILE", help="the same rows for programs")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds until it counts as hanging")
    return parser


def show(rows: list[Row]) -> None:
    print(table(rows))
    told = str(first_error(rows))  # by the end of the program
    for line in problems(rows):
        if not line.endswith(told):
            print(line, file=sys.stderr, flush=True)


def save(path: Path, rows: list[Row]) -> None:
    """Writes `date`, `code`, `rows`."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    path.write_text(json.dumps({"date": date, "code": exit_code(rows), "rows": to_json(rows)}, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
