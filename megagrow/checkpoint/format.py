"""What a checkpoint directory holds: `manifest.json`, its fields, and the rules that each keeps.

    step-N/  manifest.json     everything but the numbers: step, config, provenance, state, tables
             manifest.sha256   its digest, as `sha256sum --check` takes it
             __R_0.distcp      the items that rank R wrote, end to end; digests in the manifest
             .metadata         a pickle for torch's own tools; megagrow never reads it

The numbers are in the files of torch.distributed.checkpoint; an item is one box of one tensor.
"""

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from megagrow.checkpoint.shards import DTYPES
from megagrow.errors import CheckpointError, Damaged, shown
from megagrow.json_file import is_text, parse_object

FORMAT_VERSION = 2  # 1: model.bias in place of attention_bias and mlp_bias
MANIFEST = "manifest.json"
DIGEST = "manifest.sha256"

_MAX_NUM_DIMS = 8
_FILE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,255}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class TensorEntry:
    """Dtype by name (a key of `shards.DTYPES`) and global shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class FileEntry:
    """Size of a file; its digest unless it consists of items, which have their own."""

    num_bytes: int
    sha256: str | None


@dataclass(frozen=True)
class Item:
    """One box of one tensor, and the bytes of a file that hold it."""

    tensor: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's `manifest.json`; `parse` is the only way in, and checks every field."""

    step: int
    layout: dict[str, Any]
    config: dict[str, Any]
    provenance: dict[str, Any]
    state: dict[str, Any]
    tensors: dict[str, TensorEntry]
    files: dict[str, FileEntry]
    items: tuple[Item, ...]
    format_version: int = FORMAT_VERSION
    sha256: str = field(default="", compare=False)  # of the file this was read from

    @cached_property
    def items_of(self) -> dict[str, list[Item]]:
        """The items of every tensor."""
        items: dict[str, list[Item]] = {name: [] for name in self.tensors}
        for item in self.items:
            items[item.tensor].append(item)
        return items

    def to_bytes(self) -> bytes:
        """The text of `manifest.json`."""
        record = {
            "format_version": self.format_version,
            "step": self.step,
            "layout": self.layout,
            "config": self.config,
            "provenance": self.provenance,
            "state": self.state,
            "tensors": {name: vars(entry) for name, entry in sorted(self.tensors.items())},
            "files": {name: vars(entry) for name, entry in sorted(self.files.items())},
            "items": [vars(item) for item in self.items],
        }
        lines = [f'"{key}": {json.dumps(value, allow_nan=False)}' for key, value in record.items()]
        return ("{\n" + ",\n".join(lines) + "\n}\n").encode()

    @staticmethod
    def parse(raw: bytes, where: Path) -> "Manifest":
        """Reads the text of `manifest.json`.

        Raises:
            Damaged: names the file `where` and the field that breaks a rule.
            CheckpointError: another version of megagrow wrote it.
        """
        record = _Record(parse_object(raw, where, Damaged, "use an older checkpoint"), str(where))
        version = record.integer("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{where}: format_version is {version}{_other_version(version)}")
        manifest = Manifest(
            step=record.integer("step"),
            layout=record.object("layout"),
            config=record.object("config"),
            provenance=record.object("provenance"),
            state=record.object("state"),
            tensors={name: _tensor_entry(entry) for name, entry in record.entries("tensors")},
            files={name: _file_entry(name, entry) for name, entry in record.entries("files")},
            items=tuple(_item(entry) for entry in record.list_of_records("items")),
            sha256=hashlib.sha256(raw).hexdigest(),
        )
        _check_tables(manifest, record)
        return manifest


def _other_version(version: int) -> str:
    """What wrote a version that is not today's, and what to do with it."""
    if version == 1:
        return (
            f", of a megagrow that had model.bias for attention_bias and mlp_bias; this megagrow reads {FORMAT_VERSION}"
            "; convert it to a Hugging Face folder with the one that wrote it, which all read"
        )
    return f"; this megagrow reads {FORMAT_VERSION}; use the megagrow that wrote it"


