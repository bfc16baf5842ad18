"""Compares finished runs: writes report.json, report.md and curves.png.

    python tools/report.py runs/quickstart/{small,scratch-*,grown_salt} --output runs/quickstart

RUN is a run directory and an arm of the comparison, by its name; `scratch-*` are the budgets of the baseline.
Exit codes: 0 done, 2 usage, 3 data, 4 damaged ledger.
"""

from _command import Arguments, local_path, run

from megagrow.report import build_report, to_markdown


def main() -> None:
    parser = Arguments(description="Compare finished runs.")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=local_path)
    parser.add_argument("--output", metavar="DIR", type=local_path, required=True, help="where the three files go")
    options = parser.parse_args()

    print(to_markdown(build_report(options.runs, options.output)))
    print(f"written to {options.output}: report.md, report.json, curves.png")


if __name__ == "__main__":
    run(main)
