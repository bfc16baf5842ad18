"""Train a sentencepiece tokenizer (BPE with byte fallback) and write PREFIX.model.

    python tools/train_tokenizer.py --input corpus.jsonl --vocab-size 32000 --output tokenizer

Inputs are those of preprocess_data.py. Exit codes: 0 done, 2 usage, 3 data.
"""

from _command import Arguments, run

from megagrow.data.records import read_texts
from megagrow.data.tokenizer import train_sentencepiece


def main() -> None:
    parser = Arguments(description="Train a sentencepiece tokenizer: PREFIX.model.")
    parser.add_argument("--input", nargs="+", required=True, help=".jsonl[.gz|.zst] or text files")
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.model")
    parser.add_argument("--json-key", default="text", help="key of the text in each JSON object")
    parser.add_argument("--max-bytes", type=int, default=128 << 20, help="train on a sample of at most this size")
    options = parser.parse_args()

    texts = read_texts(options.input, options.json_key)
    tokenizer = train_sentencepiece(texts, options.vocab_size, options.output, options.max_bytes)
    print(f"{options.output}.model: {tokenizer.vocab_size} pieces")


if __name__ == "__main__":
    run(main)
