"""A few samples of a corpus as text, to be read by a person: nothing in it can act on a terminal or a page."""

from pathlib import Path

from megagrow.data.dataset import PackedDataset
from megagrow.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from megagrow.errors import DataError

MAX_CHARACTERS = 300


def tokenizer_of(dataset: PackedDataset, path: str) -> Tokenizer:
    """The tokenizer that made a dataset.

    Args:
        dataset: what has been tokenized.
        path: where the run had its tokenizer; "": it had none.

    Raises:
        DataError: it is not there, or another one has made the dataset.
    """
    description = dataset.indexed.description
    if not path and description and description["tokenizer"] == ByteTokenizer.name:
        path = ByteTokenizer.name
    if not path:
        raise DataError(f"{dataset.prefix}: the run names no tokenizer (data.tokenizer)")
    if path != ByteTokenizer.name and not Path(path).exists():
        raise DataError(f"{path}: the tokenizer is not there any more")
    tokenizer = load_tokenizer(path)
    if description and description["tokenizer_sha256"] != tokenizer.fingerprint:
        raise DataError(f"{path}: not the tokenizer that made {dataset.prefix}")
    return tokenizer


def example_text(dataset: PackedDataset, tokenizer: Tokenizer, sample: int) -> str:
    """The first characters of a sample; all that is not printed as one visible character is spelled out.

    Raises:
        DataError: tokens that the tokenizer does not know.
    """
    try:
        text = tokenizer.decode(dataset.sample(sample)[:-1].tolist())
    except (IndexError, KeyError, OverflowError, ValueError) as error:
        raise DataError(f"{dataset.prefix}: sample {sample} cannot be decoded ({type(error).__name__})") from None
    return visible(text[:MAX_CHARACTERS]) + (" …" if len(text) > MAX_CHARACTERS else "")


def visible(text: str) -> str:
    """Line ends stay; control characters, and those that turn or hide text, become their escapes."""
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)
