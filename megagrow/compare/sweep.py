"""Learning rates: every arm has the same number of tries, and those that were recorded need not be run again.

First each arm is tried at the suite's rates. Then, if the suite refines, two more tries lie about the best of them:
half a step below and above or, for arms that learn maps, at two other rates of the maps. The lowest loss wins.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megagrow.data.files import write_atomically
from megagrow.errors import ConfigError
from megagrow.json_file import parse_object

MAP_RATES = (1e-3, 1e-2)
RECORDED = Path(__file__).with_name("rates.json")


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


Measure = Callable[[Sequence[Try]], list[Tried]]


@dataclass
class Sweep:
    """All tries of a suite.

    Attributes:
        rows: what was tried, in order.
        facts: where and when, of a recorded sweep; empty: it is this comparison's own.
        fixed: a rate that all arms run at instead; None: they are tuned.
    """

    rows: list[Tried] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    fixed: float | None = None

    def tune(
        self,
        arms: Iterable[str],
        rates: Sequence[float],
        measure: Measure,
        tunes_maps: Callable[[str], bool] | None = None,
    ) -> None:
        """Tries arms.

        Args:
            arms: their names.
            rates: that all are tried at, evenly spaced by their logarithms.
            measure: carries tries out.
            tunes_maps: whether an arm spends its second round on the rate of its maps; None: there is no second round.
        """
        names = list(arms)
        self.rows += measure([Try(name, lr) for name in names for lr in rates])
        if tunes_maps is not None:
            half = math.sqrt(rates[1] / rates[0])
            self.rows += measure([each for name in names for each in _around(self.best(name), tunes_maps(name), half)])

    def best(self, arm: str) -> Try:
        """The try of an arm that ended lowest.

        Raises:
            ConfigError: none ended.
        """
        if self.fixed is not None:
            return Try(arm, self.fixed)
        ended = [row for row in self.rows if row.arm == arm and row.loss is not None]
        if not ended:
            raise ConfigError(f"{arm}: no learning rate was tried that does not diverge; tune it with lower rates")
        return min(ended, key=lambda row: row.loss if row.loss is not None else math.inf).key

    def knows(self, arms: Iterable[str]) -> bool:
        """Whether all of these arms have their rates."""
        return self.fixed is not None or {row.arm for row in self.rows} >= set(arms)


def _around(best: Try, tunes_maps: bool, half: float) -> list[Try]:
    if tunes_maps:
        return [replace(best, map_lr=lr) for lr in MAP_RATES]
    return [replace(best, lr=best.lr / half), replace(best, lr=best.lr * half)]


def recorded(label: str, path: Path = RECORDED) -> Sweep | None:
    """The recorded sweep of a suite in a size; None: there is none.

    Raises:
        ConfigError: the file is damaged.
    """
    found = _read(path).get(label)
    if found is None:
        return None
    rows = [Tried(*row) for row in found["rows"]]
    return Sweep(rows, {name: value for name, value in found.items() if name != "rows"})


def record(label: str, sweep: Sweep, facts: dict[str, Any], path: Path = RECORDED) -> None:
    """Keeps a sweep for all who run the suite after."""
    rows = [list(asdict(row).values()) for row in sweep.rows]
    content = _read(path) | {label: {**facts, "rows": rows}}
    lines = [f"{json.dumps(name)}: {_entry(entry)}" for name, entry in sorted(content.items())]
    write_atomically(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def _entry(entry: dict[str, Any]) -> str:
    """An entry with one row to a line, to be read in a diff."""
    facts = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in entry.items() if name != "rows"]
    rows = ",\n".join(f"  {json.dumps(row)}" for row in entry["rows"])
    return "{\n" + ",\n".join([*facts, f' "rows": [\n{rows}\n ]']) + "\n}"


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return parse_object(path.read_bytes(), path, ConfigError, "restore the file")
