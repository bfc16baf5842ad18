"""`python -m megagrow PRESET_OR_FILE [--section.field VALUE …]`: trains what the configuration says.

With `--dry-run` it prints the plan instead, and builds the model of one rank per place of the pipeline without memory.
"""

import math
import os
import signal
import sys

from rich.console import Console

from megagrow.command_line import DRY_RUN, parse, without_dry_run
from megagrow.config import Config, require
from megagrow.errors import ConfigError, MegagrowError
from megagrow.plan import Plan, dry_run, make_plan, show
from megagrow.train import run
from megagrow.train.run import END_SECONDS, end_within_limit


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    try:
        config = parse(without_dry_run(arguments))
        if DRY_RUN in arguments:
            show_plan(config)
            return 0
    except MegagrowError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"megagrow: error: {error}", file=sys.stderr)
        return error.exit_code
    return run(config)


def show_plan(config: Config) -> None:
    """Prints the plan for the launcher's ranks, or for the fewest that the layout needs, and what they would build.

    Raises:
        ConfigError: the layout is not valid: each broken rule with its remedy; or no number of ranks.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    fewest = config.parallel.model_ranks * config.parallel.replicate
    ranks = os.environ.get("WORLD_SIZE", str(fewest))
    require(ranks.isdecimal() and int(ranks) > 0, f"WORLD_SIZE={ranks!r} of the environment is not a number of ranks")
    plan = make_plan(config, int(ranks))
    if not isinstance(plan, Plan):
        raise ConfigError("; ".join(plan))
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    for part in (*show.plan_tables(plan), *dry_run.tables(plan.layout)):
        console.print(part)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    end_within_limit(code)
    signal.alarm(math.ceil(END_SECONDS) + 1)  # the system's own, for when the interpreter runs no threads any more
    sys.exit(code)
