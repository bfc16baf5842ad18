"""LiGO: growth by dense linear maps that are learned on the ordinary loss, tied over layers.

One learning step, outside the pipeline and in any layout:

    generate     every rank writes its target shards from the frozen source and the maps
    train step   the ordinary forward and backward passes leave gradients in the ordinary sharded parameters
    pull_back    one vector-Jacobian product takes the shards' gradients to the maps; all ranks' shares are summed
    update       AdamW on the maps, the same on every rank

The target needs gradients but no moments, so learning needs less memory than training.

Source: Wang et al., 2023 (arXiv 2303.00980), Algorithm 1. docs/ligo.md names each departure.
"""

# Shape suffix legend: T = target elements, S = source elements of an axis; L2, L1 = target, source layers.

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.functional import one_hot

from megagrow.config import ModelConfig
from megagrow.config_file import from_dict, to_dict
from megagrow.data.files import write_atomically
from megagrow.errors import CheckpointError, ConfigError, shown
from megagrow.growth.grow import Fetch, grow_into, mixed_sources
from megagrow.growth.maps import AxisMap, DenseMap, LayerMap, LayerMix, SparseMap, first_copies
from megagrow.growth.methods import make_recipe
from megagrow.growth.operator import grow_box
from megagrow.growth.recipe import Recipe
from megagrow.json_file import parse_object
from megagrow.model.transformer import name_seed
from megagrow.parallel.collectives import sum_over
from megagrow.parallel.mesh import Mesh
from megagrow.parallel.shards import box, counted_here, local
from megagrow.roles import TIED_EMBEDDING, leaves

DEPTH_NOISE = 0.03  # upper end of the authors' noise on layer weights (their `stackbert_noisy`)


