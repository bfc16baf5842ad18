"""Text from a trained model: a sample of what it has learned, or answers to many prompts."""

# Shape suffix legend: B = prompts, S = tokens so far, V = vocabulary.

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megagrow.checks import check_causal
from megagrow.config import require
from megagrow.data.tokenizer import Tokenizer
from megagrow.errors import DataError
from megagrow.model import Transformer

NOT_FINITE = "not finite: its weights are damaged or overflow; use another checkpoint or a wider dtype"


@dataclass(frozen=True)
class Sampling:
    """How a next token is picked.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only so many of the most likely tokens are drawn from; 0: all.
        top_p: only the most likely tokens that together have this probability (nucleus sampling; Holtzman et al., 2020,
            arXiv 1904.09751); 1: all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        require(self.temperature >= 0, f"temperature={self.temperature} must not be negative")
        require(self.top_k >= 0, f"top_k={self.top_k} must not be negative; 0 draws from all tokens")
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must be greater than 0 and at most 1")

    def pick(self, logits_V: Tensor, generator: torch.Generator) -> int:
        """The next token, drawn from float32 logits on the CPU."""
        if self.temperature == 0:
            return int(logits_V.argmax())
        probabilities_V = self._kept(logits_V / self.temperature).softmax(-1)
        return int(torch.multinomial(probabilities_V, 1, generator=generator))

    def _kept(self, logits_V: Tensor) -> Tensor:
        """The logits, minus infinity where a token is left out."""
        if self.top_k:
            weakest = logits_V.topk(min(self.top_k, len(logits_V))).values[-1]
            logits_V = logits_V.masked_fill(logits_V < weakest, -torch.inf)
        if self.top_p < 1:
            sorted_V, order_V = logits_V.softmax(-1).sort(descending=True, stable=True)
            dropped_V = sorted_V.cumsum(-1) - sorted_V >= self.top_p  # the one that reaches top_p stays
            logits_V = logits_V.index_fill(0, order_V[dropped_V], -torch.inf)
        return logits_V


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.8,
    seed: int = 0,
    begin_ids: Sequence[int] = (),
) -> str:
    """Continues a prompt as text.

    Args:
        model: of one process.
        tokenizer: the one that it was trained with.
        prompt: text to continue; the end-of-document token when empty.
        max_new_tokens: tokens to add; an end-of-document token ends earlier.
        temperature: of the sampling; 0 takes the most likely token.
        seed: of the sampling.
        begin_ids: tokens that stood before every text that the model was trained on (`Tokenizer.begin_ids`).

    Returns:
        Prompt and continuation.

    Raises:
        ConfigError: the model is an encoder.
        DataError: the tokenizer has more tokens than the model.
    """
    check_causal(model.config, "the model", "to generate text")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, more than the model's vocab_size="
            f"{model.config.vocab_size}; give the tokenizer that the model was trained with"
        )
    ids = tokenizer.encode(prompt)
    if not ids and not begin_ids:
        ids = [tokenizer.eod_id or 0]
    sampling = Sampling(temperature)
    (new,) = continuations(
        model, [[*begin_ids, *ids]], max_new_tokens, [seed], sampling, lambda new: new[-1] == tokenizer.eod_id
    )
    # Alone the new tokens would lose a space that begins them.
    whole, begun = tokenizer.decode([*ids, *new]), tokenizer.decode(ids)
    return prompt + (whole.removeprefix(begun) if whole.startswith(begun) else tokenizer.decode(new))


def continuations(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    seeds: Sequence[int],
    sampling: Sampling,
    is_done: Callable[[list[int]], bool],
) -> list[list[int]]:
    """Continues prompts side by side, token by token.

    No keys and values are kept: each token recomputes its whole context, the newest `max_seq_length` tokens. A
    continuation does not depend on the prompts beside it, but for rounding.

    Args:
        model: whole, or one tensor shard of it; all ranks of the shard's group call with the same arguments.
        prompts: token ids, at least one each.
        max_new_tokens: tokens to add to each.
        seeds: of the sampling, one for each prompt.
        sampling: see `Sampling`.
        is_done: whether the tokens added to a prompt so far end it.

    Returns:
        The tokens added to each prompt.

    Raises:
        DataError: the model's logits are not finite.
    """
    added: list[list[int]] = [[] for _ in prompts]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    running = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        if not running:
            break
        logits_BV = _next_logits(model, [[*prompts[i], *added[i]] for i in running])
        for i, logits_V in zip(running, logits_BV, strict=True):
            added[i].append(sampling.pick(logits_V, generators[i]))
        running = [i for i in running if not is_done(added[i])]
    return added


def _next_logits(model: Transformer, contexts: list[list[int]]) -> Tensor:
    """Logits [B, V] after each context, float32 or wider on the CPU."""
    device = model.head_VH.device
    rows = [torch.tensor(ids[-model.config.max_seq_length :]) for ids in contexts]
    ids_BS = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    with torch.no_grad():
        logits_BV = model.next_logits(ids_BS, torch.tensor([len(row) for row in rows], device=device))
    if not logits_BV.isfinite().all():
        raise DataError(f"the model's logits are {NOT_FINITE}")
    return logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32)).cpu()
