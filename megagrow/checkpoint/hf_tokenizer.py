"""What transformers makes of the tokenizer in an exported folder."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megagrow.checkpoint.source import Source
from megagrow.data.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from megagrow.errors import DataError

# How Qwen2's tokenizer cuts text before it merges bytes.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_note(family: str, tokenizer: Path | str | None) -> str:
    """What the user of an export has to know of its tokenizer; "" where `AutoTokenizer` gives its ids.

    transformers 5 makes a `Qwen2Tokenizer` of the vocabulary of every model of type qwen2, whatever
    tokenizer_config.json says; that one normalises, cuts and joins text as Qwen does.
    """
    if family != "qwen2" or not tokenizer or _is_qwens(load_tokenizer(tokenizer)):
        return ""
    return (
        f"for every qwen2 model, AutoTokenizer of transformers 5 cuts text as Qwen does: not the ids of {tokenizer}; "
        "load exports with PreTrainedTokenizerFast.from_pretrained, or use another model.family"
    )


def _is_qwens(tokenizer: Tokenizer) -> bool:
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return False
    steps = tokenizer.steps
    return _patterns(steps["pre_tokenizer"]) == [QWEN2_PATTERN] and steps["normalizer"] == {"type": "NFC"}


def _patterns(step: Any) -> list[str]:
    """The expressions that a pre-tokenizer splits by, in their order."""
    if not isinstance(step, Mapping):
        return []
    pattern = step.get("pattern")
    own = [pattern["Regex"]] if isinstance(pattern, Mapping) and isinstance(pattern.get("Regex"), str) else []
    return own + [found for part in step.get("pretokenizers", ()) for found in _patterns(part)]


def token_ids_with(source: Source, own: Path | str | None, chosen: Path | str | None) -> dict[str, Any] | None:
    """The source's special ids, unless another tokenizer comes along than its own; None: as that one says.

    Args:
        own: where the source's tokenizer is. Where nobody knows, or it cannot be read, the ids have to agree on the
            end of a document.
        chosen: what comes along.

    Raises:
        DataError: the chosen tokenizer cannot be read.
    """
    owner = source.token_ids_of or own
    if chosen is None or source.token_ids is None or str(chosen) == str(owner):
        return source.token_ids
    tokenizer = load_tokenizer(chosen)
    with suppress(DataError):  # gone, or damaged, which may be why another was chosen
        if owner is not None:
            return source.token_ids if load_tokenizer(owner).fingerprint == tokenizer.fingerprint else None
    stated = source.token_ids.get("eos_token_id")
    ends = stated if isinstance(stated, list) else [stated]
    return source.token_ids if stated is None or tokenizer.eod_id in ends else None
