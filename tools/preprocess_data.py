"""Turn text into the token files that training reads: PREFIX.bin, PREFIX.idx and PREFIX.json.

    python tools/preprocess_data.py --input a.jsonl.gz --tokenizer t.model --output data/train

Inputs by name: .jsonl, .ndjson, .json (one JSON object per line), anything else is one document; .gz and .zst are
decompressed. Nothing but an earlier dataset PREFIX is replaced. Exit codes: 0 done, 2 usage, 3 data.
"""

from megagrow.data.preprocess import preprocess_files
from megagrow.errors import named


def main() -> None:
    from _command import Arguments  # here: workers import this file again, and need no torch

    parser = Arguments(description="Tokenize text into PREFIX.bin/.idx (Megatron's format).")
    parser.add_argument("--input", nargs="+", required=True, help=".jsonl[.gz|.zst] or text files")
    parser.add_argument("--tokenizer", required=True, help="*.model, tokenizer.json, folder or byte")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin/.idx")
    parser.add_argument("--json-key", default="text", help="key of the text in each JSON object")
    parser.add_argument("--domain-key", default="", help="key of each document's domain; writes PREFIX.domains.…")
    parser.add_argument("--workers", type=int, default=1, help="processes; same bytes for any number")
    parser.add_argument("--on-bad-line", choices=("stop", "skip"), default="stop")
    parser.add_argument("--split", default="train", help="recorded in PREFIX.json")
    parser.add_argument(
        "--no-append-eod",
        dest="append_eod",
        action="store_false",
        help="do not end each document with the tokenizer's end-of-document id",
    )
    # Megatron's spelling of what is the default here.
    parser.add_argument("--append-eod", dest="append_eod", action="store_true", default=True)
    options = parser.parse_args()

    summary = preprocess_files(
        options.input,
        options.tokenizer,
        options.output,
        json_key=options.json_key,
        append_eod=options.append_eod,
        workers=options.workers,
        on_bad_line=options.on_bad_line,
        split=options.split,
        domain_key=options.domain_key,
    )
    for example in summary.bad_examples:
        print(f"skipped {example}")
    print(
        f"{options.output}: {summary.num_documents} documents, {summary.num_tokens} tokens, "
        f"{summary.num_bad} bad and {summary.num_empty} empty records left out, "
        f"{summary.seconds:.1f} s"
    )
    for name, count in summary.num_by_domain.items():
        print(f"domain {named(name)}: {count} documents")


if __name__ == "__main__":
    from _command import run

    run(main)