def check_json(value: Any, where: str) -> None:
    """Refuses what JSON would lose or change: other types, keys that are no strings, NaN, infinity, text that is none.

    Raises:
        CheckpointError: names the place, `where` being the name of the whole.
    """
    if isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{where} has the key {key!r}; keys must be strings")
            if not is_text(key):
                raise CheckpointError(f"{where} has a key that holds half a surrogate pair, which is no text")
            check_json(entry, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            check_json(entry, f"{where}[{index}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise CheckpointError(f"{where} is {value}; JSON has finite numbers only, store null")
    elif isinstance(value, str) and not is_text(value):
        raise CheckpointError(f"{where} holds half a surrogate pair, which is no text")
    elif not isinstance(value, str | int | bool | None):
        raise CheckpointError(
            f"{where} is a {type(value).__name__}; only JSON values are stored, "
            "tensors belong in the tensors of the checkpoint"
        )


class _Record:
    """A JSON object that knows its place in the file, so that every refusal names it."""

    def __init__(self, fields: dict[str, Any], where: str) -> None:
        self.fields = fields
        self.where = where

    def refuse(self, key: str, problem: str) -> NoReturn:
        raise Damaged(f"{self.where}: {key} {problem}; use an older checkpoint")

    def value(self, key: str, kind: type) -> Any:
        if key not in self.fields:
            self.refuse(key, "is missing")
        value = self.fields[key]
        if type(value) is not kind:
            self.refuse(key, f"is of type {type(value).__name__}, must be {kind.__name__}")
        return value

    def integer(self, key: str) -> int:
        return self._not_negative(key, self.value(key, int))

    def integers(self, key: str) -> tuple[int, ...]:
        values = self.value(key, list)
        if len(values) > _MAX_NUM_DIMS:
            self.refuse(key, f"has {len(values)} entries, at most {_MAX_NUM_DIMS} are allowed")
        for value in values:
            if type(value) is not int:
                self.refuse(key, f"holds a {type(value).__name__}, must hold integers")
            self._not_negative(key, value)
        return tuple(values)

    def text(self, key: str) -> str:
        return self.value(key, str)

    def digest(self, key: str) -> str:
        value = self.text(key)
        if not _SHA256.fullmatch(value):
            self.refuse(key, "is no sha256 in hexadecimal")
        return value

    def object(self, key: str) -> dict[str, Any]:
        return self.value(key, dict)

    def entries(self, key: str) -> Iterable[tuple[str, "_Record"]]:
        for name, entry in self.object(key).items():
            yield name, self._child(f"{key}.{shown(name)}", entry)

    def list_of_records(self, key: str) -> Iterable["_Record"]:
        for index, entry in enumerate(self.value(key, list)):
            yield self._child(f"{key}[{index}]", entry)

    def _child(self, key: str, entry: Any) -> "_Record":
        if type(entry) is not dict:
            self.refuse(key, f"is of type {type(entry).__name__}, must be dict")
        return _Record(entry, f"{self.where}: {key}")

    def _not_negative(self, key: str, value: int) -> int:
        if not 0 <= value < 2**63:
            self.refuse(key, "is not between 0 and 2**63 - 1")
        return value


def _tensor_entry(record: _Record) -> TensorEntry:
    dtype, shape = record.text("dtype"), record.integers("shape")
    if dtype not in DTYPES:
        record.refuse("dtype", f"is {shown(dtype)}, must be one of {[*DTYPES]}")
    if 0 in shape:
        record.refuse("shape", f"is {list(shape)}, a tensor without elements")
    return TensorEntry(dtype, shape)


def _file_entry(name: str, record: _Record) -> FileEntry:
    if not _FILE_NAME.fullmatch(name) or name in (".", ".."):
        raise Damaged(
            f"{record.where}: a file name has letters, digits and . _ - only and stays in its "
            "directory; this checkpoint did not come from megagrow"
        )
    digest = None if record.fields.get("sha256") is None else record.digest("sha256")
    return FileEntry(record.integer("num_bytes"), digest)


def _item(record: _Record) -> Item:
    return Item(
        tensor=record.text("tensor"),
        offsets=record.integers("offsets"),
        sizes=record.integers("sizes"),
        file=record.text("file"),
        start=record.integer("start"),
        num_bytes=record.integer("num_bytes"),
        sha256=record.digest("sha256"),
    )


def _check_tables(manifest: Manifest, record: _Record) -> None:
    """The three tables agree: items lie inside tensors and files, and leave no gap in either."""
    places: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for index, item in enumerate(manifest.items):
        if problem := _item_problem(manifest, item):
            record.refuse(f"items[{index}]", problem)
        places[item.file].append((item.start, item.num_bytes))
    for name, tensor in manifest.tensors.items():
        items = manifest.items_of[name]
        if sum(math.prod(item.sizes) for item in items) != math.prod(tensor.shape):
            record.refuse(f"tensors.{shown(name)}", "is not covered by the items")
        if _overlap(items):
            record.refuse(f"tensors.{shown(name)}", "has items that overlap")
    for name, file in manifest.files.items():
        if file.sha256 is None and not _cover(places[name], file.num_bytes):
            record.refuse(f"files.{shown(name)}", "has neither a digest nor items without gap")


def _cover(spans: list[tuple[int, int]], num_bytes: int) -> bool:
    """Whether the spans (start, length) laid end to end make up exactly `num_bytes`."""
    end = 0
    for start, length in sorted(spans):
        if start != end:
            return False
        end += length
    return end == num_bytes


def _overlap(items: list[Item]) -> bool:
    """Whether an element lies in two of the boxes: a sweep over the dim that is cut most, pairwise where it stands."""
    if not items[0].offsets:
        return len(items) > 1  # a scalar
    dim = max(range(len(items[0].offsets)), key=lambda dim: len({item.offsets[dim] for item in items}))
    active: list[Item] = []
    for item in sorted(items, key=lambda item: item.offsets[dim]):
        active = [other for other in active if other.offsets[dim] + other.sizes[dim] > item.offsets[dim]]
        if any(_meet(item, other) for other in active):
            return True
        active.append(item)
    return False


def _meet(one: Item, other: Item) -> bool:
    dims = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    return all(a < b + b_size and b < a + a_size for a, a_size, b, b_size in dims)


def _item_problem(manifest: Manifest, item: Item) -> str | None:
    tensor, file = manifest.tensors.get(item.tensor), manifest.files.get(item.file)
    if tensor is None:
        return f"belongs to tensor {shown(item.tensor)}, which is not in the table"
    if file is None:
        return f"lies in file {shown(item.file)}, which is not in the table"
    if not len(item.offsets) == len(item.sizes) == len(tensor.shape):
        return "has another number of dims than its tensor"
    bounds = zip(item.offsets, item.sizes, tensor.shape, strict=True)
    if any(size == 0 or offset + size > bound for offset, size, bound in bounds):
        return "is empty or reaches beyond its tensor"
    if item.start + item.num_bytes > file.num_bytes:
        return "reaches beyond its file"
    if item.num_bytes < math.prod(item.sizes) * DTYPES[tensor.dtype].itemsize:
        return "has fewer bytes than its numbers need"
    return None