class Ligo:
    """Dense maps, equal on all ranks, that start as the copies of a recipe.

    Args:
        start: a recipe that copies. Its scales stay; its copies become matrices that learn.
        noise: breaks the symmetry of copies: standard deviation of the entries of rows that are no first copies, times
            √(source size). 0 starts exactly at the recipe, in depth too.
        seed: initial maps depend on (seed, map name) only.
        device, dtype: of the maps, and of the arithmetic.

    Attributes:
        maps: map name -> [T, S], for every axis that grows.
        depth: leaf of a layer -> [L2, L1] layer weights; weights and biases have their own.
    """

    def __init__(
        self,
        start: Recipe,
        noise: float = 0.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        assert start.copies, "only copies can be made dense"
        self.start = start
        self.maps = {
            name: nn.Parameter(_initial_map(start, name, noise, seed).to(device, dtype))
            for name in start.axes
            if not self._is_alias(name)
        }
        self.depth = {
            leaf: nn.Parameter(_initial_depth(start, leaf, noise, seed).to(device, dtype))
            for leaf in leaves(start.target)
        }

    def recipe(self) -> Recipe:
        """The maps as they are now, as a recipe; differentiable in them."""
        axes: dict[str, AxisMap] = {
            name: DenseMap(matrix, self.start.axes[name].out_scale, self.start.axes[name].in_scale)
            for name, matrix in self.maps.items()
        }
        axes |= {name: axes["value"] for name in self.start.axes if self._is_alias(name)}
        return dataclasses.replace(self.start, layers=LayerMix(self.depth), axes=axes, keeps_function=False)

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that is learned, by name: `width.hidden`, `depth.attention.query.weight`, …"""
        return {f"width.{n}": p for n, p in self.maps.items()} | {f"depth.{n}": p for n, p in self.depth.items()}

    def generate(self, fetch: Fetch, targets: Mapping[str, Tensor]) -> None:
        """Writes every target shard of this rank from the source and the maps; see `grow.grow_into`."""
        grow_into(self.recipe(), fetch, targets)

    def pull_back(
        self, fetch: Fetch, targets: Mapping[str, Tensor], gradients: Mapping[str, Tensor], mesh: Mesh
    ) -> None:
        """Sets `.grad` of every map to the gradient of the loss that gave the target its gradients; a collective.

        The formula is applied again, one target parameter at a time, and differentiated; so memory is bounded by the
        largest parameter. Layers share the maps, hence the gradients add up over layers, shards and ranks.

        Args:
            fetch: as in `generate`.
            targets: this rank's parameters by name.
            gradients: theirs, whole sums over the batch, laid out like them; the two copies of a tied embedding in a
                pipeline hold the same gradient.
            mesh: where the rank stands; says which of several equal pieces counts.
        """
        parameters = self.parameters().values()
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        counted = {
            name: tensor for name, tensor in targets.items() if _counts(name, tensor, mesh) and local(tensor).numel()
        }
        recipe = self.recipe()
        with torch.enable_grad():
            for name, source in mixed_sources(recipe, fetch, counted):
                grown = grow_box(recipe, name, source.to(mesh.device), box(counted[name]))
                if grown.requires_grad:
                    grown.backward(local(gradients[name]).to(grown.dtype))
        for parameter in parameters:
            if parameter.grad is not None:
                sum_over(parameter.grad, mesh.world)

    def state_dict(self) -> dict[str, Tensor]:
        """The maps as plain tensors, by the names of `parameters`."""
        return {name: parameter.detach() for name, parameter in self.parameters().items()}

    def load_state_dict(self, state: Mapping[str, Tensor], where: str = "maps") -> None:
        """Copies saved maps into these.

        Args:
            state: from `state_dict`.
            where: what they were read from, for the message.

        Raises:
            CheckpointError: they belong to another pair of models.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        expected = {name: tuple(parameter.shape) for name, parameter in self.parameters().items()}
        odd = sorted(dict(shapes.items() ^ expected.items()))
        if odd:
            found, wanted = (named.get(odd[0], "absent") for named in (shapes, expected))
            raise CheckpointError(
                f"{where}: {odd[0]} is {found}, but this growth needs {wanted}; "
                "use maps that were learned for the same source and target sizes"
            )
        with torch.no_grad():
            for name, parameter in self.parameters().items():
                parameter.copy_(state[name])

    def _is_alias(self, name: str) -> bool:
        """Whether a map is another's: under multi-head attention the output reads the axis that the values write."""
        return name == "heads" and self.start.axes["heads"] is self.start.axes.get("value")


MAPS_REMEDY = "give a file that was saved after learning"


def save_maps(ligo: Ligo, path: Path | str) -> None:
    """Writes the maps to a safetensors file that names the two models; the file is whole or absent."""
    models = {"source": ligo.start.source, "target": ligo.start.target}
    metadata = {name: json.dumps(to_dict(model)) for name, model in models.items()}
    state = {name: tensor.contiguous() for name, tensor in ligo.state_dict().items()}
    write_atomically(path, safetensors.torch.save(state, metadata))


def load_maps(path: Path | str, device: torch.device | str = "cpu") -> Ligo:
    """Reads what `save_maps` wrote.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        texts = [metadata[key].encode() for key in ("source", "target")]
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"{path}: is no file of learned maps ({shown(str(error))}); {MAPS_REMEDY}") from None
    source, target = (_stored_model(text, path) for text in texts)
    _check_sizes(source, target, state, path)
    dtype = next(iter(state.values())).dtype
    ligo = Ligo(make_recipe("ligo", source, target), device=device, dtype=dtype)
    ligo.load_state_dict(state, str(path))
    return ligo


def _stored_model(text: bytes, path: Path | str) -> ModelConfig:
    try:
        return from_dict(parse_object(text, path, CheckpointError, MAPS_REMEDY), ModelConfig, str(path))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def _check_sizes(source: ModelConfig, target: ModelConfig, state: Mapping[str, Tensor], path: Path | str) -> None:
    """Raises CheckpointError when the file cannot hold maps between such models: building them takes that memory."""
    num_elements = sum(tensor.numel() for tensor in state.values())
    for name in ("num_layers", "hidden_size", "ffn_size", "num_heads", "num_kv_heads"):
        old, new = getattr(source, name), getattr(target, name)
        if (old != new or name == "num_layers") and old * new > num_elements:
            raise CheckpointError(
                f"{path}: {name} grows from {old} to {new}, but the file holds {num_elements} numbers; {MAPS_REMEDY}"
            )
    odd = [name for name, tensor in state.items() if not tensor.is_floating_point()]
    if odd:
        raise CheckpointError(f"{path}: {shown(odd[0])} is {state[odd[0]].dtype}, no floating point; {MAPS_REMEDY}")


def _counts(name: str, tensor: Tensor, mesh: Mesh) -> bool:
    """Whether this rank's piece enters the sums over all ranks; equal pieces of several ranks enter once."""
    is_second_copy = name == TIED_EMBEDDING and not mesh.pp.is_first
    return counted_here(tensor) and not is_second_copy


def _initial_map(start: Recipe, name: str, noise: float, seed: int) -> Tensor:
    """[T, S] the recipe's copies as a matrix, with noise on the rows that are no first copies."""
    copies = start.axes[name]
    assert isinstance(copies, SparseMap)
    matrix_TS = one_hot(copies.index, copies.num_source).double()
    noise_TS = torch.randn(matrix_TS.shape, generator=_generator(seed, f"width.{name}"), dtype=torch.double)
    noise_TS[first_copies(copies.index)] = 0
    return matrix_TS + noise_TS * (noise / math.sqrt(copies.num_source))


def _initial_depth(start: Recipe, leaf: str, noise: float, seed: int) -> Tensor:
    """[L2, L1] the recipe's layer copies; if the depth grows, with a little of every layer. Rows sum to 1."""
    assert isinstance(start.layers, LayerMap)
    copies = one_hot(torch.tensor(start.layers.index), start.source.num_layers).double()
    if not noise or copies.shape[0] == copies.shape[1]:
        return copies
    uniform = torch.rand(copies.shape, generator=_generator(seed, f"depth.{leaf}"), dtype=torch.double)
    weights = torch.where(copies == 1, 1.0, uniform * DEPTH_NOISE)
    return weights / weights.sum(1, keepdim=True)


def _generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(name_seed(seed, f"ligo.{name}"))
