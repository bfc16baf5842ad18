"""One tensor rank's rows of the vocabulary: where they stand, and how what the ranks find in their columns merges."""

# Shape suffix legend: T, C = tokens, V = local vocabulary rows, R = tensor ranks, K = statistics or entries of a token.

from dataclasses import dataclass

import torch
from torch import Tensor

from megagrow.parallel.collectives import start_all_gather
from megagrow.parallel.mesh import Axis
from megagrow.parallel.shards import chunk


@dataclass(frozen=True)
class VocabShard:
    """Where this rank's rows stand in the vocabulary, and how the passes over their logits are made.

    Attributes:
        tp: the tensor axis.
        vocab_size: rows of the whole output matrix.
        num_common: of these, from the first on, tokens that the teacher has too; None: all.
        fused: let torch.compile make one pass of each, where no kernel does.
    """

    tp: Axis
    vocab_size: int
    num_common: int | None = None
    fused: bool = False

    @property
    def vocab(self) -> slice:
        """This rank's rows."""
        return chunk(self.vocab_size, self.tp)

    @property
    def most_rows(self) -> int:
        """Rows of the rank that has most."""
        return -(-self.vocab_size // self.tp.size)

    @property
    def has_rest(self) -> bool:
        """Whether some rank has rows that the teacher lacks: the same answer everywhere."""
        return self.num_common is not None and self.num_common < self.vocab_size

    @property
    def common_rows(self) -> int:
        """Of this rank's rows, from the first on, those of tokens that the teacher has too."""
        vocab = self.vocab
        stop = vocab.stop if self.num_common is None else min(vocab.stop, self.num_common)
        return max(stop - vocab.start, 0)

    def local_labels(self, labels_T: Tensor) -> Tensor:
        """Columns of the labels that are here, -1 for the others."""
        return torch.where(self._has(labels_T), labels_T - self.vocab.start, -1)

    def of_all_ranks(self, stats_CK: Tensor) -> Tensor:
        """[R, C, K]: what every tensor rank has found in its columns."""
        return stats_CK[None] if self.tp.size == 1 else start_all_gather(stats_CK[None], 0, self.tp).wait()

    def entries(self, ids_CK: Tensor) -> "LocalEntries":
        """Tokens of each row, by their ids in the whole vocabulary."""
        is_here_CK = self._has(ids_CK)
        return LocalEntries(torch.where(is_here_CK, ids_CK - self.vocab.start, 0), is_here_CK)

    def _has(self, ids: Tensor) -> Tensor:
        vocab = self.vocab
        return (ids >= vocab.start) & (ids < vocab.stop)


@dataclass(frozen=True)
class LocalEntries:
    """A few columns of each row, of which some are on other shards.

    Attributes:
        columns_CK: local columns; 0 for those that are elsewhere.
        is_here_CK: which are on this shard.
    """

    columns_CK: Tensor
    is_here_CK: Tensor

    def pick(self, x_CV: Tensor) -> Tensor:
        """The values [C, K] in at least float32; 0 for those that are elsewhere."""
        wide = torch.promote_types(x_CV.dtype, torch.float32)
        if x_CV.shape[1] == 0:
            return torch.zeros(self.columns_CK.shape, dtype=wide, device=x_CV.device)
        return x_CV.gather(1, self.columns_CK).to(wide).masked_fill(~self.is_here_CK, 0.0)

    def blank_(self, x_CV: Tensor) -> None:
        """Sets them to -inf, so that no softmax counts them."""
        if x_CV.shape[1] == 0:
            return
        # Those elsewhere write to a column that is blanked anyway, or, in a row that has none, its own value to column
        # 0: all writes to one place agree.
        first_C1 = self.is_here_CK.to(torch.uint8).argmax(1, keepdim=True)
        anchor_C1, has_any_C1 = self.columns_CK.gather(1, first_C1), self.is_here_CK.gather(1, first_C1)
        columns_CK = torch.where(self.is_here_CK, self.columns_CK, anchor_C1)
        values_C1 = x_CV[:, :1].masked_fill(has_any_C1, -torch.inf)
        x_CV.scatter_(1, columns_CK, values_C1.expand(columns_CK.shape))

    def add_(self, x_CV: Tensor, values_CK: Tensor) -> None:
        """Adds to them; what is elsewhere is left to the rank that has it."""
        if x_CV.shape[1]:
            x_CV.scatter_add_(1, self.columns_CK, values_CK.masked_fill(~self.is_here_CK, 0.0).to(x_CV.dtype))


def logsumexp(max_RC: Tensor, sum_exp_RC: Tensor, temperature: float = 1.0) -> Tensor:
    """log Σ exp(x / temperature) over all ranks, from each one's maximum and Σ exp((x - maximum) / temperature)."""
    max_C = max_RC.amax(0)
    return max_C / temperature + (sum_exp_RC * ((max_RC - max_C) / temperature).exp()).sum(0).log()
