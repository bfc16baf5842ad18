"""The one door to the kernels: Triton for tensors on a GPU, a PyTorch twin elsewhere.

Everything here sees plain local tensors and no process group. The twins are in torch_ops.py, by the same names and with
the same parameters. Attention and its back ends are in attention_ops.py.

Legend: T = tokens, V = local vocabulary, H = hidden size, B = batch, S = sequence, N = heads, D = head dimension,
F = FFN size, 3 = (max, sum_exp, label_logit).
"""

import functools
import importlib.util
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from megagrow import cpu_ops, torch_ops
from megagrow.attention_ops import DocumentMask, attention, check_attention_backend, document_mask

__all__ = [
    "DocumentMask",
    "add_product_",
    "attention",
    "check_attention_backend",
    "compiled",
    "compiled_vocab_grad_",
    "compiled_vocab_stats",
    "document_mask",
    "gate_up_rows",
    "gelu",
    "layer_norm",
    "let_kernels_serve",
    "linear",
    "product",
    "rms_norm",
    "rope",
    "swiglu",
    "vocab_grad_",
    "vocab_rank",
    "vocab_stats",
]

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def _installed_kernels() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        import megagrow_kernels
    except (ImportError, OSError, RuntimeError) as error:
        warnings.warn(f"Triton does not load ({error}): PyTorch replaces kernels", stacklevel=2)
        return None
    return megagrow_kernels


_kernels_serve = True


def let_kernels_serve(serve: bool) -> None:
    """Whether the kernels serve at all, as they do from the start; for measurements of what they bring."""
    global _kernels_serve
    _kernels_serve = serve


