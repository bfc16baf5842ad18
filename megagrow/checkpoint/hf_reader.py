"""Reads a Hugging Face folder tensor by tensor, under megagrow's parameter names.

Nothing in the folder is trusted: every name, shape and dtype is checked before the first tensor is
read, files outside the folder cannot be named, and nothing is executed or unpickled.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megagrow.checkpoint.hf_config import (
    CONFIG_FILE,
    GENERATION_FILE,
    model_config_from_hf,
    read_json,
    special_token_ids,
)
from megagrow.checkpoint.hf_families import FAMILIES
from megagrow.checkpoint.hf_family import Family
from megagrow.checkpoint.hf_tensors import (
    Place,
    block_of_heads,
    expected_tensors,
    fuse,
    places,
    unexpected_tensors,
)
from megagrow.checkpoint.hf_windows import check_windows
from megagrow.checkpoint.remote import as_path, remote
from megagrow.checkpoint.safetensors_file import DTYPE_NAMES
from megagrow.config import ModelConfig
from megagrow.errors import CheckpointError, named, shown
from megagrow.roles import role_of

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
DTYPES_OF_NAMES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_COMPARED_ROWS = 4096  # of a tied head at a time


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: what the file's header says about it."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


class HFReader:
    """The model in a Hugging Face folder.

    Attributes:
        folder: the folder.
        model: its configuration.
        token_ids: the special token ids that generation_config.json states, else config.json.
        window: tokens that some layer's attention is bounded to, no less than the stated context; None: all are seen.
        files: those that hold its tensors.
        dropped: tensors that the model has no place for, and that its logits do not depend on.

    Raises:
        CheckpointError: a file or tensor is missing, malformed, unexpected or of the wrong shape or
            dtype, or config.json describes a model that megagrow cannot hold; the message names it.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        _check_no_adapter(self.folder)
        entries = read_json(self.folder / CONFIG_FILE)
        self.model = model_config_from_hf(self.folder)
        self.token_ids = _special_token_ids(self.folder, entries)
        self._family = FAMILIES[self.model.family]
        sizes = self.model.num_layers, self.model.max_seq_length
        self.window = check_windows(entries, self._family, *sizes, str(self.folder / CONFIG_FILE))
        catalog = _catalog(self.folder)
        self.files = sorted({stored.file for stored in catalog.values()})
        self._stored = _with_body(_renamed(catalog, self._family), self._family)
        self.dropped = self._take_extras() + self._take_copies()
        self._tied_head = self._take_tied_head()
        _check_tensors(self._stored, self._family, self.model, self.folder)

    def fetch(self, name: str) -> Tensor:
        """One whole parameter, in its stored dtype, on the CPU.

        Args:
            name: a parameter of `roles.parameter_names(self.model)`.

        Raises:
            CheckpointError: the file changed since it was opened, or a head that config.json calls
                tied differs from the embedding.
        """
        if name == "embedding.tokens" and self._tied_head is not None:
            self._compare_tied_head(self._tied_head)
        self.dtype_of(name)
        pieces = [self._read(place) for place in places(self._family, name)]
        return fuse(pieces, role_of(name), self.model)

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype that one parameter is stored in.

        Raises:
            CheckpointError: its parts are stored in several.
        """
        parts = [place.tensor for place in places(self._family, name)]
        dtypes = {DTYPES_OF_NAMES[self._stored[part].dtype] for part in parts}
        if len(dtypes) > 1:
            found = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise CheckpointError(
                f"{self.folder}: {', '.join(parts)} are stored as {found}; megagrow keeps them "
                "in one tensor, so store them in one dtype"
            )
        return dtypes.pop()

    def _read(self, place: Place) -> Tensor:
        stored = self._stored[place.tensor]
        with _open(stored.file) as file:
            if place.of == 1:
                whole: Tensor = file.get_tensor(stored.key)
                return whole.T if place.transposed else whole
            if place.by_head:
                return block_of_heads(file.get_tensor(stored.key), place, self.model.head_dim)
            size = stored.shape[place.out_dim] // place.of
            block = slice(place.index * size, (place.index + 1) * size)
            view = file.get_slice(stored.key)
            return view[:, block].T if place.transposed else view[block]

    def _take_extras(self) -> list[str]:
        """Takes known parameters that the model does without off the catalog; returns their names."""
        extras = [name for name in self._stored if re.fullmatch(self._family.extras, name)]
        for name in extras:
            del self._stored[name]
        return extras

    def _take_copies(self) -> list[str]:
        """Takes repeated tensors off the catalog; returns the names of those that nothing reads.

        With a head of its own transformers computes with the copy, whatever the original holds. (Its folders of version
        5 hold both, and they may differ.)
        """
        unread = []
        for copy, original in self._family.copies.items():
            first, second = self._stored.get(original), self._stored.pop(copy, None)
            if second is None:
                continue
            if first is not None and not _are_equal(first, second):
                if self.model.tied_embeddings:
                    raise CheckpointError(
                        f"{self.folder}: tie_word_embeddings=true, but {second.key} differs from {first.key}; set "
                        f"tie_word_embeddings=false in {CONFIG_FILE}"
                    )
                unread.append(original)
            self._stored[original] = second
        return unread

    def _take_tied_head(self) -> Stored | None:
        """Takes the head of a tied model off the catalog, or into the embedding's empty place."""
        if not self.model.tied_embeddings:
            return None
        outside = self._family.outside
        embedding, head = f"{outside['embedding.tokens']}.weight", f"{outside['head']}.weight"
        stored = self._stored.pop(head, None)
        if stored is not None and embedding not in self._stored:
            self._stored[embedding] = stored
            return None
        return stored

    def _compare_tied_head(self, head: Stored) -> None:
        tokens = self._stored[f"{self._family.outside['embedding.tokens']}.weight"]
        if not _are_equal(head, tokens):
            raise CheckpointError(
                f"{self.folder}: tie_word_embeddings=true, but {head.key} differs from "
                f"{tokens.key}; set tie_word_embeddings=false in {CONFIG_FILE}"
            )


