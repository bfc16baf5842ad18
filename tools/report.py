"""Compares finished runs: writes report.json, report.md and curves.png.

python tools/report.py runs/quickstart/{small,scratch-*,grown_salt} --output runs/quickstart
"""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from megagrow.errors import MegagrowError
from megagrow.report import build_report, to_markdown


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def main(arguments: list[str] | None = None) -> int:
    """Runs the tool and returns its exit code."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        type=Path,
        help="run directories; scratch-* is the baseline",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the three files")
    options = parser.parse_args(arguments)
    try:
        report = build_report(options.runs, options.output)
    except MegagrowError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(to_markdown(report))
    print(f"written to {options.output}: report.md, report.json, curves.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
