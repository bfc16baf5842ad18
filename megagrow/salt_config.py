"""How a small model teaches, and picks data: the section `salt` of the configuration."""

import math
from dataclasses import dataclass
from typing import Literal

from megagrow.rules import require, require_not_negative, require_size

GROWN = "grown"  # in place of the path of a teacher


@dataclass(frozen=True)
class SaltConfig:
    """Stage 1 distils from a small teacher, optionally on data that it picked; stage 2 is plain."""

    # Own checkpoint or Hugging Face folder; grown: the small model that this run grows, as it is then; empty: none, or
    # one that left a cache
    teacher: str = ""
    steps: int = 0  # steps of stage 1, counted from the start of the (grown) model's training
    weight: float = 0.5  # omega: loss = (1 - omega)·CE + omega·KD
    # Of omega over stage 1; linear, cosine: it falls to 0 at the end (docs/teaching.md).
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    temperature: float = 1.0  # rho
    temperature_on: Literal["teacher", "both"] = "teacher"
    scale_by_temperature_squared: bool = False  # Hinton's factor; off keeps the stated weight
    # KD: of the student from the teacher, or in reverse; cross_entropy: forward_kl plus the teacher's entropy, and so
    # with the same gradients
    divergence: Literal["forward_kl", "reverse_kl", "cross_entropy"] = "forward_kl"
    cache: str = ""  # folder of cache_teacher.py in place of the teacher; of a blend one for each dataset, in any order
    share: float = 0.0  # of train.steps that stage 1 takes, instead of salt.steps; as the run began, if extended
    map_weight: float = 0.0  # omega while LiGO's maps are learned, from the same teacher; 0: from the data alone
    end_when_better: bool = False  # stage 1 ends once an evaluation finds the model better than the teacher
    # Which data stage 1 is trained on (docs/selection.md); all where neither scores nor online_buffer is set.
    scores: str = ""  # folder of score_corpus.py
    keep_fraction: float = 0.5  # keep=top: the share with the highest scores
    score: Literal["median_in_top_k", "median_zero", "mean_nll", "excess_nll"] = "median_zero"
    reference_scores: str = ""  # excess_nll: folder of another model's scores, whose mean_nll is subtracted
    keep: Literal["top", "threshold", "band"] = "top"
    threshold: float = 0.0  # keep=threshold: the least score
    band_low: float = 0.25  # keep=band: between these quantiles of the score
    band_high: float = 0.75
    domains: str = ""  # PREFIX.domains.safetensors: the share, or band, is kept of each domain by itself
    quotas: tuple[str, ...] = ()  # NAME=SHARE: domains of which another share is kept than keep_fraction
    online_buffer: int = 0  # batches that the teacher scores ahead, the best keep_fraction is trained on; 0: off
    top_k: int = 10  # of online scores: a label counts as known if fewer logits are greater than its own

    def __post_init__(self) -> None:
        require_not_negative(self, "salt", "steps", "online_buffer")
        require_size(self, "salt", "top_k")
        for name in ("weight", "map_weight"):
            require(0 <= getattr(self, name) <= 1, f"salt.{name}={getattr(self, name)} must lie between 0 and 1")
        require(self.temperature > 0, f"salt.temperature={self.temperature} must be positive")
        require(0 <= self.share <= 1, f"salt.share={self.share} must lie between 0 and 1")
        require(
            self.steps == 0 or self.share == 0,
            f"salt.steps={self.steps} and salt.share={self.share} both say how long stage 1 is; leave one of them out",
        )
        require(0 < self.keep_fraction <= 1, f"salt.keep_fraction={self.keep_fraction} must be in (0, 1]")
        require(math.isfinite(self.threshold), f"salt.threshold={self.threshold} must be a finite number")
        require(
            0 <= self.band_low < self.band_high <= 1,
            f"salt.band_low={self.band_low} and band_high={self.band_high} must be quantiles, 0 <= low < high <= 1",
        )
        require(len(self.domain_shares) == len(self.quotas), f"salt.quotas={list(self.quotas)} name a domain twice")

    @property
    def has_stage_one(self) -> bool:
        """Whether stage 1 has any steps."""
        return self.steps > 0 or self.share > 0

    @property
    def teaches(self) -> bool:
        """Whether stage 1 distils: from a teacher, or from what one left behind."""
        return bool(self.teacher or self.cache)

    @property
    def grown_teaches(self) -> bool:
        """Whether the teacher is the run's own small model."""
        return self.teacher == GROWN

    @property
    def picks_data(self) -> bool:
        """Whether stage 1 is trained on a part of the data."""
        return bool(self.scores) or self.online_buffer > 0

    @property
    def kept_batches(self) -> int:
        """Batches of an online buffer that are trained on."""
        return round(self.keep_fraction * self.online_buffer)

    @property
    def domain_shares(self) -> dict[str, float]:
        """The share that is kept of each domain in `quotas`."""
        return dict(map(_domain_share, self.quotas))


def _domain_share(quota: str) -> tuple[str, float]:
    """NAME=SHARE in two; the name may hold a "=" of its own."""
    name, _, number = quota.rpartition("=")
    try:
        share = float(number)
    except ValueError:
        share = math.nan
    require(bool(name) and 0 <= share <= 1, f"salt.quotas: {quota!r} must be NAME=SHARE, a share between 0 and 1")
    return name, share
