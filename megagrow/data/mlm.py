"""Masked language modelling: which tokens of a sample an encoder has to predict, and what it sees in their place.

Each token's fate is a hash of (seed, visit, position), where a visit is the place of a sample in the order of the run.
So a sample is masked anew each time it comes, and the same whoever reads it: any data-parallel degree, microbatch size
and restart gives the same masks.

Source: BERT (Devlin et al., 2018, arXiv 1810.04805), section 3.1; masks that change: RoBERTa (Liu et al., 2019, arXiv
1907.11692), section 4.1.
"""

# Shape suffix legend: B = samples, S = sequence.

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megagrow.config import DataConfig, ModelConfig, require
from megagrow.data.blend import parse_blend
from megagrow.data.description import describe
from megagrow.data.tokenizer import Tokenizer, load_tokenizer
from megagrow.errors import ConfigError
from megagrow.model.dropout import token_keys
from megagrow.torch_ops import mix

MASKED_SHARE, RANDOM_SHARE = 0.8, 0.1  # of the tokens that are chosen; the others stay as they are
_STREAM = -1  # keeps these hashes apart from those of dropout, whose places are not negative
_UNIT = 2.0**-53


@dataclass(frozen=True)
class Masking:
    """How samples are masked.

    Attributes:
        mask_id: the token that stands for hidden ones.
        special_ids: tokens that are never chosen.
        vocab_size: random tokens are drawn from 0 … vocab_size - 1.
        seed: of all choices.
        rate: share of the other tokens that is chosen.
    """

    mask_id: int
    special_ids: tuple[int, ...]
    vocab_size: int
    seed: int
    rate: float = 0.15

    def __call__(self, tokens_BS: Tensor, visits_B: Tensor) -> tuple[Tensor, Tensor]:
        """Masks samples.

        Args:
            tokens_BS: int64.
            visits_B: int64, a number of its own for each time that a sample is read.

        Returns:
            What the model sees [B, S], and which tokens it has to predict [B, S], bool.
        """
        positions_S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        choice_BS, fate_BS, token_BS = self._hashes(visits_B.to(tokens_BS.device), positions_S)
        special = torch.tensor(self.special_ids, dtype=torch.long, device=tokens_BS.device)
        chosen_BS = (_uniform(choice_BS) < self.rate) & ~torch.isin(tokens_BS, special)
        fate_BS = _uniform(fate_BS)
        is_masked_BS = chosen_BS & (fate_BS < MASKED_SHARE)
        is_random_BS = chosen_BS & (fate_BS >= MASKED_SHARE) & (fate_BS < MASKED_SHARE + RANDOM_SHARE)
        seen_BS = torch.where(is_random_BS, token_BS % self.vocab_size, tokens_BS)
        return seen_BS.masked_fill(is_masked_BS, self.mask_id), chosen_BS

    def _hashes(self, visits_B: Tensor, positions_S: Tensor) -> Iterator[Tensor]:
        """Independent 64-bit numbers [B, S], as many as are asked for by unpacking."""
        bits_BS = token_keys(self.seed, 0, visits_B, positions_S) + _STREAM
        for _ in range(3):
            bits_BS = mix(bits_BS)
            yield bits_BS


def make_masking(data: DataConfig, model: ModelConfig) -> Masking:
    """The masking of a run: its tokens are those of `data.tokenizer`, unless options name them.

    Raises:
        ConfigError: no mask token is known, one of the tokens is none of the model's vocabulary, or the model's
            positions do not go with the tokenizer (`check_positions`).
        DataError: the tokenizer or a dataset's description cannot be read.
    """
    tokenizer = load_tokenizer(data.tokenizer) if data.tokenizer else None
    check_positions(model, tokenizer)
    described = [found for found in map(describe, parse_blend(data.train).prefixes) if found]
    mask_id = data.mask_token if data.mask_token >= 0 else tokenizer.mask_id if tokenizer else None
    named = f"data.tokenizer={data.tokenizer} has" if data.tokenizer else "without data.tokenizer there is"
    require(
        mask_id is not None,
        f"model.objective=mlm hides tokens behind a mask token, but {named} none; set data.mask_token to its id",
    )
    assert mask_id is not None
    ends = [each["eod_id"] for each in described]
    special = {*(tokenizer.special_ids if tokenizer else ()), *data.special_tokens, *ends, mask_id} - {None}
    sizes = [tokenizer.vocab_size] if tokenizer else [each["vocab_size"] for each in described]
    ids = tuple(sorted(token for token in special if token is not None))
    outside = [token for token in ids if not 0 <= token < model.vocab_size]
    require(
        not outside,
        f"the mask token and the special tokens hold {outside[:1]}, which model.vocab_size={model.vocab_size} does not "
        "have; use the model's tokenizer, or a larger vocabulary",
    )
    return Masking(mask_id, ids, min(max(sizes, default=model.vocab_size), model.vocab_size), data.seed, data.mask_rate)


def check_positions(model: ModelConfig, tokenizer: Tokenizer | None) -> None:
    """Raises ConfigError when a model whose positions begin after that of padding takes ordinary text for padding.

    transformers derives the offset from `pad_token_id`, and does not count tokens of that id as positions.
    """
    padding = model.position_offset - 1
    if tokenizer is None or padding < 0 or padding in (tokenizer.pad_id, *tokenizer.special_ids):
        return
    known = tokenizer.pad_id if tokenizer.pad_id is not None else min(tokenizer.special_ids, default=None)
    remedy = "use a tokenizer with a padding token" if known is None else f"set model.position_offset={known + 1}"
    raise ConfigError(
        f"model.position_offset={model.position_offset} makes token {padding} the padding of the exported model, but "
        f"to the tokenizer it is an ordinary one; {remedy}, one more than the id of its padding token"
    )


def _uniform(bits: Tensor) -> Tensor:
    """Numbers in [0, 1) of 53 bits each, float64."""
    return (bits >> 11 & (1 << 53) - 1).double() * _UNIT
