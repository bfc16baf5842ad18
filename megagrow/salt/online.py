"""Selection without a pass over the corpus: in stage 1 the teacher scores a buffer of samples ahead of training.

Of every buffer the best share is trained on, in the order in which the samples come; the others are passed over. Where
a run stands follows from its two cursors: `all`, candidates that were taken, which moves by a buffer when that is
begun, and `selected`, samples that were trained on. A buffer is scored again when a run is resumed in its midst, and
gives the same.
"""

# Shape suffix legend: M = candidates of a buffer, B = samples of a forward pass, S = sequence, C = this context rank's
# part of it.

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megagrow.config import Config
from megagrow.data.loader import Drawn, Stream
from megagrow.errors import DataError
from megagrow.model.transformer import Transformer
from megagrow.parallel import heartbeat
from megagrow.parallel.collectives import sum_over
from megagrow.parallel.context import cut, of_documents
from megagrow.parallel.mesh import Axis, Mesh
from megagrow.salt.records import Arrays
from megagrow.salt.score import sample_scores
from megagrow.salt.select import Values, highest

SAMPLES_AT_ONCE = 8  # that the teacher scores in one pass; another number may change the last bit of a float32 score

Places = NDArray[np.int64]


class OnlineStream:
    """Batches of the best of every buffer.

    Args:
        stream: the candidates.
        num_candidates: of a buffer.
        num_kept: of these; a multiple of the batch size.
        cursors: the run's; `all` is moved on here, `selected` by the caller, who passes it to `batch`.
        score: a collective that gives the scores [M] of candidates by dataset [M] and id [M], the same on every rank;
            the last argument says whether the buffer is new, or scored again.
    """

    def __init__(
        self,
        stream: Stream,
        num_candidates: int,
        num_kept: int,
        cursors: dict[str, int],
        score: Callable[[Places, Places, bool], Values],
    ) -> None:
        self.stream, self.num_candidates, self.num_kept = stream, num_candidates, num_kept
        self.cursors, self.score = cursors, score
        self._held: tuple[int, Places, Places] | None = None  # where the buffer starts, datasets and ids that are kept

    def batch(self, cursor: int, batch_size: int, rank: int = 0, world: int = 1) -> Drawn:
        """As `Stream.batch`; all ranks call it, and the buffer moves on with the first batch of the next one."""
        share, place = batch_size // world, cursor % self.num_kept
        which, ids = self._buffer(is_first=place < batch_size)
        # Round the end only where a resumed run has batches of another size.
        own = (place + rank * share + np.arange(share)) % self.num_kept
        return self.stream.take(which[own], ids[own])

    def begin_anew(self) -> None:
        """Leaves the rest of the buffer under way: candidates have been taken since by somebody else."""
        self.cursors["selected"] = -(-self.cursors["selected"] // self.num_kept) * self.num_kept

    def _buffer(self, is_first: bool) -> tuple[Places, Places]:
        start = self.cursors["all"] - self.num_candidates
        is_new = is_first or start < self.stream.start  # the blend, or the size of the buffer, has changed
        if is_new:
            start = self.cursors["all"]
            self.cursors["all"] += self.num_candidates
        if self._held is None or self._held[0] != start:
            which_M, ids_M = self.stream.samples(start, self.num_candidates)
            best = highest(self.score(which_M, ids_M, is_new), self.num_kept)
            self._held = start, which_M[best], ids_M[best]
        return self._held[1:]


def score_candidates(
    model: Transformer, stream: Stream, which_M: Places, ids_M: Places, config: Config, mesh: Mesh
) -> Values:
    """The scores [M] of samples, as `score_corpus` gives them; a collective over all ranks.

    Pieces begin at fixed candidates and are dealt to the pipeline and data ranks, so that the scores do not depend on
    how many there are.

    Args:
        model: whole on every pipeline and data rank.
        stream: reads the samples, and tells their documents apart if `config.data` asks for it.
        which_M, ids_M: dataset and id of each.
        config: says which score, its top_k, and how documents are treated.
        mesh: where the rank stands.

    Raises:
        DataError: on every rank: a token's loss is not finite.
    """
    salt, data = config.salt, config.data
    worker, num_workers = mesh.pp.rank * mesh.dp.size + mesh.dp.rank, mesh.pp.size * mesh.dp.size
    values_M = torch.zeros(len(ids_M), dtype=torch.float32, device=mesh.device)
    for start in range(worker * SAMPLES_AT_ONCE, len(ids_M), num_workers * SAMPLES_AT_ONCE):
        piece = slice(start, start + SAMPLES_AT_ONCE)
        drawn = stream.take(which_M[piece], ids_M[piece])
        documents = None if drawn.documents is None else drawn.documents.to(mesh.device)
        told = of_documents(documents, mesh.cp, data.mask_documents, data.reset_positions)
        scores = score_samples(model, drawn.tokens.to(mesh.device), told, salt.top_k)
        # A median passes over a few tokens that are not finite, a mean does not.
        found = np.where(np.isfinite(scores["mean_nll"]), scores[salt.score], np.nan)
        values_M[piece] = torch.from_numpy(found).to(mesh.device)
        heartbeat.progress()
    for axis in (mesh.dp, mesh.pp):
        sum_over(values_M, axis)
    values = values_M.cpu().numpy()
    if not np.isfinite(values).all():
        bad = int(np.isfinite(values).argmin())
        raise DataError(
            f"{stream.parts[which_M[bad]].dataset.prefix}: sample {ids_M[bad]} has a loss that is not finite under "
            "salt.teacher: its weights are damaged or overflow in train.precision; use another checkpoint or fp32"
        )
    return values


def score_samples(model: Transformer, tokens_BS1: Tensor, told: dict[str, Any], top_k: int) -> Arrays:
    """The scores of samples [B, S + 1], the same on every tensor and context rank.

    Args:
        told: of their documents, see `of_documents`.
    """
    inputs_BC, labels_BC = (cut(x, model.cp).contiguous() for x in (tokens_BS1[:, :-1], tokens_BS1[:, 1:]))
    scores = (x.view_as(labels_BC) for x in model.token_scores(inputs_BC, labels_BC, **told))
    nll_BS, rank_BS = (_joined(x, model.cp) for x in scores)
    return sample_scores(nll_BS, rank_BS, top_k)


def _joined(x_BC: Tensor, cp: Axis) -> Tensor:
    """All tokens [B, S] of the samples, rank by rank: scores do not depend on their order."""
    x_BRC = x_BC.new_zeros(len(x_BC), cp.size, x_BC.shape[1])
    x_BRC[:, cp.rank] = x_BC
    return sum_over(x_BRC, cp).flatten(1)
