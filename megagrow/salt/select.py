"""Which samples stage 1 trains on: the best share by score."""

import numpy as np
from numpy.typing import NDArray

from megagrow.config import require
from megagrow.errors import DataError
from megagrow.salt.score_files import SCORE_NAMES, Scores


def select(scores: Scores, score_name: str, keep_fraction: float) -> NDArray[np.int64]:
    """The ids of the round(keep_fraction · N) samples with the highest scores, at least one, in
    ascending order.

    Of equal scores the lower id is kept, so the selection depends on nothing but the scores.

    Args:
        scores: from `read_scores`, which has compared them with the dataset.
        score_name: one of SCORE_NAMES.
        keep_fraction: in (0, 1].

    Raises:
        ConfigError: an unknown score, or a share outside (0, 1].
        DataError: a sample without a finite score.
    """
    require(
        score_name in SCORE_NAMES,
        f"salt.score={score_name} is unknown; use one of {', '.join(SCORE_NAMES)}",
    )
    require(0 < keep_fraction <= 1, f"salt.keep_fraction={keep_fraction} must be in (0, 1]")
    values = scores.values[score_name]
    missing = np.flatnonzero(~np.isfinite(values))
    if len(missing):
        raise DataError(
            f"{scores.folder}: {score_name} of sample {missing[0]} is {values[missing[0]]}, and "
            f"{len(missing)} of {len(values)} are not finite; selection needs a score for every "
            "sample: score the corpus again"
        )
    num_kept = max(1, round(keep_fraction * len(values)))
    return np.sort(np.argsort(-values, kind="stable")[:num_kept])
