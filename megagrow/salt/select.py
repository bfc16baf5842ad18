"""Which samples stage 1 trains on, by their scores.

Of equal scores the sample with the lower id ranks higher, so a selection depends on nothing but scores and settings.
What is kept (`salt.keep`):

    top        the best share: SALT's (Rawat et al., 2024, arXiv 2410.18779)
    threshold  what scores at least so much
    band       what lies between two quantiles: the middle by perplexity, Perplexed by Perplexity (Ankner et al., 2024,
               arXiv 2405.20541)
"""

# Shape suffix legend: N = samples, or those of one domain.

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megagrow.config import SaltConfig, require
from megagrow.data.dataset import PackedDataset
from megagrow.data.domains import Domains, read_domains
from megagrow.errors import DataError, named
from megagrow.salt.score_files import SCORE_NAMES, Scores, read_scores

EXCESS = "excess_nll"
Values = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Selection:
    """What a run's configuration selects.

    Attributes:
        ids: int64, of the samples that are kept, in ascending order.
        values: [N] what all samples were compared by.
        scores: the folder that they come from.
        reference: the folder that was subtracted, or None.
        domains: of the samples, or None.
    """

    ids: NDArray[np.int64]
    values: Values
    scores: Scores
    reference: Scores | None
    domains: Domains | None


def make_selection(salt: SaltConfig, dataset: PackedDataset) -> Selection:
    """Reads scores and domains, which must cover every sample of `dataset`, and selects.

    Raises:
        ConfigError: an unknown score, or a quota of a domain that does not exist.
        DataError: scores or domains are missing, damaged or those of another corpus, or nothing is selected.
    """
    scores = read_scores(Path(salt.scores), dataset)
    reference = read_scores(Path(salt.reference_scores), dataset) if salt.reference_scores else None
    values = sample_values(scores, salt.score, reference)
    domains = read_domains(salt.domains, dataset.indexed).of_samples(dataset) if salt.domains else None
    return Selection(select(values, salt, domains), values, scores, reference, domains)


def sample_values(scores: Scores, score_name: str, reference: Scores | None = None) -> Values:
    """What the samples [N] are compared by: one of their scores, or the excess of their mean loss over a reference's.

    `excess_nll` is RHO-LOSS (Mindermann et al., 2022, arXiv 2206.07137) when the reference has learned from held-out
    data, so that what it finds hard is noise, and CoLoR-Filter (Brandfonbrener et al., 2024, arXiv 2406.10670) when it
    is the scorer itself, trained further on the target's data.

    Args:
        scores: from `read_scores`, which has compared them with the dataset.
        score_name: one of SCORE_NAMES, or `excess_nll`.
        reference: the scores of another model, for `excess_nll`.

    Raises:
        ConfigError: an unknown score.
        DataError: a sample without a finite score, or a reference that is the scorer, or has seen documents otherwise.
    """
    known = (*SCORE_NAMES, EXCESS)
    require(score_name in known, f"salt.score={score_name} is unknown; use one of {', '.join(known)}")
    name = "mean_nll" if score_name == EXCESS else score_name
    values = _finite(scores, name)
    if score_name != EXCESS:
        return values
    assert reference is not None, "salt_checks.check_selection asks for it"
    if reference.identity.model == scores.identity.model:
        raise DataError(
            f"{reference.folder}: scores of the same model as {scores.folder}, whose difference is 0; "
            "salt.reference_scores must be those of another model"
        )
    for flag in ("mask_documents", "reset_positions"):
        theirs, ours = getattr(reference.identity, flag), getattr(scores.identity, flag)
        if theirs != ours:
            raise DataError(
                f"{reference.folder}: was made with {flag}={theirs}, {scores.folder} with {flag}={ours}: the "
                "difference would be that of what they saw; score with both models alike"
            )
    return values.astype(np.float64) - _finite(reference, name)


def select(values_N: Values, salt: SaltConfig, domains: Domains | None = None) -> NDArray[np.int64]:
    """The ids of the samples that are kept, in ascending order; at least one of every domain with a share above 0.

    Args:
        values_N: from `sample_values`.
        salt: says what is kept, see above; other fields do not matter.
        domains: of the samples: what is kept, is kept of each domain by itself. None: of all together.

    Raises:
        ConfigError: a quota of a domain that does not exist.
        DataError: nothing is kept.
    """
    if domains is None:
        ids = _kept(values_N, salt, salt.keep_fraction)
    else:
        _check_quotas(salt, domains)
        own_ids = [np.flatnonzero(domains.ids == number) for number in range(len(domains.names))]
        shares = [salt.domain_shares.get(name, salt.keep_fraction) for name in domains.names]
        kept = [own[_kept(values_N[own], salt, share)] for own, share in zip(own_ids, shares, strict=True)]
        ids = np.sort(np.concatenate(kept))
    if len(ids) == 0:
        raise DataError(
            f"{salt.scores}: no sample is kept; the largest {salt.score} is {values_N.max():g}: lower salt.threshold, "
            "or raise salt.quotas"
        )
    return ids


def highest(values_N: Values, count: int) -> NDArray[np.int64]:
    """The places of the `count` highest values, in ascending order; of equal values the first are taken."""
    return np.sort(_falling(values_N)[:count])


def _kept(values_N: Values, salt: SaltConfig, share: float) -> NDArray[np.int64]:
    """The places in ascending order of what is kept of one domain."""
    count = len(values_N)
    if salt.keep == "threshold":
        return np.flatnonzero(values_N >= salt.threshold)
    if count == 0 or share == 0:
        return np.empty(0, np.int64)
    if salt.keep == "top":
        return highest(values_N, max(1, round(share * count)))
    first, stop = round((1 - salt.band_high) * count), round((1 - salt.band_low) * count)
    first = min(first, count - 1)
    return np.sort(_falling(values_N)[first : max(stop, first + 1)])


def _falling(values_N: Values) -> NDArray[np.int64]:
    return np.argsort(-values_N, kind="stable")


def _check_quotas(salt: SaltConfig, domains: Domains) -> None:
    for name in salt.domain_shares:
        require(
            name in domains.names,
            f"salt.quotas names {named(name)}, a domain that {salt.domains} does not have; it has "
            f"{', '.join(map(named, domains.names[:20]))}{' …' if len(domains.names) > 20 else ''}",
        )


def _finite(scores: Scores, name: str) -> NDArray[np.float32]:
    values = scores.values[name]
    missing = np.flatnonzero(~np.isfinite(values))
    if len(missing):
        raise DataError(
            f"{scores.folder}: {name} of sample {missing[0]} is {values[missing[0]]}, and "
            f"{len(missing)} of {len(values)} are not finite; selection needs a score for every "
            "sample: score the corpus again"
        )
    return values
