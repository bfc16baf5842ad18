"""Documents per second of preprocessing beside a plain loop over the same tokenizer.

    python benchmarks/preprocess.py [--workers 1 2] [--megabytes 100] [--runs 3]

The loop reads JSON lines, parses them and encodes each text with the tokenizer's own library, in one process, and
keeps nothing. Preprocessing with N processes must reach 0.8 x N of its documents per second, from the start of the
processes to the renamed files. Both are timed in turn, and the medians of the ratios of neighbours are compared. The
corpus is the standard library's source, cut into documents of a few kilobytes.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import sentencepiece
import tokenizers

from megagrow.data.builtin import documents
from megagrow.data.preprocess import preprocess_files
from megagrow.data.tokenizer import train_sentencepiece

if TYPE_CHECKING:
    from results_file import Row

Encode = Callable[[str], object]
DOCUMENT = 4000  # characters
VOCAB_SIZE = 8000
SHARE = 0.8
LONGER = {"byte": 10}  # times the text: so much faster is it read than with a vocabulary


def make_corpus(path: Path, num_bytes: int) -> int:
    """Writes JSON lines; their number."""
    texts = [file.text for file in documents(4_000_000)]
    pieces = [text[i : i + DOCUMENT] for text in texts for i in range(0, len(text), DOCUMENT)]
    written = count = 0
    with open(path, "w") as file:
        for piece in cycle(piece for piece in pieces if piece.strip()):
            if written >= num_bytes:
                return count
            written += file.write(json.dumps({"text": piece}) + "\n")
            count += 1
    raise AssertionError("the corpus never ends")


def make_tokenizers(folder: Path) -> dict[str, tuple[str, Encode]]:
    """By kind: what preprocessing is given, and the library's own way to encode."""
    model = train_sentencepiece((file.text for file in documents(1_000_000)), VOCAB_SIZE, folder / "tokenizer")
    model.save(folder / "hf")
    (folder / "hf" / "tokenizer.model").unlink()
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    fast = tokenizers.Tokenizer.from_file(str(folder / "hf" / "tokenizer.json"))
    return {
        "sentencepiece": (str(folder / "tokenizer.model"), processor.encode),
        "tokenizer.json": (str(folder / "hf"), lambda text: fast.encode(text, add_special_tokens=False).ids),
        "byte": ("byte", lambda text: list(text.encode())),
    }


def plain_loop(path: Path, encode: Encode) -> float:
    """Seconds of one process."""
    began = time.perf_counter()
    with open(path) as file:
        for line in file:
            encode(json.loads(line)["text"])
    return time.perf_counter() - began


def preprocessing(path: Path, tokenizer: str, workers: int) -> float:
    """Seconds until the dataset stands."""
    began = time.perf_counter()
    preprocess_files([path], tokenizer, path.with_name("out"), workers=workers)
    return time.perf_counter() - began


def measure(
    kind: str, path: Path, tokenizer: str, encode: Encode, options: argparse.Namespace, count: int
) -> "list[Row]":
    plain, own = list[float](), {workers: list[float]() for workers in options.workers}
    for _ in range(options.runs):
        plain.append(plain_loop(path, encode))
        for workers in options.workers:
            own[workers].append(preprocessing(path, tokenizer, workers))
    from results_file import Row  # imports torch, which the processes that encode, and read this file too, do not need

    rows = [Row(f"{kind}, plain loop", count / statistics.median(plain), "documents/s")]
    for workers, seconds in own.items():
        ratio = statistics.median(p / s for p, s in zip(plain, seconds, strict=True)) / workers
        rows.append(Row(f"{kind}, {workers} processes", count / statistics.median(seconds), "documents/s"))
        name = f"{kind}, {workers} processes, of {workers} plain loops"
        rows.append(Row(name, ratio, "x", f">= {SHARE}", ratio >= SHARE))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=["sentencepiece", "tokenizer.json", "byte"])
    options = parser.parse_args()
    from results_file import write

    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        path, kinds = Path(name) / "corpus.jsonl", make_tokenizers(Path(name))
        for kind in options.kinds:
            count = make_corpus(path, int(options.megabytes * 1e6 * LONGER.get(kind, 1)))
            rows += measure(kind, path, *kinds[kind], options, count)
    write("preprocess", rows)


if __name__ == "__main__":
    main()
