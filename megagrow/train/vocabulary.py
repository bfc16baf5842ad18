"""Data with tokens that only the grown model knows, in a run whose vocabulary grows on the way.

Datasets are opened for the model that the run ends with. No batch may hold a token that the model which reads it lacks:
on shards of a vocabulary such a token has no row on any rank, so that losses would be finite and wrong.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

from megagrow.checkpoint.agreement import Ranks
from megagrow.config import Config, ModelConfig, require
from megagrow.data.dataset import Samples
from megagrow.data.loader import Stream
from megagrow.data.mlm import Masking
from megagrow.errors import DataError, UnknownToken
from megagrow.parallel import heartbeat
from megagrow.parallel.mesh import Mesh
from megagrow.timeline import latest_step, learning_steps, num_growths
from megagrow.train.state import RunState


def limit(datasets: Iterable[Samples], model: ModelConfig) -> None:
    """From here on it is `model` that reads the batches of these datasets."""
    for dataset in datasets:
        dataset.vocab_size = model.vocab_size


def masking_for(masking: Masking | None, model: ModelConfig) -> Masking | None:
    """A run's masking, whose random tokens are those of a model that may still have fewer.

    Raises:
        ConfigError: the model does not know the mask token.
    """
    if masking is None:
        return None
    require(
        masking.mask_id < model.vocab_size,
        f"the mask token {masking.mask_id} is beyond the vocabulary of {model.vocab_size} of the model before it "
        "grows; name one of its own with data.mask_token",
    )
    return replace(masking, vocab_size=min(masking.vocab_size, model.vocab_size))


def check_before_growth(
    stream: Stream,
    datasets: Iterable[Samples],
    state: RunState,
    config: Config,
    mesh: Mesh,
    say: Callable[[str], None] = lambda message: None,
) -> None:
    """Makes sure, before anything is trained, that no model meets a token which only the last growth gives it, as it
    learns or as it teaches what it has grown into.

    All samples up to there are read once, each by one data rank; a collective. Of samples that a selection picks for
    stage 1 it cannot tell: the teacher refuses the batch then.

    Args:
        stream: the run's samples.
        datasets: its datasets.
        state: where the run stands.
        config: of the run.
        mesh: where this rank stands.
        say: takes a line for the user, before all is read.

    Raises:
        DataError: on every rank, with the first token that is met too early, or why a sample cannot be read.
    """
    steps = _steps_before_growth(state, config)
    if steps == 0:
        return
    limit(datasets, state.model)
    size, problem = config.train.global_batch_size, None
    say(f"looking through the {steps * size} samples up to the last growth for tokens that only it adds")
    try:
        for step in range(steps):
            stream.batch(state.cursors["all"] + step * size, size, mesh.dp.rank, mesh.dp.size)
            heartbeat.progress()
    except UnknownToken as error:
        is_new = state.model.vocab_size <= error.token < config.model.vocab_size
        problem = str(error) + (_remedy(config) if is_new else "")
    except DataError as error:
        problem = str(error)
    found = next(filter(None, Ranks(mesh.checkpoint_group).gather(problem)), None)
    if found:
        raise DataError(found)


def _remedy(config: Config) -> str:
    source = config.growth.source
    remedy = "growth.at_step=0" if source is None else f"growth.source.vocab_size={config.model.vocab_size}"
    teacher = " and another salt.teacher, which is to know them too" if config.salt.grown_teaches else ""
    return f", or let it know all tokens before it meets them: set {remedy}{teacher}"


def _steps_before_growth(state: RunState, config: Config) -> int:
    """Steps, at most, that a model with fewer tokens than the last one still takes, or teaches in; only the last growth
    adds any.
    """
    last = num_growths(config.growth) - 1
    knows_all = state.model.vocab_size == config.model.vocab_size
    if state.phase == "main" or knows_all or (state.phase == "ligo" and state.growths == last):
        return 0
    learned = state.ligo_step if state.phase == "ligo" else 0
    learning = learning_steps(config.growth, state.growths, last) - learned
    taught = config.salt.steps if config.salt.grown_teaches and not config.salt.picks_data else 0
    return max(latest_step(config, last) - state.train_step + learning, 0) + taught
