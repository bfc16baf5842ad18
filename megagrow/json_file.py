"""JSON files from anywhere, read strictly: what another reader would take differently is refused by name."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from megagrow.errors import MegagrowError, named, shown

MAX_DEPTH = 200  # of objects and lists inside each other; deeper ones exhaust the stack of whatever walks them
MAX_DIGITS = 4300  # of an integer: Python takes quadratic time for longer ones, and refuses to print them


def parse_object(raw: bytes, where: Path | str, kind: type[MegagrowError], remedy: str) -> dict[str, Any]:
    """The JSON object in `raw`.

    Beyond what the grammar forbids, these are refused: a key that stands twice, NaN and infinities (also as 1e999),
    integers of more than 4,300 digits, lone surrogates, and nesting deeper than 200.

    Args:
        where: the file, for errors.
        kind: class of the error that is raised.
        remedy: what the user can do, for errors.

    Raises:
        MegagrowError: of `kind`; names the file and the field, or the place when it cannot be parsed that far.
    """

    def refuse(problem: str) -> NoReturn:
        raise kind(f"{where}: {problem}; {remedy}") from None

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name, entry in pairs:
            if name in fields:
                refuse(f"key {shown(name)} stands twice in one object")
            fields[name] = entry
        return fields

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=once, parse_int=_integer)
    except RecursionError:
        refuse(f"not valid JSON: nested more than {MAX_DEPTH} deep")
    except MegagrowError:
        raise
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError: both say where
        refuse(f"not valid JSON: {error}")
    if not isinstance(value, dict):
        refuse(f"must hold a JSON object, has {type(value).__name__}")
    for name, problem in _problems(value, "", 1):
        refuse(f"{name} {problem}")
    return value


_INDICES = re.compile(r"(?:\[\d+\])+\Z")  # of a list in a list in a list


def _integer(text: str) -> int | float:
    return int(text) if len(text) <= MAX_DIGITS else math.inf


def _problems(value: Any, name: str, depth: int) -> Iterator[tuple[str, str]]:
    """(dotted name, what is wrong) of every value that JSON's grammar lets through and that is refused here."""
    if depth > MAX_DEPTH:
        yield named(_INDICES.sub("", name)), f"is nested more than {MAX_DEPTH} deep"
    elif isinstance(value, dict):
        for key, entry in value.items():
            if not is_text(key):
                yield f"key {shown(key)}", "holds half a surrogate pair, which is no text"
            yield from _problems(entry, f"{name}.{key}" if name else key, depth + 1)
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _problems(entry, f"{name}[{index}]", depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        yield named(name), "is not a finite number"
    elif isinstance(value, str) and not is_text(value):
        yield named(name), "holds half a surrogate pair, which is no text"


def is_count(value: Any) -> bool:
    """A whole number from 0 on, of 63 bits at most."""
    return type(value) is int and 0 <= value < 2**63


def is_text(value: str) -> bool:
    """Whether it can be written as UTF-8: half a surrogate pair cannot."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
