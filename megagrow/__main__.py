"""`python -m megagrow PRESET_OR_FILE [--section.field VALUE …]`: trains what the configuration says."""

import os
import sys

from megagrow.command_line import parse
from megagrow.errors import MegagrowError
from megagrow.train import run


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    try:
        config = parse(arguments)
    except MegagrowError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"megagrow: error: {error}", file=sys.stderr)
        return error.exit_code
    return run(config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