def is_hf_folder(path: Path | str) -> bool:
    """Whether a folder looks like a Hugging Face model: its config.json states a model type.

    A folder with unreadable config.json counts when Hugging Face's weight files are there, so that
    reading it can say what is wrong. Remote folders are read as own checkpoints only.
    """
    path = as_path(path)
    if remote(path) is not None:
        return False
    if not (path / CONFIG_FILE).is_file():
        return False
    try:
        return "model_type" in read_json(path / CONFIG_FILE)
    except CheckpointError:
        return any((path / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE))


def _special_token_ids(folder: Path, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Text ends at those of generation_config.json, of which chat models have more than config.json says."""
    stated = special_token_ids(entries, str(folder / CONFIG_FILE))
    path = folder / GENERATION_FILE
    return stated | (special_token_ids(read_json(path), str(path)) if path.is_file() else {})


def _check_no_adapter(folder: Path) -> None:
    """transformers adds an adapter that lies beside the weights to them, where peft is installed."""
    if (folder / ADAPTER_FILE).exists():
        raise CheckpointError(
            f"{folder / ADAPTER_FILE}: an adapter, which would be left out; merge it into the weights "
            "(peft's merge_and_unload, then save_pretrained), or remove the file to read the weights without it"
        )


def _are_equal(one: Stored, other: Stored) -> bool:
    """Whether two tensors hold the same, compared some rows at a time."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    if not one.shape:  # no parameter is a single number: left to the check of shapes
        return True
    with _open(one.file) as one_file, _open(other.file) as other_file:
        one_rows, other_rows = one_file.get_slice(one.key), other_file.get_slice(other.key)
        return all(
            torch.equal(one_rows[start : start + _COMPARED_ROWS], other_rows[start : start + _COMPARED_ROWS])
            for start in range(0, one.shape[0], _COMPARED_ROWS)
        )


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """A safetensors file; whatever is wrong with it becomes a CheckpointError.

    Opened anew for each tensor: closing it unmaps the pages that have been read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"{path}: cannot be read ({reason}); restore the file") from None
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: damaged or not a safetensors file ({shown(str(error))}); restore the file"
        ) from None


def _catalog(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder, as the headers of its files describe it."""
    stored: dict[str, Stored] = {}
    index = _index(folder)
    for path in [folder / name for name in sorted(set(index.values()))] or [folder / WEIGHTS_FILE]:
        with _open(path) as file:
            for key in file.keys():  # noqa: SIM118 - the file is no mapping
                if key in stored:
                    raise CheckpointError(
                        f"{path}: tensor {named(key)} stands in {stored[key].file.name} too; remove one"
                    )
                header = file.get_slice(key)
                stored[key] = Stored(path, key, tuple(header.get_shape()), header.get_dtype())
    for key, name in index.items():
        if key not in stored or stored[key].file.name != name:
            raise CheckpointError(
                f"{folder / name}: tensor {named(key)} is missing, though {INDEX_FILE} places it there; "
                "restore the file"
            )
    return stored


def _index(folder: Path) -> dict[str, str]:
    """Tensor -> file name of a sharded folder; empty when one file holds everything."""
    if (folder / WEIGHTS_FILE).is_file():
        return {}
    path = folder / INDEX_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: holds neither {WEIGHTS_FILE} nor {INDEX_FILE}; save the model with "
            "save_pretrained, which writes safetensors"
        )
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map must name tensors and files; restore the file")
    for key, name in weight_map.items():
        if not isinstance(name, str) or not _is_plain_name(name):
            raise CheckpointError(
                f"{path}: weight_map places {named(key)} in {shown(name)}; it must be the plain name of a "
                ".safetensors file of the folder"
            )
    return weight_map


