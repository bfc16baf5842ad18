"""The file that an evaluation leaves behind."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megagrow.checkpoint.source import Source
from megagrow.data.files import write_atomically


def write_result(path: Path | str, source: Source, settings: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Writes strict JSON, whole or not at all; a number that is not finite becomes null.

    Args:
        path: of the file.
        source: the model.
        settings: what was asked.
        found: what came out.

    Raises:
        DataError: the file cannot be written.
    """
    model = {"model": str(source.path), "model_identity": source.identity}
    content = _strict({**model, "settings": settings, **found})
    write_atomically(path, (json.dumps(content, indent=2, allow_nan=False, default=str) + "\n").encode())


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
