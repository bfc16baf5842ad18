"""Learning rates: every arm has the same number of tries.

First each arm is tried at the suite's rates. Then, if the suite refines, two more tries follow from the best of them:
half a step below and above; where it is the lowest or the highest, half a step and a whole one beyond; for arms that
learn maps, two lower rates of the maps. The lowest loss wins.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from megagrow.errors import ConfigError

# The first is that of the first round; 3e-3 and 1e-2 won nowhere by more than 0.01 nats (docs/ligo.md)
MAP_RATES = (1e-3, 3e-4, 1e-4)


@dataclass(frozen=True)
class Try:
    """An arm with its learning rates.

    Attributes:
        arm: its name.
        lr: of the weights.
        map_lr: of LiGO's maps; None: as the recipe has it.
    """

    arm: str
    lr: float
    map_lr: float | None = None

    @property
    def name(self) -> str:
        """As run directories have it."""
        maps = "" if self.map_lr is None else f"-maps{self.map_lr:.3g}"
        return f"{self.arm}-lr{self.lr:.3g}{maps}"


@dataclass(frozen=True)
class Tried:
    """A try and what it came to; `loss` is None where it diverged."""

    arm: str
    lr: float
    map_lr: float | None
    loss: float | None

    @property
    def key(self) -> Try:
        """The try."""
        return Try(self.arm, self.lr, self.map_lr)


Measure = Callable[[Sequence[Try]], list[Tried]]  # leaves out tries that have not ended


@dataclass
class Sweep:
    """All tries of a suite.

    Attributes:
        rows: what was tried, in order.
        fixed: a rate that all arms run at instead; None: they are tuned.
    """

    rows: list[Tried] = field(default_factory=list)
    fixed: float | None = None
    _owed: set[str] = field(default_factory=set)  # arms of which a try has not ended

    def tune(
        self,
        arms: Iterable[str],
        rates: Sequence[float],
        measure: Measure,
        tunes_maps: Callable[[str], bool] | None = None,
    ) -> None:
        """Tries the arms that have not been tried.

        Args:
            arms: their names.
            rates: that all are tried at, evenly spaced by their logarithms.
            measure: carries tries out.
            tunes_maps: whether an arm spends its second round on the rate of its maps; None: there is no second round.
        """
        tried = {row.arm for row in self.rows if row.arm not in self._owed}
        names = [] if self.fixed is not None else [arm for arm in arms if arm not in tried]
        self.rows = [row for row in self.rows if row.arm not in names]
        self._owed -= set(names)
        self._try([Try(name, lr) for name in names for lr in rates], measure)
        if tunes_maps is not None:
            known = [name for name in names if self.knows([name])]
            self._try([each for name in known for each in _second(self.best(name), rates, tunes_maps(name))], measure)

    def best(self, arm: str) -> Try:
        """The try of an arm that ended lowest.

        Raises:
            ConfigError: none ended.
        """
        if self.fixed is not None:
            return Try(arm, self.fixed)
        ended = self._ended(arm)
        if not ended:
            raise ConfigError(f"{arm}: no learning rate was tried that does not diverge; tune it with lower rates")
        return min(ended, key=_loss).key

    def best_arm(self, arms: Iterable[str]) -> str | None:
        """Which of the arms ended lowest at its best try; None: nothing was tuned."""
        ended = [row for arm in arms if self.knows([arm]) for row in self._ended(arm)]
        return min(ended, key=_loss).arm if ended else None

    def knows(self, arms: Iterable[str]) -> bool:
        """Whether all of these arms have their rates."""
        return self.fixed is not None or all(arm not in self._owed and self._ended(arm) for arm in arms)

    def at_end(self, arm: str) -> Literal["lowest", "highest"] | None:
        """Whether the best rate of an arm is the lowest or the highest that was tried."""
        rates = [row.lr for row in self.rows if row.arm == arm]
        if self.fixed is not None or not self.knows([arm]) or len(rates) < 2:
            return None
        best = self.best(arm).lr
        return "lowest" if best == min(rates) else "highest" if best == max(rates) else None

    def maps_at_end(self, arm: str) -> bool:
        """Whether the best rate of an arm's maps is the lowest that was tried."""
        rates = [row.map_lr for row in self.rows if row.arm == arm and row.map_lr is not None]
        return bool(rates) and self.knows([arm]) and self.best(arm).map_lr == min(rates)

    def diverging(self, arms: Iterable[str]) -> list[str]:
        """Those that diverged at every rate."""
        tried = {row.arm for row in self.rows if row.arm not in self._owed}
        return [arm for arm in arms if arm in tried and not self._ended(arm)]

    def _ended(self, arm: str) -> list[Tried]:
        return [row for row in self.rows if row.arm == arm and row.loss is not None]

    def _try(self, tries: list[Try], measure: Measure) -> None:
        found = measure(tries)
        self.rows += found
        self._owed |= {each.arm for each in set(tries) - {row.key for row in found}}


def _loss(row: Tried) -> float:
    return math.inf if row.loss is None else row.loss


def _second(best: Try, rates: Sequence[float], tunes_maps: bool) -> list[Try]:
    """The tries that follow from the best of the first ones."""
    if tunes_maps:
        return [replace(best, map_lr=lr) for lr in MAP_RATES[1:]]
    half = math.sqrt(rates[1] / rates[0])
    ends = {min(rates): (1 / half, 1 / half**2), max(rates): (half, half**2)}
    return [replace(best, lr=best.lr * factor) for factor in ends.get(best.lr, (1 / half, half))]
