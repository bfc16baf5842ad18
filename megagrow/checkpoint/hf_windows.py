"""Attention bounded to the last tokens (sliding windows): accepted where the window reaches the whole context."""

from collections.abc import Mapping
from typing import Any

from megagrow.checkpoint.hf_entries import positive, switch, unsupported
from megagrow.checkpoint.hf_family import Family
from megagrow.errors import CheckpointError

DEFAULT_WINDOW = 4096  # what transformers assumes when the key is absent; null is no window
DEFAULT_FULL_LAYERS = 28  # of Qwen2 and Qwen3, before those with a window
LAYER_TYPES = ("full_attention", "sliding_attention")


def check_windows(entries: Mapping[str, Any], family: Family, num_layers: int, context: int, where: str) -> int | None:
    """The window of the layers that have one, in tokens; None: all see everything.

    Raises:
        CheckpointError: it is shorter than the context that config.json states.
    """
    window = _window(entries, family, num_layers, where)
    if window is not None and window < context:
        raise CheckpointError(
            f"{where}: sliding_window={window} is shorter than the context, max_position_embeddings={context}; "
            "megagrow's attention sees all of it, and the logits of longer texts would change; use a model without "
            f"sliding window, or set max_position_embeddings={window} to use this one within its window"
        )
    return window


def _window(entries: Mapping[str, Any], family: Family, num_layers: int, where: str) -> int | None:
    """The window of the layers that have one; None: no layer has."""
    if family.window == "never":
        for key, allowed in (("sliding_window", None), ("use_sliding_window", False)):
            if entries.get(key) is not None and entries[key] is not allowed:
                raise unsupported(key, entries[key], f"use a model with {key}={allowed}", where)
        return None
    stated = entries.get("sliding_window", DEFAULT_WINDOW)
    window = None if stated is None else positive(stated, int, "sliding_window", where)
    if family.window == "all_layers":
        return window
    in_use = entries.get("use_sliding_window")
    window = window if in_use is not None and switch(in_use, "use_sliding_window", where) else None
    types = _layer_types(entries, num_layers, where)
    if types is None:
        full = entries.get("max_window_layers", DEFAULT_FULL_LAYERS)
        return window if full == 0 or positive(full, int, "max_window_layers", where) < num_layers else None
    if "sliding_attention" not in types:
        return None
    if window is None:
        raise CheckpointError(
            f"{where}: layer_types names sliding_attention, but there is no sliding_window in use; correct one of them"
        )
    return window


def _layer_types(entries: Mapping[str, Any], num_layers: int, where: str) -> list[str] | None:
    types = entries.get("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != num_layers or any(each not in LAYER_TYPES for each in types):
        raise CheckpointError(
            f"{where}: layer_types must be a list of {' or '.join(LAYER_TYPES)} for each of {num_layers} layers; "
            "use a model that has no others"
        )
    return types
