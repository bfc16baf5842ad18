"""Converts a model between megagrow's checkpoints and Hugging Face folders.

    python tools/convert_checkpoint.py SRC DST --to {hf,megagrow} [--dtype D] [--tokenizer T] [--no-verify]

SRC is an own checkpoint, a run directory or a Hugging Face folder; DST is a new folder. Tensors
keep their dtype unless --dtype says otherwise, and no more than one of them is in memory. Both are
then loaded, one after the other, and run on the same random tokens: the largest logit difference is
printed, and too large a one is an error. --no-verify leaves that out, for models larger than memory.
Exit codes: 0 done, 2 usage or a model that DST's format cannot express, 3 tokenizer, 4 checkpoint.
"""

import os
from argparse import BooleanOptionalAction

from _command import Arguments, local_path, run

from megagrow.checkpoint import convert
from megagrow.checkpoint.source import open_source


def main() -> None:
    parser = Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("src", help="checkpoint, run directory or Hugging Face folder")
    parser.add_argument("dst", type=local_path, help="folder to write; must not exist or be empty")
    parser.add_argument("--to", required=True, choices=["hf", "megagrow"], help="format of DST")
    parser.add_argument("--dtype", choices=[*convert.DTYPES], help="of all tensors of DST (default: as in SRC)")
    parser.add_argument("--tokenizer", type=local_path, metavar="T", help="of DST (default: that of SRC)")
    parser.add_argument(
        "--verify", action=BooleanOptionalAction, default=True, help="compare the logits of SRC and DST (default)"
    )
    arguments = parser.parse_args()
    dst, dtype = arguments.dst, convert.DTYPES.get(arguments.dtype)
    os.environ["HF_HUB_OFFLINE"] = "1"
    source = open_source(arguments.src)  # once: a run that goes on has another newest checkpoint in a minute
    has_tokenizer = convert.convert(source, dst, arguments.to, dtype, tell=print, tokenizer=arguments.tokenizer)
    without = "" if has_tokenizer else ", without a tokenizer: none found with SRC, and none given (--tokenizer)"
    print(f"wrote {dst} from {source.path}{without}")
    if not arguments.verify:
        return
    compared = convert.compare(source, dst, dtype)
    print(
        f"largest logit difference {compared.largest_difference:.3g}, "
        f"largest logit {compared.largest_logit:.3g}: {source.path} in {compared.libraries[0]} against "
        f"{dst} in {compared.libraries[1]}, {compared.num_tokens} random tokens, "
        + ("float32" if dtype is None else f"weights rounded to {arguments.dtype}")
    )
    convert.check_equal(compared)


if __name__ == "__main__":
    run(main)
