"""LiGO's Algorithm 1 written out parameter by parameter, for one process: what the library is compared with.

It shares no code with the library: no roles, no boxes, no operator.
"""

# Shape suffix legend: B = batch, S = sequence, V = vocabulary.

from collections.abc import Mapping

import torch
from torch import Tensor

from megagrow.config import ModelConfig
from megagrow.model import Transformer

Maps = Mapping[str, Tensor]


def generate(source: ModelConfig, target: ModelConfig, small: Maps, maps: Maps) -> dict[str, Tensor]:
    """The target's parameters from the source's and the maps (`width.*`, `depth.*`); differentiable.

    B is the paper's matrix of an axis (rows: target); A reads it: the same matrix times source size / target size.
    """
    B = {axis: maps.get(f"width.{axis}") for axis in ("hidden", "query", "key", "value", "ffn")}
    B["heads"] = maps.get("width.heads", B["value"] if source.num_heads == source.num_kv_heads else None)
    B = {axis: matrix if matrix is not None else None for axis, matrix in B.items()}
    A = {axis: None if m is None else m * (m.shape[1] / m.shape[0]) for axis, m in B.items()}

    def left(matrix: Tensor | None, x: Tensor) -> Tensor:
        return x if matrix is None else matrix @ x

    def right(x: Tensor, matrix: Tensor | None) -> Tensor:
        return x if matrix is None else x @ matrix.T

    def mixed(leaf: str, layer: int) -> Tensor:
        weights = maps[f"depth.{leaf}"][layer]
        return sum(w * small[f"layers.{j}.{leaf}"] for j, w in enumerate(weights.unbind()))

    def fused(x: Tensor, unit: int, first: Tensor | None, second: Tensor | None) -> Tensor:
        parts = x.unflatten(0, (-1, 2, unit))
        one, two = left(first, parts[:, 0].flatten(0, 1)), left(second, parts[:, 1].flatten(0, 1))
        pair = [part.unflatten(0, (-1, unit)) for part in (one, two)]
        return torch.stack(pair, dim=1).flatten(0, 2)

    grown = {"embedding.tokens": right(small["embedding.tokens"], B["hidden"])}
    if source.positions == "learned":
        grown["embedding.positions"] = right(small["embedding.positions"], B["hidden"])
    for i in range(target.num_layers):
        for leaf in [n.removeprefix("layers.0.") for n in small if n.startswith("layers.0.")]:
            module, _, kind = leaf.rpartition(".")
            x = mixed(leaf, i)
            if module in ("attention_norm", "mlp_norm"):
                x = left(B["hidden"], x)
            elif module == "attention.query":
                x = left(B["query"], x)
            elif module == "attention.key_value":
                x = fused(x, source.head_dim, B["key"], B["value"])
            elif module == "mlp.gate_up":
                x = fused(x, 1, B["ffn"], B["ffn"])
            elif module == "mlp.up":
                x = left(B["ffn"], x)
            else:
                assert module in ("attention.output", "mlp.down")
                x = left(B["hidden"], x)
            if kind == "weight" and not module.endswith("norm"):
                reads = {"attention.output": "heads", "mlp.down": "ffn"}.get(module, "hidden")
                x = right(x, A[reads])
            grown[f"layers.{i}.{leaf}"] = x
    norm = A["hidden"] if source.tied_embeddings else B["hidden"]
    for name in small:
        if name.startswith("final_norm."):
            grown[name] = left(norm, small[name])
    if not source.tied_embeddings:
        grown["head.weight"] = right(small["head.weight"], A["hidden"])
    return grown


def loss_of(model: ModelConfig, parameters: Maps, ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
    """Mean cross-entropy of a model with the given parameters; differentiable in them."""
    hidden = torch.func.functional_call(Transformer(model).double(), dict(parameters), (ids_BS,))
    head = parameters["embedding.tokens" if model.tied_embeddings else "head.weight"]
    logits_BSV = hidden @ head.T
    return torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten())
