"""Context parallelism: several ranks share each sequence, and attention sees all of it.

Every sequence is cut into 2·cp chunks, and rank r holds chunks r and 2·cp − 1 − r: under a causal mask an early chunk
has little to look at and a late one much, so that all ranks have the same work. (Without one any cut would do.)
Queries stay where they are; keys and values are gathered (with grouped heads they are the smaller part), and their
gradients summed back to their owners.

Source: Llama 3 (2024, arXiv 2407.21783), section 3.3.2, all-gather based context parallelism.
"""

# Shape suffix legend: B = batch, S = this rank's tokens, T = tokens of the whole sequence, N = query heads,
# K = key/value heads, D = head_dim.

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from megagrow import ops
from megagrow.parallel.collectives import gather_from
from megagrow.parallel.mesh import Axis


@lru_cache(maxsize=16)
def local_positions(seq_length: int, rank: int, size: int, device: torch.device) -> Tensor:
    """The positions [seq_length / size] of a context rank's tokens, in the order in which it holds them."""
    if size == 1:
        return torch.arange(seq_length, device=device)
    chunks = torch.arange(seq_length, device=device).chunk(2 * size)
    return torch.cat([chunks[i] for i in _chunks_of(rank, size)])


def cut(x: Tensor, cp: Axis) -> Tensor:
    """This rank's tokens of x [B, T, ...]."""
    if cp.size == 1:
        return x
    return x[:, local_positions(x.shape[1], cp.rank, cp.size, x.device)]


def document_masks(documents_BT: Tensor, cp: Axis, causal: bool = True) -> list[ops.DocumentMask]:
    """For each run of this rank's queries, which keys of the sequence they see: those of their own document.

    Args:
        documents_BT: the document of every token of the whole sequences.
        cp: the context axis.
        causal: earlier ones only, as `attention` will be told; else all of this rank's queries are one run.
    """
    if not causal:
        return [ops.document_mask(cut(documents_BT, cp), documents_BT, causal=False)]
    return [
        ops.document_mask(documents_BT[:, own], documents_BT[:, seen]) for own, seen in _runs(documents_BT.shape[1], cp)
    ]


def restarted_positions(documents_BT: Tensor) -> Tensor:
    """Positions [B, T] that begin at 0 with each document, and with each sample, from the documents of its tokens."""
    places_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    begins_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return places_T - (places_T * begins_BT).cummax(dim=1).values


def of_documents(documents_BT: Tensor | None, cp: Axis, mask: bool, reset: bool) -> dict[str, Tensor]:
    """What a model is told of documents: those of the whole sequences, and this context rank's positions in them.

    Args:
        documents_BT: the document of every token of the whole sequences; None: nothing depends on documents.
        cp: the context axis.
        mask: attention stays inside a document.
        reset: positions begin anew at each document.
    """
    if documents_BT is None:
        return {}
    given = {"documents": documents_BT} if mask else {}
    return given | ({"positions": cut(restarted_positions(documents_BT), cp).contiguous()} if reset else {})


def attention(
    q_BNSD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    cp: Axis,
    masks: Sequence[ops.DocumentMask] | None = None,
    backend: str = "sdpa",
    causal: bool = True,
) -> Tensor:
    """Attention of this rank's queries to the whole sequence, or to what comes before them.

    Args:
        q_BNSD, k_BKSD, v_BKSD: of this rank's tokens, rotated.
        cp: the context axis.
        masks: from `document_masks`; None: attention crosses documents.
        backend: see `ops.attention`.
        causal: whether a query sees no later positions.

    Returns:
        [B, N, S, D]
    """
    k_BKTD, v_BKTD = (k_BKSD, v_BKSD) if cp.size == 1 else _gather(torch.stack((k_BKSD, v_BKSD)), cp).unbind()
    if cp.size == 1 or not causal:
        return ops.attention(q_BNSD, k_BKTD, v_BKTD, causal, masks[0] if masks else None, backend)
    parts = []
    for i, (part_BNSD, (_, seen)) in enumerate(zip(q_BNSD.chunk(2, dim=2), _runs(k_BKTD.shape[2], cp), strict=True)):
        documents = masks[i] if masks else None
        parts.append(ops.attention(part_BNSD, k_BKTD[:, :, seen], v_BKTD[:, :, seen], True, documents, backend))
    return torch.cat(parts, dim=2)


def _runs(seq_length: int, cp: Axis) -> list[tuple[slice, slice]]:
    """For each chunk of this rank: where it stands in the sequence, and what it may look at."""
    if cp.size == 1:
        return [(slice(None), slice(None))]
    chunk = seq_length // (2 * cp.size)
    places = _chunks_of(cp.rank, cp.size)
    return [(slice(i * chunk, (i + 1) * chunk), slice(0, (i + 1) * chunk)) for i in places]


def _chunks_of(rank: int, size: int) -> tuple[int, int]:
    return rank, 2 * size - 1 - rank


def _gather(x_2BKSD: Tensor, cp: Axis) -> Tensor:
    """Keys and values of all ranks, in the order of the sequence."""
    chunks = gather_from(x_2BKSD, 3, cp).chunk(2 * cp.size, dim=3)
    places = [place for rank in range(cp.size) for place in _chunks_of(rank, cp.size)]
    return torch.cat([chunks[places.index(i)] for i in range(len(places))], dim=3)
