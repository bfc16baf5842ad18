"""A model that all ranks use together: a tensor group holds it, and the groups share what is asked of it."""

# Shape suffix legend: N = windows or prompts, B = those of a batch, S = inputs of the longest window of a batch,
# T = scored labels of a batch.

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megagrow.checkpoint.source import Source, load_model
from megagrow.checks import check_causal, check_model
from megagrow.config import ParallelConfig, require
from megagrow.errors import DataError
from megagrow.evaluate.windows import Window
from megagrow.generate import NOT_FINITE, Sampling, continuations
from megagrow.model import Transformer
from megagrow.parallel import heartbeat
from megagrow.parallel.collectives import sum_over
from megagrow.parallel.mesh import Mesh

FAILED = -1  # in place of a length


class SharedModel:
    """Scores windows and continues prompts; all ranks make the same calls and get the same results.

    Batches are made before they are dealt to the tensor groups, so that results do not depend on how many there are.

    Args:
        model: this rank's tensor shard of a whole decoder.
        mesh: where the rank stands; all axes but the tensor axis share the work.
        batch_size: windows or prompts of a forward pass.
    """

    def __init__(self, model: Transformer, mesh: Mesh, batch_size: int = 16) -> None:
        require(batch_size > 0, f"batch_size={batch_size} must be positive")
        check_causal(model.config, "the model", "to evaluate texts")
        self.model, self.mesh, self.batch_size = model, mesh, batch_size
        self.group, self.num_groups = mesh.world.rank // mesh.tp.size, mesh.world.size // mesh.tp.size

    def score(self, windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
        """Scores each window's labels that count.

        Returns:
            nll_N: sum of negative log-likelihoods in nats, float64; greedy_N: whether each of the labels is the one
            that an argmax takes.

        Raises:
            DataError: a token is not in the model's vocabulary, or a log-likelihood is not finite.
        """
        self._check_tokens([window.tokens for window in windows])
        results_N2 = torch.zeros(len(windows), 2, dtype=torch.float64)
        for places in self._share([len(window.tokens) for window in windows]):
            results_N2[places] = self._score_batch([windows[i] for i in places])
            heartbeat.progress()
        nll_N, misses_N = self._collect(results_N2).unbind(-1)
        if not nll_N.isfinite().all():
            raise DataError(f"the model's log-likelihoods are {NOT_FINITE}")
        return nll_N, misses_N == 0

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        seeds: Sequence[int],
        sampling: Sampling,
        is_done: Callable[[list[int]], bool],
    ) -> list[list[int]]:
        """Continues each prompt, see `generate.continuations`; `is_done` must say the same on every rank.

        Raises:
            DataError: a token is not in the model's vocabulary, or a logit is not finite.
        """
        self._check_tokens(prompts)
        results_NT = torch.zeros(len(prompts), 1 + max_new_tokens, dtype=torch.long)  # length or FAILED, tokens
        for places in self._share([len(prompt) for prompt in prompts]):
            batch, own_seeds = [prompts[i] for i in places], [seeds[i] for i in places]
            try:
                added = continuations(self.model, batch, max_new_tokens, own_seeds, sampling, is_done)
            except DataError:  # the other groups do not know of it, and would wait for this one's results
                results_NT[places, 0] = FAILED
                break
            for i, ids in zip(places, added, strict=True):
                results_NT[i, : 1 + len(ids)] = torch.tensor([len(ids), *ids])
            heartbeat.progress()
        results = self._collect(results_NT).tolist()
        if any(ids[0] == FAILED for ids in results):
            raise DataError(f"the model's logits are {NOT_FINITE}")
        return [ids[: ids.pop(0)] for ids in results]

    def _check_tokens(self, texts: Sequence[Sequence[int] | NDArray[np.int64]]) -> None:
        """Before the work is shared, so that every rank ends."""
        vocab_size = self.model.config.vocab_size
        for tokens in texts:
            low, high = (int(limit(tokens, initial=0)) for limit in (np.min, np.max))
            if low < 0 or high >= vocab_size:
                raise DataError(
                    f"token {low if low < 0 else high} is outside of the model's vocab_size={vocab_size}; "
                    "use the tokenizer that the model was trained with"
                )

    def _share(self, lengths: list[int]) -> list[list[int]]:
        """The batches of this tensor group, as places; the longest first, so that a lack of memory shows at once."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        starts = range(0, len(order), self.batch_size)
        return [order[start : start + self.batch_size] for start in starts][self.group :: self.num_groups]

    def _collect(self, results: Tensor) -> Tensor:
        """The results of all groups, each having left 0 where the others worked."""
        mine = results if self.mesh.tp.is_first else torch.zeros_like(results)
        return sum_over(mine.to(self.mesh.device), self.mesh.world).cpu()

    def _score_batch(self, windows: list[Window]) -> Tensor:
        """Of each window [B, 2]: the sum of its negative log-likelihoods, and labels that an argmax would not take."""
        num_inputs = max(len(window.tokens) for window in windows) - 1
        tokens = np.zeros((len(windows), num_inputs + 1), np.int64)
        chosen = np.zeros((len(windows), num_inputs), bool)
        documents = np.full((len(windows), num_inputs), -1)
        for row, window in enumerate(windows):
            n = len(window.tokens) - 1
            tokens[row, : n + 1] = window.tokens
            chosen[row, n - window.num_scored : n] = True
            documents[row, :n] = 0 if window.documents is None else window.documents
        is_masked = any(window.documents is not None for window in windows)
        tokens_BS1, chosen_BS, documents_BS = (
            torch.from_numpy(x).to(self.mesh.device) for x in (tokens, chosen, documents)
        )
        nll_T, rank_T = self.model.token_scores(
            tokens_BS1[:, :-1], tokens_BS1[:, 1:], documents_BS if is_masked else None, chosen_BS, ties_by_id=True
        )
        scores_BS2 = torch.zeros(*chosen_BS.shape, 2, dtype=torch.float64, device=self.mesh.device)
        scores_BS2[chosen_BS] = torch.stack([nll_T.double(), (rank_T > 0).double()], dim=-1)
        return scores_BS2.sum(1).cpu()


def load_shared_model(
    source: Source, mesh: Mesh, batch_size: int = 16, dtype: torch.dtype = torch.float32
) -> SharedModel:
    """Loads a decoder onto every tensor group.

    Args:
        source: the model on disk.
        mesh: see `SharedModel`.
        batch_size: see `SharedModel`.
        dtype: of parameters and activations.

    Raises:
        ConfigError: the model is an encoder, or cannot be cut over the tensor axis.
    """
    check_causal(source.model, str(source.path), "to evaluate texts")
    check_model(source.model, ParallelConfig(tensor=mesh.tp.size), str(source.path))
    return SharedModel(load_model(source, mesh.tensor_only(), dtype), mesh, batch_size)
