"""SALT's stage 1 inside a run: its teacher while it teaches, and the stream of the data that it picked."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from megagrow import flops
from megagrow.checkpoint.source import Source, check_source, open_source
from megagrow.config import Config
from megagrow.data.dataset import PackedDataset, Samples
from megagrow.data.loader import Stream, shuffled
from megagrow.errors import CheckpointError, ConfigError
from megagrow.ledger import Ledger, Phase
from megagrow.parallel.mesh import Mesh
from megagrow.parallel.pipeline import Batch
from megagrow.salt.schedule import is_stage_one, teacher_weight
from megagrow.salt.score import read_scores
from megagrow.salt.select import select
from megagrow.salt.teacher import Teacher, check_teacher
from megagrow.train.learner import Learner
from megagrow.train.part import compute_dtype
from megagrow.train.state import RunState


class SaltStage:
    """Attaches the teacher when stage 1 begins and frees it when it ends.

    Args:
        config: the run's configuration; its salt section may be empty.
        mesh: where this rank stands.
        datasets: the training data; scores must be those of the only one.
        state: the run's state; what teacher and scores cost is entered into its ledger.
        tell: prints a line for the user.
    """

    def __init__(
        self, config: Config, mesh: Mesh, datasets: Sequence[Samples], state: RunState, tell: Callable[[str], None]
    ) -> None:
        self.config, self.mesh, self.datasets, self.state, self.tell = config, mesh, datasets, state, tell
        self.teacher: Teacher | None = None
        self.seconds = 0.0  # what the teacher took of the current step
        is_ahead = state.phase != "main" or is_stage_one(self._step_in_phase, config.salt)
        self.stream = self._selected_stream() if config.salt.scores and is_ahead else None
        self.source = self._open_teacher() if config.salt.teacher and is_ahead else None

    def switch(self, on: bool, learner: Learner) -> None:
        """Makes the teacher present or absent where it is not, and gives it the weight of the coming step."""
        self.seconds = 0.0
        wanted = on and bool(self.config.salt.teacher)
        if wanted and self.teacher is None:
            self.teacher = self._load_teacher()
            self.teacher.attach(learner.part.last_stage)
        elif not wanted and self.teacher is not None:
            self.teacher.free(learner.part.last_stage)
            self.teacher = None
            self.tell(f"stage 1 ends after step {self.state.step}: the teacher is freed")
        if self.teacher is not None:
            self.teacher.weigh(learner.part.last_stage, teacher_weight(self._step_in_phase, self.config.salt))

    @property
    def _step_in_phase(self) -> int:
        return self.state.train_step - (self.state.grown_at or 0)

    def rejoin(self, state: RunState) -> None:
        """Follows the run to another state after a roll-back; the teacher is attached anew at the next step."""
        self.state, self.teacher = state, None

    def teacher_hidden(self, batch: Batch, num_microbatches: int) -> Tensor | None:
        """The teacher's states for this rank's batch, on the last stage; its cost goes into the ledger."""
        if self.teacher is None:
            return None
        began = time.perf_counter()
        hidden = self.teacher.hidden(batch.ids, num_microbatches, batch.documents, batch.positions)
        self.seconds = time.perf_counter() - began
        length = self.config.data.seq_length
        num_tokens = self.config.train.global_batch_size * length
        spent = flops.forward_flops(self.teacher.config, num_tokens, length)
        self.state.ledger.add("teacher", flops=spent, tokens=num_tokens, seconds=self.seconds)
        return hidden

    def _open_teacher(self) -> Source:
        """Opens the teacher before training begins, so that a wrong one is refused at once."""
        source = open_source(self.config.salt.teacher)
        check_teacher(source.model, self.config.model, self.config.data.seq_length)
        return source

    def _load_teacher(self) -> Teacher:
        config, source = self.config, self.source
        assert source is not None, "only a configured teacher is loaded"
        teacher = Teacher(source, self.mesh, config.salt, config.model, compute_dtype(config))
        name, skip = str(source.path), config.init.skip_source_check
        losses = [check_source(teacher.model, dataset, self.mesh, name, skip) for dataset in self.datasets]
        given = -1.0 if config.init.from_ else config.init.source_flops
        self._inherit("teacher", source.identity, ledger_of(source, given), str(source.path))
        shown = ", ".join(f"{loss:.3f}" for loss in losses)
        self.tell(f"stage 1: {source.path} teaches for {config.salt.steps} steps (its loss here: {shown})")
        if source.model.vocab_size != config.model.vocab_size:
            sizes = f"{source.model.vocab_size} of the teacher and {config.model.vocab_size} of the model"
            self.tell(f"stage 1 compares the tokens that both vocabularies have, {sizes}: the rest counts as padding")
        return teacher

    def _inherit(self, label: str, identity: str, ledger: Ledger, path: str) -> None:
        """Enters a cost into the run's ledger; a resumed run must find what it began with."""
        known = {item.identity for item in self.state.ledger.inherited if item.label == label}
        if known - {identity}:
            raise CheckpointError(
                f"{path}: salt.{label} has changed since this run began; restore what it was, or use another --run.dir"
            )
        self.state.ledger.inherit(label, identity, ledger)

    def _selected_stream(self) -> Stream:
        salt, data, dataset = self.config.salt, self.config.data, self.datasets[0]
        if len(self.datasets) > 1 or not isinstance(dataset, PackedDataset):
            raise ConfigError(
                "salt.scores are those of one dataset, data.train is a blend; merge its datasets "
                "(tools/merge_datasets.py), score the result and train on it"
            )
        scores = read_scores(Path(salt.scores), dataset)
        ids = select(scores, salt.score, salt.keep_fraction)
        cost = scores.cost
        scoring = Ledger(phases=[Phase("scoring", tokens=cost.tokens, flops=cost.flops, seconds=cost.seconds)])
        self._inherit("scores", scores.sha256, scoring, salt.scores)
        # Whoever scored was trained; where it is the source or the teacher too, their known ledger counts instead.
        self.state.ledger.inherit("scorer", scores.identity.model, Ledger.outside())
        self.tell(f"stage 1 trains on {len(ids):,} of {dataset.num_samples:,} samples, by {salt.score}")
        return Stream([shuffled(dataset, data.seed, ids)], with_documents=data.mask_documents or data.reset_positions)


def ledger_of(source: Source, given_flops: float) -> Ledger:
    """What a source's training cost, as far as anybody knows; `given_flops` is the user's word for it, -1 for none."""
    if source.ledger is not None:
        return Ledger.from_dict(source.ledger, f"{source.path}: ledger")
    return Ledger.outside(given_flops if given_flops >= 0 else None)
