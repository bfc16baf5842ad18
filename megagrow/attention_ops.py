"""Softmax attention by one of several back ends; `ops` hands on what is public here.

Everything here sees plain local tensors. The queries may be fewer than the keys: they are then the last ones of the
keys' positions, so that a causal mask is aligned to the lower right.

Legend: B = batch, S = query positions, T = key positions (S <= T), N = query heads, K = key/value heads (K divides N),
D = head dimension, I = blocks of queries, J = blocks of keys.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention

from megagrow import cpu_ops
from megagrow.errors import ConfigError

# Of documents: in blocks for FlexAttention, or whole [B, 1, S, T], true where a query sees a key.
DocumentMask = BlockMask | Tensor

HALF_DTYPES = (torch.float16, torch.bfloat16)
FLEX_DTYPES = (*HALF_DTYPES, torch.float32)
FLEX_MIN_HEAD_DIM = 16  # of FlexAttention's Triton kernels
MASK_BLOCK = 128  # positions; FlexAttention's default, which all of its kernels' tiles divide
# The versions that a function is compiled in: FlexAttention's of source, target and teacher, each with and without
# gradients, for every pair of lengths. torch's limit of 8 is soon reached, and what follows would run unfused.
VERSIONS = 64


def check_attention_backend(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """Makes sure that attention can run before anything is built.

    Args:
        backend: `sdpa` or `flash_attn`.
        dtype: of compute.
        device: of compute.

    Raises:
        ConfigError: the back end is not installed, does not load, or does not serve these tensors.
    """
    if backend == "sdpa":
        return
    for problem in (_flash_device_problem(dtype, device), _flash_import_problem()):
        if problem:
            raise ConfigError(f"train.attention=flash_attn {problem}, or use train.attention=sdpa")


def attention(
    q_BNSD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    causal: bool = True,
    documents: DocumentMask | tuple[Tensor, Tensor] | None = None,
    backend: str = "sdpa",
) -> Tensor:
    """Softmax attention with scale 1/sqrt(D); query head n reads key/value head n * K // N.

    Args:
        q_BNSD: queries.
        k_BKTD, v_BKTD: keys and values.
        causal: the queries are the last S of the T positions, and each sees positions up to its own only.
        documents: queries see keys of their own document only: `document_mask(…)`, built once for all layers with the
            same `causal`, or what that is built from, the pair (query_documents_BS, key_documents_BT).
        backend: `sdpa`: torch's own kernels, FlexAttention for documents on a GPU, our own on a CPU. `flash_attn`: that
            package; without documents, 16-bit tensors on a GPU only.

    Returns:
        [B, N, S, D]
    """
    assert not causal or q_BNSD.shape[2] <= k_BKTD.shape[2], "causal queries are the last ones of the keys' positions"
    if backend == "flash_attn":
        assert documents is None, "flash_attn takes no documents here"
        return _flash_attention(q_BNSD, k_BKTD, v_BKTD, causal)
    if documents is None and causal and q_BNSD.device.type == "cpu":
        return cpu_ops.causal_attention(q_BNSD, k_BKTD, v_BKTD)
    if documents is None:
        return _sdpa(q_BNSD, k_BKTD, v_BKTD, causal)
    mask = document_mask(*documents, causal=causal) if isinstance(documents, tuple) else documents
    return _masked_attention(q_BNSD, k_BKTD, v_BKTD, mask)


def document_mask(query_documents_BS: Tensor, key_documents_BT: Tensor, causal: bool = True) -> DocumentMask:
    """Which keys each query sees: those of its own document and, if `causal`, not after it.

    Args:
        query_documents_BS: integer; the document of every query, these being the last S of the T positions.
        key_documents_BT: of every key.
        causal: as `attention` will be told.

    Returns:
        What `attention` takes as `documents`; on a GPU of size B·S·T / 128², elsewhere B·S·T.
    """
    if query_documents_BS.is_cuda:
        return _block_mask(query_documents_BS, key_documents_BT, causal)
    visible_BST = query_documents_BS[:, :, None] == key_documents_BT[:, None, :]
    if causal:
        visible_BST &= _lower_right(visible_BST.shape[1], visible_BST.shape[2], visible_BST.device)
    return visible_BST[:, None]


def _sdpa(q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, causal: bool, mask: Tensor | None = None) -> Tensor:
    k_BKTD, v_BKTD = _heads_for_fused_kernel(q_BNSD, k_BKTD), _heads_for_fused_kernel(q_BNSD, v_BKTD)
    grouped = q_BNSD.shape[1] != k_BKTD.shape[1]
    S, T = q_BNSD.shape[2], k_BKTD.shape[2]
    if causal and S < T:  # `is_causal` would be aligned to the upper left
        if q_BNSD.is_cuda:
            return _sdpa_lower_right(q_BNSD, k_BKTD, v_BKTD, grouped)
        mask, causal = _lower_right(S, T, q_BNSD.device), False
    return F.scaled_dot_product_attention(q_BNSD, k_BKTD, v_BKTD, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


@torch.compiler.disable  # Dynamo cannot make the tensor subclass that stands for the mask
def _sdpa_lower_right(q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, grouped: bool) -> Tensor:
    """Without a mask in memory: a GPU's fused kernels can align to the lower right by themselves."""
    mask = causal_lower_right(q_BNSD.shape[2], k_BKTD.shape[2])
    return F.scaled_dot_product_attention(q_BNSD, k_BKTD, v_BKTD, attn_mask=mask, enable_gqa=grouped)


