"""How a run begins: the model that it trains first, from nothing or from a checkpoint, and its learner."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megagrow.checkpoint.convert import tokenizer_of
from megagrow.checkpoint.format import Manifest
from megagrow.checkpoint.hf_tokenizer import token_ids_with, tokenizer_note
from megagrow.checkpoint.source import Source, judge_fit, known_samples, open_source, share_identity
from megagrow.checks import check_chain, check_models_from
from megagrow.config import Config, ModelConfig
from megagrow.config_file import to_dict
from megagrow.data.dataset import Samples
from megagrow.data.mlm import Masking
from megagrow.data.tokenizer import ByteTokenizer
from megagrow.errors import CheckpointError, Damaged
from megagrow.evaluate import mean_loss
from megagrow.growth.bootstrap import explain
from megagrow.parallel.mesh import Mesh
from megagrow.train import growing, saving, vocabulary
from megagrow.train.learner import Learner, ModelLearner
from megagrow.train.part import Part, build_part, initialize_part, load_part
from megagrow.train.salt_costs import ledger_of
from megagrow.train.state import RunState


@dataclass(frozen=True)
class Beginning:
    """A run that has no checkpoint of its own yet.

    `datasets` and `masking` are what the loss of a source is judged on; `say` takes a line for the user.
    """

    config: Config
    mesh: Mesh
    datasets: Sequence[Samples]
    masking: Masking | None
    say: Callable[[str], None]

    def begin(self) -> tuple[ModelLearner, RunState]:
        """What the run trains first.

        Raises:
            ConfigError, CheckpointError: the source does not fit the run, or does not know its data.
        """
        folder = self.config.init.from_
        learner, state = self._begin_from(open_source(folder)) if folder else self._begin_at_random()
        growing.check_freezing(learner, state, self.config)
        if told := growing.warning(learner, state, self.config):
            self.say(told)
        return learner, state

    def _begin_at_random(self) -> tuple[ModelLearner, RunState]:
        config, small = self.config, self.config.growth.source
        if told := explain(config):
            self.say(told)
        state = RunState(small or config.model, "small" if small else "main")
        self._tell_of_tokenizer(config.data.tokenizer)
        growing.check_recipes(state, config)
        part = build_part(state.model, config, self.mesh)
        initialize_part(part, config.train.seed)
        return growing.new_learner(part, config), state

    def _begin_from(self, source: Source) -> tuple[ModelLearner, RunState]:
        config = self.config
        if source.note:
            self.say(source.note)
        grows = config.growth.method != "none"
        if grows:
            check_chain(config, source.model)
        elif source.model != config.model:
            raise CheckpointError(
                f"{source.path} holds another model ({first_difference(source.model, config.model)}); "
                "make the models equal, or set growth.method to grow it"
            )
        check_models_from(source.model, config, str(source.path))
        state = RunState(source.model, "small" if grows else "main")
        state.tokenizer, own = _place_of_tokenizer(source), tokenizer_of(source)
        state.token_ids = token_ids_with(source, own, config.data.tokenizer or None)
        self._tell_of_tokenizer(config.data.tokenizer or own)
        growing.check_recipes(state, config)
        share_identity(source, self.mesh)
        state.ledger.inherit("source", source.identity, ledger_of(source, config.init.source_flops))
        part = build_part(source.model, config, self.mesh)
        load_part(part, source.fetch)
        self._check_source(part, source)
        if told := growing.moments_note(source, config):
            self.say(told)
        return growing.new_learner(part, config, source), state

    def _tell_of_tokenizer(self, tokenizer: Path | str | None) -> None:
        if note := tokenizer_note(self.config.model.family, tokenizer):
            self.say(note)

    def _check_source(self, part: Part, source: Source) -> None:
        """Its loss on the run's data, which tells a tokenizer that is not its own."""
        name, vocab_size = str(source.path), source.model.vocab_size
        grows, batch_size = self.config.model.vocab_size > vocab_size, self.config.train.global_batch_size
        for dataset in self.datasets:
            where = "the data" if len(self.datasets) == 1 else dataset.prefix
            tokens = known_samples(dataset, vocab_size, grows, name)
            if not len(tokens):
                new = f"the first samples all hold tokens beyond its vocabulary of {vocab_size}"
                self.say(f"source {source.path}: not tried on {where}, {new}")
                continue
            masking = vocabulary.masking_for(self.masking, source.model)
            loss = mean_loss(part.engine, tokens, batch_size, self.mesh, masking=masking)
            judge_fit(loss, vocab_size, name, self.config.init.skip_source_check)
            self.say(f"source {source.path}: loss {loss:.3f} on {where}")


def resumed_learner(manifest: Manifest, path: Path, state: RunState, config: Config, mesh: Mesh) -> Learner | Damaged:
    """A learner with what a checkpoint holds, or what is wrong with it: without the traceback, which keeps tensors."""
    learner = growing.learner_for(state, config, mesh)
    try:
        saving.load(manifest, path, learner, mesh)
    except Damaged as error:
        return Damaged(str(error))
    return learner


def _place_of_tokenizer(source: Source) -> str:
    """Where the tokenizer of a source lies, from wherever that is asked later; what it names where it is not there."""
    found = tokenizer_of(source)
    if found is None or str(found) == ByteTokenizer.name:
        return source.tokenizer
    return str(found.absolute())


def first_difference(old: ModelConfig, new: ModelConfig) -> str:
    """The first field in which two models differ, in words."""
    before, now = to_dict(old), to_dict(new)
    name = next(name for name in before if before[name] != now[name])
    return f"{name}={before[name]} there, {now[name]} here"
