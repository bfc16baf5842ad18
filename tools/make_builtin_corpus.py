"""Make the built-in corpus: a tokenizer and token files from the standard library's source.

    python tools/make_builtin_corpus.py --output data/builtin --vocab-size 2048

Writes tokenizer.model, train.bin/.idx/.json and validation.bin/.idx/.json, and does nothing when
the folder holds exactly these. Exit codes: 0 done, 2 usage, 3 data.
"""

from pathlib import Path

from _command import Arguments, run

from megagrow.data.builtin import SPLITS, build_corpus
from megagrow.data.indexed import IndexedDataset


def main() -> None:
    parser = Arguments(description="Tokenizer and token files from the standard library's source.")
    parser.add_argument("--output", required=True, metavar="FOLDER")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--limit-bytes", type=int, default=None, help="use a sample of the files of this size")
    options = parser.parse_args()

    built = build_corpus(options.output, options.vocab_size, options.limit_bytes)
    for split in SPLITS:
        dataset = IndexedDataset(Path(options.output) / split)
        done = "written" if built else "already complete"
        size = f"{dataset.num_documents} documents, {dataset.num_tokens} tokens"
        print(f"{dataset.prefix}: {size}, {done}")


if __name__ == "__main__":
    run(main)
