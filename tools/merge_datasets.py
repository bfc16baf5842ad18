"""Merge token files: the documents of several PREFIX.bin/.idx, one after the other, as one dataset.

    python tools/merge_datasets.py --input data/a data/b --output data/ab

Token bytes are copied as they are; the inputs must have the same dtype and, where they say it (PREFIX.json), the same
tokenizer and split. Exit codes: 0 done, 2 usage, 3 data.
"""

from _command import Arguments, run

from megagrow.data.merge import merge_datasets


def main() -> None:
    parser = Arguments(description="Merge datasets of Megatron's format into one.")
    parser.add_argument("--input", nargs="+", required=True, metavar="PREFIX", help="in this order")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin/.idx")
    options = parser.parse_args()
    merged = merge_datasets(options.input, options.output)
    print(f"{merged.prefix}: {merged.num_documents} documents, {merged.num_tokens} tokens")


if __name__ == "__main__":
    run(main)
