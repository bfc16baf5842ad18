"""What SALT costs: memory of its loss, scoring, a step of stage 1, and what is left of the teacher afterwards.

python benchmarks/salt.py                           # a quarter of an hour, 8 GB; benchmarks/results/salt.json
python benchmarks/salt.py --rows memory scoring     # only these; or stage_one, switch

memory      of the mixed loss of a step, beside that of a plain and of a dense one (salt_loss.py)
scoring     tokens per second, beside transformers' forward pass with log-softmax and top-k (salt_scoring.py)
stage_one   the time of its steps, beside plain ones, and beside the ratio of FLOPs that the ledger has (salt_runs.py)
switch      what a run holds after it, beside one that never had a teacher (from the same runs)
"""

import argparse

import salt_loss
import salt_runs
import salt_scoring
from results_file import Row, write

PARTS = ("memory", "scoring", "stage_one", "switch")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=PARTS, default=PARTS)
    wanted = parser.parse_args().rows
    rows: list[Row] = []
    if "memory" in wanted:
        rows += salt_loss.rows()
    if "scoring" in wanted:
        rows += salt_scoring.rows_of(salt_scoring.measure())
    for layout in salt_runs.LAYOUTS if {"stage_one", "switch"} & set(wanted) else ():
        runs = salt_runs.measure(layout)
        rows += salt_runs.time_rows(layout, runs) if "stage_one" in wanted else []
        rows += salt_runs.memory_rows(layout, runs) if "switch" in wanted else []
    print(f"written to {write('salt', rows)}")
    return 0 if all(row.holds is not False for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
