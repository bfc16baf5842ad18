"""SALT's stage 1 inside a run: its teacher while it teaches, or what one left behind, and the data that it picked."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from megagrow import flops
from megagrow.checkpoint.source import Source, check_source, open_source
from megagrow.config import Config
from megagrow.data.dataset import PackedDataset, Samples
from megagrow.data.loader import Drawn, Stream, shuffled
from megagrow.errors import CheckpointError, ConfigError
from megagrow.ledger import Ledger, Phase
from megagrow.parallel.mesh import Mesh
from megagrow.parallel.pipeline import Batch
from megagrow.salt.cached_teacher import CachedTeacher
from megagrow.salt.schedule import is_stage_one, teacher_weight
from megagrow.salt.score import read_scores
from megagrow.salt.select import select
from megagrow.salt.teacher import Teacher, check_teacher
from megagrow.timeline import last_source, latest_step, learning_steps, num_growths
from megagrow.train.grown_teacher import is_kept, teacher_folder
from megagrow.train.learner import Learner
from megagrow.train.part import compute_dtype
from megagrow.train.state import RunState

DRAWS_AT_ONCE = 1 << 20  # samples whose places in a cache are looked up together


class SaltStage:
    """Attaches the teacher when stage 1 begins and frees it when it ends.

    Args:
        config: the run's configuration; its salt section may be empty.
        mesh: where this rank stands.
        datasets: the training data; scores must be those of the only one.
        ordinary: the stream of the run, from which stage 1 draws where nothing is selected.
        state: the run's state; what teacher and scores cost is entered into its ledger.
        tell: prints a line for the user.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        datasets: Sequence[Samples],
        ordinary: Stream,
        state: RunState,
        tell: Callable[[str], None],
    ) -> None:
        self.config, self.mesh, self.datasets, self.state, self.tell = config, mesh, datasets, state, tell
        self.teacher: Teacher | CachedTeacher | None = None
        self.seconds = 0.0  # what the teacher took of the current step
        is_ahead = state.phase != "main" or is_stage_one(self._step_in_phase, config.salt)
        self.stream = self._selected_stream() if config.salt.scores and is_ahead else None
        self.source = self._open_teacher() if config.salt.teacher and is_ahead else None
        self.cached = self._open_cache(ordinary) if config.salt.cache and is_ahead else None

    def switch(self, on: bool, learner: Learner) -> None:
        """Makes the teacher present or absent where it is not, and gives it the weight of the coming step."""
        self.seconds = 0.0
        wanted = on and self.config.salt.teaches
        if wanted and self.teacher is None:
            self.teacher = self.cached or self._load_teacher()
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

    def teach(self, batch: Batch, drawn: Drawn, num_microbatches: int) -> Batch:
        """This rank's batch with what the teacher says of it, on the last stage; its cost goes into the ledger."""
        if self.teacher is None:
            return batch
        began = time.perf_counter()
        length, spent = self.config.data.seq_length, 0.0
        num_tokens = self.config.train.global_batch_size * length
        if isinstance(self.teacher, CachedTeacher):
            taught = replace(batch, **self.teacher.targets(drawn.which, drawn.ids, self.mesh))
        else:
            hidden = self.teacher.hidden(batch.ids, num_microbatches, batch.documents, batch.positions)
            taught = replace(batch, teacher_hidden=hidden)
            spent = flops.forward_flops(self.teacher.config, num_tokens, length)
        self.seconds = time.perf_counter() - began
        self.state.ledger.add("teacher", flops=spent, tokens=num_tokens, seconds=self.seconds)
        return taught

    def _open_teacher(self) -> Source | None:
        """Opens the teacher before training begins, so that a wrong one is refused at once; None: it still learns."""
        config, state = self.config, self.state
        if config.salt.grown_teaches and not is_kept(state, config):
            check_teacher(last_source(config, state.model, state.growths), config.model, config.data.seq_length)
            return None
        source = open_source(teacher_folder(config) if config.salt.grown_teaches else config.salt.teacher)
        check_teacher(source.model, config.model, config.data.seq_length)
        return source

    def _open_cache(self, ordinary: Stream) -> CachedTeacher:
        """Opens what a teacher left behind, and makes sure that it has spoken of every sample that stage 1 draws."""
        cached = CachedTeacher(self.config, self.datasets)
        stream, first, count = self._draws(ordinary)
        for start in range(first, first + count, DRAWS_AT_ONCE) if cached.is_partial else ():
            cached.check_coverage(*stream.samples(start, min(DRAWS_AT_ONCE, first + count - start)))
        for cache in cached.caches:
            cost = cache.cost
            caching = Ledger(phases=[Phase("teacher", tokens=cost.tokens, flops=cost.flops, seconds=cost.seconds)])
            # A blend may get another dataset in mid-run, but the cache of one stays what it was.
            label = f"cache of {cache.identity.corpus_sha256[:12]}"
            self._inherit(label, cache.sha256, caching, str(cache.folder))
            # Whoever spoke was trained; where it is the source too, its known ledger counts instead.
            self.state.ledger.inherit("teacher", cache.identity.model, Ledger.outside())
        names = " ".join(str(cache.folder) for cache in cached.caches)
        self.tell(f"stage 1: {names} teaches for {self.config.salt.steps} steps, in place of its teacher")
        return cached

    def _draws(self, ordinary: Stream) -> tuple[Stream, int, int]:
        """The stream of stage 1, and the first and the number of the samples that it still draws from it.

        Where nobody knows when the model grows (at a plateau), those count too that are drawn before.
        """
        state, config, size = self.state, self.config, self.config.train.global_batch_size
        begun = self._step_in_phase if state.phase == "main" else 0
        count = (min(config.salt.steps, config.train.steps) - begun) * size
        if self.stream is not None:
            return self.stream, state.cursors["selected"], count
        ahead = 0
        if state.phase != "main":
            last = num_growths(config.growth) - 1
            learned = state.ligo_step if state.phase == "ligo" else 0
            ahead = max(latest_step(config, last) - state.train_step, 0)
            ahead += learning_steps(config.growth, state.growths) - learned
        first = state.cursors["all"]
        is_known = config.growth.at_plateau == 0 and all(each.at_plateau == 0 for each in config.growth.earlier)
        return (ordinary, first + ahead * size, count) if is_known else (ordinary, first, count + ahead * size)

    def _load_teacher(self) -> Teacher:
        config = self.config
        self.source = source = self.source or self._open_teacher()
        assert source is not None, "stage 1 comes when the model has grown"
        teacher = Teacher(source, self.mesh, config.salt, config.model, compute_dtype(config))
        # The run's own model is made for this data, however little it has learned of it.
        name, skip = str(source.path), config.init.skip_source_check or config.salt.grown_teaches
        losses = [check_source(teacher.model, dataset, self.mesh, name, skip) for dataset in self.datasets]
        given = -1.0 if config.init.from_ else config.init.source_flops
        self._inherit("teacher", source.identity, ledger_of(source, given), str(source.path))
        shown = ", ".join(f"{loss:.3f}" for loss in losses)
        self.tell(f"stage 1: {source.path} teaches for {config.salt.steps} steps (its loss here: {shown})")
        return teacher

    def _inherit(self, label: str, identity: str, ledger: Ledger, path: str) -> None:
        """Enters a cost into the run's ledger; a resumed run must find what it began with."""
        known = {item.identity for item in self.state.ledger.inherited if item.label == label}
        if known - {identity}:
            raise CheckpointError(
                f"{path}: salt.{label.split()[0]} has changed since this run began; restore what it was, or use "
                "another --run.dir"
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
