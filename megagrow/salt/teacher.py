"""The small model as a teacher inside the mesh: body on all pipeline ranks, head on the last.

Run whole on the last stage, the teacher would cost that stage PP times as much as its share. So
each pipeline rank holds the body and runs every PP-th microbatch before the step; only hidden
states travel, never logits.
"""

# Shape suffix legend: B = this data rank's samples, S = sequence, H = the teacher's hidden size,
# V = local vocabulary.

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megagrow.checkpoint.source import Source, load_model
from megagrow.checks import check_causal, check_model
from megagrow.config import ModelConfig, ParallelConfig, SaltConfig, require
from megagrow.errors import DataError
from megagrow.model.transformer import LossOptions, Transformer
from megagrow.model.transformer import Teacher as StageTeacher
from megagrow.parallel import heartbeat
from megagrow.parallel.collectives import sum_over
from megagrow.parallel.loss import NUM_SUMS
from megagrow.parallel.mesh import Axis, Mesh
from megagrow.parallel.pipeline import Batch
from megagrow.parallel.shards import chunk
from megagrow.roles import TIED_EMBEDDING

SAMPLES_AT_ONCE = 8  # that it evaluates in one pass
MAX_PADDING = 1024  # rows that fill up a vocabulary: to a multiple of 128 on each of 8 tensor ranks
PADDED_SHARE = 8  # and at most one for so many tokens


