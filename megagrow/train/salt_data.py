"""The samples that stage 1 is trained on where a folder of scores selects them."""

from collections.abc import Callable, Sequence

from megagrow.config import Config
from megagrow.data.dataset import PackedDataset, Samples
from megagrow.data.loader import Stream, shuffled
from megagrow.errors import ConfigError, named
from megagrow.ledger import Ledger, Phase
from megagrow.salt.score_files import Scores
from megagrow.salt.select import Selection, make_selection
from megagrow.train.salt_costs import inherit, recorded


def selected_stream(config: Config, datasets: Sequence[Samples], ledger: Ledger, tell: Callable[[str], None]) -> Stream:
    """The selected samples, shuffled anew in each epoch; what their scores cost is entered into the ledger.

    Raises:
        ConfigError, DataError: scores or domains are missing, or not those of the data.
        CheckpointError: the run began with other scores.
    """
    salt, data, dataset = config.salt, config.data, datasets[0]
    if len(datasets) > 1 or not isinstance(dataset, PackedDataset):
        raise ConfigError(
            "salt.scores are those of one dataset, data.train is a blend; merge its datasets "
            "(tools/merge_datasets.py), score the result and train on it"
        )
    selection = make_selection(salt, dataset)
    given = -1.0 if config.init.from_ or salt.teaches else config.init.source_flops
    _charge(ledger, "scores", selection.scores, salt.scores, given)
    if selection.reference is not None:
        _charge(ledger, "reference_scores", selection.reference, salt.reference_scores)
    tell(f"stage 1 trains on {len(selection.ids):,} of {dataset.num_samples:,} samples, by {salt.score}")
    for flag in ("mask_documents", "reset_positions"):
        seen, trained = getattr(selection.scores.identity, flag), getattr(data, flag)
        if seen != trained:
            tell(f"note: {salt.scores} was made with {flag}={seen}, training has data.{flag}={trained}")
    if selection.domains is not None:
        tell(f"of each domain: {_shares(selection)}")
    ordered = shuffled(dataset, data.seed, selection.ids)
    return Stream([ordered], with_documents=data.mask_documents or data.reset_positions)


def _charge(ledger: Ledger, label: str, scores: Scores, path: str, given_flops: float = -1.0) -> None:
    cost = scores.cost
    scoring = Ledger(phases=[Phase("scoring", tokens=cost.tokens, flops=cost.flops, seconds=cost.seconds)])
    inherit(ledger, label, scores.sha256, scoring, path)
    # Whoever scored was trained; where it is the source or the teacher too, it is charged once.
    training = recorded(scores.training, f"{path}: training", given_flops)
    ledger.inherit("scorer", scores.identity.model, training)


def _shares(selection: Selection) -> str:
    assert selection.domains is not None
    all_of, kept = selection.domains.counts(), selection.domains.among(selection.ids).counts()
    return ", ".join(f"{named(name)} {kept[name]:,} of {count:,}" for name, count in all_of.items())
