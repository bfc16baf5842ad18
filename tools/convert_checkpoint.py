"""Converts a model between megagrow's checkpoints and Hugging Face folders.

    python tools/convert_checkpoint.py SRC DST --to {hf,megagrow}

SRC is an own checkpoint, a run directory or a Hugging Face folder; DST is a new folder. Tensors
keep their dtype. Both are then run on the same random tokens, and the largest logit difference is
printed. Exit codes: 0 done, 2 usage or a model that DST's format cannot express, 3 tokenizer,
4 checkpoint.
"""

import argparse
import os
import sys
from pathlib import Path

from megagrow.checkpoint import convert
from megagrow.errors import MegagrowError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("src", type=Path, help="checkpoint, run directory or Hugging Face folder")
    parser.add_argument("dst", type=Path, help="folder to write; must not exist or be empty")
    parser.add_argument("--to", required=True, choices=["hf", "megagrow"], help="format of DST")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        run(args.src, args.dst, args.to)
    except MegagrowError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def run(src: Path, dst: Path, to: convert.Format) -> None:
    has_tokenizer = convert.convert(src, dst, to)
    print(f"wrote {dst}" + ("" if has_tokenizer else ", without a tokenizer: none found with SRC"))
    compared = convert.compare(src, dst)
    with_first, with_second = compared.libraries
    print(
        f"largest logit difference {compared.largest_difference:.3g}, "
        f"largest logit {compared.largest_logit:.3g}: {src} in {with_first} against {dst} in "
        f"{with_second}, {compared.num_tokens} random tokens, float32"
    )
    convert.check_equal(compared)


if __name__ == "__main__":
    sys.exit(main())