class Teacher:
    """A trained model that gives hidden states to distil from, forward only.

    Args:
        source: the teacher.
        mesh: its tensor axis shards the teacher as it shards the student, so that vocabulary shards
            line up.
        salt: how it teaches.
        student: the model that learns.
        dtype: of the teacher's parameters and activations; None: float32.

    Attributes:
        config: the teacher's configuration.
        model: the whole teacher, sharded over the tensor axis.

    Raises:
        ConfigError: the vocabularies differ by more than padding, or the tensor axis does not divide the teacher.
    """

    def __init__(
        self,
        source: Source,
        mesh: Mesh,
        salt: SaltConfig,
        student: ModelConfig,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_model(source.model, ParallelConfig(tensor=mesh.tp.size), f"the teacher {source.path}")
        check_vocabulary(source.model.vocab_size, student.vocab_size)
        self.config, self.mesh, self.salt = source.model, mesh, salt
        self._path, self._vocab_size = source.path, student.vocab_size
        self._fetch = None if source.model.vocab_size == student.vocab_size else source.fetch  # see _student_rows
        self._model: Transformer | None = load_model(source, mesh.without_pipeline(), dtype)

    @property
    def model(self) -> Transformer:
        assert self._model is not None, "the teacher has been freed"
        return self._model

    def hidden(
        self,
        ids_BS: Tensor,
        num_microbatches: int,
        documents_BT: Tensor | None = None,
        positions_BS: Tensor | None = None,
    ) -> Tensor | None:
        """The states [B, S, H] after the teacher's final norm; None on pipeline ranks that compute no loss.

        Args:
            ids_BS: this data and context rank's tokens, the same on every pipeline and tensor rank.
            num_microbatches: pieces that B is cut into; pipeline rank p runs pieces p, p + PP, …
            documents_BT: the document of every token of the whole sequences, or None: attention crosses documents.
            positions_BS: of the tokens; None: they count from each sample's first token on.

        Raises:
            DataError: a token is beyond the teacher's vocabulary, where the student's is larger.
        """
        self._check_known(ids_BS)
        model, pp = self.model, self.mesh.pp
        given = {"x": ids_BS, "documents": documents_BT, "positions": positions_BS}
        chunks = {name: x.chunk(num_microbatches) for name, x in given.items() if x is not None}
        with torch.no_grad():
            pieces = [dict(zip(chunks, piece, strict=True)) for piece in zip(*chunks.values(), strict=True)]
            own = {}
            for i in range(pp.rank, len(pieces), pp.size):
                own[i] = model(**pieces[i])
                heartbeat.progress()
        if pp.rank != self.mesh.loss_rank:
            _send(own, self.mesh)
            return None
        dtype = next(model.parameters()).dtype
        hidden_BSH = torch.empty(*ids_BS.shape, self.config.hidden_size, dtype=dtype, device=ids_BS.device)
        _collect(hidden_BSH, own, num_microbatches, pp)
        return hidden_BSH

    def evaluate(self, batch: Batch) -> Tensor:
        """The global sums [loss, CE, 0, 0] of a batch, the same on every rank; before `attach`, which drops heads.

        Pieces of the batch are shared out over the pipeline ranks, as by `hidden`.
        """
        model, pp = self.model, self.mesh.pp
        sums = torch.zeros(NUM_SUMS, dtype=torch.double, device=batch.ids.device)
        pieces = {name: x.split(SAMPLES_AT_ONCE) for name, x in {"x": batch.ids, **batch.inputs()}.items()}
        with torch.no_grad():
            for i in range(pp.rank, len(pieces["x"]), pp.size):
                model(**{name: parts[i] for name, parts in pieces.items()})
                sums += model.loss_sums.pop()
        return sum_over(sum_over(sums, self.mesh.tokens), pp)

    def attach(self, last_stage: Transformer | None) -> None:
        """Gives the last stage the head and how it is mixed in; other ranks drop theirs, unless they score."""
        if last_stage is not None:
            num_common = min(self.config.vocab_size, self._vocab_size)
            last_stage.teacher = StageTeacher(self._student_rows(), loss_options(self.salt), num_common)
        elif not self.config.tied_embeddings and self.salt.online_buffer == 0:
            del self.model.head

    def _student_rows(self) -> Tensor:
        """The output rows of the tokens whose logits the student has on this rank, as far as the teacher has them.

        Where vocabularies of different sizes are cut, the shards end at different tokens; those rows are read anew.
        """
        own_VH = self.model.head_VH.detach()
        if self._fetch is None:
            return own_VH
        head_VH = self._fetch(TIED_EMBEDDING if self.config.tied_embeddings else "head.weight")
        return head_VH[chunk(self._vocab_size, self.mesh.tp)].to(own_VH.device, own_VH.dtype)

    def _check_known(self, ids_BS: Tensor) -> None:
        if self.config.vocab_size < self._vocab_size and int(ids_BS.max()) >= self.config.vocab_size:
            raise DataError(
                f"the data holds token {int(ids_BS.max())}, the teacher {self._path} has vocab_size="
                f"{self.config.vocab_size} and the model {self._vocab_size}: what the model has more must be padding, "
                "not tokens; use a salt.teacher with the data's tokenizer"
            )

    def weigh(self, last_stage: Transformer | None, weight: float) -> None:
        """Sets ω for the coming steps, where the loss is computed."""
        weigh(last_stage, weight)

    def free(self, last_stage: Transformer | None) -> None:
        """Drops the teacher's weights here and on the stage; its memory is released."""
        if last_stage is not None:
            last_stage.teacher = None
        self._model = self._fetch = None


def weigh(last_stage: Transformer | None, weight: float) -> None:
    """Sets ω for the coming steps on the stage that computes the loss, if it is here and has a teacher."""
    if last_stage is not None and last_stage.teacher is not None:
        last_stage.teacher.options = replace(last_stage.teacher.options, weight=weight)


def loss_options(salt: SaltConfig) -> LossOptions:
    """How the loss mixes the teacher in, from the configuration."""
    return LossOptions(
        weight=salt.weight,
        temperature=salt.temperature,
        both=salt.temperature_on == "both",
        scale=salt.temperature**2 if salt.scale_by_temperature_squared else 1.0,
        divergence=salt.divergence,
    )


def check_teacher(teacher: ModelConfig, student: ModelConfig, seq_length: int) -> None:
    """Raises ConfigError unless `teacher` can teach `student` on such sequences; for a dry run."""
    check_causal(teacher, "the teacher", "to teach next tokens")
    check_vocabulary(teacher.vocab_size, student.vocab_size)
    require(
        teacher.positions != "learned" or seq_length <= teacher.max_seq_length,
        f"data.seq_length={seq_length} exceeds the teacher's max_seq_length="
        f"{teacher.max_seq_length}, the rows of its position table; use shorter sequences or "
        "another salt.teacher",
    )


def check_vocabulary(of_teacher: int, of_student: int, teacher: str = "the teacher") -> None:
    """Vocabularies of one tokenizer, padded each in its own way, are compared over the tokens that both have.

    Args:
        of_teacher, of_student: their sizes.
        teacher: its name, for the message.

    Raises:
        ConfigError: they differ by more than padding.
    """
    smaller, larger = sorted((of_teacher, of_student))
    limit = min(MAX_PADDING, smaller // PADDED_SHARE)
    require(
        larger - smaller <= limit,
        f"{teacher} has vocab_size={of_teacher}, the model vocab_size={of_student}: distillation compares the same "
        f"tokens, and {larger - smaller} rows are too many for padding (at most {limit} here); use a teacher with the "
        "model's tokenizer",
    )


def _send(own: dict[int, Tensor], mesh: Mesh) -> None:
    group, target = mesh.pp.group, mesh.loss_rank
    requests = [dist.isend(hidden.contiguous(), group=group, group_dst=target) for hidden in own.values()]
    for request in requests:
        assert request is not None
        request.wait()


def _collect(hidden_BSH: Tensor, own: dict[int, Tensor], num_microbatches: int, pp: Axis) -> None:
    """Fills in this rank's microbatches, and receives the others in the order of their sending."""
    requests = []
    for i, piece_BSH in enumerate(hidden_BSH.chunk(num_microbatches)):
        if i in own:
            piece_BSH.copy_(own[i])
        else:
            requests.append(dist.irecv(piece_BSH, group=pp.group, group_src=i % pp.size))
    for request in requests:
        assert request is not None
        request.wait()
