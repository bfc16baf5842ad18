"""The loop: which step comes next, and what follows each step."""

import gc
import math
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megagrow import flops, ops
from megagrow.adamw import check_optimizer_backend
from megagrow.checkpoint import hf, store
from megagrow.checkpoint.agreement import Ranks
from megagrow.config import Config, ModelConfig
from megagrow.data.description import check_one_tokenizer
from megagrow.data.mlm import make_masking
from megagrow.errors import Damaged, NonFiniteError, Preempted
from megagrow.evaluate import make_batch, make_masked_batch
from megagrow.metrics import Metrics, Progress
from megagrow.model.dropout import token_keys
from megagrow.optim import lr_at
from megagrow.parallel import heartbeat
from megagrow.parallel.context import local_positions
from megagrow.parallel.mesh import Mesh
from megagrow.profiling import Profiling, check_profiling
from megagrow.roles import num_parameters
from megagrow.timeline import growth_settings, step_tokens
from megagrow.train import growing, grown_teacher, saving, timing, vocabulary
from megagrow.train.beginning import Beginning, resumed_learner
from megagrow.train.clock import Clock, settle
from megagrow.train.garbage import collect_if_due, collected_between_steps
from megagrow.train.learner import Learner, ModelLearner, StepResult, map_lr
from megagrow.train.part import compute_dtype
from megagrow.train.salt_stage import SaltStage
from megagrow.train.state import RunState
from megagrow.train.stop import StopRequest
from megagrow.train.streams import (
    blend_weights,
    check_enough,
    continue_blend,
    describe_cursors,
    identities,
    make_evaluator,
    num_made,
    open_stream,
    open_training_data,
)


