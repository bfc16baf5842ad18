"""SALT's stage 1 inside a run: its teacher while it teaches, or what one left behind, and when it ends."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from megagrow import flops
from megagrow.checkpoint.source import Source, check_source, open_source, share_identity
from megagrow.config import Config
from megagrow.data.dataset import PackedDataset, Samples
from megagrow.data.loader import Drawn, Stream
from megagrow.errors import DataError
from megagrow.evaluate import Evaluator
from megagrow.ledger import Ledger, Phase
from megagrow.parallel import heartbeat
from megagrow.parallel.collectives import broadcast_from, told_by_first
from megagrow.parallel.mesh import Mesh
from megagrow.parallel.pipeline import Batch
from megagrow.salt.cached_teacher import CachedTeacher
from megagrow.salt.online import OnlineStream, Places, score_candidates
from megagrow.salt.records import share_fingerprint
from megagrow.salt.schedule import is_stage_one, teacher_weight
from megagrow.salt.select import Values
from megagrow.salt.teacher import Teacher, check_teacher
from megagrow.timeline import last_source, latest_step, learning_steps, may_grow_early, num_growths
from megagrow.train.clock import settle
from megagrow.train.grown_teacher import is_kept, teacher_folder
from megagrow.train.learner import Learner
from megagrow.train.part import compute_dtype
from megagrow.train.salt_costs import inherit, ledger_of, recorded
from megagrow.train.salt_data import selected_stream
from megagrow.train.state import RunState

DRAWS_AT_ONCE = 1 << 20  # samples whose places in a cache are looked up together


class SaltStage:
    """Attaches the teacher when stage 1 begins, and frees it and the selected data when it ends.

    Args:
        config: the run's configuration; its salt section may be empty.
        mesh: where this rank stands.
        datasets: the training data; scores must be those of the only one.
        ordinary: all of the training data in its order, from which stage 1 draws where nothing is selected, and an
            online selection picks.
        evaluator: the held-out data, if there are any.
        state: the run's state; what teacher and scores cost is entered into its ledger.
        tell: prints a line for the user.

    Attributes:
        stream: of the data that stage 1 picks; None: it takes all, or is over.
        seconds: what the teacher took of the current step.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        datasets: Sequence[Samples],
        ordinary: Stream,
        evaluator: Evaluator | None,
        state: RunState,
        tell: Callable[[str], None],
    ) -> None:
        self.config, self.mesh, self.datasets, self.state, self.tell = config, mesh, datasets, state, tell
        self.ordinary, self.evaluator = ordinary, evaluator
        self.teacher: Teacher | CachedTeacher | None = None
        self.source: Source | None = None
        self.cached: CachedTeacher | None = None
        self.stream: Stream | OnlineStream | None = None
        self.seconds = 0.0
        self._open()

    @property
    def is_on(self) -> bool:
        """Whether the coming step is in stage 1."""
        state = self.state
        planned = is_stage_one(self._step_in_phase, self.config.salt)
        return state.phase == "main" and state.stage_one_end is None and planned

    @property
    def teaches_maps(self) -> bool:
        """Whether the coming step learns the maps of the last growth, and the teacher has a word in it."""
        state, config = self.state, self.config
        is_last = state.growths == num_growths(config.growth) - 1
        return state.phase == "ligo" and is_last and config.salt.map_weight > 0

    @property
    def has_just_ended(self) -> bool:
        """Whether the coming step is the first after stage 1."""
        state, planned = self.state, (self.state.grown_at or 0) + self.config.salt.steps
        end = planned if state.stage_one_end is None else state.stage_one_end
        return state.phase == "main" and state.train_step == end

    def switch(self, learner: Learner) -> None:
        """Makes the teacher present or absent where it is not, and gives it the weight of the coming step."""
        self.seconds = 0.0
        if self.teaches_maps or (self.is_on and self.config.salt.teaches):
            self._teach(learner)
        elif self.teacher is not None:
            self.teacher.free(learner.part.last_stage)
            self.teacher = None
            self.tell(f"stage 1 ends after step {self.state.step}: the teacher is freed")
        if self._is_over:
            self.source = self.stream = self.cached = None

    def judge(self, validation_loss: float) -> None:
        """Ends stage 1 for good, if that is asked for, when the model's held-out loss is below the teacher's."""
        state = self.state
        if not (self.config.salt.end_when_better and self.is_on):
            return
        assert state.teacher_loss is not None, "measured when the teacher was loaded"
        if told_by_first(validation_loss < state.teacher_loss, self.mesh.world, self.mesh.device):
            state.stage_one_end = state.train_step
            self.tell(f"held-out loss {validation_loss:.4f} is below the teacher's {state.teacher_loss:.4f}")

    def rejoin(self, state: RunState) -> None:
        """Follows the run to another state after a roll-back; the teacher is attached anew at the next step.

        A cache is asked again for what stage 1 still draws: samples have been skipped.
        """
        was_over = self._is_over
        self.state, self.teacher, self.cached = state, None, None
        if self.config.salt.grown_teaches:
            self.source = None  # a run that grows again writes it anew
        self._open()
        if isinstance(self.stream, OnlineStream) and (was_over or not self.is_on):
            self.stream.begin_anew()  # others train, or have trained, on what comes after the buffer

    def teach(self, batch: Batch, drawn: Drawn, num_microbatches: int) -> Batch:
        """This rank's batch with what the teacher says of it, on the last stage; its cost goes into the ledger."""
        if self.teacher is None or self._weight == 0:  # it does no more than pick what is trained on
            return batch
        heartbeat.enter("teacher", self.state.step)
        began = time.perf_counter()
        if isinstance(self.teacher, CachedTeacher):
            taught = replace(batch, **self.teacher.targets(drawn.which, drawn.ids, self.mesh))
        else:
            hidden = self.teacher.hidden(batch.ids, num_microbatches, batch.documents, batch.positions)
            taught = replace(batch, teacher_hidden=hidden)
            settle(self.mesh.device)  # what it computes is the teacher's, not the step's
        seconds = time.perf_counter() - began
        self.seconds += seconds
        self._charge("teacher", self.config.train.global_batch_size, seconds)
        return taught

    @property
    def _step_in_phase(self) -> int:
        return self.state.train_step - (self.state.grown_at or 0)

    @property
    def _weight(self) -> float:
        """ω of the coming step."""
        salt = self.config.salt
        return salt.map_weight if self.teaches_maps else teacher_weight(self._step_in_phase, salt)

    @property
    def _is_over(self) -> bool:
        return self.state.phase == "main" and not self.is_on

    def _open(self) -> None:
        """Opens what stage 1 needs before training begins, so that what is wrong is refused at once."""
        salt = self.config.salt
        if self._is_over:
            return
        if salt.teacher and self.source is None:
            self.source = self._open_teacher()
        for dataset in self.datasets if salt.scores or salt.cache else ():
            if isinstance(dataset, PackedDataset):
                share_fingerprint(dataset, self.mesh)
        if salt.online_buffer:
            self.stream = self._online_stream()
        elif salt.scores and self.stream is None:
            self.stream = selected_stream(self.config, self.datasets, self.state.ledger, self.tell)
        if salt.cache and self.cached is None:
            self.cached = self._open_cache()

    def _open_teacher(self) -> Source | None:
        """The teacher on disk; None: it is the model that this run still trains."""
        config, state = self.config, self.state
        if config.salt.grown_teaches and not is_kept(state, config):
            check_teacher(last_source(config, state.model, state.growths), config.model, config.data.seq_length)
            return None
        source = open_source(teacher_folder(config) if config.salt.grown_teaches else config.salt.teacher)
        check_teacher(source.model, config.model, config.data.seq_length)
        return source

    def _open_cache(self) -> CachedTeacher:
        """Opens what a teacher left behind, and makes sure that it has spoken of every sample that stage 1 draws."""
        cached = CachedTeacher(self.config, self.datasets)
        stream, first, count = self._draws()
        for start in range(first, first + count, DRAWS_AT_ONCE) if cached.is_partial else ():
            cached.check_coverage(*stream.samples(start, min(DRAWS_AT_ONCE, first + count - start)))
        for cache in cached.caches:
            cost = cache.cost
            caching = Ledger(phases=[Phase("teacher", tokens=cost.tokens, flops=cost.flops, seconds=cost.seconds)])
            # A blend may get another dataset in mid-run, but the cache of one stays what it was.
            label = f"cache of {cache.identity.corpus_sha256[:12]}"
            inherit(self.state.ledger, label, cache.sha256, caching, str(cache.folder))
            # Whoever spoke was trained; where it is the source too, it is charged once.
            training = recorded(cache.training, f"{cache.folder}: training", self._given_flops)
            inherit(self.state.ledger, "teacher", cache.identity.model, training, str(cache.folder))
            self._tell_of_padding(cache.identity.vocab_size)
        names = " ".join(str(cache.folder) for cache in cached.caches)
        self.tell(f"stage 1: {names} teaches for {self.config.salt.steps} steps, in place of its teacher")
        return cached

    def _draws(self) -> tuple[Stream, int, int]:
        """The stream of stage 1, and the first and the number of the samples that it still draws from it.

        Where nobody knows when the model grows (at a plateau), those count too that it draws if that is sooner.
        """
        state, config, size = self.state, self.config, self.config.train.global_batch_size
        now, start, learning = state.train_step, state.grown_at or 0, 0
        if state.phase != "main":
            start = max(latest_step(config, num_growths(config.growth) - 1), now)
            learned = state.ligo_step if state.phase == "ligo" else 0
            learning = learning_steps(config.growth, state.growths) - learned
        is_known = state.phase == "main" or not may_grow_early(config)
        if isinstance(self.stream, Stream):
            earliest = start if is_known else now
            return self.stream, state.cursors["selected"], (self._end(earliest) - max(earliest, now)) * size
        before = max(start - now, 0) + learning
        skipped, end = before if is_known else 0, self._end(start) - now + learning
        return self.ordinary, state.cursors["all"] + skipped * size, (end - skipped) * size

    def _end(self, start: int) -> int:
        """Steps of the schedule that are done when stage 1 ends at the latest, if it starts after so many."""
        return min(start + self.config.salt.steps, self.config.train.steps)

    def _teach(self, learner: Learner) -> None:
        if self.teacher is None:
            self.teacher = self.cached or self._load_teacher()
            self.teacher.attach(learner.part.last_stage)
        self.teacher.weigh(learner.part.last_stage, self._weight)

    def _load_teacher(self) -> Teacher:
        config = self.config
        self.source = source = self.source or self._open_teacher()
        assert source is not None, "stage 1 comes when the model has grown"
        teacher = Teacher(source, self.mesh, config.salt, config.model, compute_dtype(config))
        # The run's own model is made for this data, however little it has learned of it.
        name, own = str(source.path), config.salt.grown_teaches
        given = self.mesh, name, config.init.skip_source_check or own, own
        losses = [check_source(teacher.model, dataset, *given) for dataset in self.datasets]
        share_identity(source, self.mesh)
        inherit(self.state.ledger, "teacher", source.identity, ledger_of(source, self._given_flops), name)
        shown = ", ".join(f"{loss:.3f}" for loss in losses)
        maps = f"{config.growth.ligo_steps} steps that learn maps, and " if self.teaches_maps else ""
        self.tell(f"stage 1: {name} teaches for {maps}{config.salt.steps} steps (its loss here: {shown})")
        self._tell_of_padding(source.model.vocab_size)
        if config.salt.end_when_better and self.state.teacher_loss is None:
            self.state.teacher_loss = self._held_out_loss(teacher)
            self.tell(f"stage 1 ends early once the held-out loss is below the teacher's {self.state.teacher_loss:.4f}")
        return teacher

    @property
    def _given_flops(self) -> float:
        """What the user says of the teacher's training; -1 where that is said of what the run starts from."""
        init = self.config.init
        return -1.0 if init.from_ else init.source_flops

    def _tell_of_padding(self, vocab_size: int) -> None:
        size = self.config.model.vocab_size
        if vocab_size != size:
            sizes = f"{vocab_size} of the teacher and {size} of the model"
            self.tell(f"stage 1 compares the tokens that both vocabularies have, {sizes}: the rest counts as padding")

    def _held_out_loss(self, teacher: Teacher) -> float:
        assert self.evaluator is not None, "salt_checks.check_stage_one asks for it"
        began = time.perf_counter()
        found = torch.tensor(self.evaluator.loss(teacher, self.mesh), dtype=torch.double, device=self.mesh.device)
        loss = broadcast_from(found, 0, self.mesh.world).item()
        if not math.isfinite(loss):
            raise DataError(f"salt.teacher={self.config.salt.teacher} has a held-out loss of {loss}; use another one")
        seconds = time.perf_counter() - began
        self._charge("evaluation", self.evaluator.num_batches * self.evaluator.batch_size, seconds, teacher)
        self.seconds += seconds
        return loss

    def _online_stream(self) -> OnlineStream:
        salt, size = self.config.salt, self.config.train.global_batch_size
        sizes = salt.online_buffer * size, salt.kept_batches * size
        return OnlineStream(self.ordinary, *sizes, self.state.cursors, self._score)

    def _score(self, which_M: Places, ids_M: Places, is_new: bool) -> Values:
        """The teacher's scores of a buffer; a buffer is charged once, as a step is that a resumed run does again."""
        assert isinstance(self.teacher, Teacher), "it is loaded before the first step"
        heartbeat.enter("scoring", self.state.step)
        began = time.perf_counter()
        values = score_candidates(self.teacher.model, self.ordinary, which_M, ids_M, self.config, self.mesh)
        seconds = time.perf_counter() - began
        self.seconds += seconds
        if is_new:
            self._charge("scoring", len(ids_M), seconds, steps=self.config.salt.online_buffer)
        return values

    def _charge(
        self, phase: str, num_samples: int, seconds: float, teacher: Teacher | None = None, steps: int = 1
    ) -> None:
        """Enters the teacher's forward passes over so many samples into the ledger; a cache has paid for its own."""
        length = self.config.data.seq_length
        passes = teacher or self.teacher
        num_tokens = num_samples * length
        spent = flops.forward_flops(passes.config, num_tokens, length) if isinstance(passes, Teacher) else 0.0
        self.state.ledger.add(phase, flops=spent, tokens=num_tokens, seconds=seconds, steps=steps)
