"""Text from a trained model, to look at what it has learned."""

# Shape suffix legend: S = tokens so far, V = vocabulary.

import torch

from megagrow.checks import check_causal
from megagrow.data.tokenizer import Tokenizer
from megagrow.errors import DataError
from megagrow.model import Transformer


def generate(
    model: Transformer, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, temperature: float = 0.8, seed: int = 0
) -> str:
    """Continues a prompt, token by token; the whole context is recomputed for each (a sample, not a server).

    Args:
        model: of one process.
        tokenizer: the one that it was trained with.
        prompt: text to continue; the end-of-document token when empty.
        max_new_tokens: tokens to add; an end-of-document token ends earlier.
        temperature: of the sampling; 0 takes the most likely token.
        seed: of the sampling.

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
    ids = tokenizer.encode(prompt) or [tokenizer.eod_id or 0]
    num_prompt = len(ids)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        while len(ids) - num_prompt < max_new_tokens:
            context_S = torch.tensor(ids[-model.config.max_seq_length :])
            logits_V = model.logits(context_S[None])[0, -1].float().cpu()
            ids.append(_pick(logits_V, temperature, generator))
            if ids[-1] == tokenizer.eod_id:
                break
    return prompt + tokenizer.decode(ids[num_prompt if prompt else 1 :])


def _pick(logits_V: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    return int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator))
