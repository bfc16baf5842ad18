"""What a teacher says of the next token, in a few tokens of each position: the likeliest ones, or draws.

Both work on vocabulary shards, chunked over tokens, and give every tensor rank the same. Which of several equal logits
belongs to the top is decided by the lower id.
"""

# Shape suffix legend: T = tokens, C = tokens of a chunk, H = hidden, V = local vocabulary rows, N = columns in
# ascending order of ids, R = tensor ranks, K = entries of a token.

from collections.abc import Iterator

import torch
from torch import Tensor

from megagrow import ops
from megagrow.parallel.collectives import sum_over
from megagrow.parallel.mesh import Axis
from megagrow.parallel.vocab_shard import VocabShard


@torch.no_grad()
def top_tokens(
    hidden_TH: Tensor,
    head_VH: Tensor,
    count: int,
    temperature: float,
    vocab_size: int,
    tp: Axis,
    *,
    head_bias: Tensor | None = None,
    chunk_tokens: int = 256,
) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` likeliest tokens of each position, the mass of the others, without gradients.

    Args:
        hidden_TH, head_VH, vocab_size, tp, head_bias: as in `loss.vocab_parallel_loss`.
        count: at most vocab_size.
        temperature: by which logits are divided.
        chunk_tokens: tokens whose logits exist at a time.

    Returns:
        ids_TK int64, the likeliest first, of equal ones the lower id; log_probs_TK; tail_T, the log of the mass of all
        other tokens, -inf where there are none.
    """
    shard, found = VocabShard(tp, vocab_size), []
    for soft_CV in _soft_logits(hidden_TH, head_VH, head_bias, temperature, chunk_tokens):
        values_CN, columns_CN = _top(soft_CV, min(count, soft_CV.shape[1]))
        values_CK, ids_CK = _merged_top(values_CN, columns_CN + shard.vocab.start, count, vocab_size, shard)
        lse_C = _logsumexp(soft_CV, shard)
        shard.entries(ids_CK).blank_(soft_CV)
        found.append((ids_CK, values_CK - lse_C[:, None], _logsumexp(soft_CV, shard) - lse_C))
        del soft_CV  # before the next chunk's exist
    ids, log_probs, tails = zip(*found, strict=True)
    return torch.cat(ids), torch.cat(log_probs), torch.cat(tails)


@torch.no_grad()
def drawn_tokens(
    hidden_TH: Tensor,
    head_VH: Tensor,
    count: int,
    temperature: float,
    uniform_T: Tensor,
    vocab_size: int,
    tp: Axis,
    *,
    head_bias: Tensor | None = None,
    chunk_tokens: int = 256,
) -> tuple[Tensor, Tensor]:
    """`count` draws from the distribution of each position, and its entropy, without gradients.

    One number places all draws of a position, at equal distances (systematic sampling; Madow & Madow, 1944): each token
    comes as often as its probability says on average, and at most one time more or less.

    Args:
        uniform_T: float64 in [0, 1), a random number for each position; with 32 bits or fewer.
        hidden_TH, head_VH, temperature, vocab_size, tp, head_bias, chunk_tokens: as in `top_tokens`.

    Returns:
        ids_TK int64, ascending, with repeats; entropy_T in nats.
    """
    shard, found = VocabShard(tp, vocab_size), []
    places_K = torch.arange(count, dtype=torch.float64, device=hidden_TH.device)
    chunks = _soft_logits(hidden_TH, head_VH, head_bias, temperature, chunk_tokens)
    for soft_CV, uniform_C in zip(chunks, uniform_T.split(chunk_tokens), strict=True):
        mass_CV = (soft_CV - _logsumexp(soft_CV, shard)[:, None]).double().exp()
        expected_C1 = torch.special.entr(mass_CV).sum(-1, keepdim=True)
        ids_CK = _at_quantiles(mass_CV.cumsum(-1), (uniform_C[:, None] + places_K) / count, shard)
        found.append((ids_CK, shard.of_all_ranks(expected_C1).sum(0)[:, 0]))
        del soft_CV, mass_CV  # before the next chunk's exist
    ids, entropies = zip(*found, strict=True)
    return torch.cat(ids), torch.cat(entropies)


def _soft_logits(
    hidden_TH: Tensor, head_VH: Tensor, bias_V: Tensor | None, temperature: float, chunk_tokens: int
) -> Iterator[Tensor]:
    """Logits of a chunk by the temperature, in at least float32."""
    head = head_VH.to(hidden_TH.dtype)
    for hidden_CH in hidden_TH.split(chunk_tokens):
        logits_CV = ops.product(hidden_CH, head)
        logits_CV = logits_CV if bias_V is None else logits_CV.add_(bias_V)
        logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32)).div_(temperature)
        yield logits_CV
        del logits_CV


def _logsumexp(soft_CV: Tensor, shard: VocabShard) -> Tensor:
    """Over all ranks; -inf where nothing is left."""
    own_C = soft_CV.logsumexp(-1) if soft_CV.shape[1] else soft_CV.new_full((len(soft_CV),), -torch.inf)
    return shard.of_all_ranks(own_C[:, None])[..., 0].logsumexp(0)


def _top(values_CN: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest values and their columns, in the order of the columns; of equal ones the first columns."""
    if count == 0:
        return values_CN[:, :0], torch.empty_like(values_CN[:, :0], dtype=torch.int64)
    largest_CK, columns_CK = values_CN.topk(count)
    least_C1 = largest_CK[:, -1:]
    is_equal_CN = values_CN == least_C1
    num_taken_C1 = (largest_CK == least_C1).sum(-1, keepdim=True)
    if (is_equal_CN.sum(-1, keepdim=True) > num_taken_C1).any():
        is_surplus_CN = is_equal_CN & (is_equal_CN.cumsum(-1) > num_taken_C1)
        columns_CK = values_CN.masked_fill(is_surplus_CN, -torch.inf).topk(count).indices
    columns_CK = columns_CK.sort(-1).values
    return values_CN.gather(1, columns_CK), columns_CK


def _merged_top(
    values_CN: Tensor, ids_CN: Tensor, count: int, vocab_size: int, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """The top of all ranks' tops, the largest first; of equal values the lower id."""
    num_missing = count - values_CN.shape[1]  # of a rank with fewer rows; never chosen, since all ranks have enough
    values_CK = torch.nn.functional.pad(values_CN, (0, num_missing), value=-torch.inf)
    ids_CK = torch.nn.functional.pad(ids_CN, (0, num_missing), value=vocab_size)
    # Ranks hold ascending rows, and each one's are in ascending order: so are all of them together.
    values_CN, ids_CN = (shard.of_all_ranks(x).transpose(0, 1).flatten(1) for x in (values_CK, ids_CK))
    values_CK, columns_CK = _top(values_CN, count)
    order_CK = values_CK.sort(dim=-1, descending=True, stable=True).indices
    return values_CK.gather(1, order_CK), ids_CN.gather(1, columns_CK).gather(1, order_CK)


def _at_quantiles(cumulative_CV: Tensor, places_CK: Tensor, shard: VocabShard) -> Tensor:
    """The tokens [C, K] in which the cumulative mass of the whole vocabulary passes shares of its end."""
    num_rows = cumulative_CV.shape[1]
    own_C1 = cumulative_CV[:, -1:] if num_rows else cumulative_CV.new_zeros(len(cumulative_CV), 1)
    ends_CR = shard.of_all_ranks(own_C1)[..., 0].T.contiguous().cumsum(-1)
    points_CK = places_CK * ends_CR[:, -1:]
    owner_CK = torch.searchsorted(ends_CR, points_CK, right=True).clamp(max=shard.tp.size - 1)
    begin_C1 = ends_CR[:, shard.tp.rank, None] - own_C1
    is_mine_CK = owner_CK == shard.tp.rank
    if not num_rows:
        return sum_over(torch.zeros_like(owner_CK), shard.tp)
    columns_CK = torch.searchsorted(cumulative_CV, points_CK - begin_C1, right=True).clamp(max=num_rows - 1)
    return sum_over(torch.where(is_mine_CK, columns_CK + shard.vocab.start, 0), shard.tp)
