"""The one table that says what each parameter is: its kind, its axes, what is fused in it, which learned maps grow it.

Initialisation, tensor parallelism, growth, the optimizer and the Hugging Face exchange all read this table, so that no
other file asks for substrings of parameter names.

A matrix is stored out x in. Its rows are laid out as (axis unit, part, element): the rows of one attention head, or of
one FFN neuron, stand together, so that a contiguous slice of rows is a whole number of heads or neurons:

    attention.query      [num_heads · head_dim, hidden]           heads of one key/value group stand together
    attention.key_value  [num_kv_heads · 2 · head_dim, hidden]    (kv head, key | value, head_dim)
    mlp.gate_up          [ffn · 2, hidden]                        (neuron, gate | up)
"""

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from megagrow.config import ModelConfig

Axis = Literal["vocab", "positions", "token_types", "hidden", "q_heads", "kv_heads", "head_dim", "ffn"]
Kind = Literal["embedding", "positions", "token_types", "norm_gain", "norm_bias", "matrix", "bias", "head"]

TIED_EMBEDDING = "embedding.tokens"  # the one parameter that two pipeline stages can hold
SHARDED_AXES = ("vocab", "q_heads", "kv_heads", "ffn")  # what the tensor-parallel axis cuts


@dataclass(frozen=True)
class Role:
    """What one parameter is.

    Attributes:
        kind: what it does.
        out: axis of dim 0.
        in_: axis of dim 1; None for vectors.
        parts: what is fused inside the out axis; a plain parameter has one part.
        out_maps: for each part, the learned map that grows the out axis ("": the axis does not grow).
        in_map: the learned map that grows the in axis ("": none).
    """

    kind: Kind
    out: Axis
    in_: Axis | None = None
    parts: tuple[str, ...] = ("",)
    out_maps: tuple[str, ...] = ("",)
    in_map: str = ""

    @property
    def tensor_dim(self) -> int | None:
        """The dim that tensor parallelism shards; None: every tensor rank holds the whole parameter.

        (So it does also where there are fewer key/value heads than tensor ranks; see `shards.tensor_dim`.)
        """
        if self.out in SHARDED_AXES:
            return 0
        return 1 if self.in_ in SHARDED_AXES else None

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to matrices, not to norms and biases."""
        return self.in_ is not None

    @property
    def writes_residual(self) -> bool:
        """Whether the output is added to the residual stream; such matrices start smaller with depth."""
        return self.kind == "matrix" and self.out == "hidden" and self.in_ != "hidden"


_KEY_VALUE = ("key", "value")
_GATE_UP = ("gate", "up")
_HIDDEN = ("hidden",)

OUTSIDE_LAYERS: dict[str, Role] = {
    "embedding.tokens": Role("embedding", "vocab", "hidden", out_maps=("vocab",), in_map="hidden"),
    "embedding.positions": Role("positions", "positions", "hidden", in_map="hidden"),
    "embedding.token_types": Role("token_types", "token_types", "hidden", in_map="hidden"),
    "embedding_norm.weight": Role("norm_gain", "hidden", out_maps=_HIDDEN),
    "embedding_norm.bias": Role("norm_bias", "hidden", out_maps=_HIDDEN),
    "final_norm.weight": Role("norm_gain", "hidden", out_maps=_HIDDEN),
    "final_norm.bias": Role("norm_bias", "hidden", out_maps=_HIDDEN),
    "mlm_head.dense.weight": Role("matrix", "hidden", "hidden", out_maps=_HIDDEN, in_map="hidden"),
    "mlm_head.dense.bias": Role("bias", "hidden", out_maps=_HIDDEN),
    "mlm_head.norm.weight": Role("norm_gain", "hidden", out_maps=_HIDDEN),
    "mlm_head.norm.bias": Role("norm_bias", "hidden", out_maps=_HIDDEN),
    "head.weight": Role("head", "vocab", "hidden", out_maps=("vocab",), in_map="hidden"),
    "head.bias": Role("bias", "vocab", out_maps=("vocab",)),
}

INSIDE_LAYER: dict[str, Role] = {
    "attention_norm.weight": Role("norm_gain", "hidden", out_maps=_HIDDEN),
    "attention_norm.bias": Role("norm_bias", "hidden", out_maps=_HIDDEN),
    "attention.query.weight": Role("matrix", "q_heads", "hidden", out_maps=("query",), in_map="hidden"),
    "attention.query.bias": Role("bias", "q_heads", out_maps=("query",)),
    "attention.key_value.weight": Role("matrix", "kv_heads", "hidden", _KEY_VALUE, ("key", "value"), "hidden"),
    "attention.key_value.bias": Role("bias", "kv_heads", None, _KEY_VALUE, ("key", "value")),
    "attention.query_norm.weight": Role("norm_gain", "head_dim"),
    "attention.key_norm.weight": Role("norm_gain", "head_dim"),
    "attention.output.weight": Role("matrix", "hidden", "q_heads", out_maps=_HIDDEN, in_map="heads"),
    "attention.output.bias": Role("bias", "hidden", out_maps=_HIDDEN),
    "mlp_norm.weight": Role("norm_gain", "hidden", out_maps=_HIDDEN),
    "mlp_norm.bias": Role("norm_bias", "hidden", out_maps=_HIDDEN),
    "mlp.gate_up.weight": Role("matrix", "ffn", "hidden", _GATE_UP, ("ffn", "ffn"), "hidden"),
    "mlp.gate_up.bias": Role("bias", "ffn", None, _GATE_UP, ("ffn", "ffn")),
    "mlp.up.weight": Role("matrix", "ffn", "hidden", out_maps=("ffn",), in_map="hidden"),
    "mlp.up.bias": Role("bias", "ffn", out_maps=("ffn",)),
    "mlp.down.weight": Role("matrix", "hidden", "ffn", out_maps=_HIDDEN, in_map="ffn"),
    "mlp.down.bias": Role("bias", "hidden", out_maps=_HIDDEN),
}

_LAYER_NAME = re.compile(r"layers\.(\d+)\.(.+)")


def split_name(name: str) -> tuple[int | None, str]:
    """Splits `layers.17.mlp.down.weight` into (17, `mlp.down.weight`); the layer is None outside the layers."""
    match = _LAYER_NAME.fullmatch(name)
    return (int(match[1]), match[2]) if match else (None, name)


def layer_name(layer: int, leaf: str) -> str:
    """The inverse of `split_name` for a parameter of a layer."""
    return f"layers.{layer}.{leaf}"


def role_of(name: str) -> Role:
    """The role of a parameter.

    Raises:
        KeyError: no parameter of any supported model has this name.
    """
    layer, leaf = split_name(name)
    return OUTSIDE_LAYERS[leaf] if layer is None else INSIDE_LAYER[leaf]


def axis_size(axis: Axis, model: ModelConfig) -> int:
    """Number of units along an axis: heads for the head axes, elements for the others."""
    return {
        "vocab": model.vocab_size,
        "positions": model.position_offset + model.max_seq_length,
        "token_types": model.num_token_types,
        "hidden": model.hidden_size,
        "q_heads": model.num_heads,
        "kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "ffn": model.ffn_size,
    }[axis]


def axis_unit(axis: Axis, model: ModelConfig) -> int:
    """Elements per unit of an axis: head_dim for the head axes, else 1."""
    return model.head_dim if axis in ("q_heads", "kv_heads") else 1


def shape_of(role: Role, model: ModelConfig) -> tuple[int, ...]:
    """Global, unpadded shape of a parameter."""
    rows = axis_size(role.out, model) * len(role.parts) * axis_unit(role.out, model)
    if role.in_ is None:
        return (rows,)
    return rows, axis_size(role.in_, model) * axis_unit(role.in_, model)


def leaves(model: ModelConfig) -> list[str]:
    """Names of one layer's parameters, without the `layers.N.` prefix, in their order in the block."""
    absent = {"mlp.up"} if model.is_gated else {"mlp.gate_up"}
    if not model.qk_norm:
        absent |= {"attention.query_norm", "attention.key_norm"}

    def present(leaf: str) -> bool:
        module, _, part = leaf.rpartition(".")
        return module not in absent and (part != "bias" or _has_bias(module, model))

    return [leaf for leaf in INSIDE_LAYER if present(leaf)]


