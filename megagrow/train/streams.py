"""The data of a run: what it trains on, in which order, and what it is measured on."""

from collections.abc import Mapping, Sequence

from megagrow.checkpoint.source import CHECK_SAMPLES
from megagrow.config import Config, DataConfig, ModelConfig
from megagrow.data.blend import Blend, BlendStart, DatasetIdentity, EvenDraws, parse_blend
from megagrow.data.dataset import JoinedDatasets, PackedDataset, Samples
from megagrow.data.description import describe
from megagrow.data.loader import FileOrder, Ordered, Stream, shuffled
from megagrow.data.megatron import MegatronDataset, split_shares
from megagrow.data.megatron_blend import MegatronDraws, blend_sizes, with_surplus
from megagrow.data.mlm import Masking
from megagrow.errors import CheckpointError, ConfigError, DataError
from megagrow.evaluate import Evaluator
from megagrow.parallel import heartbeat
from megagrow.timeline import order_size

WHOLE = (0.0, 1.0)


def open_dataset(prefix: str, model: ModelConfig, config: Config) -> PackedDataset:
    """Opens a token file and makes sure that the model can read it.

    Raises:
        DataError: missing, malformed or too short file, or a vocabulary larger than the model's.
    """
    _check_vocabulary(prefix, model.vocab_size)
    dataset = PackedDataset(prefix, config.data.seq_length, model.vocab_size)
    _try(dataset)
    return dataset


def open_training_data(config: Config) -> list[Samples]:
    """The datasets of `data.train`, in the order that the configuration asks for.

    They hold tokens of the model that the run ends with (see vocabulary.py for those before it).

    Raises:
        ConfigError, DataError: no dataset, or one that cannot be used (see `open_dataset`).
    """
    blend = parse_blend(config.data.train)
    if config.data.order == "megagrow":
        return [open_dataset(prefix, config.model, config) for prefix in blend.prefixes]
    share = _shares(config.data).get("train")
    if share is None:
        raise ConfigError(f'data.split="{config.data.split}" leaves nothing for training; give it a weight')
    sizes = _megatron_sizes(blend, config)
    return [_open_megatron(p, n, share, config) for p, n in zip(blend.prefixes, sizes, strict=True)]


def blend_weights(config: Config, datasets: Sequence[Samples]) -> dict[str, float]:
    """The weight of each dataset by prefix; where none are given, its number of samples."""
    blend = parse_blend(config.data.train)
    weights = blend.weights or [float(dataset.num_samples) for dataset in datasets]
    return dict(zip(blend.prefixes, weights, strict=True))


def identities(datasets: Sequence[Samples]) -> dict[str, DatasetIdentity]:
    """What tells each dataset from another in its place, by prefix; reads a few MiB of each."""
    found = {}
    for dataset in datasets:
        assert isinstance(dataset, PackedDataset | MegatronDataset)
        found[dataset.prefix] = DatasetIdentity(dataset.num_samples, dataset.indexed.sketch())
        heartbeat.progress()
    return found


def continue_blend(
    saved: BlendStart | None,
    weights: dict[str, float],
    datasets: Mapping[str, DatasetIdentity],
    cursor: int,
    may_change: bool,
) -> BlendStart:
    """Where the run's draws begin: as saved, or here if the blend has changed.

    Args:
        saved: in the checkpoint; None: the run is new.
        weights: of the blend now.
        datasets: what those of the blend are now.
        cursor: samples that the run has consumed.
        may_change: whether the blend may be another than the saved one.

    Raises:
        CheckpointError: it has changed, and nobody said that it may; or a dataset of it is not what it was.
    """
    if saved is None:
        return BlendStart(weights, datasets=dict(datasets))
    saved = saved.renamed(weights)
    _check_unchanged(saved.datasets, datasets)
    if list(saved.weights.items()) == list(weights.items()):
        return saved
    if not may_change:
        raise CheckpointError(
            f"data.train was {describe_blend(saved.weights)} when the run was saved and is {describe_blend(weights)} "
            "now; restore it, or set --data.change-blend true to go on with other data (data.order=megagrow only)"
        )
    return saved.changed(weights, cursor, datasets)


def _check_unchanged(saved: Mapping[str, DatasetIdentity], datasets: Mapping[str, DatasetIdentity]) -> None:
    for prefix, now in datasets.items():
        before = saved.get(prefix, now)
        if before != now:
            raise CheckpointError(
                f"{prefix}: is not the dataset that the run was saved with, which had {before.num_samples} samples and "
                f"has {now.num_samples} now: its cursor means nothing in another; put it back, or give the new one a "
                "name of its own and set --data.change-blend true (data.order=megagrow only)"
            )


def describe_blend(weights: Mapping[str, float]) -> str:
    """A blend in words."""
    return " ".join(f"{weight:g} {prefix}" for prefix, weight in weights.items())


def describe_cursors(begun: BlendStart, cursor: int) -> str:
    """Where each dataset goes on when the run has consumed `cursor` samples, in words."""
    consumed = begun.consumed(cursor)
    return ", ".join(f"{prefix} at {count}{'' if count else ' (new)'}" for prefix, count in consumed.items())


