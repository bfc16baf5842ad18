"""What a CPU does better than by torch's own way: float32 products, and causal attention.

Both are operations of their own, so that a compiler takes them as they are. `ops` and `attention_ops` say when they
serve.

Legend: M, N, K = sizes of a product; in attention B = batch, S = query positions, T = key positions (S <= T),
N = query heads, K = key/value heads (K divides N), G = N / K, D = head dimension, Q = queries of a block,
E = keys that they see, and pairs of letters are dimensions joined.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

HAS_ONEDNN = torch.backends.mkldnn.is_available()
HAS_NARROW_MKL = torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2"
TAKES_FLOAT32 = HAS_ONEDNN and not HAS_NARROW_MKL  # whether `product` does
QUERY_BLOCK = 64  # their scores stay in a core's cache
PIECE_ROWS = 2048  # of a product that is added to a sum: they stay in the cache until they are
LONG = 2**14  # rows or columns that only a vocabulary has: more of them are multiplied piece by piece


def serves_product(a_MK: Tensor, b_NK: Tensor) -> bool:
    """Whether `product` is the faster way.

    For float32, torch asks MKL, which takes 2.2 times as long as oneDNN on an AMD EPYC 9005 (113 instead of 255 GFLOP/s
    on a core), but on a core without AVX-512 (EPYC 7003) a tenth less, and half as long where matrices are small or
    read by columns, as for a weight's gradient. For bfloat16, it asks oneDNN anyway.
    """
    return (
        TAKES_FLOAT32
        and a_MK.device.type == "cpu"
        and a_MK.dtype == b_NK.dtype == torch.float32
        and a_MK.numel() > 0
        and b_NK.numel() > 0
    )


# Not oneDNN's operation itself, since the compiler wants constant weights for that.
@torch.library.custom_op("megagrow::product", mutates_args=())
def product(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """a·bᵀ [M, N] by oneDNN; both may be strided.

    oneDNN lays the whole of b out anew, and of the sum over a long K the whole of a: of an output matrix that would be
    more than the logits of a chunk.
    """
    num_rows, num_terms = b_NK.shape
    if max(num_rows, num_terms) <= LONG:
        return _linear(a_MK, b_NK)
    if num_rows >= num_terms:
        y_MN = a_MK.new_empty(len(a_MK), num_rows)
        _write_pieces(y_MN, a_MK, b_NK)
        return y_MN
    total_MN = a_MK.new_zeros(len(a_MK), num_rows)
    for a_MP, b_NP in zip(a_MK.split(PIECE_ROWS, 1), b_NK.split(PIECE_ROWS, 1), strict=True):
        total_MN += _linear(a_MP, b_NP)
    return total_MN


@torch.library.custom_op("megagrow::write_product", mutates_args=("y_MN",))
def write_product(y_MN: Tensor, a_MK: Tensor, b_NK: Tensor) -> None:
    """y = a·bᵀ, columns after columns."""
    _write_pieces(y_MN, a_MK, b_NK)


def _write_pieces(y_MN: Tensor, a_MK: Tensor, b_NK: Tensor) -> None:
    for y_MR, b_RK in zip(y_MN.split(PIECE_ROWS, 1), b_NK.split(PIECE_ROWS), strict=True):
        y_MR.copy_(_linear(a_MK, b_RK))


def _linear(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a_MK, b_NK, None, "none", [], "")


@product.register_fake
def _(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    return a_MK.new_empty(a_MK.shape[0], b_NK.shape[0])  # len() would fix the sizes


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _product_backward(ctx: Any, dy_MN: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a_MK, b_NK = ctx.saved_tensors
    wants_a, wants_b = ctx.needs_input_grad
    return product(dy_MN, b_NK.T) if wants_a else None, product(dy_MN.T, a_MK.T) if wants_b else None


product.register_autograd(_product_backward, setup_context=_keep_inputs)


@torch.library.custom_op("megagrow::causal_attention", mutates_args=())
def causal_attention(q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
    """Softmax attention with scale 1/sqrt(D); the queries are the last S of the T positions.

    A block of queries after the other, each with the keys up to its last query only. The backward pass computes the
    probabilities again. 1.2 times as fast as torch's fused attention in float32 and 1.7 times in bfloat16 (both
    directions, 512 positions, D = 64).

    Returns:
        [B, N, S, D], in memory [B, S, N, D].
    """
    y_BNSD = _like_heads(q_BNSD)
    k_XTD, v_XTD = k_BKTD.flatten(0, 1), v_BKTD.flatten(0, 1)
    for queries, E in _blocks(q_BNSD.shape[2], k_XTD.shape[1]):
        q_XQD = _grouped(q_BNSD[:, :, queries], k_BKTD.shape[1])
        p_XQE = _probabilities(q_XQD, k_XTD[:, :E], queries)
        y_BNSD[:, :, queries] = torch.bmm(p_XQE, v_XTD[:, :E]).view(y_BNSD[:, :, queries].shape)
    return y_BNSD


@causal_attention.register_fake
def _(q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
    return _like_heads(q_BNSD)


@torch.library.custom_op("megagrow::causal_attention_backward", mutates_args=())
def causal_attention_backward(
    dy_BNSD: Tensor, q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, laid out as `causal_attention` lays out its result."""
    dq_BNSD, dk_BKTD, dv_BKTD = _like_heads(q_BNSD), _like_heads(k_BKTD), _like_heads(v_BKTD)
    k_XTD, v_XTD = k_BKTD.flatten(0, 1), v_BKTD.flatten(0, 1)
    dk_XTD, dv_XTD = (torch.empty_like(k_XTD, dtype=wide_dtype(k_XTD)) for _ in range(2))
    scale, num_kv_heads = q_BNSD.shape[3] ** -0.5, k_BKTD.shape[1]
    add: Callable[[Tensor, Tensor], Tensor] = Tensor.copy_  # the last queries come first: they see all keys
    for queries, E in reversed(list(_blocks(q_BNSD.shape[2], k_XTD.shape[1]))):
        q_XQD, dy_XQD = (_grouped(x_BNSD[:, :, queries], num_kv_heads) for x_BNSD in (q_BNSD, dy_BNSD))
        p_XQE = _probabilities(q_XQD, k_XTD[:, :E], queries)
        dp_XQE = torch.bmm(dy_XQD, v_XTD[:, :E].transpose(1, 2))
        ds_XQE = torch._softmax_backward_data(dp_XQE, p_XQE, -1, p_XQE.dtype)
        add(dv_XTD[:, :E], torch.bmm(p_XQE.transpose(1, 2), dy_XQD))
        add(dk_XTD[:, :E], torch.bmm(ds_XQE.transpose(1, 2), q_XQD))
        add = Tensor.add_
        dq_XQD = torch.bmm(ds_XQE, k_XTD[:, :E]).mul_(scale)
        dq_BNSD[:, :, queries] = dq_XQD.view(dq_BNSD[:, :, queries].shape)
    dk_BKTD.copy_(dk_XTD.mul_(scale).view(k_BKTD.shape))
    dv_BKTD.copy_(dv_XTD.view(v_BKTD.shape))
    return dq_BNSD, dk_BKTD, dv_BKTD


