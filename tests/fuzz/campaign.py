"""Feeds malformed files to every reader and prints how many each field has refused: `make fuzz`.

python -m tests.fuzz.campaign [--per-field 500] [--only FORMAT]
"""

import argparse
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz import (
    configurations,
    domain_files,
    hf_folders,
    index_files,
    journals,
    manifests,
    score_folders,
    teacher_caches,
)
from tests.fuzz.fields import Field, count_refusals
from tests.fuzz.watch import Misbehaved, watching


def all_fields(folder: Path) -> Iterator[Field]:
    """The fields of all formats; their files come to lie in `folder`."""
    yield from index_files.fields(folder)
    yield from manifests.fields(folder)
    yield from score_folders.fields(folder / "scores")
    yield from teacher_caches.fields(folder / "caches")
    yield from domain_files.fields(folder / "domains")
    yield from configurations.fields(folder)
    yield from hf_folders.fields(folder)
    yield from journals.fields(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Feed malformed files to every reader.")
    parser.add_argument("--per-field", type=int, default=500, help="different malformed files per field")
    parser.add_argument("--only", default="", help="start of a format's name")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    started, counts, num_fields, failures = time.monotonic(), Counter[str](), Counter[str](), list[str]()
    with tempfile.TemporaryDirectory() as folder:
        for field in all_fields(Path(folder)):
            if field.format.startswith(options.only):
                num_fields[field.format] += 1
                try:
                    with watching():
                        count = count_refusals(field, options.per_field)
                except Misbehaved as error:
                    failures.append(str(error))
                    print(str(error)[:700], flush=True)
                    continue
                counts[field.format] += count
                print(f"{field.format:24} {field.name:44} {count:6}", flush=True)
    print(f"\n{'format':24} {'fields':>6} {'malformed files refused':>24}")
    for name, count in counts.items():
        print(f"{name:24} {num_fields[name]:6} {count:24}")
    mode = "asserts off (python -O)" if sys.flags.optimize else "asserts on"
    print(f"{'all':24} {num_fields.total():6} {counts.total():24}   {time.monotonic() - started:.0f} s, {mode}")
    sys.exit("\n".join(failures) or None)


if __name__ == "__main__":
    main()
