"""Files of learned maps: saved, read back, described."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megagrow.config import ModelConfig
from megagrow.config_file import from_dict, to_dict
from megagrow.data.files import write_atomically
from megagrow.errors import CheckpointError, ConfigError, named, shown
from megagrow.growth.ligo import Ligo, check_shapes
from megagrow.growth.ligo_maps import Variant, map_shapes, start_recipe
from megagrow.json_file import parse_object

LARGEST_VOCABULARY = 1 << 24  # far above any tokenizer's: a vocabulary that grows takes some bytes for each token
REMEDY = "give a file that was saved after learning"


@dataclass(frozen=True)
class MapFacts:
    """One learned map in numbers.

    Attributes:
        name, shape: as in the file.
        row_sums: smallest and largest.
        departure: the entry that has moved farthest from its initial value.
        effective_rank: exp of the entropy of the singular values' shares, from 1 to the smaller size (Roy & Vetterli,
            2007, *The effective rank*).
    """

    name: str
    shape: tuple[int, ...]
    row_sums: tuple[float, float]
    departure: float
    effective_rank: float


def save_maps(ligo: Ligo, path: Path | str, state: Mapping[str, Tensor] | None = None) -> None:
    """Writes maps to a safetensors file that names the two models and how the maps began; it is whole or absent.

    Args:
        ligo: the maps.
        path: of the file.
        state: the maps of all ranks (`Ligo.gathered`); None: this process holds all.
    """
    begun = {"variant": ligo.variant, "init": ligo.start.method, "noise": ligo.noise, "seed": ligo.start.seed}
    models = {"source": to_dict(ligo.start.source), "target": to_dict(ligo.start.target)}
    metadata = {**{name: json.dumps(model) for name, model in models.items()}, "maps": json.dumps(begun)}
    tensors = {name: tensor.contiguous() for name, tensor in (state or ligo.state_dict()).items()}
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def load_maps(path: Path | str, device: torch.device | str = "cpu") -> Ligo:
    """Reads what `save_maps` wrote.

    Raises:
        CheckpointError: the file is missing, damaged, of an older version, or holds something else.
    """
    ligo, state = _read(path, device)
    ligo.load_state_dict(state, str(path))
    return ligo


def describe_maps(path: Path | str) -> tuple[Ligo, list[MapFacts]]:
    """The maps of a file, and each in numbers.

    Raises:
        CheckpointError: see `load_maps`.
    """
    ligo, state = _read(path, "cpu")
    initial = {name: tensor.double().clone() for name, tensor in ligo.state_dict().items()}
    ligo.load_state_dict(state, str(path))
    return ligo, [_facts(name, tensor.double(), initial[name]) for name, tensor in ligo.state_dict().items()]


def _read(path: Path | str, device: torch.device | str) -> tuple[Ligo, dict[str, Tensor]]:
    """The maps as they began, and those of the file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        texts = [metadata[key].encode() for key in ("source", "target")]
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"{path}: is no file of learned maps ({shown(str(error))}); {REMEDY}") from None
    source, target = (_stored_model(text, path) for text in texts)
    _check_sizes(source, target, state, path)
    begun = _begun(metadata, path)
    try:
        start = start_recipe(begun["init"], source, target, begun["seed"])
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    check_shapes(map_shapes(start, begun["variant"]), state, str(path))
    dtype = next(iter(state.values())).dtype
    return Ligo(start, begun["noise"], device, dtype, begun["variant"]), state


def _begun(metadata: Mapping[str, str], path: Path | str) -> dict[str, Any]:
    """How the maps began, checked."""
    if "maps" not in metadata:
        raise CheckpointError(
            f"{path}: was saved by an older version, which did not note the variant of LiGO; learn the maps again"
        )
    begun = parse_object(metadata["maps"].encode(), path, CheckpointError, REMEDY)
    rules = {
        "variant": lambda v: v in get_args(Variant),
        "init": lambda v: isinstance(v, str),
        "noise": lambda v: type(v) in (int, float) and 0 <= v < math.inf,
        "seed": lambda v: type(v) is int and 0 <= v < 2**63,
    }
    odd = [name for name, holds in rules.items() if name not in begun or not holds(begun[name])]
    if odd or set(begun) != set(rules):
        name = odd[0] if odd else min(set(begun) - set(rules))
        raise CheckpointError(f"{path}: metadata maps.{named(name)} is {shown(begun.get(name))}; {REMEDY}")
    return begun


def _stored_model(text: bytes, path: Path | str) -> ModelConfig:
    try:
        return from_dict(parse_object(text, path, CheckpointError, REMEDY), ModelConfig, str(path))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def _check_sizes(source: ModelConfig, target: ModelConfig, state: Mapping[str, Tensor], path: Path | str) -> None:
    """Raises CheckpointError when the file cannot hold maps between such models: building them takes that memory."""
    num_elements = sum(tensor.numel() for tensor in state.values())
    for name in ("num_layers", "hidden_size", "ffn_size", "num_heads", "num_kv_heads"):
        old, new = getattr(source, name), getattr(target, name)
        learned = old * new if name == "num_layers" else old * (new - old)
        if learned > num_elements:
            raise CheckpointError(
                f"{path}: {name} grows from {old} to {new}, but the file holds {num_elements} numbers; {REMEDY}"
            )
    if source.vocab_size != target.vocab_size > LARGEST_VOCABULARY:
        raise CheckpointError(
            f"{path}: vocab_size grows from {source.vocab_size} to {target.vocab_size}; no tokenizer has that; {REMEDY}"
        )
    odd = [name for name, tensor in state.items() if not tensor.is_floating_point()]
    if odd:
        raise CheckpointError(f"{path}: {shown(odd[0])} is {state[odd[0]].dtype}, no floating point; {REMEDY}")


def _facts(name: str, tensor: Tensor, initial: Tensor) -> MapFacts:
    rows = tensor.flatten(0, -2) if tensor.ndim > 1 else tensor[:, None]
    sums, departure = rows.sum(1), (tensor - initial).abs().max().item()
    shares = torch.linalg.svdvals(rows)
    shares = shares / shares.sum()
    rank = torch.special.entr(shares).sum().exp().item()
    return MapFacts(name, tuple(tensor.shape), (sums.min().item(), sums.max().item()), departure, rank)