@causal_attention_backward.register_fake
def _(dy_BNSD: Tensor, q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _like_heads(q_BNSD), _like_heads(k_BKTD), _like_heads(v_BKTD)


def _attention_backward(ctx: Any, dy_BNSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return causal_attention_backward(dy_BNSD, *ctx.saved_tensors)


causal_attention.register_autograd(_attention_backward, setup_context=_keep_inputs)


@register_flop_formula(torch.ops.megagrow.product)
def _product_flops(a_shape: list[int], b_shape: list[int], *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(a_shape) * b_shape[0]


@register_flop_formula(torch.ops.megagrow.write_product)
def _written_product_flops(y_shape: list[int], *shapes: list[int], **kwargs: Any) -> int:
    return _product_flops(*shapes)


@register_flop_formula(torch.ops.megagrow.causal_attention)
def _attention_flops(q_shape: list[int], k_shape: list[int], *args: Any, **kwargs: Any) -> int:
    return 2 * 2 * math.prod(q_shape) * k_shape[2]  # over all pairs, as torch counts its own


@register_flop_formula(torch.ops.megagrow.causal_attention_backward)
def _attention_backward_flops(dy_shape: list[int], q_shape: list[int], k_shape: list[int], *args: Any, **_: Any) -> int:
    return 5 * 2 * math.prod(q_shape) * k_shape[2]


def _blocks(S: int, T: int) -> Iterator[tuple[slice, int]]:
    """The queries of each block, and the number of keys up to the last of them."""
    for start in range(0, S, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, S)
        yield slice(start, stop), T - S + stop


def _probabilities(q_XQD: Tensor, k_XED: Tensor, queries: slice) -> Tensor:
    """The softmax of a block's scores, which have float32 at least: 16 bits of a score of 20 make it 8 % off."""
    num_queries = queries.stop - queries.start
    wide_q_XQD, wide_k_XED = (x.to(wide_dtype(x)) for x in (q_XQD, k_XED))
    unread = wide_q_XQD.new_empty(())
    with _products_of(q_XQD.dtype):
        scores_XQE = torch.baddbmm(unread, wide_q_XQD, wide_k_XED.transpose(1, 2), beta=0, alpha=q_XQD.shape[2] ** -0.5)
    own = scores_XQE.unflatten(1, (-1, num_queries))[..., -num_queries:]
    own += torch.full((num_queries, num_queries), -torch.inf, dtype=own.dtype).triu(1)
    return scores_XQE.softmax(-1).to(q_XQD.dtype)


@contextmanager
def _products_of(dtype: torch.dtype) -> Iterator[None]:
    """Where all factors are bfloat16 kept in float32: oneDNN may read them as such. The same bits in half the time,
    since torch has no product of bfloat16 on a CPU that comes out in float32."""
    if dtype is not torch.bfloat16:
        yield
        return
    mkldnn: Any = torch.backends.mkldnn  # whose types lack what is set here
    matmul = mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def wide_dtype(x: Tensor) -> torch.dtype:
    """float32 at least, for sums and exponentials of x."""
    return torch.promote_types(x.dtype, torch.float32)


def _grouped(x_BNQD: Tensor, num_kv_heads: int) -> Tensor:
    """The queries of all heads that share keys, as if they were those of one head."""
    B, N, Q, D = x_BNQD.shape
    return x_BNQD.reshape(B * num_kv_heads, N // num_kv_heads * Q, D)


def _like_heads(x_BNSD: Tensor) -> Tensor:
    """Of this shape, in memory [B, S, N, D]: the output projection reads that as it is."""
    B, N, S, D = x_BNSD.shape
    return x_BNSD.new_empty(B, S, N, D).transpose(1, 2)
