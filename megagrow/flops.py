"""What a model costs in floating-point operations: every matrix product, two per multiply-add.

Conventions by name, because published figures differ by them:

    full     scores and values over all S x S pairs, as in torch's flop counter and most papers
    causal   half of that, since a causal mask needs only half of the pairs, as in Megatron; an encoder needs all
    electra  the counter of ELECTRA (Clark et al., 2020), for encoders, with which LiGO's figures were made: what each
             element costs besides, a dense look-up of the embedding, logits of the chosen tokens only; a backward pass
             counts as one forward pass

In the first two, norms, activations, rotations, softmax and the embedding look-up are left out, as everywhere. What
an implementation adds (recompute, padded vocabulary rows, work repeated on several ranks) is left
out too: the count belongs to the algorithm, so that layouts can be compared.
"""

from functools import lru_cache
from math import prod
from typing import Literal

from megagrow.config import ModelConfig, require
from megagrow.roles import (
    Axis,
    Role,
    axis_size,
    axis_unit,
    layer_name,
    leaves,
    parameter_names,
    role_of,
    shape_of,
    split_name,
)

Convention = Literal["full", "causal", "electra"]
DEFAULT_CONVENTION: Convention = "full"

# Of one element, as ELECTRA counts them.
_DROPOUT, _NORM, _GELU, _SOFTMAX = 4, 5, 8, 5
_CHOSEN = 0.15625  # of an encoder's tokens have logits: 20 of 128