class Trainer:
    """One run: its data, its learner, its state.

    Args:
        config: must have passed `checks.check`.
        mesh: where this rank stands.

    Raises:
        DataError, CheckpointError, ConfigError: something that the run needs is missing or does not fit.
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        heartbeat.enter("load")
        self.config, self.mesh = config, mesh
        self.dir = Path(config.run.dir)
        hf.check_exportable(config.model)
        check_device(config, mesh.device)
        ops.let_kernels_serve(config.train.kernels)
        self.datasets = open_training_data(config)
        check_one_tokenizer(config.data)
        self.masking = None if config.model.is_causal else make_masking(config.data, config.model)
        self.evaluator = make_evaluator(config, self.masking)
        self.saver = saving.make_saver(config, mesh)
        self.validation_loss: float | None = None  # the latest, of a step
        self.saved_step: int | None = None  # of the checkpoint that holds the present state
        self.clock = Clock()
        self._owes_save = False  # because bad steps have held it up
        self._checkpoint_seconds = 0.0  # for which steps have waited since the last line of metrics.jsonl
        self.progress = Progress(config.train.steps, enabled=mesh.is_main)
        beginning = Beginning(config, mesh, self.datasets, self.masking, self.progress.message)
        self.learner, self.state = self._resume() or beginning.begin()
        self.state.blend = continue_blend(
            self.state.blend,
            blend_weights(config, self.datasets),
            Ranks(mesh.checkpoint_group).first("cannot read the data", lambda: identities(self.datasets)),
            self.state.cursors["all"],
            config.data.change_blend,
        )
        if self.state.blend.start == self.state.cursors["all"] > 0:
            self.state.forget_losses()
            self.progress.message(f"goes on: {describe_cursors(self.state.blend, self.state.cursors['all'])}")
        check_enough(self.datasets, config, self.state.samples_at_end(config))
        self.stream = open_stream(self.datasets, self.state.blend, config)
        vocabulary.check_before_growth(self.stream, self.datasets, self.state, config, mesh, self.progress.message)
        data = self.datasets, self.stream, self.evaluator
        self.salt = SaltStage(config, mesh, *data, self.state, self.progress.message)
        self.metrics = Metrics(self.dir, config, resume_step=self.state.step or None, enabled=mesh.is_main)

    def _resume(self, good_until: int | None = None) -> tuple[Learner, RunState] | None:
        """The newest checkpoint of the run that is whole; None when the run is new.

        One that cannot be read just now, or does not fit the model, is not passed over: an older one would train again
        what is done, and may hold the model from before a growth.

        Args:
            good_until: the step before bad ones; what stops have saved among these is set aside, since its weights may
                be to blame. Where nothing else is whole, None.
        """
        problem: Damaged | None = None
        bad: list[str] = []
        while (path := self._newest(bad)) is not None:
            manifest = store.read_manifest(path)
            state = saving.read_state(manifest, path, self.config, self.progress.message)
            if good_until is not None and state.step > good_until and state.guard.bad_steps > 0:
                bad.append(path.name)
                continue
            learner = resumed_learner(manifest, path, state, self.config, self.mesh)
            if isinstance(learner, Damaged):
                gc.collect()  # two models need not fit
                self.progress.message(f"warning: {learner}; trying the one before it")
                self.saver.passed_over.add(path.name)
                problem = learner
                continue
            growing.after_load(learner, state)
            growing.check_recipes(state, self.config)
            self.progress.message(f"resuming from {path}")
            self.saved_step = state.step
            if bad:
                saving.leave_behind(bad, self.config, self.mesh)
                self.progress.message(f"saved among the bad steps, and set aside: {', '.join(bad)}")
            return learner, state
        if problem is not None and not bad:
            raise problem
        return None

    def _newest(self, left_out: Collection[str] = ()) -> Path | None:
        try:
            return saving.newest(self.config, self.mesh, self.saver.passed_over.union(left_out))
        except Damaged:
            if left_out:
                return None
            raise

    def run(self, stop: StopRequest) -> None:
        """Trains to the end of the schedule, or until a stop is asked for.

        Raises:
            Preempted: a signal asked for a stop; everything is saved.
            NonFiniteError: too many steps in a row were refused, before and after a roll-back.
        """
        stop.wait_for_step()
        with self.progress, Profiling(self.config.run, self.mesh.world.rank, self.mesh.device) as profiling:
            if self.state.step == 0 and self.evaluator and not self.config.init.from_:
                self.progress.message(f"{describe_model(self.state.model)}, {self.mesh.world.size} rank(s)")
            with self._no_save_left_behind(), collected_between_steps():
                while not self.state.is_done(self.config):
                    if stop.agreed(self.mesh, self.saver.has_failed):
                        self._save_and_stop(stop)
                    self._grow_if_due()
                    with profiling.step(self.state.step):
                        self._step()
                    collect_if_due(self.state.step)
                self._save()
                self._wait_for_save()
            self.metrics.close()
            self._write_ledger()

    @contextmanager
    def _no_save_left_behind(self) -> Iterator[None]:
        """An error is no reason to lose the checkpoint that is being written, on whichever rank it happens."""
        try:
            yield
        except Exception:
            with suppress(Exception):  # the first error is the one to tell
                self._wait_for_save()
            raise

    def _wait_for_save(self) -> None:
        heartbeat.enter("checkpoint", self.state.step)
        self.saver.wait()

    def _save_and_stop(self, stop: StopRequest) -> None:
        self._wait_for_save()  # where it has failed, that is why the ranks stop
        if self.state.step > 0:
            self._save()
            self._wait_for_save()
            self._write_ledger()
        what = "saved" if self.state.step > 0 else "there was nothing to save"
        raise Preempted(f"stopped by {stop.name or 'another rank'} after step {self.state.step}; {what}")

    def _grow_if_due(self) -> None:
        state, config = self.state, self.config
        after: float | None = None
        ready = growing.is_ready(self.learner, state, config)
        reason = timing.due(state, config, self.mesh) if ready else None
        if reason is not None:
            before = self._loss_for_event()
            if grown_teacher.is_due(state, config):
                self._wait_for_save()
                grown_teacher.keep(self.learner.part, state, config, self.mesh)
            with self._growing(generates=state.growing(config).growth.learns_maps):
                self.learner = growing.begin(self.learner, state, config, self.mesh)
            after = self._loss_for_event()  # final unless maps are learned next
            state.pending_event = {"reason": reason, "loss_before": before, "loss_initial": after}
        if state.phase == "ligo" and state.ligo_step >= config.growth.ligo_steps:
            with self._growing(generates=False):  # the last step of the maps has generated the weights
                self.learner = growing.finish(self.learner, state, config, self.progress.message)
            after = self._loss_for_event()
        if state.phase != "ligo" and state.pending_event is not None:
            self._record_growth(after)

    @contextmanager
    def _growing(self, generates: bool) -> Iterator[None]:
        """Charges the time, and generating the large model's weights; from here on losses are of another model."""
        state = self.state
        source, growth = state.model, state.growing(self.config)
        self._wait_for_save()
        self.saver.release()
        heartbeat.enter("grow", state.step)
        began = time.perf_counter()
        yield
        gc.collect()  # the small model's modules hold each other
        settle(self.mesh.device)
        spent = 0.0
        if generates:
            spent = flops.ligo_generation_flops(source, growth.model, growth.growth.ligo_variant)
        seconds = time.perf_counter() - began
        state.ledger.add("growth", flops=spent, tokens=0, seconds=seconds, model=describe_model(growth.model))
        state.guard.forget()

    def _record_growth(self, after: float | None) -> None:
        state = self.state
        assert state.pending_event is not None
        number = state.growths - 1
        own = growth_settings(self.config.growth, number)
        facts = {"number": number, "model": describe_model(state.model), "train_step": state.train_step}
        event = {"method": own.method, "optimizer": own.optimizer, **facts, **state.pending_event, "loss_after": after}
        state.ledger.add_event("growth", state.step, **event)
        state.pending_event = None
        names = {"loss_before": "before", "loss_initial": "as it began", "loss_after": "after"}
        losses = ", ".join(f"{event[key]:.4f} {when}" for key, when in names.items() if event[key] is not None)
        self.progress.message(f"grown to {facts['model']} by {own.method}: loss {losses or 'not measured'}")

    def _step(self) -> None:
        state, config = self.state, self.config
        self.clock.charge(state.ledger)
        began = time.perf_counter()
        heartbeat.enter("data", state.step)
        vocabulary.limit(self.datasets, self.learner.part.config)
        salt_on = self.salt.is_on
        self.salt.switch(self.learner)
        if self.salt.has_just_ended:
            state.guard.forget()  # the mixed losses of stage 1 are no measure for those of stage 2
        self.learner.part.freeze(timing.frozen_layers(state, config))
        if timing.restarts(state, config) and isinstance(self.learner, ModelLearner):
            self.learner.restart()
        phase = state.phase if state.phase != "main" else "salt" if salt_on else "train"
        result = self._learn(salt_on)
        settle(self.mesh.device)
        seconds = time.perf_counter() - began - self.salt.seconds
        self._count(phase, seconds)
        timing.note_loss(state, result, config)
        self._follow_up(phase, result, seconds)

    def _learn(self, salt_on: bool) -> StepResult:
        """Takes the next samples of the stream that is in turn and learns from them."""
        state, config, mesh = self.state, self.config, self.mesh
        name, stream = ("selected", self.salt.stream) if salt_on and self.salt.stream else ("all", self.stream)
        size = config.train.global_batch_size
        drawn = stream.batch(state.cursors[name], size, mesh.dp.rank, mesh.dp.size)
        how = drawn.documents, config.data.mask_documents, config.data.reset_positions
        masking = vocabulary.masking_for(self.masking, self.learner.part.config)
        if masking is None:
            batch = make_batch(drawn.tokens, size, mesh, *how)
        else:
            share = len(drawn.tokens)
            visits = state.cursors[name] + mesh.dp.rank * share + torch.arange(share)
            batch = make_masked_batch(drawn.tokens, visits, masking, mesh, *how)
        state.cursors[name] += size
        if state.phase != "ligo":  # maps learn what the target computes, not noise around it
            batch = replace(batch, dropout_keys=dropout_keys(config, state.step, mesh))
        if salt_on or self.salt.teaches_maps:
            batch = self.salt.teach(batch, drawn, self.learner.part.engine.num_microbatches)
        heartbeat.enter("forward/backward", state.step)
        return self.learner.step(batch, self._lr(), state.guard)

    def _lr(self) -> float:
        state, config = self.state, self.config
        if state.phase == "ligo":
            return map_lr(state.ligo_step, config)
        return lr_at(state.train_step, config.train.steps, config.optim) * timing.rewarmup(state, config)

    def _count(self, phase: str, seconds: float) -> None:
        """Charges a step to the ledger and moves the counters."""
        state, config = self.state, self.config
        tokens, length, model = step_tokens(config), config.data.seq_length, self.learner.part.config
        if phase == "ligo":
            variant = config.growth.ligo_variant
            spent = flops.ligo_step_flops(state.model, model, tokens, length, variant=variant)
        else:
            spent = flops.training_flops(model, tokens, length, frozen_layers=timing.frozen_layers(state, config))
        state.ledger.add(phase, flops=spent, tokens=tokens, seconds=seconds, model=describe_model(model))
        self.clock.enter(phase, describe_model(model))
        state.tokens += tokens
        state.step += 1
        if phase == "ligo":
            state.ligo_step += 1
        else:
            state.train_step += 1

    def _follow_up(self, phase: str, result: StepResult, seconds: float) -> None:
        state, config = self.state, self.config
        heartbeat.enter("metrics", state.step)
        validation = self._validate(self.learner) if self._evaluation_is_due() else None
        if validation is not None:
            self.validation_loss = validation
            self.salt.judge(validation)
        self._log(phase, result, seconds, validation)
        if not result.accepted:
            self.progress.message(f"step {state.step} is refused: loss {result.loss}, gradient norm {result.grad_norm}")
        if validation is not None:
            self.progress.message(f"step {state.step}: validation loss {validation:.4f}")
        if state.guard.bad_steps >= config.optim.max_bad_steps:
            self._roll_back(result)
        elif self._save_is_due():
            self._save()

    def _is_due(self, interval: int) -> bool:
        return self.state.is_done(self.config) or (interval > 0 and self.state.step % interval == 0)

    def _evaluation_is_due(self) -> bool:
        """At its interval, and right after growing, where the loss changes fast, at powers of two."""
        train, grown_at = self.config.train, self.state.grown_at
        learns_maps = self.state.phase == "ligo"  # meanwhile `train_step` stands still
        since = 0 if grown_at is None or learns_maps else self.state.train_step - grown_at
        return self._is_due(train.eval_interval) or (0 < since <= train.eval_after_growth and since.bit_count() == 1)

    def _save_is_due(self) -> bool:
        """A save that is due waits while steps are bad: rolling back to it would land among them."""
        self._owes_save |= self._is_due(self.config.checkpoint.interval)
        return self._owes_save and self.state.guard.bad_steps == 0 and not self.state.is_done(self.config)

    def _validate(self, learner: Learner) -> float | None:
        if self.evaluator is None or self._is_beyond(learner.part.config):
            return None
        began = time.perf_counter()
        heartbeat.enter("evaluate", self.state.step)
        loss = self.evaluator.loss(learner.part.engine, self.mesh)
        model, tokens = learner.part.config, self.evaluator.num_tokens
        spent = flops.forward_flops(model, tokens, self.config.data.seq_length)
        seconds = time.perf_counter() - began
        self.state.ledger.add("evaluation", flops=spent, tokens=tokens, seconds=seconds, model=describe_model(model))
        return loss

    def _is_beyond(self, model: ModelConfig) -> bool:
        """Whether the held-out data hold tokens that a model will only know when it has grown."""
        known, full = model.vocab_size, self.config.model.vocab_size
        return known < full and self.evaluator is not None and self.evaluator.largest_token >= known

    def _loss_for_event(self) -> float | None:
        """The validation loss now; None where there is none, or none that a checkpoint can hold."""
        loss = self._validate(self.learner)
        return loss if loss is not None and math.isfinite(loss) else None

    def _log(self, phase: str, result: StepResult, seconds: float, validation: float | None) -> None:
        state, config = self.state, self.config
        rate = config.train.global_batch_size * config.data.seq_length / seconds
        if state.step % config.run.log_interval == 0 or validation is not None or not result.accepted:
            own = state.ledger.own()
            is_taught = (phase == "salt" and config.salt.teaches) or self.salt.teaches_maps
            self.metrics.log(
                step=state.step,
                phase=phase,
                tokens=state.tokens,
                loss=result.loss,
                ce=result.ce,
                kd=result.kd if is_taught else None,
                teacher_entropy=result.teacher_entropy if is_taught else None,
                lr=result.lr,
                grad_norm=result.grad_norm,
                tokens_per_second=rate,
                mfu=self._mfu(rate),
                flops_total=own["flops"],
                seconds_total=own["seconds"],
                checkpoint_seconds=self._checkpoint_seconds,
                validation_loss=validation,
                skipped=not result.accepted,
            )
            self._checkpoint_seconds = 0.0
        if phase == "ligo":
            done, total = state.ligo_step, config.growth.ligo_steps
        else:
            done, total = state.train_step, config.train.steps
        self.progress.update(
            done,
            phase=phase,
            loss=result.loss,
            lr=result.lr,
            grad_norm=result.grad_norm,
            tokens_per_second=rate,
            mfu=self._mfu(rate),
            total_steps=total,
        )

    def _mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs over the devices' peak; None where the peak is not known (CPUs, fp32)."""
        if self.mesh.device.type != "cuda":
            return None
        peak = flops.peak_flops_per_second(torch.cuda.get_device_name(), self.config.train.precision)
        model = self.learner.part.config
        frozen = timing.frozen_layers(self.state, self.config)
        per_token = flops.training_flops(model, 1, self.config.data.seq_length, frozen_layers=frozen)
        return None if peak is None else tokens_per_second * per_token / (peak * self.mesh.world.size)

    def _roll_back(self, result: StepResult) -> None:
        """Returns to the last checkpoint and goes on with the data after the bad stretch.

        Raises:
            NonFiniteError: there is none, or that has been tried here before.
        """
        self._wait_for_save()
        state = self.state
        what = f"{state.guard.bad_steps} steps in a row were refused, last at step {state.step} (loss {result.loss})"
        if not self._may_roll_back() or self._newest() is None:
            raise NonFiniteError(f"{what}; lower optim.lr or look at the data around sample {state.cursors['all']}")
        del self.learner  # two models need not fit
        gc.collect()
        found = self._resume(good_until=state.step - state.guard.bad_steps) or self._resume()
        assert found is not None, "a checkpoint was there"
        self.learner, restored = found
        self._check_spare_samples(restored, what)
        restored.cursors, restored.blend, restored.rolled_back_at = dict(state.cursors), state.blend, state.step
        restored.guard.bad_steps, self._owes_save = 0, False
        restored.tokens, restored.ledger.phases = state.tokens, state.ledger.phases  # thrown away, but spent
        self.state = restored
        self.salt.rejoin(restored)
        self.metrics.rewind(restored.step)
        self.progress.message(f"{what}; rolled back to step {restored.step}, skipping the samples in between")

    def _may_roll_back(self) -> bool:
        """Once, and again after so many further steps that other data must be the cause."""
        state, config = self.state, self.config
        if state.rolled_back_at < 0:
            return True
        came_to, interval = state.step - state.guard.bad_steps, config.checkpoint.interval
        return interval > 0 and came_to >= state.rolled_back_at + max(interval, config.optim.max_bad_steps)

    def _check_spare_samples(self, restored: RunState, what: str) -> None:
        """Megatron's order has an end, and steps that are done again take samples that nobody counted on."""
        config = self.config
        needed = self.state.cursors["all"] - restored.cursors["all"] + restored.samples_at_end(config)
        made = num_made(self.datasets, config)
        if made is not None and needed > made:
            raise NonFiniteError(
                f"{what}; to roll back takes {needed} samples, data.order=megatron has {made}: lower "
                f"optim.lr, or begin anew with --data.num-samples {needed} or more"
            )

    def _save(self) -> None:
        self.clock.charge(self.state.ledger)
        began, self._owes_save = time.perf_counter(), False
        heartbeat.enter("checkpoint", self.state.step)
        if self.state.step != self.saved_step:
            saving.save(self.saver, self.learner, self.state, self.config)
            self.saved_step = self.state.step
        self._checkpoint_seconds += time.perf_counter() - began
        self._write_ledger()

    def _write_ledger(self) -> None:
        self.clock.charge(self.state.ledger)
        if self.mesh.is_main:
            self.state.ledger.save(self.dir / "ledger.json")


def dropout_keys(config: Config, step: int, mesh: Mesh) -> Tensor | None:
    """The dropout keys of this rank's tokens in a step; None when nothing is dropped."""
    if config.train.dropout == 0:
        return None
    share = config.train.global_batch_size // mesh.dp.size
    samples = torch.arange(mesh.dp.rank * share, (mesh.dp.rank + 1) * share, device=mesh.device)
    positions = local_positions(config.data.seq_length, mesh.cp.rank, mesh.cp.size, mesh.device)
    return token_keys(config.train.seed, step, samples, positions)


def check_device(config: Config, device: torch.device) -> None:
    """Raises ConfigError when this machine lacks what the configuration asks for."""
    ops.check_attention_backend(config.train.attention, compute_dtype(config) or torch.get_default_dtype(), device)
    ops.check_kernels(config.train.kernels, device)
    check_optimizer_backend(config.optim.backend, device)
    check_profiling(config.run, device)


def describe_model(model: ModelConfig) -> str:
    """A model in a few words, for messages and the ledger."""
    millions = num_parameters(model) / 1e6
    return f"{model.family} {model.num_layers}x{model.hidden_size} ({millions:.3g}M parameters)"
