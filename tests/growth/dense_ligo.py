"""LiGO written out parameter by parameter, for one process: what the library is compared with.

It shares no code with the library: no roles, no boxes, no operator.
"""

# Shape suffix legend: B = batch, S = sequence, V = vocabulary.

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megagrow.config import ModelConfig
from megagrow.model import Transformer

Maps = Mapping[str, Tensor]

RULES = {  # module of a layer -> axes of its rows and columns
    "attention_norm": ("hidden", None),
    "attention.query": ("query", "hidden"),
    "attention.key": ("key", "hidden"),
    "attention.value": ("value", "hidden"),
    "attention.output": ("hidden", "heads"),
    "mlp_norm": ("hidden", None),
    "mlp.gate": ("ffn", "hidden"),
    "mlp.up": ("ffn", "hidden"),
    "mlp.down": ("hidden", "ffn"),
}
FUSED = {"attention.key_value": ("attention.key", "attention.value"), "mlp.gate_up": ("mlp.gate", "mlp.up")}


class Matrices:
    """The paper's B of an axis in a layer (rows: target) and A, which reads the axis.

    Args:
        maps: what is learned, by the library's names.
        extended: B = [I; C], of which the maps hold C.
        shared_heads: attention outputs read what the values write.
        ratio: A is B times source size / target size, as where the maps start as copies; else it is B.
    """

    def __init__(self, maps: Maps, extended: bool, shared_heads: bool, ratio: bool) -> None:
        self.maps, self.extended, self.shared_heads, self.ratio = maps, extended, shared_heads, ratio

    def B(self, axis: str | None, layer: int | None) -> Tensor | None:
        axis = "value" if axis == "heads" and self.shared_heads else axis
        matrix = self.maps.get(f"width.layers.{layer}.{axis}", self.maps.get(f"width.{axis}"))
        if matrix is None or not self.extended:
            return matrix
        return torch.cat((torch.eye(matrix.shape[1], dtype=matrix.dtype), matrix))

    def A(self, axis: str | None, layer: int | None) -> Tensor | None:
        matrix = self.B(axis, layer)
        return matrix * (matrix.shape[1] / matrix.shape[0]) if matrix is not None and self.ratio else matrix


def generate(
    source: ModelConfig, target: ModelConfig, small: Maps, maps: Maps, variant: str = "tied", ratio: bool = True
) -> dict[str, Tensor]:
    """The target's parameters from the source's and the maps (`width.*`, `depth.*`); differentiable.

    Of `full_rank` all but the random blocks: new gains of norms are the mean of the old ones besides.
    """
    shared_heads = all(model.num_heads == model.num_kv_heads for model in (source, target))
    matrices = Matrices(maps, variant in ("target_layer", "full_rank"), shared_heads, ratio)
    A, B = matrices.A, matrices.B
    grown = {}
    for i in range(target.num_layers):
        for leaf in [n.removeprefix("layers.0.") for n in small if n.startswith("layers.0.")]:
            module, _, kind = leaf.rpartition(".")
            parts = []
            for p, part in enumerate(FUSED.get(module, (module,))):
                rows, columns = RULES[part]
                weights = maps[f"depth.{leaf}"][p, i]
                pieces = [piece(source, small[f"layers.{j}.{leaf}"], module, p) for j in range(source.num_layers)]
                if variant == "source_layer":
                    pieces = [right(left(B(rows, j), x), A(columns, j)) for j, x in enumerate(pieces)]
                mixed = sum(w * x for w, x in zip(weights, pieces, strict=True))
                parts.append(mixed if variant == "source_layer" else right(left(B(rows, i), mixed), A(columns, i)))
            grown[f"layers.{i}.{leaf}"] = fuse(target, parts, module)
    outside = {name: with_new_tokens(target, name, x) for name, x in small.items() if not name.startswith("layers.")}
    written = A if source.tied_embeddings else B  # the last norm takes the scale that a tied matrix cannot
    transform = "transform" if "width.transform" in maps else "hidden"
    for name, x in outside.items():
        if name.startswith("embedding."):
            grown[name] = right(x, B("hidden", None))
        elif name.startswith("embedding_norm."):
            grown[name] = left(B("hidden", None), x)
        elif name.startswith("final_norm."):
            grown[name] = left(written("hidden", None), x)
        elif name.startswith("mlm_head.norm."):
            grown[name] = left(written(transform, None), x)
        elif name.startswith("mlm_head.dense."):
            wide = left(B(transform, None), x)
            grown[name] = right(wide, A("hidden", None)) if x.ndim == 2 else wide
        elif name == "head.weight":
            grown[name] = right(x, A("hidden" if target.is_causal else transform, None))
        else:
            assert name == "head.bias"
            grown[name] = x
    if variant == "full_rank":
        for name in [name for name in grown if name.endswith("norm.weight")]:
            new = torch.arange(target.hidden_size) >= source.hidden_size
            grown[name] = grown[name] + new * grown[name][~new].mean()
    return grown


def with_new_tokens(target: ModelConfig, name: str, x: Tensor) -> Tensor:
    """Rows of tokens, with those of new ones, which are the mean of the old."""
    if name not in ("embedding.tokens", "head.weight", "head.bias"):
        return x
    return torch.cat([x, *[x.mean(0, keepdim=True)] * (target.vocab_size - len(x))])


def left(matrix: Tensor | None, x: Tensor) -> Tensor:
    return x if matrix is None else matrix @ x


def right(x: Tensor, matrix: Tensor | None) -> Tensor:
    return x if matrix is None or x.ndim == 1 else x @ matrix.T


def piece(model: ModelConfig, x: Tensor, module: str, part: int) -> Tensor:
    """One of the matrices that are fused in a parameter."""
    if module not in FUSED:
        return x
    unit = model.head_dim if module.startswith("attention") else 1
    return x.unflatten(0, (-1, 2, unit))[:, part].flatten(0, 1)


def fuse(model: ModelConfig, parts: list[Tensor], module: str) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    unit = model.head_dim if module.startswith("attention") else 1
    return torch.stack([part.unflatten(0, (-1, unit)) for part in parts], dim=1).flatten(0, 2)


class _Logits(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.model = Transformer(model).double()

    def forward(self, ids_BS: Tensor) -> Tensor:
        return self.model.logits(ids_BS)


def loss_of(model: ModelConfig, parameters: Maps, ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
    """Mean cross-entropy of a model with the given parameters; differentiable in them."""
    named = {f"model.{name}": parameter for name, parameter in parameters.items()}
    logits_BSV = torch.func.functional_call(_Logits(model), named, (ids_BS,))
    return nn.functional.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten())