# Dense bf16 FLOP/s from the vendors' data sheets; the first name that occurs in the device's.
_PEAK_BF16 = (
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800 PCIe", 756e12),
    ("H800", 989e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("MI300X", 1307e12),
    ("MI250X", 191.5e12),  # of one die: torch shows each of the two as a device
)


def forward_flops_per_token(model: ModelConfig, seq_length: int, convention: Convention = DEFAULT_CONVENTION) -> float:
    """FLOPs of one token's forward pass, head included, inside a sequence of `seq_length` tokens.

    Of the well-known 2N, only the weights that multiply something count; attention comes on top.

    Raises:
        ConfigError: `electra` of a model that is no encoder.
    """
    if convention == "electra":
        return _electra_flops_per_token(model, seq_length)
    per_layer = layer_flops_per_token(model, seq_length, convention)
    return model.num_layers * per_layer + head_flops_per_token(model)


@lru_cache(maxsize=64)
def layer_flops_per_token(model: ModelConfig, seq_length: int, convention: Convention = DEFAULT_CONVENTION) -> float:
    """FLOPs of one token's forward pass through one layer, `full` or `causal`."""
    roles = [role_of(layer_name(0, leaf)) for leaf in leaves(model)]
    shapes = [_matrix_shape(role, model) for role in roles if role.kind == "matrix"]
    pairs = seq_length if convention == "full" or not model.is_causal else seq_length / 2
    attention = 2 * model.num_heads * model.head_dim * pairs  # scores, and values
    return 2.0 * (sum(rows * columns for rows, columns in shapes) + attention)


def head_flops_per_token(model: ModelConfig) -> float:
    """FLOPs of one token's logits, whether the head has weights of its own or the embedding's.

    An encoder's head has a dense layer before. All tokens count, though its loss reads the chosen ones only: the logits
    of all are computed.
    """
    dense = 0 if model.is_causal else model.hidden_size
    return 2.0 * (model.vocab_size + dense) * model.hidden_size


def forward_flops(
    model: ModelConfig, tokens: int, seq_length: int, convention: Convention = DEFAULT_CONVENTION
) -> float:
    """FLOPs of `tokens` through body and head, no backward pass: a teacher's, or scoring's."""
    return tokens * forward_flops_per_token(model, seq_length, convention)


def training_flops(
    model: ModelConfig,
    tokens: int,
    seq_length: int,
    convention: Convention = DEFAULT_CONVENTION,
    frozen_layers: int = 0,
) -> float:
    """FLOPs of training on `tokens`: forward, and twice that for the two kinds of gradients; `electra`: once.

    Frozen layers at the bottom have a forward pass only, and the embedding below them, tied to the head, no gradient.
    """
    backward = 1 if convention == "electra" else 2
    whole = (1 + backward) * forward_flops(model, tokens, seq_length, convention)
    if frozen_layers == 0:
        return whole
    skipped = backward * frozen_layers * layer_flops_per_token(model, seq_length, convention)
    if model.tied_embeddings:
        skipped += (backward - 1) * 2.0 * model.vocab_size * model.hidden_size
    return whole - tokens * skipped


def _electra_flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """FLOPs of one token's forward pass as ELECTRA counts them.

    Source: Clark et al., "ELECTRA" (2020, arXiv 2003.10555), table of FLOPs; its authors' counter, in which the norm
    after attention costs the same whatever the width.
    """
    require(not model.is_causal, f"the FLOPs convention electra is one of encoders, not of {model.family}; use full")
    h, v = model.hidden_size, model.vocab_size
    shapes = {leaf: shape_of(role_of(layer_name(0, leaf)), model) for leaf in leaves(model) if "norm" not in leaf}
    weights_and_biases = sum((2 if len(shape) == 2 else 1) * prod(shape) for shape in shapes.values())
    products = 2 * 2 * model.num_heads * model.head_dim * seq_length  # scores, and values
    each_score = (_SOFTMAX + _DROPOUT + 1) * model.num_heads * seq_length  # the 1 scales it
    around = 2 * (_DROPOUT + 1) * h + _GELU * model.ffn_size + _NORM * (h + 1)  # the 1 adds the residual
    layer = weights_and_biases + products + each_score + around
    embedding = 2 * h * v + 2 * h * (seq_length + model.num_token_types) + (2 + _NORM + _DROPOUT) * h
    head = 2 * h * v + (_SOFTMAX + 2) * v + 2 * h * h + (1 + _GELU + _NORM) * h
    return model.num_layers * layer + embedding + _CHOSEN * head


@lru_cache(maxsize=64)
def ligo_generation_flops(source: ModelConfig, target: ModelConfig, variant: str = "full_rank") -> float:
    """FLOPs of generating the target's weights once with LiGO's maps.

    Layers are mixed on the small side, Σ_j w_kj·Θ_j, then widened to O·Θ·Iᵀ in the cheaper of the
    two orders (Wang et al., 2023, arXiv 2303.00980, algorithm 1). Each target weight is generated
    once, however many ranks need it; the batch does not matter. New tokens' rows, means of old ones, are no product.

    Args:
        source, target: the two models.
        variant: `growth.ligo_variant`. With a map for each target layer only the new blocks are computed; with one for
            each source layer all of these are widened, then mixed on the large side. (If no axis but the residual
            stream grows, whose map all layers share, they are mixed first as ever.)
    """
    if all(getattr(source, size) == getattr(target, size) for size in ("num_heads", "num_kv_heads", "ffn_size")):
        variant = "tied" if variant == "source_layer" else variant
    return sum(_generated(name, source, target, variant) for name in parameter_names(target))


def ligo_step_flops(
    source: ModelConfig,
    target: ModelConfig,
    tokens: int,
    seq_length: int,
    convention: Convention = DEFAULT_CONVENTION,
    variant: str = "full_rank",
) -> float:
    """FLOPs of one step that learns LiGO's maps: the target's step, generation and its backward.

    Gradients come from generating once more, piece by piece, and differentiating that (`Ligo.pull_back`), which is
    counted although it is a kind of recompute: in small models it is several per cent of a step. The backward pass is
    taken as twice the generation. That is a little too much, because the frozen source needs no gradient; better to
    charge learned growth too much than too little.
    """
    return training_flops(target, tokens, seq_length, convention) + 4 * ligo_generation_flops(source, target, variant)


def peak_flops_per_second(device_name: str, precision: str) -> float | None:
    """Dense peak FLOP/s of a device, the denominator of MFU; None when not known (CPUs, fp32)."""
    if precision != "bf16":
        return None
    return next((peak for part, peak in _PEAK_BF16 if part.lower() in device_name.lower()), None)


def _matrix_shape(role: Role, model: ModelConfig) -> tuple[int, int]:
    rows, columns = shape_of(role, model)
    return rows, columns


def _generated(name: str, source: ModelConfig, target: ModelConfig, variant: str) -> float:
    role = role_of(name)
    layer, _ = split_name(name)
    flops, learns_rows = 0.0, role.out != "vocab"
    for out_map in role.out_maps:
        rows, new_rows = (_part_size(role.out, model) for model in (source, target))
        columns, new_columns = (_part_size(role.in_, model) if role.in_ else 1 for model in (source, target))
        kept = (rows, columns) if variant in ("target_layer", "full_rank") else (0, 0)
        widen_out = 2.0 * (new_rows - kept[0]) * rows if out_map and learns_rows and new_rows > rows else 0.0
        widen_in = 2.0 * (new_columns - kept[1]) * columns if role.in_map and new_columns > columns else 0.0
        rows = rows if learns_rows else new_rows  # which are there before
        widen = min(widen_out * columns + widen_in * new_rows, widen_in * rows + widen_out * new_columns)
        if layer is None:
            flops += widen
        elif variant == "source_layer":
            flops += source.num_layers * (widen / target.num_layers + 2.0 * new_rows * new_columns)
        else:
            flops += widen + 2.0 * source.num_layers * rows * columns
    return flops


def _part_size(axis: Axis, model: ModelConfig) -> int:
    return axis_size(axis, model) * axis_unit(axis, model)
