"""Writes a complete Hugging Face folder: config, weights, tokenizer; all of it or nothing."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagrow.checkpoint.hf_config import CONFIG_FILE, GENERATION_FILE, check_exportable, hf_config_from_model
from megagrow.checkpoint.hf_families import FAMILIES
from megagrow.checkpoint.hf_reader import INDEX_FILE, WEIGHTS_FILE, is_hf_folder
from megagrow.checkpoint.hf_tensors import FamilyTensors, written_tensors
from megagrow.checkpoint.safetensors_file import SafetensorsFile
from megagrow.checkpoint.staged import StagedFolder, cannot_be_written, check_free
from megagrow.config import ModelConfig
from megagrow.data.mlm import check_positions
from megagrow.data.tokenizer import Tokenizer, load_tokenizer
from megagrow.errors import CheckpointError, MegagrowError
from megagrow.roles import num_parameters, parameter_names

SHARD_BYTES = 5 * 10**9
_ASSUMED_ITEM_BYTES = 4  # where only the tensors themselves will tell


def write_hf_folder(
    folder: Path | str,
    model: ModelConfig,
    fetch: Callable[[str], Tensor],
    tokenizer_source: Path | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    token_ids: Mapping[str, Any] | None = None,
    is_writer: bool = True,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Exports a model in the layout of transformers' `save_pretrained`.

    No more than one parameter is in memory at a time. On several ranks all of them call this, and
    every rank fetches every parameter in the same order, so that `fetch` may be a collective. What
    goes wrong in writing is raised after the last fetch: no rank is left waiting in one.

    Args:
        folder: must not exist or be empty, unless `overwrite` is set.
        fetch: gives the whole parameter of a name; only the writer uses what it returns.
        tokenizer_source: what `load_tokenizer` takes; None: no tokenizer files.
        dtype: of the stored weights; None: as fetched.
        token_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`; None: as the tokenizer says.
        is_writer: whether this rank writes; exactly one does.
        overwrite: replace the Hugging Face folder that is there.
        shard_bytes: weights beyond this size are cut into files of at most this size.

    Raises:
        ConfigError: the model's family cannot express it (on all ranks, before the first fetch), or its positions do
            not go with the tokenizer (`mlm.check_positions`).
        CheckpointError: the folder is taken or cannot be written.
        DataError: the tokenizer cannot be read.
    """
    check_exportable(model)
    output = _Folder(Path(folder), model, dtype, shard_bytes, overwrite)
    attempt = _Attempt(is_writer)
    try:
        attempt(output.start, tokenizer_source, token_ids)
        for name in parameter_names(model):
            attempt(output.add, name, fetch(name))
        attempt(output.publish)
    finally:
        output.discard()
    if isinstance(attempt.error, OSError):
        raise cannot_be_written(folder, attempt.error) from attempt.error
    if attempt.error is not None:
        raise attempt.error


def check_target(folder: Path, overwrite: bool = False) -> None:
    """Raises CheckpointError unless an export may be written to `folder`.

    Args:
        overwrite: a Hugging Face folder may be there; nothing else is ever replaced.
    """
    if not overwrite or not is_hf_folder(folder):
        check_free(folder)


class _Attempt:
    """Runs one step after another until one fails; later steps are left out, the error is kept."""

    def __init__(self, active: bool) -> None:
        self._active = active
        self.error: Exception | None = None

    def __call__(self, step: Callable[..., None], *args: Any) -> None:
        if self._active and self.error is None:
            try:
                step(*args)
            except (OSError, MegagrowError) as error:
                self.error = error


