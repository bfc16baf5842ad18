"""The files of a dataset PREFIX, and what must not stand under their names before they are written."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from megagrow.data.description import BEGINNING, describe, description_path
from megagrow.data.files import os_errors_as_data_errors
from megagrow.errors import ConfigError, DataError

MAGIC = b"MMIDIDX\x00\x00"  # with which an index begins
DOMAINS = "domains"  # the tensor in the file of domains
_RENAME = "give the output another name"
_BESIDE = (".lengths.tmp", ".journal.tmp")  # of preprocessing


def index_path(prefix: str | Path) -> Path:
    """PREFIX.idx"""
    return Path(f"{prefix}.idx")


def tokens_path(prefix: str | Path) -> Path:
    """PREFIX.bin"""
    return Path(f"{prefix}.bin")


def domains_path(prefix: str | Path) -> Path:
    """PREFIX.domains.safetensors"""
    return Path(f"{prefix}.domains.safetensors")


def files_of(prefix: str | Path) -> list[Path]:
    """All that a dataset can have, in the order in which they are to appear: the index last."""
    return [tokens_path(prefix), description_path(prefix), domains_path(prefix), index_path(prefix)]


def temporary(path: Path) -> Path:
    """The name of a file that is being written."""
    return path.with_name(path.name + ".tmp")


def check_output(prefix: str | Path, inputs: Sequence[str | Path] = ()) -> None:
    """Makes sure that writing PREFIX replaces nothing but an earlier dataset of that name.

    Raises:
        ConfigError: one of the inputs would be written over.
        DataError: under one of the names stands a file of another kind.
    """
    for path in _written(prefix):
        for given in inputs:
            if _is_same(path, given):
                raise ConfigError(f"{given} is an input, and writing {prefix} would replace it; {_RENAME}")
    checks: dict[Path, tuple[Callable[[Path], bool], str]] = {
        index_path(prefix): (_is_index, "is not a Megatron index"),
        tokens_path(prefix): (_has_index, "stands there without an index"),
        description_path(prefix): (_is_description, "is not the description of a dataset"),
        domains_path(prefix): (_is_domains, "holds no domains"),
    }
    for path, (is_ours, problem) in checks.items():
        if path.exists() and not is_ours(path):
            raise DataError(f"{path}: {problem}, and would be replaced; move it away, or {_RENAME}")


def _written(prefix: str | Path) -> Iterator[Path]:
    for path in files_of(prefix):
        yield path
        yield temporary(path)
    yield from (Path(f"{prefix}{suffix}") for suffix in _BESIDE)


def _is_same(path: Path, given: str | Path) -> bool:
    if os.path.realpath(path) == os.path.realpath(given):
        return True
    return path.exists() and os.path.exists(given) and os.path.samefile(path, given)


def _is_index(path: Path) -> bool:
    if not path.is_file():
        return False
    with os_errors_as_data_errors(path), open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _has_index(path: Path) -> bool:
    """The index of a commit that was killed has its temporary name still."""
    index = path.with_suffix(".idx")
    return index.exists() or temporary(index).exists()


def _is_description(path: Path) -> bool:
    """A damaged one too, by its first field: it is written again."""
    try:
        with open(path, "rb") as file:
            if file.read(len(BEGINNING)) == BEGINNING:
                return True
        describe(str(path).removesuffix(".json"))
    except (DataError, OSError):
        return False
    return True


def _is_domains(path: Path) -> bool:
    try:
        with safe_open(str(path), framework="numpy") as file:
            return DOMAINS in set(file.keys())
    except (SafetensorError, OSError):
        return False