def _masked_attention(q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: DocumentMask) -> Tensor:
    if isinstance(mask, Tensor):
        return _sdpa(q_BNSD, k_BKTD, v_BKTD, causal=False, mask=mask)
    if q_BNSD.dtype not in FLEX_DTYPES or q_BNSD.shape[3] < FLEX_MIN_HEAD_DIM:
        B, S, T = len(q_BNSD), q_BNSD.shape[2], k_BKTD.shape[2]
        visible_B1ST = create_mask(mask.mask_mod, B, 1, S, T, device=str(q_BNSD.device))
        return _sdpa(q_BNSD, k_BKTD, v_BKTD, causal=False, mask=visible_B1ST)
    # Inside a compiled block it is compiled with it.
    flex: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    grouped = q_BNSD.shape[1] != k_BKTD.shape[1]
    return flex(q_BNSD, k_BKTD, v_BKTD, block_mask=mask, enable_gqa=grouped)


def _flash_attention(q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, causal: bool) -> Tensor:
    y_BSND = _flash_attn_func()(
        q_BNSD.transpose(1, 2),
        k_BKTD.transpose(1, 2),
        v_BKTD.transpose(1, 2),
        softmax_scale=q_BNSD.shape[3] ** -0.5,
        causal=causal,  # aligned to the lower right, since flash-attn 2.1
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return y_BSND.transpose(1, 2)


def _lower_right(S: int, T: int, device: torch.device) -> Tensor:
    return torch.ones(S, T, dtype=torch.bool, device=device).tril(T - S)


def _heads_for_fused_kernel(q_BNSD: Tensor, x_BKTD: Tensor) -> Tensor:
    """Keys or values, repeated for each query head where a GPU would otherwise hold all scores in memory.

    Only FlashAttention takes grouped heads there (torch 2.13), and only in 16 bits.
    """
    if not q_BNSD.is_cuda or q_BNSD.dtype in HALF_DTYPES:
        return x_BKTD
    return x_BKTD.repeat_interleave(q_BNSD.shape[1] // x_BKTD.shape[1], dim=1)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    allow_versions()
    return torch.compile(flex_attention, fullgraph=True)


def allow_versions() -> None:
    """Lets torch compile a function `VERSIONS` times in this process."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VERSIONS)


def _block_mask(query_documents_BS: Tensor, key_documents_BT: Tensor, causal: bool) -> BlockMask:
    """The mask in blocks, from the range of documents of each; torch's own way goes through all S·T pairs.

    A block whose ranges overlap is kept and masked in detail, whatever the order of documents; one whose ranges are the
    same single document, and which the diagonal does not cut, is kept whole.
    """
    S, T = query_documents_BS.shape[1], key_documents_BT.shape[1]
    offset = T - S

    def visible(b: Tensor, h: Tensor, s: Tensor, t: Tensor) -> Tensor:
        same = query_documents_BS[b, s] == key_documents_BT[b, t]
        return same & (t <= s + offset) if causal else same

    low_BI1, high_BI1 = (x_BI[:, :, None] for x_BI in _document_ranges(query_documents_BS))
    low_B1J, high_B1J = (x_BJ[:, None, :] for x_BJ in _document_ranges(key_documents_BT))
    needed_BIJ = (low_BI1 <= high_B1J) & (low_B1J <= high_BI1)
    whole_BIJ = (low_BI1 == high_BI1) & (low_B1J == high_B1J) & needed_BIJ
    first_I1 = MASK_BLOCK * torch.arange(needed_BIJ.shape[1], device=needed_BIJ.device)[:, None]
    first_J = MASK_BLOCK * torch.arange(needed_BIJ.shape[2], device=needed_BIJ.device)
    last_I1, last_J = first_I1 + MASK_BLOCK - 1, first_J + MASK_BLOCK - 1
    whole_BIJ &= (last_I1 < S) & (last_J < T)
    if causal:
        needed_BIJ &= first_J <= last_I1 + offset
        whole_BIJ &= last_J <= first_I1 + offset
    return BlockMask.from_kv_blocks(
        *_in_order(needed_BIJ & ~whole_BIJ),
        *_in_order(whole_BIJ),
        BLOCK_SIZE=MASK_BLOCK,
        mask_mod=visible,
        seq_lengths=(S, T),
    )


def _document_ranges(documents_BS: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and the highest document of every block of positions, the last block being filled up."""
    missing = -documents_BS.shape[1] % MASK_BLOCK
    filled_BS = torch.cat((documents_BS, documents_BS[:, -1:].expand(-1, missing)), dim=1)
    low_BI, high_BI = filled_BS.unflatten(1, (-1, MASK_BLOCK)).aminmax(dim=2)
    return low_BI, high_BI


def _in_order(chosen_BIJ: Tensor) -> tuple[Tensor, Tensor]:
    """Per row of blocks, for all heads: how many are chosen, and their indices before those of the others."""
    chosen_B1IJ = chosen_BIJ[:, None].to(torch.int8)
    order_B1IJ = chosen_B1IJ.argsort(dim=-1, descending=True, stable=True)
    return chosen_B1IJ.sum(-1, dtype=torch.int32), order_B1IJ.to(torch.int32)


def _flash_device_problem(dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"runs on GPUs, not on the {device.type}; start the run where one is visible"
    if dtype not in HALF_DTYPES:
        return f"does not compute in {str(dtype).removeprefix('torch.')}; use train.precision=bf16"
    return None


def _flash_import_problem() -> str | None:
    remedy = "pip install flash-attn --no-build-isolation"
    try:
        _flash_attn_func()
    except ModuleNotFoundError as error:
        if error.name == "flash_attn":
            return f"needs the package flash-attn; build it with: {remedy}"
        return f"needs {error.name}, which is not installed; install it, or build anew: {remedy}"
    except Exception as error:  # a build for another torch fails in many ways
        return f"does not load ({' '.join(str(error).split())}); build it for this torch: {remedy}"
    return None


def _flash_attn_func() -> Callable[..., Tensor]:
    from flash_attn import flash_attn_func

    return flash_attn_func