class _Folder:
    """A Hugging Face folder being written."""

    def __init__(
        self, path: Path, model: ModelConfig, dtype: torch.dtype | None, shard_bytes: int, overwrite: bool
    ) -> None:
        self._folder, self._model, self._dtype = StagedFolder(path, overwrite), model, dtype
        self._tensors = FamilyTensors(FAMILIES[model.family], model)
        item_bytes = dtype.itemsize if dtype else _ASSUMED_ITEM_BYTES
        self._files = _plan_files(model, shard_bytes // item_bytes)
        self._file_of = {name: file for file, names in self._files.items() for name in names}
        self._open: dict[str, SafetensorsFile] = {}
        self._dtypes: set[torch.dtype] = set()
        self._num_bytes = 0
        self._token_ids: dict[str, Any] = {}

    def start(self, tokenizer_source: Path | str | None, token_ids: Mapping[str, Any] | None) -> None:
        check_target(self._folder.path, self._folder.overwrite)
        tokenizer = load_tokenizer(tokenizer_source) if tokenizer_source else None
        _check_tokenizer(tokenizer, self._model)
        check_positions(self._model, tokenizer)
        self._folder.start()
        if tokenizer is not None:
            tokenizer.save(self._folder.temporary)
            self._token_ids = {"eos_token_id": tokenizer.eod_id, "pad_token_id": tokenizer.pad_id}
        if token_ids is not None:
            self._token_ids = dict(token_ids)

    def add(self, name: str, parameter: Tensor) -> None:
        for tensor_name, tensor in self._tensors.completed_by(name, parameter.detach()):
            self._write(tensor_name, tensor if self._dtype is None else tensor.to(self._dtype))

    def _write(self, name: str, tensor: Tensor) -> None:
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = SafetensorsFile(self._folder.temporary / file, self._files[file])
        self._open[file].add(name, tensor)
        self._dtypes.add(tensor.dtype)
        self._num_bytes += tensor.nbytes

    def publish(self) -> None:
        """Completes the folder and gives it its name."""
        config = hf_config_from_model(self._model, dtype=_common_dtype(self._dtypes), token_ids=self._token_ids)
        _write_json(self._folder.temporary / CONFIG_FILE, config)
        if self._model.is_causal:
            _write_json(self._folder.temporary / GENERATION_FILE, self._generation_config())
        if len(self._files) > 1:
            _write_json(self._folder.temporary / INDEX_FILE, self._index())
        self._folder.publish()

    def discard(self) -> None:
        """Removes what was not published; never fails."""
        for file in self._open.values():
            file.close()
        self._folder.discard()

    def _generation_config(self) -> dict[str, Any]:
        stated = {name: value for name, value in self._token_ids.items() if value is not None}
        return {"_from_model_config": True, **stated}

    def _index(self) -> dict[str, Any]:
        totals = {
            "total_parameters": num_parameters(self._model),
            "total_size": self._num_bytes,
        }
        return {"metadata": totals, "weight_map": dict(sorted(self._file_of.items()))}


def _plan_files(model: ModelConfig, limit: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """File name -> shapes of its tensors; a file has at most `limit` elements, or one tensor."""
    files: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in written_tensors(FAMILIES[model.family], model):
        size = torch.Size(shape).numel()
        if files[-1] and held + size > limit:
            files.append({})
            held = 0
        files[-1][name] = shape
        held += size
    if len(files) == 1:
        return {WEIGHTS_FILE: files[0]}
    stem = WEIGHTS_FILE.removesuffix(".safetensors")
    return {
        f"{stem}-{number:05}-of-{len(files):05}.safetensors": tensors for number, tensors in enumerate(files, start=1)
    }


def _check_tokenizer(tokenizer: Tokenizer | None, model: ModelConfig) -> None:
    if tokenizer is not None and tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, more than "
            f"model.vocab_size={model.vocab_size}; give the tokenizer of the model's data"
        )


def _common_dtype(dtypes: set[torch.dtype]) -> torch.dtype:
    """The dtype that holds all of the stored ones: what readers convert the whole model to."""
    first, *rest = dtypes
    for dtype in rest:
        first = torch.promote_types(first, dtype)
    return first


def _write_json(path: Path, entries: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
