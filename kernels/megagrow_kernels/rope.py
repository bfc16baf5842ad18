"""Rotary position embedding of queries and keys, in one launch, in place where that is allowed.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), equation 34, where columns 2i and
2i + 1 of a head turn by the angle i of their token; in Hugging Face's Llama columns i and i + R/2 do.
Bytes per element with 2-byte activations: forward 4 per rotated element, 0 per value; backward 4, values too: they are
copied next to the keys, as the fused key/value projection wants its gradient, instead of by a pass of their own. In
compiled code, whose forward pass writes new tensors, the compiler stacks them: 8 per element of keys and values.

Legend: B = batch, S = sequence, N = query heads, K = key/value heads, P = parts of a key/value head (key, or key and
value), D = head dimension, R = rotated columns of a head, C = their pairs, R/2.
Prefixes: i_ index, o_ offsets, p_ pointer, b_ values of a block, m_ mask.
"""

import torch
import triton
import triton.language as tl

from megagrow_kernels.launch import ANY, pick

MAX_HEAD_DIM = ANY["rope"][-1].block
MAX_BATCH = 65535  # a GPU's limit for the second axis of a grid
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def rope_ref(
    x_BSND: torch.Tensor, cos_SR: torch.Tensor, sin_SR: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    """The definition for one tensor, in the precision of its inputs."""
    C = cos_SR.shape[-1] // 2
    cos_S1C, sin_S1C = cos_SR[:, None, :C], sin_SR[:, None, :C]
    even = slice(0, 2 * C, 2) if interleaved else slice(0, C)
    odd = slice(1, 2 * C, 2) if interleaved else slice(C, 2 * C)
    y_BSND = x_BSND.clone()
    y_BSND[..., even] = x_BSND[..., even] * cos_S1C - x_BSND[..., odd] * sin_S1C
    y_BSND[..., odd] = x_BSND[..., odd] * cos_S1C + x_BSND[..., even] * sin_S1C
    return y_BSND


@triton.jit
def _load_angles(p_cos, p_sin, i_s, C: tl.constexpr, BLOCK_C: tl.constexpr, INVERSE: tl.constexpr):
    o_c = tl.arange(0, BLOCK_C)
    b_cos = tl.load(p_cos + i_s * (2 * C) + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    b_sin = tl.load(p_sin + i_s * (2 * C) + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    return b_cos[None, :], (-b_sin if INVERSE else b_sin)[None, :]


@triton.jit
def _turn(p_x, p_y, m_n, b_cos, b_sin, C: tl.constexpr, BLOCK_C: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Turns a block of heads, [BLOCK_N, 1] pointers to the first columns, from p_x to p_y, which may be the same."""
    dtype: tl.constexpr = p_y.dtype.scalar.element_ty
    if INTERLEAVED:
        o_r = tl.arange(0, 2 * BLOCK_C)[None, :]
        m_x = m_n & (o_r < 2 * C)
        b_x = tl.load(p_x + o_r, mask=m_x, other=0.0).to(tl.float32)
        b_1, b_2 = tl.split(tl.reshape(b_x, (m_n.shape[0], BLOCK_C, 2)))
        b_y = tl.join(b_1 * b_cos - b_2 * b_sin, b_2 * b_cos + b_1 * b_sin)
        tl.store(p_y + o_r, tl.reshape(b_y, (m_n.shape[0], 2 * BLOCK_C)).to(dtype), mask=m_x)
    else:
        o_c = tl.arange(0, BLOCK_C)[None, :]
        m_x = m_n & (o_c < C)
        b_1 = tl.load(p_x + o_c, mask=m_x, other=0.0).to(tl.float32)
        b_2 = tl.load(p_x + (C + o_c), mask=m_x, other=0.0).to(tl.float32)
        tl.store(p_y + o_c, (b_1 * b_cos - b_2 * b_sin).to(dtype), mask=m_x)
        tl.store(p_y + (C + o_c), (b_2 * b_cos + b_1 * b_sin).to(dtype), mask=m_x)


@triton.jit
def _copy(p_x, p_y, m_n, FIRST: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The columns from FIRST on of a block of heads, as they are; zeros without a source."""
    o_d = FIRST + tl.arange(0, BLOCK_D)[None, :]
    m_x = m_n & (o_d < D)
    if p_x is None:
        tl.store(p_y + o_d, tl.zeros([m_n.shape[0], BLOCK_D], dtype=p_y.dtype.scalar.element_ty), mask=m_x)
    else:
        tl.store(p_y + o_d, tl.load(p_x + o_d, mask=m_x, other=0.0), mask=m_x)


@triton.jit
def rope_fwd_kernel(
    p_q,
    p_k,
    p_cos,
    p_sin,
    stride_qb,
    stride_qs,
    stride_qn,
    stride_kb,
    stride_ks,
    stride_kn,
    N: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Grid (S, B): a program turns all heads of a token, in place."""
    i_s = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64)
    b_cos, b_sin = _load_angles(p_cos, p_sin, i_s, C, BLOCK_C, False)
    # A head may lie further than 2^31 elements from the next, where the sequence is the inner dimension.
    for i_n in range(0, N, BLOCK_N):
        o_n = (i_n + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        p_x = p_q + i_b * stride_qb + i_s * stride_qs + o_n * stride_qn
        _turn(p_x, p_x, o_n < N, b_cos, b_sin, C, BLOCK_C, INTERLEAVED)
    for i_n in range(0, K, BLOCK_N):
        o_n = (i_n + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        p_x = p_k + i_b * stride_kb + i_s * stride_ks + o_n * stride_kn
        _turn(p_x, p_x, o_n < K, b_cos, b_sin, C, BLOCK_C, INTERLEAVED)


@triton.jit
def rope_new_kernel(
    p_q,
    p_k,
    p_v,
    p_cos,
    p_sin,
    p_qy,
    p_kvy,
    stride_qb,
    stride_qs,
    stride_qn,
    stride_kb,
    stride_ks,
    stride_kn,
    stride_vb,
    stride_vs,
    stride_vn,
    N: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """The same into new tensors [B, S, N, D] and [B, S, K, P, D]: the backward pass, and the compilers' forward pass.

    Without queries none are written; missing keys or values are zeros, as absent gradients are.
    """
    i_s = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64)
    i_t = i_b * tl.num_programs(0) + i_s
    b_cos, b_sin = _load_angles(p_cos, p_sin, i_s, C, BLOCK_C, INVERSE)
    if p_q is not None:
        for i_n in range(0, N, BLOCK_N):
            o_n = (i_n + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
            p_x = p_q + i_b * stride_qb + i_s * stride_qs + o_n * stride_qn
            p_y = p_qy + (i_t * N + o_n) * D
            _turn(p_x, p_y, o_n < N, b_cos, b_sin, C, BLOCK_C, INTERLEAVED)
            if 2 * C < D:
                _copy(p_x, p_y, o_n < N, 2 * C, D, BLOCK_REST)
    for i_n in range(0, K, BLOCK_N):
        o_n = (i_n + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        p_y = p_kvy + (i_t * K + o_n) * (P * D)
        if p_k is None:
            _copy(None, p_y, o_n < K, 0, D, BLOCK_D)
        else:
            p_x = p_k + i_b * stride_kb + i_s * stride_ks + o_n * stride_kn
            _turn(p_x, p_y, o_n < K, b_cos, b_sin, C, BLOCK_C, INTERLEAVED)
            if 2 * C < D:
                _copy(p_x, p_y, o_n < K, 2 * C, D, BLOCK_REST)
        if P == 2:
            if p_v is None:
                _copy(None, p_y + D, o_n < K, 0, D, BLOCK_D)
            else:
                p_x = p_v + i_b * stride_vb + i_s * stride_vs + o_n * stride_vn
                _copy(p_x, p_y + D, o_n < K, 0, D, BLOCK_D)


def _check(q: torch.Tensor, kv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    if q.dim() != 4 or kv.dim() != 5 or kv.shape[:2] != q.shape[:2] or kv.shape[4] != q.shape[3]:
        raise ValueError(
            f"rope_: q has shape {tuple(q.shape)} and kv {tuple(kv.shape)}, must be [B, S, N, D] and [B, S, K, P, D]"
        )
    (B, S, _, D), P, R = q.shape, kv.shape[3], cos.shape[-1]
    if P not in (1, 2):
        raise ValueError(f"rope_: kv has {P} parts to a head, must have 1 (keys) or 2 (keys and values)")
    if q.dtype not in DTYPES or kv.dtype != q.dtype:
        raise ValueError(f"rope_: q is {q.dtype} and kv {kv.dtype}; both must be float16, bfloat16 or float32")
    if cos.shape != (S, R) or sin.shape != (S, R) or R % 2 != 0 or not 2 <= R <= D:
        raise ValueError(
            f"rope_: cos has shape {tuple(cos.shape)} and sin {tuple(sin.shape)}, must be [{S}, R] with R even, 2..{D}"
        )
    if cos.dtype not in (torch.float32, q.dtype) or sin.dtype != cos.dtype:
        raise ValueError(f"rope_: cos is {cos.dtype} and sin {sin.dtype}; both must be float32 or q's {q.dtype}")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("rope_: cos or sin requires a gradient, the kernel has none for them")
    if D > MAX_HEAD_DIM or B > MAX_BATCH:
        raise ValueError(f"rope_: D={D} or B={B} exceeds the kernel's {MAX_HEAD_DIM} or {MAX_BATCH}")


def _check_in_place(name: str, x: torch.Tensor) -> None:
    """What autograd would say of a write in place that it knew of, and torch of memory that overlaps."""
    if x.stride(-1) != 1:
        raise ValueError(f"rope_: columns of {name} are {x.stride(-1)} elements apart, must touch")
    if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
        raise ValueError(f"rope_: {name} is expanded, elements that share memory cannot be overwritten: clone it")
    base = x if x._base is None else x._base
    if torch.is_grad_enabled() and base.is_leaf and base.requires_grad:
        raise ValueError(f"rope_: {name} is a leaf that requires a gradient, or a view of one: clone it")


def _blocks(num_heads: int, head_dim: int, num_pairs: int, device: torch.device | None = None) -> dict[str, int]:
    block_d = triton.next_power_of_2(head_dim)
    launch = pick("rope", block_d * triton.next_power_of_2(num_heads), device)
    return {
        "BLOCK_N": max(launch.block // block_d, 1),
        "BLOCK_C": triton.next_power_of_2(num_pairs),
        "num_warps": launch.num_warps,
    }


def _rotate_(
    q_BSND: torch.Tensor, k_BSKD: torch.Tensor, cos_SR: torch.Tensor, sin_SR: torch.Tensor, interleaved: bool
) -> None:
    (B, S, N, D), K, C = q_BSND.shape, k_BSKD.shape[2], cos_SR.shape[1] // 2
    if B * S * (N + K) == 0:
        return
    rope_fwd_kernel[(S, B)](
        q_BSND,
        k_BSKD,
        cos_SR.contiguous(),
        sin_SR.contiguous(),
        *q_BSND.stride()[:3],
        *k_BSKD.stride()[:3],
        N=N,
        K=K,
        C=C,
        INTERLEAVED=interleaved,
        **_blocks(max(N, K), D, C, q_BSND.device),
    )


def _rotated(
    q_BSND: torch.Tensor | None,
    k_BSKD: torch.Tensor | None,
    v_BSKD: torch.Tensor | None,
    cos_SR: torch.Tensor,
    sin_SR: torch.Tensor,
    P: int,
    interleaved: bool,
    inverse: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """New queries [B, S, N, D], and new keys and values [B, S, K, P, D]; None for what is not given."""
    q_BSND, k_BSKD, v_BSKD = (_touching(x) for x in (q_BSND, k_BSKD, v_BSKD))
    heads = v_BSKD if k_BSKD is None else k_BSKD
    some = next(x for x in (q_BSND, k_BSKD, v_BSKD) if x is not None)
    (B, S, _, D), C = some.shape, cos_SR.shape[1] // 2
    N, K = (0 if x is None else x.shape[2] for x in (q_BSND, heads))
    new_q = None if q_BSND is None else torch.empty(B, S, N, D, dtype=some.dtype, device=some.device)
    new_kv = None if heads is None else torch.empty(B, S, K, P, D, dtype=some.dtype, device=some.device)
    if B * S * (N + K) == 0:
        return new_q, new_kv
    rope_new_kernel[(S, B)](
        q_BSND,
        k_BSKD,
        v_BSKD,
        cos_SR.contiguous(),
        sin_SR.contiguous(),
        new_q,
        new_kv,
        *(stride for x in (q_BSND, k_BSKD, v_BSKD) for stride in ((0, 0, 0) if x is None else x.stride()[:3])),
        N=N,
        K=K,
        P=P,
        D=D,
        C=C,
        BLOCK_D=triton.next_power_of_2(D),
        BLOCK_REST=triton.next_power_of_2(max(D - 2 * C, 1)),
        INTERLEAVED=interleaved,
        INVERSE=inverse,
        **_blocks(max(N, K), D, C, some.device),
    )
    return new_q, new_kv


def _touching(x: torch.Tensor | None) -> torch.Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


class _RoPE(torch.autograd.Function):
    """Gives gradients through what it returns, whether or not it overwrites q and the keys in kv.

    `mark_dirty` would make q itself the output, but autograd refuses it for views, which a projection's heads are, in a
    function with several outputs. So what is overwritten is returned as views, and version counters tell of the write.
    """

    @staticmethod
    def forward(ctx, q, kv, cos, sin, interleaved, in_place):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cos, sin)
        ctx.num_parts, ctx.interleaved = kv.shape[3], interleaved
        if not in_place:
            k, *v = kv.unbind(-2)
            new_q, new_k = _rotated(q, k, None, cos, sin, 1, interleaved, inverse=False)
            return new_q, new_k.squeeze(-2), *v
        _rotate_(q, kv[..., 0, :], cos, sin, interleaved)
        # Before the views are made: a view older than the last write would be taken for a part of its base's history.
        torch.autograd.graph.increment_version([x for x in (q, kv) if not x.is_inference()])
        return q, *kv.unbind(-2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk, dv=None):
        needs_q, needs_kv, *_ = ctx.needs_input_grad
        dq = dq if needs_q else None
        dk, dv = (dk, dv) if needs_kv else (None, None)
        if dq is None and dk is None and dv is None:
            return None, None, None, None, None, None
        dq, dkv = _rotated(dq, dk, dv, *ctx.saved_tensors, ctx.num_parts, ctx.interleaved, inverse=True)
        return dq, dkv, None, None, None, None


@torch.library.custom_op("megagrow_kernels::rope", mutates_args=())
def _rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """For compilers, which undo writes in place: new queries and keys. It is its own backward pass."""
    new_q, new_kv = _rotated(q, k, None, cos, sin, 1, interleaved, inverse)
    assert new_q is not None and new_kv is not None  # since both are given
    return new_q, new_kv.squeeze(-2)


@_rope.register_fake
def _(q, k, cos, sin, interleaved, inverse):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _keep_angles(ctx, inputs, output):
    _, _, cos, sin, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _turn_back(ctx, dq, dk):
    dq, dk = _rope(dq, dk, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse)
    return dq, dk, None, None, None, None


_rope.register_autograd(_turn_back, setup_context=_keep_angles)


def rope_(
    q_BSND: torch.Tensor,
    kv_BSKPD: torch.Tensor,
    cos_SR: torch.Tensor,
    sin_SR: torch.Tensor,
    interleaved: bool = False,
    in_place: bool = True,
) -> tuple[torch.Tensor, ...]:
    """Turns queries and keys by the angles of their positions, in place; computed in float32.

    What is returned is differentiable; q and kv themselves are not to be used any more. Compiled, they keep their
    values as with `in_place=False`: a compiler has no use for the write.

    Args:
        q_BSND: float16, bfloat16 or float32; the columns of a head touch, other strides are free.
        kv_BSKPD: of q's dtype, keys (P = 1), or keys and values (P = 2), of which the values stay as they are.
        cos_SR, sin_SR: float32 or of q's dtype; of R/2 angles per position, twice over. R is even, and the columns from
            R on stay as they are.
        interleaved: pairs columns 2i and 2i + 1, as RoFormer and GPT-J; else i and i + R/2, as Hugging Face's Llama.
        in_place: if not, q and k are new tensors, for as many bytes but more memory: where someone keeps the arguments,
            as selective recomputation keeps the results of projections.

    Returns:
        (q, k) or (q, k, v) with k and v [B, S, K, D]; in place all are views of the arguments, else v is.

    Raises:
        ValueError: a shape, dtype or stride does not fit, or autograd does not allow the write, in one line.
    """
    _check(q_BSND, kv_BSKPD, cos_SR, sin_SR)
    if torch.compiler.is_compiling():
        k_BSKD, *v_BSKD = kv_BSKPD.unbind(-2)
        return *_rope(q_BSND, k_BSKD, cos_SR, sin_SR, interleaved, False), *v_BSKD
    if in_place:
        _check_in_place("q", q_BSND)
        _check_in_place("kv", kv_BSKPD)
    return _RoPE.apply(q_BSND, kv_BSKPD, cos_SR, sin_SR, interleaved, in_place)
