"""A model's tokenizer as transformers loads it from an exported folder."""

import tempfile
from pathlib import Path
from typing import Any

from megagrow.data.tokenizer import load_tokenizer
from megagrow.errors import ConfigError, DataError, shown

INSTALL = "pip install 'megagrow[eval]'"


def load_transformers_tokenizer(path: Path | str) -> Any:
    """The tokenizer at `path`, special tokens and chat template included, without a network and without its code.

    Args:
        path: a Hugging Face folder, or what `load_tokenizer` takes.

    Raises:
        ConfigError: transformers is not installed.
        DataError: there is no such tokenizer, or it cannot be read.
    """
    try:
        import transformers
    except ImportError:
        raise ConfigError(f"tasks need the package transformers, which is not installed; {INSTALL}") from None
    with tempfile.TemporaryDirectory() as folder:
        # Without config.json, by which transformers chooses classes; ours says what is wrong better than it does, too.
        load_tokenizer(path).save(folder)
        try:
            found = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever stumbles over the files beside the tokenizer's
            raise DataError(f"{path}: transformers cannot load the tokenizer ({shown(str(error))})") from error
    found.name_or_path = str(path)  # by which lm_eval's caches know it
    return found
