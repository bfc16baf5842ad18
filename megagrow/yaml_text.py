"""YAML as configurations need it: mappings, lists and plain values; whatever could surprise is refused by name."""

import re
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode

from megagrow.errors import ConfigError, shown

MAX_DEPTH = 20  # of mappings and lists inside each other; a configuration has 4
_TAG = "tag:yaml.org,2002:"
_REPLACED = {_TAG + kind for kind in ("timestamp", "merge", "value", "int", "float")}
# Numbers of YAML 1.2 (10.3.2): YAML 1.1 would read 0012 as 10 and 1:30 as 90.
_INTEGER = re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z")
_FLOAT = re.compile(
    r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
)


def read_yaml(text: str | bytes, where: str) -> Any:
    """The value of one YAML document (None when it is empty).

    Beyond YAML's own rules these are refused: tags, which could ask for other types; anchors and aliases, a few of
    which can stand for billions of values; keys that stand twice; nesting deeper than 20. Numbers are those of YAML
    1.2; dates are text, and `<<` and `=` are names like others.

    Args:
        text: the document, in UTF-8 when it is bytes.
        where: file or source, for errors.

    Raises:
        ConfigError: one line with the place in the document.
    """
    try:
        return _StrictLoader(text.decode("utf-8") if isinstance(text, bytes) else text).get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    except (ValueError, OverflowError) as error:  # not UTF-8, a number of more than 4,300 digits, no character (\\U)
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


class _StrictLoader(yaml.SafeLoader):
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ComposerError(None, None, "anchors and aliases are refused; write the value out", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise ComposerError(None, None, f"the tag {shown(event.tag)} is refused; leave it out", event.start_mark)
        if self._depth == MAX_DEPTH:
            raise ComposerError(None, None, f"nested more than {MAX_DEPTH} deep", event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node in (key for key, _ in node.value if isinstance(key, ScalarNode)):  # the others are refused below
            if key_node.value in seen:
                raise ConstructorError(None, None, f"key {shown(key_node.value)} stands twice", key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


# The first that matches decides, and a float's pattern matches integers too.
_StrictLoader.add_implicit_resolver(_TAG + "int", _INTEGER, list("-+0123456789"))
_StrictLoader.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+.0123456789"))
_StrictLoader.add_constructor(_TAG + "int", _StrictLoader.construct_integer)
