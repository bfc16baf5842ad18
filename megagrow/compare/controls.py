"""Controls: runs beside the arms that tell what of an arm does the work.

never_grown             the small model on the whole budget: what growing has to beat, beside training from scratch;
                        tuned as that is. The others have the rates of the arm that they are about, and spend more
X_uncharged             X, which learns maps, trained for as many steps as if learning them had cost nothing; as
                        nearly as it is where a hundred such steps are a ten thousandth of the run. Beside `ligo_0`
                        and `rms_random`, from which X starts, that is what learning gives, apart from its cost
salt_by_never_grown     SALT for as many steps, by a teacher that is itself finished, as that of SALT's paper was;
                        `salt` has one that took a fifth of the budget
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from megagrow.compare.suite import NEVER_GROWN, SMALL
from megagrow.config import Config


@dataclass(frozen=True)
class Control:
    """One control.

    Attributes:
        of: the arm that it is about and whose rates it has; itself: it is tuned.
        about: what it does.
        charged: whether steps that learn maps shorten its training.
        small: the run of the small model that it starts or learns from.
    """

    of: str
    about: str
    charged: bool = True
    small: str = SMALL


def _uncharged(arm: str) -> Control:
    about = f"{arm} that trains as long as if learning its maps had cost nothing; it spends more than its budget."
    return Control(arm, about, charged=False)


CONTROLS = {
    NEVER_GROWN: Control(NEVER_GROWN, "The small model, trained on the whole budget and never grown."),
    **{f"{arm}_uncharged": _uncharged(arm) for arm in ("ligo", "ligo_full_rank")},
    f"salt_by_{NEVER_GROWN}": Control(
        "salt", f"salt whose teacher is {NEVER_GROWN}; all-in it spends 1.8 times its budget.", small=NEVER_GROWN
    ),
}


def controls_of(arms: Iterable[str]) -> list[str]:
    """The controls that belong beside some arms."""
    there = {NEVER_GROWN, *arms}
    return [name for name, control in CONTROLS.items() if control.of in there]


def tuned_as(name: str) -> str:
    """The arm whose rates something has: a control that of what it is about, all else its own."""
    return CONTROLS[name].of if name in CONTROLS else name


def small_of(name: str) -> str:
    """The run of the small model that an arm starts or learns from."""
    return CONTROLS[name].small if name in CONTROLS else SMALL


def as_charged(name: str, config: Config) -> Config:
    """The run whose cost decides how many steps an arm may train."""
    if name in CONTROLS and not CONTROLS[name].charged:
        return replace(config, growth=replace(config.growth, ligo_steps=0))
    return config