def _is_plain_name(name: str) -> bool:
    has_separator = any(sign in name for sign in ("/", "\\", "\0"))
    return name.endswith(".safetensors") and not has_separator and name.isprintable() and len(name) <= 255


def _renamed(stored: Mapping[str, Stored], family: Family) -> dict[str, Stored]:
    """The catalog with the names of today where an old version wrote others."""
    renamed: dict[str, Stored] = {}
    for key, entry in stored.items():
        old = next((end for end in family.renamed if key.endswith(end)), "")
        name = key.removesuffix(old) + family.renamed[old] if old else key
        if name in renamed:
            raise CheckpointError(
                f"{entry.file}: {named(renamed[name].key)} and {named(key)} are the same tensor; remove one"
            )
        renamed[name] = entry
    return renamed


def _with_body(stored: Mapping[str, Stored], family: Family) -> dict[str, Stored]:
    """The catalog under full names; a folder saved without its head lacks the body's prefix."""
    if any(name.startswith(family.body) for name in stored):
        return dict(stored)
    headless = f"{family.outside['head']}."
    return {name if name.startswith(headless) else family.body + name: entry for name, entry in stored.items()}


def _check_tensors(stored: Mapping[str, Stored], family: Family, model: ModelConfig, folder: Path) -> None:
    if model.num_layers > len(stored):
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: {family.entries['num_layers'].key}={model.num_layers}, but "
            f"the folder holds only {len(stored)} tensors; restore the file"
        )
    for name, shape in expected_tensors(family, model):
        if name not in stored:
            raise CheckpointError(
                f"{folder}: tensor {name} is missing; restore the weights that belong to {CONFIG_FILE}"
            )
        entry = stored[name]
        if entry.shape != shape:
            raise CheckpointError(
                f"{entry.file}: tensor {named(entry.key)} has shape {list(entry.shape)}, {CONFIG_FILE} "
                f"asks for {list(shape)}; restore the one that belongs to the other"
            )
        if entry.dtype not in DTYPE_NAMES.values():
            raise CheckpointError(
                f"{entry.file}: tensor {named(entry.key)} is stored as {entry.dtype}; use an unquantized "
                f"model, in {', '.join(DTYPE_NAMES.values())}"
            )
    unexpected = unexpected_tensors(stored, family, model)
    if unexpected:
        raise CheckpointError(
            f"{stored[unexpected[0]].file}: tensor {named(stored[unexpected[0]].key)} has no place in the "
            f"model that {CONFIG_FILE} describes, and would be lost; use a folder without it"
        )
