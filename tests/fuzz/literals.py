"""What may stand in a JSON or YAML file where something else is wanted, as text, so that it need not be valid."""

import json
import sys
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

Literals = SearchStrategy[str]

TEXTS = st.text(max_size=12) | st.sampled_from(["../x", "/etc/passwd", "a" * 5000, "0", "true", "\n", "\x00", "…"])
INTEGERS = st.integers(-(2**70), 2**70) | st.sampled_from([0, -1, 2**31, 2**63, -(2**63) - 1, 10**400])
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
SCALARS = {"null": st.none(), "bool": st.booleans(), "int": INTEGERS, "float": FLOATS, "str": TEXTS}
NESTED: SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | INTEGERS | FLOATS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
KINDS = {**SCALARS, "list": st.lists(NESTED, max_size=4), "dict": st.dictionaries(TEXTS, NESTED, max_size=4)}

BROKEN = [  # no reader takes these, wherever they stand
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, '"\\ud800"', '{"a": 1, "a": 2}', "[" * 3000),
    *('{"a":' * 3000, "[" * 300 + "]" * 300, "[1", '"open', "{]", "\x00", '"tab\t', ""),
]
BROKEN_YAML = [
    '!!python/object/apply:os.mkdir ["canary"]',
    '!!python/name:os.system ""',
    "!!binary aGVsbG8=",
    "!!int x",
    "!!timestamp x",
    "&a [*a]",
    "*undefined",
    "[&a [x, x], &b [*a, *a], &c [*b, *b], [*c, *c]]",
    "{<<: {a: 1}}",
    *(".nan", ".inf", "-.inf", "0b_", "0x_", "0x" + "f" * 5000, "[" * 300, "{a: 1, a: 2}", "{? [1] : 2}", "\x07", "'"),
]
BROKEN_ANYWHERE_IN_YAML = [
    text for text in BROKEN if text not in ("NaN", "Infinity", "-Infinity", "", "1e999", "-1e999")
]


def rejecting(accepts: Callable[[Any], bool], *likely: SearchStrategy[Any], broken: list[str] = BROKEN) -> Literals:
    """Literals of values for which `accepts` is False: of every kind, of the `likely` ones, and broken ones."""
    values = st.one_of(*KINDS.values(), *likely, *likely)
    wrong = values.filter(lambda value: not accepts(value)).map(json.dumps)
    return wrong | wrong | wrong | st.sampled_from(broken)


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_object(value: Any) -> bool:
    return isinstance(value, dict)


def is_count(value: Any) -> bool:
    """A whole number that fits into 64 bits, and is not negative."""
    return type(value) is int and 0 <= value < 2**63


def is_number(value: Any) -> bool:
    """Finite, and no truth value."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
