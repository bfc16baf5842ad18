"""What the table of a Hugging Face model family says: how config.json and the tensors read in our terms.

hf_config.py, hf_rope.py and hf_tensors.py read the tables in both directions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megagrow.config import ModelConfig


@dataclass(frozen=True)
class Entry:
    """Where config.json holds a field of `ModelConfig`.

    Attributes:
        key: name in config.json.
        default: what transformers assumes when the key is absent or null; a function of the fields
            above it where it depends on them; None: the key is required.
        added: what config.json's number is larger by than ours, a function of the fields above it; None: nothing.
    """

    key: str
    default: int | float | Callable[[Mapping[str, Any]], int] | None = None
    added: Callable[[Mapping[str, Any]], int] | None = None

    def difference(self, fields: Mapping[str, Any]) -> int:
        """What config.json's number is larger by than ours."""
        return self.added(fields) if self.added else 0


@dataclass(frozen=True)
class Switch:
    """What an entry that is true or false says of a field of `ModelConfig`.

    Attributes:
        field: of `ModelConfig`.
        off, on: its values.
        default: what transformers assumes when the key is absent or null.
    """

    field: str
    off: Any
    on: Any
    default: bool = False


@dataclass(frozen=True)
class Rope:
    """Where config.json held rotary settings before `rope_parameters` took them all.

    Attributes:
        theta: key of the base.
        fraction: key of the share of each head's dimensions that is rotated; "": all of them are.
        default_fraction: what transformers assumes when that is absent or null.
    """

    theta: str = "rope_theta"
    fraction: str = ""
    default_fraction: float = 1.0


@dataclass(frozen=True)
class Block:
    """Where one part of a parameter lies: block `index` of `of` equal ones along the out dim.

    `by_head`: of each head apart, so that the rows are laid out (head, block, element).
    """

    module: str
    index: int = 0
    of: int = 1
    by_head: bool = False


@dataclass(frozen=True)
class Family:
    """A model type of transformers.

    Attributes:
        model_type: `model_type` in config.json, `family` in `ModelConfig`.
        architecture: the class that transformers builds.
        entries: field of `ModelConfig` -> entry of config.json.
        kind: fields of `ModelConfig` that the family fixes, functions of the model where they
            follow from other fields.
        switches: entries that are true or false -> what they say.
        activation: the entry that names the MLP's activation, and its values for each of ours; the first is written,
            and that of the first activation assumed where the key is absent or null.
        only: entries of which no other values are understood. The first is written, and assumed
            where the key is absent or null.
        constants: entries that are written and not read, because they leave the logits alone;
            functions of the model where they follow from it.
            Dropout is one of them: it acts in training only.
        body: prefix that the tensors of a folder saved without its head do not have.
        layers: prefix of a layer's modules, before its number.
        outside: module of ours -> full name of theirs, outside the layers.
        inside: module of ours -> where its parts (`Role.parts`) lie in theirs, in every layer.
        transposed: whether the matrices inside the layers are stored in x out.
        ignored: pattern of tensor names that hold no parameters.
        rope: where the rotary settings are; None: positions are not rotations.
        window: whether attention may be bounded to the last tokens: never; in all layers, by the entry
            `sliding_window`; or in the layers that further entries choose, as in Qwen2.
        names: parameter of ours -> full name of their tensor, where it does not follow from the module's.
        copies: tensor -> the one that it repeats. It is written where the head is untied: transformers then computes
            with it.
        extras: pattern of parameters that the logits do not depend on; they are dropped, and named.
        renamed: ends of tensor names in old folders -> what they are now.
    """

    model_type: str
    architecture: str
    entries: Mapping[str, Entry]
    kind: Mapping[str, Any]
    switches: Mapping[str, Switch]
    activation: tuple[str, Mapping[str, tuple[str, ...]]]
    only: Mapping[str, tuple[Any, ...]]
    constants: Mapping[str, Any]
    body: str
    layers: str
    outside: Mapping[str, str]
    inside: Mapping[str, tuple[Block, ...]]
    transposed: bool
    ignored: str
    rope: Rope | None = None
    window: Literal["never", "all_layers", "some_layers"] = "never"
    names: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    extras: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)


def fixed_fields(family: Family, model: ModelConfig) -> dict[str, Any]:
    """The values that the family's models have in the fields of `Family.kind`."""
    return {name: value(model) if callable(value) else value for name, value in family.kind.items()}