def _kernels(x: Tensor) -> ModuleType | None:
    """`megagrow_kernels` if they can serve `x`; None where the twin has to."""
    return _installed_kernels() if _kernels_serve and x.is_cuda and x.dtype in KERNEL_DTYPES else None


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: None = None) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square norm over the last dimension, times `weight`; float32 statistics at least.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4, with eps
    inside the root.

    Args:
        x: [..., H]; the output has its dtype.
        weight: [H], any floating dtype.
        eps: added to the mean square.
        residual: like x in shape and dtype; added to it before the norm.

    Returns:
        y of x's shape; with a residual the pair (y, x + residual).
    """
    kernels = _kernels(x)
    if kernels is None:
        return torch_ops.rms_norm(x, weight, eps, residual)
    return kernels.rms_norm(x, weight, eps, residual)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm over the last dimension of x [..., H], times `weight` [H], plus `bias` [H]."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def vocab_stats(logits_TV: Tensor, labels_T: Tensor, num_valid: int | None = None) -> Tensor:
    """Maximum, sum of exponentials and label logit of every token over one vocabulary shard.

    Not differentiable: `vocab_grad_` is the gradient. The statistics of shards r merge as

        max = max_r max_r                   sum_exp = sum_r sum_exp_r * exp(max_r - max)
        label_logit = sum_r label_logit_r

    and then logsumexp = max + log(sum_exp), loss = logsumexp - label_logit.

    Args:
        logits_TV: floating; rows may be strided.
        labels_T: int64, local column of the label; any index outside 0..num_valid - 1 means that
            the label is on another shard, or ignored.
        num_valid: columns from here on are padding and count as -inf; default: all are valid.

    Returns:
        stats_T3, float32 (float64 for float64 logits): (max, sum of exp(logit - max), label logit).
        Without a label here the last is 0; without any valid column the first two are (-inf, 0).
    """
    kernels = _kernels(logits_TV)
    if kernels is None:
        return torch_ops.vocab_stats(logits_TV, labels_T, num_valid)
    return kernels.vocab_stats(logits_TV, labels_T, num_valid)


def vocab_rank(logits_TV: Tensor, label_logits_T: Tensor, labels_T: Tensor, num_valid: int | None = None) -> Tensor:
    """Number of local logits strictly greater than the label's; the sum over shards is its rank.

    The label's own column is skipped: a label logit that went through other arithmetic would
    otherwise count itself.

    Args:
        logits_TV, labels_T, num_valid: as in `vocab_stats`.
        label_logits_T: the label logit of every token, summed over the shards; in the dtype of the
            statistics.

    Returns:
        rank_T int32.
    """
    kernels = _kernels(logits_TV)
    if kernels is None:
        return torch_ops.vocab_rank(logits_TV, label_logits_T, labels_T, num_valid)
    return kernels.vocab_rank(logits_TV, label_logits_T, labels_T, num_valid)


def vocab_grad_(
    logits_TV: Tensor,
    labels_T: Tensor,
    logsumexp_T: Tensor,
    scale_T: Tensor,
    num_valid: int | None = None,
) -> Tensor:
    """Overwrites logits with the gradient of sum(scale * loss): scale * (softmax - onehot(label)).

    Args:
        logits_TV, labels_T, num_valid: as in `vocab_stats`; padding columns become 0.
        logsumexp_T: over the whole vocabulary, in the dtype of the statistics.
        scale_T: weight of every token's loss, in the dtype of the statistics; 0 for ignored ones.

    Returns:
        logits_TV itself.
    """
    kernels = _kernels(logits_TV)
    if kernels is None:
        return torch_ops.vocab_grad_(logits_TV, labels_T, logsumexp_T, scale_T, num_valid)
    return kernels.vocab_grad_(logits_TV, labels_T, logsumexp_T, scale_T, num_valid)


def compiled_vocab_stats(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """`vocab_stats`, in one pass that torch.compile makes where no kernel serves."""
    if _kernels(logits_TV) is not None or logits_TV.numel() == 0:
        return vocab_stats(logits_TV, labels_T)
    return compiled(torch_ops.stats_of_rows)(logits_TV, labels_T)


def compiled_vocab_grad_(logits_TV: Tensor, labels_T: Tensor, logsumexp_T: Tensor, scale_T: Tensor) -> Tensor:
    """`vocab_grad_`, likewise."""
    if _kernels(logits_TV) is not None or logits_TV.numel() == 0:
        return vocab_grad_(logits_TV, labels_T, logsumexp_T, scale_T)
    compiled(torch_ops.write_vocab_grad)(logits_TV, labels_T, logsumexp_T, scale_T)
    return logits_TV


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of a function, one for all who ask: what calls it with equal shapes shares its code."""
    return torch.compile(function)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·weightᵀ + bias.

    Args:
        x: [..., in]
        weight: [out, in]
        bias: [out] or None.
    """
    if not cpu_ops.serves_product(x, weight):
        return F.linear(x, weight, bias)
    y = cpu_ops.product(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def product(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """a·bᵀ [M, N]."""
    return cpu_ops.product(a_MK, b_NK) if cpu_ops.serves_product(a_MK, b_NK) else torch.mm(a_MK, b_NK.T)


@torch.no_grad()
def add_product_(total_MN: Tensor, a_MK: Tensor, b_NK: Tensor, is_first: bool = False) -> None:
    """total += a·bᵀ, or for the first total = a·bᵀ; the total may have a wider dtype."""
    add = Tensor.copy_ if is_first else Tensor.add_
    num_rows = cpu_ops.PIECE_ROWS if total_MN.device.type == "cpu" else max(len(total_MN), 1)
    for total_RN, a_RK in zip(total_MN.split(num_rows), a_MK.split(num_rows), strict=True):
        add(total_RN, product(a_RK, b_NK))


def gate_up_rows(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The fused weight or bias of gate and up in the dtype of compute, its rows ordered as `swiglu` wants the columns.

    Args:
        weight: [2 F, ...], gate in even rows, up in odd ones.

    Returns:
        On a CPU, which reads every second column at a tenth of its speed, all of gate before all of up; elsewhere as
        they are.
    """
    if torch_ops.alternates(weight):
        return weight.to(dtype)
    separate = weight.unflatten(0, (-1, 2)).transpose(0, 1)
    return separate.to(dtype, memory_format=torch.contiguous_format).flatten(0, 1)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020), equation 5.

    Args:
        gate_up: [..., 2 F], columns as `gate_up_rows` orders them.

    Returns:
        [..., F]
    """
    return torch_ops.swiglu(gate_up)


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh approximation, as in GPT-2."""
    return torch_ops.gelu(x)


def rope(x_BSND: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    """Rotary position embedding in Hugging Face's layout for Llama: columns i and i + D/2 pair.

    Source: Su et al., "RoFormer" (2021), equation 34, which pairs 2i and 2i + 1 instead.

    Args:
        x_BSND: queries or keys, D even.
        cos_SD, sin_SD: of the angles of every position, the D/2 of them twice over; float32 ones
            round the result to x's dtype once, ones of x's dtype give Hugging Face's bits.
    """
    return torch_ops.rope(x_BSND, cos_SD, sin_SD)
