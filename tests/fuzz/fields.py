"""A field of a format: how files look in which it is wrong, who reads them, and what the refusal must say."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tests.fuzz.literals import Literals
from tests.fuzz.watch import Misbehaved, refusal

PLACE = r"line \d+|char \d+|position \d+|not valid YAML|not valid JSON|stands twice"  # of what cannot be parsed
MARK = '"@@@"'
ROUNDS = 10


@dataclass(frozen=True)
class Field:
    """One field.

    Attributes:
        format: of the file.
        name: of the field.
        file: that is written.
        malformed: contents of the file in which this field breaks a rule.
        read: what reads the file, and must refuse it.
        says: pattern of the refusal, beside the file's name: the field, or those that contradict it.
        write: puts a content in place; None: into `file`.
    """

    format: str
    name: str
    file: Path
    malformed: SearchStrategy[bytes]
    read: Callable[[], Any]
    says: str
    write: Callable[[bytes], None] | None = None

    def put(self, content: bytes) -> None:
        (self.write or self.file.write_bytes)(content)


def count_refusals(field: Field, wanted: int) -> int:
    """Reads `wanted` different malformed files, each of which must be refused; call it inside of `watching()`.

    Raises:
        Misbehaved: one was accepted, or not refused as it should be; it is in the message.
    """
    seen: set[bytes] = set()

    def attempt(content: bytes) -> None:
        if content in seen or len(seen) >= wanted:
            return
        field.put(content)
        try:
            _check_refusal(field, refusal(field.read, len(content)))
        except Misbehaved as error:
            raise Misbehaved(f"{field.format}, {field.name}: {error}; the file: {content[:600]!r}") from error
        seen.add(content)

    for number in range(ROUNDS):
        limits = settings(
            max_examples=wanted - len(seen) + min(100, 5 * wanted),  # some are drawn twice
            deadline=None,
            database=None,
            derandomize=False,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        hypothesis.seed(number)(limits(given(field.malformed)(attempt)))()
        if len(seen) >= wanted:
            return len(seen)
    raise Misbehaved(f"{field.format}, {field.name}: only {len(seen)} different malformed files were drawn")


def _check_refusal(field: Field, error: Exception | None) -> None:
    if error is None:
        raise Misbehaved("it is accepted")
    message = str(error)
    if "\n" in message or len(message) > 1000:
        raise Misbehaved(f"the refusal is not one readable line: {message[:300]!r}")
    if field.file.name not in message:
        raise Misbehaved(f"the refusal does not name {field.file.name}: {message}")
    if not re.search(f"{field.says}|{PLACE}", message.replace(str(field.file), "")):
        raise Misbehaved(f"the refusal names neither the field nor a place: {message}")


def texts_with(record: dict[str, Any], path: tuple[str | int, ...], wrong: Literals, required: bool = True) -> Any:
    """The record as JSON with something wrong at `path`: another value, the key twice or, if required, missing."""
    template = json.dumps(_replaced(record, path, "@@@"))
    texts = wrong.map(lambda literal: template.replace(MARK, literal))
    key = path[-1]
    if isinstance(key, str):
        pair = f"{json.dumps(key)}: {MARK}"
        twice = st.integers(0, 10**6).map(
            lambda n: template.replace(pair, f"{json.dumps(key)}: {n}, {json.dumps(key)}: 1")
        )
        texts = texts | texts | texts | twice
        if required:
            texts = texts | st.just(json.dumps(_removed(record, path)))
    return texts.map(lambda text: text.encode("utf-8", "surrogatepass"))


def unparsable(content: bytes) -> SearchStrategy[bytes]:
    """Files that are no JSON object: cut, of another encoding, of random bytes, or holding something else."""
    cut = st.integers(0, len(content.rstrip()) - 1).map(lambda end: content[:end])
    other = st.binary(max_size=300).filter(lambda raw: not _is_object(raw))
    values = st.sampled_from([b"[]", b"null", b"3", b'"text"', content.decode().encode("utf-16")])
    return cut | other | values


def _is_object(raw: bytes) -> bool:
    try:
        return isinstance(json.loads(raw), dict)
    except (ValueError, RecursionError):
        return False


def _replaced(record: Any, path: tuple[str | int, ...], value: Any) -> Any:
    if not path:
        return value
    changed = dict(record) if isinstance(record, dict) else list(record)
    inner = record.get(path[0], {}) if isinstance(record, dict) else record[path[0]]  # type: ignore[index]
    changed[path[0]] = _replaced(inner, path[1:], value)  # type: ignore[index]
    return changed


def _removed(record: Any, path: tuple[str | int, ...]) -> Any:
    if len(path) > 1:
        return _replaced(record, path[:1], _removed(record[path[0]], path[1:]))
    return {key: value for key, value in record.items() if key != path[0]}