def open_stream(datasets: Sequence[Samples], begun: BlendStart, config: Config) -> Stream:
    """The run's training samples, from the datasets that `open_training_data` opened."""
    data, weights = config.data, list(begun.weights.values())
    with_documents = data.mask_documents or data.reset_positions
    if data.order == "megagrow":
        parts = [shuffled(dataset, data.seed) for dataset in datasets]
        firsts = [begun.firsts.get(prefix, 0) for prefix in begun.weights]
        return Stream(parts, EvenDraws(weights), start=begun.start, firsts=firsts, with_documents=with_documents)
    parts = [Ordered(dataset, FileOrder(dataset.prefix, dataset.num_samples)) for dataset in datasets]
    draws = _megatron_draws(datasets, weights, config) if _is_blend(parse_blend(data.train), data) else None
    return Stream(parts, draws, with_documents=with_documents)


def make_evaluator(config: Config, masking: Masking | None = None) -> Evaluator | None:
    """The held-out batches that the configuration names, or None."""
    data = config.data
    held_out = _shares(data).get("validation") if data.split else None
    if config.train.eval_batches == 0 or not (data.validation or held_out):
        return None
    blend = parse_blend(data.validation or data.train, "data.validation" if data.validation else "data.train")
    datasets: list[Samples]
    if held_out:
        datasets = [_open_megatron(prefix, None, held_out, config) for prefix in blend.prefixes]
    elif blend.weights is None:
        datasets = [open_dataset(prefix, config.model, config) for prefix in blend.prefixes]
    else:
        raise ConfigError(f"data.validation={data.validation} has weights; held-out datasets weigh by their size")
    dataset = datasets[0] if len(datasets) == 1 else JoinedDatasets(datasets)
    train = config.train
    how = data.mask_documents, data.reset_positions, masking
    return Evaluator(dataset, train.global_batch_size, train.eval_batches, *how)


def num_made(datasets: Sequence[Samples], config: Config) -> int | None:
    """Samples that the run's order has, of the datasets that `open_training_data` opened; None: it does not end."""
    if config.data.order == "megagrow":
        return None
    blend = parse_blend(config.data.train)
    return _blend_size(datasets, blend, config) if _is_blend(blend, config.data) else datasets[0].num_samples


def check_enough(datasets: Sequence[Samples], config: Config, needed: int) -> None:
    """Raises ConfigError where the run takes more samples than its order has, which would show at its end only.

    Args:
        datasets: from `open_training_data`.
        needed: samples that the run will have taken when it is done.
    """
    made = num_made(datasets, config)
    if made is None or needed <= made:
        return
    why, remedy = f"data.num_samples={config.data.num_samples}", f"set --data.num-samples {needed} or more"
    if made < order_size(config):
        why, remedy = "a blend without weights ends with its datasets", "give each a weight"
    raise ConfigError(
        f"data.order=megatron has {made} samples here ({why}), and this run takes {needed}; {remedy} in a new run, or "
        "train for fewer steps"
    )


def _megatron_sizes(blend: Blend, config: Config) -> list[int | None]:
    """For how many samples each dataset's order is made."""
    if not _is_blend(blend, config.data):
        return [order_size(config)]
    if blend.weights is None:
        return [None] * len(blend.prefixes)
    return [with_surplus(size) for size in blend_sizes(blend.weights, order_size(config))]


def _megatron_draws(datasets: Sequence[Samples], weights: list[float], config: Config) -> MegatronDraws:
    size = _blend_size(datasets, parse_blend(config.data.train), config)
    draws = MegatronDraws(weights, size)
    for dataset, count in zip(datasets, draws.counts(size).tolist(), strict=True):
        if count > dataset.num_samples:
            raise DataError(f"{dataset.prefix}: the blend draws {count} samples, but {dataset.num_samples} were made")
    return draws


def _blend_size(datasets: Sequence[Samples], blend: Blend, config: Config) -> int:
    """How many draws a blend has."""
    if blend.weights is None:
        return min(order_size(config), sum(dataset.num_samples for dataset in datasets))
    return sum(blend_sizes(blend.weights, order_size(config)))


def _is_blend(blend: Blend, data: DataConfig) -> bool:
    """Whether Megatron blends: one dataset with a weight is a blend for it only where a split is given too."""
    return len(blend.prefixes) > 1 or bool(blend.weights and data.split)


def _shares(data: DataConfig) -> dict[str, tuple[float, float]]:
    return split_shares(data.split) if data.split else {"train": WHOLE}


def _open_megatron(prefix: str, num_samples: int | None, share: tuple[float, float], config: Config) -> Samples:
    data, vocab_size = config.data, config.model.vocab_size
    _check_vocabulary(prefix, vocab_size)
    dataset = MegatronDataset(prefix, data.seq_length, num_samples, data.seed, share, vocab_size)
    _try(dataset)
    return dataset


def _check_vocabulary(prefix: str, vocab_size: int) -> None:
    described = describe(prefix)
    if described and described["vocab_size"] > vocab_size:
        raise DataError(
            f"{prefix}: made with a vocabulary of {described['vocab_size']}, model.vocab_size={vocab_size}; "
            f"set --model.vocab-size {described['vocab_size']} or more"
        )


def _try(dataset: Samples) -> None:
    """Each batch is checked; a wrong file shows at once."""
    dataset.batch(range(min(CHECK_SAMPLES, dataset.num_samples)))