def first_names(model: ModelConfig) -> list[str]:
    """Names of the parameters before the layers, in the order of the forward pass."""
    names = [TIED_EMBEDDING]
    names += ["embedding.positions"] * (model.positions == "learned")
    names += ["embedding.token_types"] * (model.num_token_types > 0)
    return names + _norm_names("embedding_norm", model) * (model.norm_place == "after")


def last_names(model: ModelConfig) -> list[str]:
    """Names of the parameters after the layers, in the order of the forward pass, without a tied output matrix."""
    names = _norm_names("final_norm", model) * (model.norm_place == "before")
    if model.objective == "mlm":
        names += ["mlm_head.dense.weight", "mlm_head.dense.bias", *_norm_names("mlm_head.norm", model)]
    names += ["head.weight"] * (not model.tied_embeddings)
    return names + ["head.bias"] * (model.objective == "mlm")


def after_transform(model: ModelConfig) -> list[str]:
    """Names of what uses the output of an encoder's MLM transform, which a growth method may grow apart from `hidden`.

    The transform writes it (rows of its dense layer, its norm), an untied head reads it (columns).
    """
    return [] if model.is_causal else [name for name in last_names(model) if name != "head.bias"]


def parameter_names(model: ModelConfig) -> list[str]:
    """Names of all parameters of a model, in the order of the forward pass."""
    inside = [layer_name(i, leaf) for i in range(model.num_layers) for leaf in leaves(model)]
    return [*first_names(model), *inside, *last_names(model)]


def _norm_names(module: str, model: ModelConfig) -> list[str]:
    return [f"{module}.weight"] + [f"{module}.bias"] * (model.norm == "layer_norm")


def _has_bias(module: str, model: ModelConfig) -> bool:
    """Whether a module of a layer has a bias."""
    if module.endswith("norm"):
        return model.norm == "layer_norm" and module in ("attention_norm", "mlp_norm")
    if module.startswith("mlp."):
        return model.mlp_bias
    return model.attention_bias == "all" or (model.attention_bias == "qkv" and module != "attention.output")


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Global, unpadded shape of every parameter of a model, by name."""
    return {name: shape_of(role_of(name), model) for name in parameter_names(model)}


@lru_cache(maxsize=64)  # each step names its model by it
def num_parameters(model: ModelConfig) -> int:
    """Number of parameters; a tied embedding counts once."""
    return sum(math.prod(shape) for shape in parameter_shapes(model).values())
